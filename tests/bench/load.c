/*
 * A load generator: connections to one endpoint, so many at a time, each of which checks the name that answers.
 *
 *   load VERSION ENDPOINT FIRST-PORT PORTS FIRST-ALIAS ALIASES OPTION AT FIRST-SOURCE SOURCES FIRST-TUPLE COUNT
 *        PARALLEL SECONDS
 *
 * Connection n goes to alias i = (FIRST-TUPLE + n * 7919) mod ALIASES, by port FIRST-PORT + i mod PORTS, and carries
 * OPTION (hexadecimal, as setsockopt(IP_OPTIONS or IPV6_DSTOPTS) wants it; "-" for none) with the 16-bit number i + 1
 * at byte AT. It must be answered by the text form of the address FIRST-ALIAS + i and a line end; then it is closed.
 * No source address and port is used twice: connection n is bound to the tuple number FIRST-TUPLE + n, of which every
 * source address has TUPLES_PER_SOURCE.
 *
 * It prints "ready", waits for a line, runs, and prints one line:
 *   GOOD WRONG FAILED START END USER SYSTEM P50 P99 RETRIED
 * START and END in seconds of CLOCK_MONOTONIC, USER and SYSTEM in seconds of this process's CPU time between them, P50
 * and P99 in microseconds from connect to the first byte, RETRIED the connections that took longer than the first
 * retransmission of a SYN (1 s). What was wrong goes to standard error. After SECONDS, what is still open has failed.
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
#define RETRANSMISSION 1000000000LL
#define MAX_OPTION 40
#define MAX_REPORTED 5
#define NAME 64

struct connection {
	int fd;
	int alias;
	int held;
	long long started;
	char name[NAME];
};

static int version, ports, aliases, sources, option_at, parallel;
static long first_tuple, count, started, good, wrong, failed, retried, reported;
static struct sockaddr_storage endpoint, first_source;
static int first_port;
static socklen_t address_size;
static unsigned char option[MAX_OPTION];
static socklen_t option_size;
static char (*names)[NAME];
static long long *latencies;
static int epoll;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static long long now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000000000LL + at.tv_nsec;
}

static void *host_of(struct sockaddr_storage *address)
{
	if (version == 4)
		return &((struct sockaddr_in *)address)->sin_addr;
	return &((struct sockaddr_in6 *)address)->sin6_addr;
}

static struct sockaddr_storage address_of(const char *text)
{
	struct sockaddr_storage address = { .ss_family = version == 4 ? AF_INET : AF_INET6 };
	if (inet_pton(address.ss_family, text, host_of(&address)) != 1)
		die(text);
	return address;
}

/* Address + offset, and a port; both families keep the port in the same place. */
static struct sockaddr_storage beyond(struct sockaddr_storage address, unsigned offset, int port)
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

static void fail(struct connection *connection, const char *what)
{
	failed++;
	if (reported++ < MAX_REPORTED)
		fprintf(stderr, "to %.*s: %s: %s\n", (int)strcspn(names[connection->alias], "\n"),
			names[connection->alias], what, strerror(errno));
	if (connection->fd >= 0)
		close(connection->fd);
	connection->fd = -1;
}

