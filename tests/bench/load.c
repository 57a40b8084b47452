/*
 * A load generator: connections to one endpoint, so many at a time, each of which checks the name that answers.
 *
 *   load SETTING=VALUE ...    (those of common.h, and:)
 *     first, daemons    connection n goes to daemon first + (tuple + n * 7919) mod daemons
 *     tuple      number of the first source address and port; none is used twice
 *     count      connections in all
 *     parallel   ... and at a time
 *     seconds    what is still open after so many has failed
 *
 * It prints "ready", waits for a line, runs, and prints one line:
 *   GOOD WRONG FAILED START END USER SYSTEM P50 P99 RETRIED
 * START and END in seconds of CLOCK_MONOTONIC, USER and SYSTEM in seconds of this process's CPU time between them, P50
 * and P99 in microseconds from connect to the first byte, RETRIED the connections that took longer than the first
 * retransmission of a SYN (1 s). What was wrong goes to standard error.
 */
#include "common.h"

#define RETRANSMISSION 1000000000LL
#define MAX_REPORTED 5

struct connection {
	int fd;
	int daemon;
	int held;
	int silent;
	long long started;
	char name[NAME];
};

static long first_tuple, count, started, good, wrong, failed, retried, reported;
static int first, daemons;
static char (*names)[NAME];
static long long *latencies;
static int epoll;

static void fail(struct connection *connection, const char *what)
{
	failed++;
	if (reported++ < MAX_REPORTED)
		fprintf(stderr, "to %.*s: %s: %s\n", (int)strcspn(names[connection->daemon], "\n"),
			names[connection->daemon], what, strerror(errno));
	if (connection->fd >= 0)
		close(connection->fd);
	connection->fd = -1;
}

static void open_next(struct connection *connection)
{
	while (connection->fd < 0 && started < count) {
		long tuple = first_tuple + started;
		connection->daemon = first + (first_tuple + started++ * 7919) % daemons;
		connection->held = 0;
		connection->silent = request_size > 0;
		connection->started = now();
		connection->fd = bound_socket(connection->daemon, tuple, SOCK_NONBLOCK);
		/* Edge-triggered, or a connection that has asked would be writable for ever. */
		struct epoll_event event = { .events = EPOLLIN | (request_size ? EPOLLOUT | EPOLLET : 0),
					     .data.ptr = connection };
		if (connection->fd < 0)
			fail(connection, "bind");
		else if (connect_to(connection->fd, connection->daemon) && errno != EINPROGRESS)
			fail(connection, "connect");
		else if (epoll_ctl(epoll, EPOLL_CTL_ADD, connection->fd, &event))
			die("epoll_ctl");
	}
}

static void ask(struct connection *connection)
{
	/* All at once: the send buffer of a new connection holds many requests. */
	if (send(connection->fd, request_for(connection->daemon), request_size, MSG_NOSIGNAL) == (ssize_t)request_size)
		connection->silent = 0;
	else
		fail(connection, "send");
}

static void on_readable(struct connection *connection)
{
	ssize_t size = read(connection->fd, connection->name + connection->held, NAME - connection->held);
	if (size < 0 && errno == EAGAIN)
		return;
	if (size <= 0) {
		fail(connection, size ? "read" : "closed without a name");
		return;
	}
	long long took = now() - connection->started;
	if (!connection->held) {
		latencies[good + wrong] = took;
		retried += took > RETRANSMISSION;
	}
	connection->held += size;
	if (connection->name[connection->held - 1] != '\n' && connection->held < NAME)
		return;
	const char *expected = names[connection->daemon];
	if (connection->held == (int)strlen(expected) && !memcmp(connection->name, expected, connection->held)) {
		good++;
	} else {
		wrong++;
		if (reported++ < MAX_REPORTED)
			fprintf(stderr, "meant for %.*s, answered by %.*s\n", (int)strlen(expected) - 1, expected,
				connection->held - 1, connection->name);
	}
	close(connection->fd);
	connection->fd = -1;
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

	names = calloc(first + daemons, NAME);
	latencies = calloc(count, sizeof *latencies);
	struct connection *connections = calloc(parallel, sizeof *connections);
	struct epoll_event *events = calloc(parallel, sizeof *events);
	epoll = epoll_create1(0);
	if (!names || !latencies || !connections || !events || epoll < 0)
		die("start");
	for (int i = 0; i < first + daemons; i++)
		name_of(i, names[i]);
	wait_for_word();

	struct rusage before, after;
	getrusage(RUSAGE_SELF, &before);
	long long start = now();
	for (int i = 0; i < parallel; i++) {
		connections[i].fd = -1;
		open_next(&connections[i]);
	}
	while (good + wrong + failed < count) {
		int ready = epoll_wait(epoll, events, parallel, 100);
		for (int i = 0; i < ready; i++) {
			struct connection *connection = events[i].data.ptr;
			if (connection->silent && events[i].events == EPOLLOUT)
				ask(connection);
			else if (events[i].events & ~EPOLLOUT)
				on_readable(connection);
			open_next(connection);
		}
		if (now() - start > limit) {
			failed = count - good - wrong;
			fprintf(stderr, "%ld connections unfinished after %lld s\n", failed, limit / 1000000000LL);
			break;
		}
	}
	long long end = now();
	getrusage(RUSAGE_SELF, &after);

	long measured = good + wrong;
	qsort(latencies, measured, sizeof *latencies, ascending);
	printf("%ld %ld %ld %.6f %.6f %.6f %.6f %.1f %.1f %ld\n", good, wrong, failed, start / 1e9, end / 1e9,
	       seconds(after.ru_utime) - seconds(before.ru_utime), seconds(after.ru_stime) - seconds(before.ru_stime),
	       percentile(latencies, measured, 50), percentile(latencies, measured, 99), retried);
	return 0;
}
