/*
 * A load generator: flows of datagrams to one endpoint, so many at a time, each from a port of its own. A flow says what
 * its daemon's record has, and is good when every datagram was answered with the daemon's name.
 *
 *   flows SETTING=VALUE ...    (those of common.h and datagrams.h, and:)
 *     first, daemons    flow n goes to daemon first + (tuple + n * 7919) mod daemons
 *     tuple      number of the first source address and port; none is used twice
 *     count      flows in all
 *     parallel   ... and at a time
 *     seconds    what is still open after so many has failed
 *
 * It prints what load.c prints, RETRIED being the datagrams that were said again after AGAIN without an answer.
 */
#include "datagrams.h"

#define AGAIN 1000000000LL
#define MAX_REPORTED 5

struct flow {
	int fd;
	int daemon;
	int missing;
	long long started, said;
};

static long first_tuple, count, started, good, wrong, failed, retried, reported;
static int first, daemons, epoll;
static char (*names)[NAME];
static long long *latencies;

static void report(const struct flow *flow, const char *what)
{
	if (reported++ < MAX_REPORTED)
		fprintf(stderr, "to %.*s: %s: %s\n", (int)strcspn(names[flow->daemon], "\n"), names[flow->daemon], what,
			strerror(errno));
}

static void end(struct flow *flow)
{
	close(flow->fd);
	flow->fd = -1;
}

static void open_next(struct flow *flow)
{
	while (flow->fd < 0 && started < count) {
		long tuple = first_tuple + started;
		flow->daemon = first + (first_tuple + started++ * 7919) % daemons;
		flow->missing = firsts[flow->daemon].datagrams;
		flow->started = flow->said = now();
		flow->fd = flow_socket(flow->daemon, tuple, SOCK_NONBLOCK);
		struct epoll_event event = { .events = EPOLLIN, .data.ptr = flow };
		if (flow->fd < 0) {
			failed++;
			report(flow, "bind");
		} else if (epoll_ctl(epoll, EPOLL_CTL_ADD, flow->fd, &event)) {
			die("epoll_ctl");
		} else if (say_first(flow->fd, flow->daemon)) {
			failed++;
			report(flow, "send");
			end(flow);
		}
	}
}

static void on_readable(struct flow *flow)
{
	int right;
	while ((right = hear_name(flow->fd, names[flow->daemon])) == 1)
		if (!--flow->missing) {
			latencies[good++] = now() - flow->started;
			end(flow);
			return;
		}
	if (right < 0 && errno == EAGAIN)
		return;
	if (right < 0)
		failed++;
	else
		wrong++;
	report(flow, right < 0 ? "recv" : "another daemon's answer");
	end(flow);
}

static void say_again(struct flow *flow)
{
	if (flow->fd < 0 || now() - flow->said < AGAIN)
		return;
	retried++;
	flow->said = now();
	say_first(flow->fd, flow->daemon);
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
	struct flow *flows = calloc(parallel, sizeof *flows);
	struct epoll_event *events = calloc(parallel, sizeof *events);
	epoll = epoll_create1(0);
	if (!names || !latencies || !flows || !events || epoll < 0)
		die("start");
	for (int i = 0; i < first + daemons; i++)
		name_of(i, names[i]);
	read_records(argv, first + daemons);
	wait_for_word();

	struct rusage before, after;
	getrusage(RUSAGE_SELF, &before);
	long long start = now();
	for (int i = 0; i < parallel; i++) {
		flows[i].fd = -1;
		open_next(&flows[i]);
	}
	while (good + wrong + failed < count) {
		int ready = epoll_wait(epoll, events, parallel, 100);
		for (int i = 0; i < ready; i++) {
			on_readable(events[i].data.ptr);
			open_next(events[i].data.ptr);
		}
		for (int i = 0; !ready && i < parallel; i++)
			say_again(&flows[i]);
		if (now() - start > limit) {
			failed = count - good - wrong;
			fprintf(stderr, "%ld flows unfinished after %lld s\n", failed, limit / 1000000000LL);
			break;
		}
	}
	long long stop = now();
	getrusage(RUSAGE_SELF, &after);

	qsort(latencies, good, sizeof *latencies, ascending);
	printf("%ld %ld %ld %.6f %.6f %.6f %.6f %.1f %.1f %ld\n", good, wrong, failed, start / 1e9, stop / 1e9,
	       seconds(after.ru_utime) - seconds(before.ru_utime), seconds(after.ru_stime) - seconds(before.ru_stime),
	       percentile(latencies, good, 50), percentile(latencies, good, 99), retried);
	return 0;
}
