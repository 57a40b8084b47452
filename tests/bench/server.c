/*
 * Many daemons in one process: a listening socket on each address, which answers every connection with its own name.
 *
 *   server PORT { FIRST-ADDRESS COUNT } ...
 *
 * The name is the text form of the address and a line end; it is written at once, then the connection is closed.
 * Prints "listening N" when all of them listen, and serves until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define NAME 64
#define BACKLOG 4096
#define EVENTS 256

struct listener {
	int fd;
	int length;
	char name[NAME];
};

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static void listen_on(struct listener *listener, int family, unsigned char *host, int port, int epoll)
{
	static const int one = 1;
	struct sockaddr_in6 ipv6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	struct sockaddr_in ipv4 = { .sin_family = AF_INET, .sin_port = htons(port) };
	memcpy(family == AF_INET ? (void *)&ipv4.sin_addr : (void *)&ipv6.sin6_addr, host, family == AF_INET ? 4 : 16);
	inet_ntop(family, host, listener->name, NAME - 1);
	strcat(listener->name, "\n");
	listener->length = strlen(listener->name);
	listener->fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (listener->fd < 0)
		die("socket");
	setsockopt(listener->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener->fd, family == AF_INET ? (void *)&ipv4 : (void *)&ipv6,
		 family == AF_INET ? sizeof ipv4 : sizeof ipv6))
		die(listener->name);
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = listener };
	if (listen(listener->fd, BACKLOG) || epoll_ctl(epoll, EPOLL_CTL_ADD, listener->fd, &event))
		die("listen");
}

int main(int argc, char **argv)
{
	if (argc < 4 || argc % 2) {
		fprintf(stderr, "usage: server PORT { FIRST-ADDRESS COUNT } ...\n");
		return 2;
	}
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	int epoll = epoll_create1(0), total = 0;
	for (int run = 2; run < argc; run += 2) {
		unsigned char host[16];
		int family = strchr(argv[run], ':') ? AF_INET6 : AF_INET, size = family == AF_INET ? 4 : 16;
		int count = atoi(argv[run + 1]);
		struct listener *listeners = calloc(count, sizeof *listeners);
		if (!listeners || inet_pton(family, argv[run], host) != 1)
			die(argv[run]);
		for (int number = 0; number < count; number++) {
			listen_on(&listeners[number], family, host, atoi(argv[1]), epoll);
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
		for (int number = 0; number < ready; number++) {
			struct listener *listener = events[number].data.ptr;
			/* One at a time: with many daemons, a second accept would nearly always find nothing. */
			int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK);
			if (fd < 0)
				continue;
			/* A client that is gone already notices what is missing; the server need not. */
			if (send(fd, listener->name, listener->length, MSG_NOSIGNAL) < 0 && errno != EPIPE &&
			    errno != ECONNRESET)
				perror("send");
			close(fd);
		}
	}
}
