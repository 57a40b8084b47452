/*
 * What the clients (load.c, stream.c) share: settings, addresses, and the connection numbered n.
 *
 * Settings are arguments NAME=VALUE in any order, every one of them required:
 *   version    4 or 6
 *   endpoint   address, and port, ports: daemon i is asked for at port + i mod ports
 *   alias      address of daemon 0; daemon i has the address alias + i, and answers with its text form and a line end
 *   option     hexadecimal, as setsockopt(IP_OPTIONS or IPV6_DSTOPTS) wants it, with i + 1 written as a 16-bit number
 *              at byte option_at; empty for none
 *   request    hexadecimal, what a client says first, with i written as three hexadecimal digits at byte request_at;
 *              empty if the server speaks first
 *   source     first of `sources` addresses to connect from, TUPLES_PER_SOURCE ports each; connection n has the n-th
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define TUPLES_PER_SOURCE 50000
#define FIRST_SOURCE_PORT 10000
#define MAX_OPTION 40
#define MAX_REQUEST 8192
#define DIGITS 3
#define NAME 64

static int version, first_port, ports, sources, option_at, request_at;
static struct sockaddr_storage endpoint, first_alias, first_source;
static socklen_t address_size;
static unsigned char option[MAX_OPTION], request[MAX_REQUEST];
static size_t option_size, request_size;

static inline void die(const char *what)
{
	perror(what);
	exit(2);
}

static inline long long now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static inline const char *setting(char **argv, const char *name)
{
	size_t length = strlen(name);
	while (*++argv)
		if (!strncmp(*argv, name, length) && (*argv)[length] == '=')
			return *argv + length + 1;
	fprintf(stderr, "the setting %s= is missing\n", name);
	exit(2);
}

static inline long number(char **argv, const char *name)
{
	return atol(setting(argv, name));
}

static inline size_t bytes(char **argv, const char *name, unsigned char *into, size_t room)
{
	size_t size = 0;
	for (const char *hex = setting(argv, name); hex[0] && hex[1]; hex += 2) {
		if (size == room) {
			fprintf(stderr, "%s= is too long\n", name);
			exit(2);
		}
		into[size++] = strtoul((char[]){ hex[0], hex[1], 0 }, NULL, 16);
	}
	return size;
}

static inline void *host_of(struct sockaddr_storage *address)
{
	if (version == 4)
		return &((struct sockaddr_in *)address)->sin_addr;
	return &((struct sockaddr_in6 *)address)->sin6_addr;
}

static inline struct sockaddr_storage address_of(const char *text)
{
	struct sockaddr_storage address = { .ss_family = version == 4 ? AF_INET : AF_INET6 };
	if (inet_pton(address.ss_family, text, host_of(&address)) != 1)
		die(text);
	return address;
}

/* Address + offset, and a port; both families keep the port in the same place. */
static inline struct sockaddr_storage beyond(struct sockaddr_storage address, unsigned offset, int port)
{
	unsigned char *host = host_of(&address);
	for (int byte = (version == 4 ? 4 : 16) - 1; byte >= 0 && offset; byte--) {
		offset += host[byte];
		host[byte] = offset & 0xff;
		offset >>= 8;
	}
	((struct sockaddr_in *)&address)->sin_port = htons(port);
	return address;
}

static inline void read_settings(char **argv)
{
	version = number(argv, "version");
	address_size = version == 4 ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
	endpoint = address_of(setting(argv, "endpoint"));
	first_port = number(argv, "port");
	ports = number(argv, "ports");
	first_alias = address_of(setting(argv, "alias"));
	option_size = bytes(argv, "option", option, MAX_OPTION);
	option_at = number(argv, "option_at");
	request_size = bytes(argv, "request", request, MAX_REQUEST);
	request_at = number(argv, "request_at");
	first_source = address_of(setting(argv, "source"));
	sources = number(argv, "sources");
}

/* What daemon i answers with; `name` has room for NAME bytes. */
static inline void name_of(int i, char *name)
{
	struct sockaddr_storage address = beyond(first_alias, i, 0);
	inet_ntop(address.ss_family, host_of(&address), name, NAME - 1);
	strcat(name, "\n");
}

/* The request for daemon i; good until the next call. */
static inline const unsigned char *request_for(int i)
{
	char digits[DIGITS + 1];
	snprintf(digits, sizeof digits, "%03x", i & 0xfff);
	if (request_size)
		memcpy(request + request_at, digits, DIGITS);
	return request;
}

/* A socket that carries the option for daemon i, bound to the tuple-th source; -1 if it could not be bound. */
static inline int bound_socket(int i, long tuple, int flags)
{
	static const int one = 1;
	int fd = socket(version == 4 ? AF_INET : AF_INET6, SOCK_STREAM | flags, 0);
	if (fd < 0)
		die("socket");
	if (option_size) {
		option[option_at] = (i + 1) >> 8;
		option[option_at + 1] = i + 1;
		if (setsockopt(fd, version == 4 ? IPPROTO_IP : IPPROTO_IPV6,
			       version == 4 ? IP_OPTIONS : IPV6_DSTOPTS, option, option_size))
			die("setsockopt");
	}
	struct sockaddr_storage source =
		beyond(first_source, tuple / TUPLES_PER_SOURCE % sources, FIRST_SOURCE_PORT + tuple % TUPLES_PER_SOURCE);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (!bind(fd, (struct sockaddr *)&source, address_size))
		return fd;
	close(fd);
	return -1;
}

/* connect() towards daemon i: 0, or -1 and errno, as it gives. */
static inline int connect_to(int fd, int i)
{
	struct sockaddr_storage to = beyond(endpoint, 0, first_port + i % ports);
	return connect(fd, (struct sockaddr *)&to, address_size);
}

static inline int ascending(const void *left, const void *right)
{
	long long difference = *(const long long *)left - *(const long long *)right;
	return difference < 0 ? -1 : difference > 0;
}

/* The given hundredth of `size` sorted nanoseconds, in microseconds. */
static inline double percentile(const long long *sorted, long size, int hundredth)
{
	return size ? sorted[size * hundredth / 100] / 1e3 : 0;
}

static inline double seconds(struct timeval time)
{
	return time.tv_sec + time.tv_usec / 1e6;
}

/* Says that everything is prepared and waits for the word. */
static inline void wait_for_word(void)
{
	puts("ready");
	fflush(stdout);
	if (getchar() == EOF)
		exit(2);
}
