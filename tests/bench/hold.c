/*
 * Connections that are opened, checked, and then held without a word: what do they cost?
 *
 *   hold SETTING=VALUE ...    (those of common.h, and:)
 *     first, daemons    connection n goes to daemon first + n mod daemons
 *     tuple      number of the first source address and port; none is used twice
 *     count      connections in all
 *     parallel   ... that are being opened at a time
 *     seconds    those that are not open after so many have failed
 *
 * It prints "ready", waits for a line, opens all of them, each of which must be answered by its daemon's name, and prints
 *   HELD FAILED START END
 * START and END in seconds of CLOCK_MONOTONIC. From then on, for each line that it reads, it has a byte sent back on
 * every connection, and prints how many of them did that. It ends, and resets them all, when nothing more is to be read.
 * An answer of the wrong daemon ends it with status 3.
 */
#include "common.h"
#include <fcntl.h>

#define PATIENCE_MS 10000

struct connection {
	int fd;
	int daemon;
	int held;
	int asked;
	char name[NAME];
};

static struct connection *connections;
static long first_tuple, count, started, done, failed;
static int first, daemons, epoll;

static void watch(struct connection *connection, int operation, unsigned events)
{
	struct epoll_event event = { .events = events, .data.ptr = connection };
	if (epoll_ctl(epoll, operation, connection->fd, &event))
		die("epoll_ctl");
}

static void fail(struct connection *connection, const char *what)
{
	if (!failed++)
		perror(what);
	close(connection->fd);
	connection->fd = -1;
}

static void open_next(void)
{
	static const struct linger reset = { .l_onoff = 1 };
	if (started == count)
		return;
	struct connection *connection = &connections[started];
	connection->daemon = first + started % daemons;
	connection->fd = bound_socket(connection->daemon, first_tuple + started, SOCK_NONBLOCK);
	started++;
	if (connection->fd < 0)
		die("bind");
	setsockopt(connection->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
	if (connect_to(connection->fd, connection->daemon) && errno != EINPROGRESS)
		die("connect");
	watch(connection, EPOLL_CTL_ADD, EPOLLOUT);
}

static void on_event(struct connection *connection)
{
	char expected[NAME] = "";
	if (!connection->asked) {
		connection->asked = 1;
		if (send(connection->fd, request_for(connection->daemon), request_size, MSG_NOSIGNAL) !=
		    (ssize_t)request_size) {
			fail(connection, "send");
			open_next();
			return;
		}
		watch(connection, EPOLL_CTL_MOD, EPOLLIN);
		return;
	}
	ssize_t size = read(connection->fd, connection->name + connection->held, NAME - connection->held);
	if (size < 0 && errno == EAGAIN)
		return;
	if (size <= 0) {
		fail(connection, "read");
		open_next();
		return;
	}
	connection->held += size;
	if (connection->name[connection->held - 1] != '\n')
		return;
	name_of(connection->daemon, expected);
	if (connection->held != (int)strlen(expected) || memcmp(connection->name, expected, connection->held)) {
		fprintf(stderr, "meant for %s, answered by %.*s\n", expected, connection->held, connection->name);
		exit(3);
	}
	done++;
	/* Who holds connections with nothing to say need not watch them: an epoll of all would cost 128 bytes each. */
	watch(connection, EPOLL_CTL_DEL, 0);
	open_next();
}

/* Has a byte sent back on every connection; how many did. */
static long still_there(void)
{
	struct timeval patience = { .tv_sec = PATIENCE_MS / 1000 };
	long alive = 0;
	char byte = '.';
	for (long n = 0; n < count; n++) {
		int fd = connections[n].fd;
		if (fd < 0)
			continue;
		fcntl(fd, F_SETFL, 0);
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
		alive += send(fd, &byte, 1, MSG_NOSIGNAL) == 1 && recv(fd, &byte, 1, 0) == 1;
	}
	return alive;
}

int main(int argc, char **argv)
{
	(void)argc;
	read_settings(argv);
	first = number(argv, "first");
	daemons = number(argv, "daemons");
	first_tuple = number(argv, "tuple");
	count = number(argv, "count");
	int parallel = number(argv, "parallel");
	long long limit = number(argv, "seconds") * 1000000000LL;
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);

	struct epoll_event *events = calloc(parallel, sizeof *events);
	connections = calloc(count, sizeof *connections);
	epoll = epoll_create1(0);
	if (!events || !connections || epoll < 0)
		die("start");
	wait_for_word();

	long long start = now();
	for (int i = 0; i < parallel; i++)
		open_next();
	while (done + failed < count && now() - start < limit) {
		int ready = epoll_wait(epoll, events, parallel, 100);
		for (int i = 0; i < ready; i++)
			on_event(events[i].data.ptr);
	}
	printf("%ld %ld %.6f %.6f\n", done, count - done, start / 1e9, now() / 1e9);
	fflush(stdout);
	for (int byte; (byte = getchar()) != EOF;) {
		if (byte == '\n') {
			printf("%ld\n", still_there());
			fflush(stdout);
		}
	}
	return 0;
}
