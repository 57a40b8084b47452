/*
 * Many daemons in one process: a listening socket on each address, which answers every connection with its own name.
 *
 *   server PORT { WHAT REQUEST FIRST-ADDRESS COUNT } ...
 *
 * A daemon reads a request of REQUEST bytes (0: none), answers with the text form of its address and a line end, and then
 *   answer     closes
 *   echo       sends back what it gets, until the client has closed
 *   sink       reads to the client's end, tells how many bytes that were, and closes
 *   source     waits for a byte, sends for SOURCE_SECONDS and closes
 * Prints "listening N" when all of them listen, and serves until it is killed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NAME 64
#define BACKLOG 4096
#define EVENTS 256
#define CHUNK 262144
#define SOURCE_SECONDS 0.5

enum what { ANSWER, ECHO, SINK, SOURCE };

/* A listening socket (without a daemon of its own), or one of its connections. */
struct end {
	int fd;
	struct end *daemon;
	enum what what;
	int missing;
	int length;
	/* Bytes a sink has had. */
	long total;
	/* When a source is to end; 0: it has not begun. */
	double end;
	char name[NAME];
};

static int epoll;
static char chunk[CHUNK];

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static void listen_on(struct end *daemon, int family, unsigned char *host, int port)
{
	static const int one = 1;
	struct sockaddr_in6 ipv6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	struct sockaddr_in ipv4 = { .sin_family = AF_INET, .sin_port = htons(port) };
	memcpy(family == AF_INET ? (void *)&ipv4.sin_addr : (void *)&ipv6.sin6_addr, host, family == AF_INET ? 4 : 16);
	inet_ntop(family, host, daemon->name, NAME - 1);
	strcat(daemon->name, "\n");
	daemon->length = strlen(daemon->name);
	daemon->fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (daemon->fd < 0)
		die("socket");
	setsockopt(daemon->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	setsockopt(daemon->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (bind(daemon->fd, family == AF_INET ? (void *)&ipv4 : (void *)&ipv6,
		 family == AF_INET ? sizeof ipv4 : sizeof ipv6))
		die(daemon->name);
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = daemon };
	if (listen(daemon->fd, BACKLOG) || epoll_ctl(epoll, EPOLL_CTL_ADD, daemon->fd, &event))
		die("listen");
}

/* A client that is gone already notices what is missing; the server need not. */
static int say(struct end *connection, const char *text, size_t size)
{
	if (send(connection->fd, text, size, MSG_NOSIGNAL) == (ssize_t)size)
		return 1;
	if (errno != EPIPE && errno != ECONNRESET)
		perror("send");
	return 0;
}

/* These two take one portion at a time, so that connections get their turn. Whether the connection goes on: */
static int sink(struct end *connection)
{
	ssize_t size = recv(connection->fd, chunk, CHUNK, 0);
	if (!size)
		say(connection, chunk, snprintf(chunk, CHUNK, "%ld\n", connection->total));
	if (size <= 0)
		return size < 0 && errno == EAGAIN;
	connection->total += size;
	return 1;
}

static int source(struct end *connection)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	double now = at.tv_sec + at.tv_nsec / 1e9;
	if (!connection->end) {
		struct epoll_event event = { .events = EPOLLOUT, .data.ptr = connection };
		ssize_t size = recv(connection->fd, chunk, 1, 0);
		if (size <= 0)
			return size < 0 && errno == EAGAIN;
		connection->end = now + SOURCE_SECONDS;
		if (epoll_ctl(epoll, EPOLL_CTL_MOD, connection->fd, &event))
			die("epoll_ctl");
	}
	if (now > connection->end)
		return 0;
	return send(connection->fd, chunk, CHUNK, MSG_NOSIGNAL) > 0 || errno == EAGAIN;
}

/* Whether the connection goes on. */
static int serve(struct end *connection)
{
	while (connection->missing) {
		ssize_t size = recv(connection->fd, chunk, connection->missing, 0);
		if (size <= 0)
			return size < 0 && errno == EAGAIN;
		connection->missing -= size;
	}
	if (connection->length) {
		if (!say(connection, connection->daemon->name, connection->length))
			return 0;
		connection->length = 0;
		return connection->what != ANSWER;
	}
	if (connection->what == SINK)
		return sink(connection);
	if (connection->what == SOURCE)
		return source(connection);
	ssize_t size = recv(connection->fd, chunk, CHUNK, 0);
	if (size <= 0)
		return size < 0 && errno == EAGAIN;
	return say(connection, chunk, size);
}

static void accept_on(struct end *daemon)
{
	/* One at a time: with many daemons, a second accept would nearly always find nothing. */
	int fd = accept4(daemon->fd, NULL, NULL, SOCK_NONBLOCK);
	if (fd < 0)
		return;
	struct end first = { .fd = fd, .daemon = daemon, .what = daemon->what,
			     .missing = daemon->missing, .length = daemon->length };
	/* The request is often there already. */
	if (!serve(&first)) {
		close(fd);
		return;
	}
	struct end *connection = malloc(sizeof *connection);
	if (!connection)
		die("malloc");
	*connection = first;
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = connection };
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

static enum what what_of(const char *word)
{
	static const char *const words[] = { "answer", "echo", "sink", "source" };
	for (int what = 0; what < 4; what++)
		if (!strcmp(word, words[what]))
			return what;
	fprintf(stderr, "%s is not what a daemon can do\n", word);
	exit(2);
}

int main(int argc, char **argv)
{
	if (argc < 6 || argc % 4 != 2) {
		fprintf(stderr, "usage: server PORT { WHAT REQUEST FIRST-ADDRESS COUNT } ...\n");
		return 2;
	}
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	epoll = epoll_create1(0);
	int total = 0;
	for (char **run = argv + 2; *run; run += 4) {
		unsigned char host[16];
		int family = strchr(run[2], ':') ? AF_INET6 : AF_INET, size = family == AF_INET ? 4 : 16;
		int count = atoi(run[3]);
		struct end *daemons = calloc(count, sizeof *daemons);
		if (!daemons || inet_pton(family, run[2], host) != 1)
			die(run[2]);
		for (int number = 0; number < count; number++) {
			daemons[number].what = what_of(run[0]);
			daemons[number].missing = atoi(run[1]);
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
		for (int number = 0; number < ready; number++) {
			struct end *end = events[number].data.ptr;
			if (!end->daemon) {
				accept_on(end);
			} else if (!serve(end)) {
				close(end->fd);
				free(end);
			}
		}
	}
}
