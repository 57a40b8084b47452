/*
 * Established connections: what they carry once they stand. Each is checked for the daemon's name first.
 *
 *   stream SETTING=VALUE ...    (those of common.h, and:)
 *     what       exchange, up or down
 *     daemon     whom to ask
 *     tuple      number of the first source address and port
 *     count      exchange: messages of MESSAGE bytes that come back, each way, on each connection
 *     parallel   exchange: connections at a time
 *     seconds    up: how long to send; what is stuck for 10 s longer has failed
 *
 * It prints "ready", waits for a line, runs, and prints one line:
 *   exchange:  EXCHANGES START END USER SYSTEM P50 P99   (microseconds from message to answer)
 *   up, down:  BYTES     START END USER SYSTEM           (of all connections together; END when the last byte is known
 *                                                         to have arrived)
 * START and END in seconds of CLOCK_MONOTONIC, USER and SYSTEM in seconds of this process's CPU time between them.
 * Whatever goes wrong ends it with status 2 and a word on standard error; an answer of the wrong daemon, with status 3.
 */
#include "common.h"
#include <fcntl.h>

#define MESSAGE 64
#define CHUNK 262144
#define PATIENCE 10
#define EVENTS 64

static unsigned char chunk[CHUNK];
static long long *latencies;
static long measured;

static int established(int i, long tuple)
{
	char expected[NAME] = "", name[NAME] = "";
	int fd = bound_socket(i, tuple, 0);
	if (fd < 0)
		die("bind");
	if (connect_to(fd, i))
		die("connect");
	if (send(fd, request_for(i), request_size, MSG_NOSIGNAL) != (ssize_t)request_size)
		die("send");
	name_of(i, expected);
	if (recv(fd, name, strlen(expected), MSG_WAITALL) != (ssize_t)strlen(expected))
		die("name");
	if (strcmp(name, expected)) {
		fprintf(stderr, "meant for %s, answered by %s\n", expected, name);
		exit(3);
	}
	return fd;
}

static void send_all(int fd, const unsigned char *from, size_t size)
{
	while (size) {
		ssize_t sent = send(fd, from, size, MSG_NOSIGNAL);
		if (sent < 0)
			die("send");
		from += sent;
		size -= sent;
	}
}

/* `count` exchanges on each connection, all connections at the same time. */
static long exchange(const int *fds, int parallel, long count)
{
	struct peer { int fd; long left; long long asked; } *peers = calloc(parallel, sizeof *peers);
	struct epoll_event *events = calloc(parallel, sizeof *events);
	int epoll = epoll_create1(0), open = parallel;
	latencies = calloc(count * parallel, sizeof *latencies);
	if (!peers || !events || !latencies || epoll < 0)
		die("start");
	for (int i = 0; i < parallel; i++) {
		struct epoll_event event = { .events = EPOLLIN, .data.ptr = &peers[i] };
		peers[i] = (struct peer){ .fd = fds[i], .left = count, .asked = now() };
		if (epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event))
			die("epoll_ctl");
		send_all(fds[i], chunk, MESSAGE);
	}
	while (open) {
		int ready = epoll_wait(epoll, events, parallel, PATIENCE * 1000);
		if (ready <= 0)
			die("epoll_wait");
		for (int i = 0; i < ready; i++) {
			struct peer *peer = events[i].data.ptr;
			if (recv(peer->fd, chunk, MESSAGE, MSG_WAITALL) != MESSAGE)
				die("answer");
			long long at = now();
			latencies[measured++] = at - peer->asked;
			peer->asked = at;
			if (--peer->left) {
				send_all(peer->fd, chunk, MESSAGE);
			} else {
				epoll_ctl(epoll, EPOLL_CTL_DEL, peer->fd, NULL);
				open--;
			}
		}
	}
	qsort(latencies, measured, sizeof *latencies, ascending);
	return measured;
}

static void set_blocking(int fd, int blocking)
{
	int flags = fcntl(fd, F_GETFL);
	if (fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK))
		die("fcntl");
}

