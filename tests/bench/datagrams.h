/*
 * What the clients of datagrams (flows.c, packets.c) share, on top of common.h: a flow's socket and what it says first.
 *
 * One more setting:
 *   records    a file with one record for each daemon, in which a byte order of our own machine's 16-bit numbers says how
 *              many datagrams follow, and in front of each how many bytes it has
 *
 * A daemon (responder.c) answers each of them with its name, in front of which a QUIC long header may stand.
 */
#define _GNU_SOURCE
#include "common.h"
#include <stdint.h>

#define MAX_DATAGRAM 1500
#define QUIC_HEADER 23
#define MAX_FIRST 4

struct first {
	int datagrams;
	struct {
		int size;
		const unsigned char *data;
	} datagram[MAX_FIRST];
};

static struct first *firsts;

/* What is said first to daemons 0 to `daemons` - 1. */
static inline void read_records(char **argv, int daemons)
{
	FILE *file = fopen(setting(argv, "records"), "rb");
	firsts = calloc(daemons, sizeof *firsts);
	if (!file || !firsts)
		die("records");
	for (int i = 0; i < daemons; i++) {
		uint16_t count, size;
		if (fread(&count, sizeof count, 1, file) != 1 || count > MAX_FIRST)
			die("records");
		firsts[i].datagrams = count;
		for (int n = 0; n < count; n++) {
			unsigned char *data = malloc(MAX_DATAGRAM);
			if (!data || fread(&size, sizeof size, 1, file) != 1 || size > MAX_DATAGRAM ||
			    fread(data, size, 1, file) != 1)
				die("records");
			firsts[i].datagram[n].size = size;
			firsts[i].datagram[n].data = data;
		}
	}
	fclose(file);
}

/* A connected socket for daemon i, bound to the tuple-th source; -1 if it could not be. */
static inline int flow_socket(int i, long tuple, int flags)
{
	int fd = socket(version == 4 ? AF_INET : AF_INET6, SOCK_DGRAM | flags, 0);
	if (fd < 0)
		die("socket");
	struct sockaddr_storage source =
		beyond(first_source, tuple / TUPLES_PER_SOURCE % sources, FIRST_SOURCE_PORT + tuple % TUPLES_PER_SOURCE);
	if (!bind(fd, (struct sockaddr *)&source, address_size) && !connect_to(fd, i))
		return fd;
	close(fd);
	return -1;
}

/* 0, or -1 and errno. */
static inline int say_first(int fd, int i)
{
	for (int n = 0; n < firsts[i].datagrams; n++)
		if (send(fd, firsts[i].datagram[n].data, firsts[i].datagram[n].size, 0) < 0)
			return -1;
	return 0;
}

/* Reads one answer: 1 if it is the name, 0 if it is another, -1 and errno if there is none. */
static inline int hear_name(int fd, const char *name)
{
	unsigned char answer[MAX_DATAGRAM];
	ssize_t size = recv(fd, answer, sizeof answer, 0);
	if (size < 0)
		return -1;
	ssize_t start = size >= QUIC_HEADER && (answer[0] & 0xc0) == 0xc0 ? QUIC_HEADER : 0;
	return size - start == (ssize_t)strlen(name) && !memcmp(answer + start, name, size - start);
}
