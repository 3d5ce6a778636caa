/* SPDX-License-Identifier: MIT
 *
 * A load on redis for bench.overhead: one request at a time on each connection, at a rate or as fast as it goes.
 *
 * In: options, below at `main`. Out: a line of JSON, and a file with the latency of each request in us (uint32).
 * With a rate, request n is due at n / rate seconds, whether the server keeps up or not, and its latency is
 * counted from then: what waits for a free connection while the server stands still has waited too (no
 * coordinated omission). All that was due is sent and waited for, beyond the end if need be. What came due
 * within a tick is sent at its end, and has waited since then too: a timer and a wakeup for each request would
 * cost more than its answer.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define CONNECTIONS 1024
#define ANSWER_BYTES (70 << 10)
#define VALUE_BYTES (64 << 10)
#define DRAIN_NS 30000000000ull

struct connection {
	int socket;
	uint64_t since_ns; /* when the request was due */
	size_t got;
	char answer[ANSWER_BYTES];
};

static struct connection connections[CONNECTIONS];
static int waiting[CONNECTIONS], free_count; /* connections without a request */
static char value[VALUE_BYTES], request[VALUE_BYTES + 256];
static uint32_t *latencies;
static size_t completed, room;
static uint64_t state = 88172645463325252u, keys = 100000, value_bytes = 100, write_percent = 50, sequence;
static int preload;

static void fail(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void ask(uint64_t since_ns)
{
	struct connection *c = &connections[waiting[--free_count]];
	char key[32];
	const int key_bytes = sprintf(key, "load:%llu", (unsigned long long)(preload ? sequence++ : next() % keys));
	size_t size;

	if (preload || next() % 100 < write_percent) {
		/* A value of its own, so that pages change. */
		const uint64_t mark = next();
		memcpy(value, &mark, value_bytes < 8 ? value_bytes : 8);
		size = (size_t)sprintf(request, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%zu\r\n", key_bytes, key,
				       (size_t)value_bytes);
		memcpy(request + size, value, value_bytes);
		memcpy(request + size + value_bytes, "\r\n", 2);
		size += value_bytes + 2;
	} else {
		size = (size_t)sprintf(request, "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", key_bytes, key);
	}
	c->since_ns = since_ns;
	c->got = 0;
	/* Blocking, but a request is far smaller than a socket's buffer. */
	for (size_t sent = 0; sent < size;) {
		const ssize_t n = send(c->socket, request + sent, size - sent, MSG_NOSIGNAL);
		if (n < 0 && errno != EINTR)
			fail("send");
		sent += n < 0 ? 0 : (size_t)n;
	}
}

/* Whether the answer is there as a whole: a line, and for a value as many bytes as that says. */
static int is_whole(const struct connection *c)
{
	const char *end = memmem(c->answer, c->got, "\r\n", 2);
	if (!end)
		return 0;
	if (c->answer[0] == '-') {
		fprintf(stderr, "load: redis answers %.*s\n", (int)(end - c->answer), c->answer);
		exit(1);
	}
	const long length = c->answer[0] == '$' ? atol(c->answer + 1) : -1;
	return length < 0 || c->got >= (size_t)(end - c->answer) + 2 + (size_t)length + 2;
}

static void hear(struct connection *c)
{
	const ssize_t n = recv(c->socket, c->answer + c->got, ANSWER_BYTES - c->got, MSG_DONTWAIT);
	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
		fprintf(stderr, "load: the connection was closed\n");
		exit(1);
	}
	c->got += n < 0 ? 0 : (size_t)n;
	if (!is_whole(c))
		return;
	if (completed == room) {
		room = room ? room * 2 : 1 << 20;
		latencies = realloc(latencies, room * sizeof(*latencies));
		if (!latencies)
			fail("memory");
	}
	latencies[completed++] = (uint32_t)((now_ns() - c->since_ns) / 1000);
	waiting[free_count++] = (int)(c - connections);
}