/* An epoll of all connections, which do not block any more. */
static int watch(const int *fds, int parallel, unsigned events)
{
	int epoll = epoll_create1(0);
	for (int n = 0; n < parallel; n++) {
		struct epoll_event event = { .events = events, .data.fd = fds[n] };
		set_blocking(fds[n], 0);
		if (epoll_ctl(epoll, EPOLL_CTL_ADD, fds[n], &event))
			die("epoll_ctl");
	}
	return epoll;
}

static int ready_ones(int epoll, struct epoll_event *events)
{
	int ready = epoll_wait(epoll, events, EVENTS, PATIENCE * 1000);
	if (ready <= 0)
		die("epoll_wait");
	return ready;
}

/* Sends for some time, then has the servers say how much arrived. */
static long up(const int *fds, int parallel, long long duration)
{
	struct epoll_event events[EVENTS];
	long sent = 0, arrived = 0;
	int epoll = watch(fds, parallel, EPOLLOUT);
	for (long long end = now() + duration; now() < end;)
		for (int n = ready_ones(epoll, events) - 1; n >= 0; n--) {
			ssize_t size = send(events[n].data.fd, chunk, CHUNK, MSG_NOSIGNAL);
			if (size < 0 && errno != EAGAIN)
				die("send");
			sent += size > 0 ? size : 0;
		}
	for (int n = 0; n < parallel; n++)
		shutdown(fds[n], SHUT_WR);
	for (int n = 0; n < parallel; n++) {
		char answer[NAME] = "";
		set_blocking(fds[n], 1);
		if (recv(fds[n], answer, NAME - 1, MSG_WAITALL) <= 0)
			die("answer");
		arrived += atol(answer);
	}
	if (arrived != sent) {
		fprintf(stderr, "%ld bytes sent, %ld arrived\n", sent, arrived);
		exit(2);
	}
	return sent;
}

/* Reads until the servers have sent enough, in their opinion. */
static long down(const int *fds, int parallel)
{
	struct epoll_event events[EVENTS];
	long received = 0;
	int epoll = watch(fds, parallel, EPOLLIN), open = parallel;
	for (int n = 0; n < parallel; n++)
		send_all(fds[n], chunk, 1);
	while (open)
		for (int n = ready_ones(epoll, events) - 1; n >= 0; n--) {
			ssize_t size = recv(events[n].data.fd, chunk, CHUNK, 0);
			if (size < 0 && errno != EAGAIN)
				die("recv");
			received += size > 0 ? size : 0;
			if (!size) {
				epoll_ctl(epoll, EPOLL_CTL_DEL, events[n].data.fd, NULL);
				open--;
			}
		}
	return received;
}

int main(int argc, char **argv)
{
	(void)argc;
	read_settings(argv);
	const char *what = setting(argv, "what");
	int i = number(argv, "daemon"), parallel = number(argv, "parallel");
	long tuple = number(argv, "tuple"), count = number(argv, "count"), result;
	long long duration = number(argv, "milliseconds") * 1000000LL;
	struct timeval patience = { .tv_sec = PATIENCE };
	int *fds = calloc(parallel, sizeof *fds);
	if (!fds)
		die("start");
	wait_for_word();

	for (int n = 0; n < parallel; n++) {
		fds[n] = established(i, tuple + n);
		setsockopt(fds[n], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
		setsockopt(fds[n], SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	}
	struct rusage before, after;
	getrusage(RUSAGE_SELF, &before);
	long long start = now();
	if (!strcmp(what, "exchange"))
		result = exchange(fds, parallel, count);
	else if (!strcmp(what, "up"))
		result = up(fds, parallel, duration);
	else
		result = down(fds, parallel);
	long long end = now();
	getrusage(RUSAGE_SELF, &after);
	printf("%ld %.6f %.6f %.6f %.6f %.1f %.1f\n", result, start / 1e9, end / 1e9,
	       seconds(after.ru_utime) - seconds(before.ru_utime), seconds(after.ru_stime) - seconds(before.ru_stime),
	       percentile(latencies, measured, 50), percentile(latencies, measured, 99));
	return 0;
}
