/*
 * Established flows of datagrams: how many packets a second they carry. Each flow is opened with its daemon's record and
 * checked for the name; then, flow after flow, BURST datagrams go out at once and come back.
 *
 *   packets SETTING=VALUE ...    (those of common.h and datagrams.h, and:)
 *     daemon         whom the first flow asks; the next one asks the next
 *     tuple          number of the first source address and port
 *     parallel       flows
 *     size           bytes of each datagram
 *     milliseconds   how long
 *
 * It prints "ready", waits for a line, runs, and prints one line:
 *   RETURNED LOST START END USER SYSTEM
 * (RETURNED: datagrams there and back; LOST: those that did not come back within PATIENCE; times as load.c has them.)
 * Whatever goes wrong ends it with status 2 and a word on standard error; an answer of the wrong daemon, with status 3.
 */
#include "datagrams.h"

#define BURST 32
#define PATIENCE 200000
#define TRIES 5
/* What a QUIC packet with a short header begins with (RFC 9000 section 17.3); no record does. responder.c sends it back. */
#define ECHO 0x40

static unsigned char out[MAX_DATAGRAM], in[BURST][MAX_DATAGRAM];
static struct mmsghdr sending[BURST], receiving[BURST];
static struct iovec one, many[BURST];

static int established(int i, long tuple)
{
	static const struct timeval patience = { .tv_usec = PATIENCE };
	char name[NAME] = "";
	int fd = flow_socket(i, tuple, 0), missing = firsts[i].datagrams;
	if (fd < 0)
		die("bind");
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	name_of(i, name);
	for (int tries = 0; tries < TRIES; tries++) {
		if (say_first(fd, i))
			die("send");
		int right = 1;
		while (missing && (right = hear_name(fd, name)) == 1)
			missing--;
		if (!right) {
			fprintf(stderr, "meant for %s, answered by another\n", name);
			exit(3);
		}
		if (!missing)
			return fd;
	}
	die("name");
	return -1;
}

/* How many of a burst came back. */
static int burst(int fd)
{
	int returned = 0;
	if (sendmmsg(fd, sending, BURST, 0) != BURST)
		die("sendmmsg");
	while (returned < BURST) {
		int got = recvmmsg(fd, receiving, BURST - returned, MSG_WAITFORONE, NULL);
		if (got < 0 && errno == EAGAIN)
			break;
		if (got < 0)
			die("recvmmsg");
		for (int n = 0; n < got; n++)
			if (receiving[n].msg_len != one.iov_len || in[n][0] != ECHO) {
				fprintf(stderr, "what came back is not what was sent\n");
				exit(2);
			}
		returned += got;
	}
	return returned;
}

int main(int argc, char **argv)
{
	(void)argc;
	read_settings(argv);
	int first = number(argv, "daemon"), parallel = number(argv, "parallel");
	long tuple = number(argv, "tuple"), returned = 0, lost = 0;
	long long duration = number(argv, "milliseconds") * 1000000LL;
	int *fds = calloc(parallel, sizeof *fds);
	if (!fds)
		die("start");
	out[0] = ECHO;
	one = (struct iovec){ .iov_base = out, .iov_len = number(argv, "size") };
	for (int n = 0; n < BURST; n++) {
		many[n] = (struct iovec){ .iov_base = in[n], .iov_len = MAX_DATAGRAM };
		sending[n].msg_hdr = (struct msghdr){ .msg_iov = &one, .msg_iovlen = 1 };
		receiving[n].msg_hdr = (struct msghdr){ .msg_iov = &many[n], .msg_iovlen = 1 };
	}
	read_records(argv, first + parallel);
	wait_for_word();

	for (int n = 0; n < parallel; n++)
		fds[n] = established(first + n, tuple + n);
	struct rusage before, after;
	getrusage(RUSAGE_SELF, &before);
	long long start = now();
	for (int n = 0; now() - start < duration; n = (n + 1) % parallel) {
		int came = burst(fds[n]);
		returned += came;
		lost += BURST - came;
	}
	long long end = now();
	getrusage(RUSAGE_SELF, &after);
	printf("%ld %ld %.6f %.6f %.6f %.6f\n", returned, lost, start / 1e9, end / 1e9,
	       seconds(after.ru_utime) - seconds(before.ru_utime), seconds(after.ru_stime) - seconds(before.ru_stime));
	return 0;
}