static void open_next(struct connection *connection)
{
	static const int one = 1;
	while (connection->fd < 0 && started < count) {
		long number = started++;
		long tuple = first_tuple + number;
		connection->alias = (first_tuple + number * 7919) % aliases;
		connection->held = 0;
		connection->started = now();
		connection->fd = socket(version == 4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
		if (connection->fd < 0)
			die("socket");
		if (option_size) {
			option[option_at] = (connection->alias + 1) >> 8;
			option[option_at + 1] = connection->alias + 1;
			if (setsockopt(connection->fd, version == 4 ? IPPROTO_IP : IPPROTO_IPV6,
				       version == 4 ? IP_OPTIONS : IPV6_DSTOPTS, option, option_size))
				die("setsockopt");
		}
		struct sockaddr_storage source = beyond(first_source, tuple / TUPLES_PER_SOURCE % sources,
							FIRST_SOURCE_PORT + tuple % TUPLES_PER_SOURCE);
		struct sockaddr_storage to = beyond(endpoint, 0, first_port + connection->alias % ports);
		struct epoll_event event = { .events = EPOLLIN, .data.ptr = connection };
		setsockopt(connection->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
		if (bind(connection->fd, (struct sockaddr *)&source, address_size))
			fail(connection, "bind");
		else if (connect(connection->fd, (struct sockaddr *)&to, address_size) && errno != EINPROGRESS)
			fail(connection, "connect");
		else if (epoll_ctl(epoll, EPOLL_CTL_ADD, connection->fd, &event))
			die("epoll_ctl");
	}
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
	const char *expected = names[connection->alias];
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

static int ascending(const void *left, const void *right)
{
	long long difference = *(const long long *)left - *(const long long *)right;
	return difference < 0 ? -1 : difference > 0;
}

static double seconds(struct timeval time)
{
	return time.tv_sec + time.tv_usec / 1e6;
}

int main(int argc, char **argv)
{
	if (argc != 15) {
		fprintf(stderr, "usage: see the top of load.c\n");
		return 2;
	}
	version = atoi(argv[1]);
	address_size = version == 4 ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
	endpoint = address_of(argv[2]);
	first_port = atoi(argv[3]);
	ports = atoi(argv[4]);
	struct sockaddr_storage first_alias = address_of(argv[5]);
	aliases = atoi(argv[6]);
	if (strcmp(argv[7], "-"))
		for (const char *hex = argv[7]; hex[0] && hex[1] && option_size < MAX_OPTION; hex += 2)
			option[option_size++] = strtoul((char[]){ hex[0], hex[1], 0 }, NULL, 16);
	option_at = atoi(argv[8]);
	first_source = address_of(argv[9]);
	sources = atoi(argv[10]);
	first_tuple = atol(argv[11]);
	count = atol(argv[12]);
	parallel = atoi(argv[13]);
	long long limit = atoll(argv[14]) * 1000000000LL;

	names = calloc(aliases, NAME);
	latencies = calloc(count, sizeof *latencies);
	struct connection *connections = calloc(parallel, sizeof *connections);
	struct epoll_event *events = calloc(parallel, sizeof *events);
	epoll = epoll_create1(0);
	if (!names || !latencies || !connections || !events || epoll < 0)
		die("start");
	for (int alias = 0; alias < aliases; alias++) {
		struct sockaddr_storage address = beyond(first_alias, alias, 0);
		inet_ntop(address.ss_family, host_of(&address), names[alias], NAME - 1);
		strcat(names[alias], "\n");
	}
	puts("ready");
	fflush(stdout);
	if (getchar() == EOF)
		return 2;

	struct rusage before, after;
	getrusage(RUSAGE_SELF, &before);
	long long start = now();
	for (int number = 0; number < parallel; number++) {
		connections[number].fd = -1;
		open_next(&connections[number]);
	}
	while (good + wrong + failed < count) {
		int ready = epoll_wait(epoll, events, parallel, 100);
		for (int number = 0; number < ready; number++) {
			struct connection *connection = events[number].data.ptr;
			on_readable(connection);
			open_next(connection);
		}
		if (now() - start > limit) {
			failed = count - good - wrong;
			fprintf(stderr, "%ld connections unfinished after %s s\n", failed, argv[14]);
			break;
		}
	}
	long long end = now();
	getrusage(RUSAGE_SELF, &after);

	long measured = good + wrong;
	qsort(latencies, measured, sizeof *latencies, ascending);
	printf("%ld %ld %ld %.6f %.6f %.6f %.6f %.1f %.1f %ld\n", good, wrong, failed, start / 1e9, end / 1e9,
	       seconds(after.ru_utime) - seconds(before.ru_utime), seconds(after.ru_stime) - seconds(before.ru_stime),
	       measured ? latencies[measured / 2] / 1e3 : 0, measured ? latencies[measured * 99 / 100] / 1e3 : 0,
	       retried);
	return 0;
}
