/*
 * Many daemons of datagrams in one process: a socket on each address, which answers every datagram with its own name.
 *
 *   responder PORT { answer REQUEST FIRST-ADDRESS COUNT } ...    (as server.c; REQUEST means nothing here)
 *
 * To a QUIC packet with a long header the name comes behind a long header of the daemon's own, with a new connection id
 * (RFC 9000 section 17.2); a datagram that begins with ECHO comes back as it is.
 * Prints "listening N" when all of them are bound, and serves until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define NAME 64
#define EVENTS 64
#define BURST 32
#define MAX_DATAGRAM 1500
#define ECHO 0x40
#define LONG 0xc0
#define ID 8

struct daemon {
	int fd;
	uint32_t number;
	size_t length;
	char name[NAME];
};

static int epoll;
static unsigned char in[BURST][MAX_DATAGRAM], out[BURST][MAX_DATAGRAM];
static struct sockaddr_in6 peers[BURST];
static struct iovec from[BURST], to[BURST];
static struct mmsghdr receiving[BURST], sending[BURST];

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static void listen_on(struct daemon *daemon, int family, unsigned char *host, int port)
{
	struct sockaddr_in6 ipv6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	struct sockaddr_in ipv4 = { .sin_family = AF_INET, .sin_port = htons(port) };
	memcpy(family == AF_INET ? (void *)&ipv4.sin_addr : (void *)&ipv6.sin6_addr, host, family == AF_INET ? 4 : 16);
	inet_ntop(family, host, daemon->name, NAME - 1);
	strcat(daemon->name, "\n");
	daemon->length = strlen(daemon->name);
	daemon->fd = socket(family, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = daemon };
	if (daemon->fd < 0 ||
	    bind(daemon->fd, family == AF_INET ? (void *)&ipv4 : (void *)&ipv6,
		 family == AF_INET ? sizeof ipv4 : sizeof ipv6) ||
	    epoll_ctl(epoll, EPOLL_CTL_ADD, daemon->fd, &event))
		die(daemon->name);
}

/* The answer to datagram n of a burst. */
static struct iovec answer(const struct daemon *daemon, int n)
{
	static uint16_t serial, process;
	unsigned char *at = out[n];
	if (in[n][0] == ECHO && receiving[n].msg_len)
		return (struct iovec){ .iov_base = in[n], .iov_len = receiving[n].msg_len };
	if ((in[n][0] & LONG) == LONG && receiving[n].msg_len > 6 + ID) {
		/* Flags, version, the client's id (here: what it called us), and our own. */
		memcpy(at, in[n], 5);
		at[5] = ID;
		memcpy(at + 6, in[n] + 6, ID);
		at[6 + ID] = ID;
		serial++;
		process = getpid();
		memcpy(at + 7 + ID, &daemon->number, 4);
		memcpy(at + 7 + ID + 4, &process, 2);
		memcpy(at + 7 + ID + 6, &serial, 2);
		at += 7 + 2 * ID;
	}
	memcpy(at, daemon->name, daemon->length);
	return (struct iovec){ .iov_base = out[n], .iov_len = at - out[n] + daemon->length };
}

static void serve(const struct daemon *daemon)
{
	for (int n = 0; n < BURST; n++)
		receiving[n].msg_hdr.msg_namelen = sizeof peers[n];
	int got = recvmmsg(daemon->fd, receiving, BURST, 0, NULL);
	if (got <= 0)
		return;
	for (int n = 0; n < got; n++) {
		to[n] = answer(daemon, n);
		sending[n].msg_hdr.msg_namelen = receiving[n].msg_hdr.msg_namelen;
	}
	/* What finds no room is missed by its client, which says it again and counts it. */
	if (sendmmsg(daemon->fd, sending, got, 0) < 0)
		perror("sendmmsg");
}

int main(int argc, char **argv)
{
	if (argc < 6 || argc % 4 != 2) {
		fprintf(stderr, "usage: responder PORT { answer REQUEST FIRST-ADDRESS COUNT } ...\n");
		return 2;
	}
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	epoll = epoll_create1(0);
	for (int n = 0; n < BURST; n++) {
		from[n] = (struct iovec){ .iov_base = in[n], .iov_len = MAX_DATAGRAM };
		receiving[n].msg_hdr = (struct msghdr){ .msg_name = &peers[n], .msg_iov = &from[n], .msg_iovlen = 1 };
		sending[n].msg_hdr = (struct msghdr){ .msg_name = &peers[n], .msg_iov = &to[n], .msg_iovlen = 1 };
	}
	int total = 0;
	for (char **run = argv + 2; *run; run += 4) {
		unsigned char host[16];
		int family = strchr(run[2], ':') ? AF_INET6 : AF_INET, size = family == AF_INET ? 4 : 16;
		int count = atoi(run[3]);
		struct daemon *daemons = calloc(count, sizeof *daemons);
		if (!daemons || inet_pton(family, run[2], host) != 1)
			die(run[2]);
		for (int number = 0; number < count; number++) {
			daemons[number].number = (uint32_t)total + number;
			listen_on(&daemons[number], family, host, atoi(argv[1]));
			for (int byte = size - 1; byte >= 0 && !++host[byte]; byte--)
				;
		}
		total += count;
	}
	printf("listening %d\n", total);
	fflush(stdout);
	for (;;) {
		struct epoll_event events[EVENTS];
		int ready = epoll_wait(epoll, events, EVENTS, -1);
		for (int number = 0; number < ready; number++)
			serve(events[number].data.ptr);
	}
}