static int connect_all(const char *address, int port, int count)
{
	const int poll = epoll_create1(EPOLL_CLOEXEC), one = 1;
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };

	if (inet_pton(AF_INET, address, &to.sin_addr) != 1)
		fail("address");
	for (int n = 0; n < count; n++) {
		struct epoll_event event = { .events = EPOLLIN, .data.u32 = (uint32_t)n };
		connections[n].socket = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (connect(connections[n].socket, (struct sockaddr *)&to, sizeof(to)))
			fail("connect");
		setsockopt(connections[n].socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		epoll_ctl(poll, EPOLL_CTL_ADD, connections[n].socket, &event);
		waiting[free_count++] = n;
	}
	return poll;
}

/* ADDRESS PORT and: -c connections, -k keys, -v bytes of a value, -w percent of writes, -d seconds, -r requests a
 * second (0: a new one whenever a connection is free), -t microseconds of a tick, -o file for latencies, -p: write
 * every key once instead. */
int main(int argc, char **argv)
{
	double rate = 0, seconds = 1;
	uint64_t tick_ns = 1;
	const char *output = NULL;
	int count = 50;

	for (int option; (option = getopt(argc, argv, "c:k:v:w:d:r:t:o:p")) != -1;)
		switch (option) {
		case 'c': count = atoi(optarg); break;
		case 'k': keys = strtoul(optarg, NULL, 10); break;
		case 'v': value_bytes = strtoul(optarg, NULL, 10); break;
		case 'w': write_percent = strtoul(optarg, NULL, 10); break;
		case 'd': seconds = atof(optarg); break;
		case 'r': rate = atof(optarg); break;
		case 't': tick_ns = strtoul(optarg, NULL, 10) * 1000; break;
		case 'o': output = optarg; break;
		case 'p': preload = 1; break;
		default: return 2;
		}
	if (argc - optind != 2 || count < 1 || count > CONNECTIONS || !keys || value_bytes > VALUE_BYTES || !tick_ns)
		return 2;
	prctl(PR_SET_TIMERSLACK, 1);
	state += (uint64_t)getpid() * 2654435761u;
	for (uint64_t at = 0; at < value_bytes; at++)
		value[at] = (char)next();
	const int poll = connect_all(argv[optind], atoi(argv[optind + 1]), count);
	const double period_ns = rate > 0 ? 1e9 / rate : 0;
	const uint64_t begun = now_ns(), end = begun + (uint64_t)(seconds * 1e9);
	uint64_t asked = 0;
	size_t in_time = 0;

	for (;;) {
		uint64_t now = now_ns(), due = begun + (uint64_t)((double)asked * period_ns);
		int more = preload ? sequence < keys : (rate > 0 ? due : now) < end;
		/* All that was due at the last tick. */
		while (more && free_count && (rate <= 0 || due <= now - (now - begun) % tick_ns)) {
			ask(rate > 0 ? due : now);
			asked++;
			now = now_ns();
			due = begun + (uint64_t)((double)asked * period_ns);
			more = preload ? sequence < keys : (rate > 0 ? due : now) < end;
		}
		if (!more && free_count == count)
			break;
		if (!preload && now > end + DRAIN_NS) {
			fprintf(stderr, "load: not all was answered\n");
			return 1;
		}
		struct timespec wait = { 0, 100000000 };
		if (rate > 0 && more && free_count) {
			const uint64_t tick = begun + (due - begun + tick_ns - 1) / tick_ns * tick_ns;
			wait.tv_nsec = tick > now ? (long)((tick - now) % 100000000) : 0;
		}
		struct epoll_event events[64];
		const int n = epoll_pwait2(poll, events, 64, &wait, NULL);
		for (int at = 0; at < n; at++)
			hear(&connections[events[at].data.u32]);
		if (now_ns() <= end)
			in_time = completed;
	}
	if (output) {
		FILE *file = fopen(output, "wb");
		if (!file || fwrite(latencies, sizeof(*latencies), completed, file) != completed || fclose(file))
			fail(output);
	}
	struct rusage usage;
	getrusage(RUSAGE_SELF, &usage);
	printf("{\"asked\":%llu,\"answered_in_time\":%zu,\"cpu_s\":%.3f}\n", (unsigned long long)asked, in_time,
	       (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
		       (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
	return 0;
}
