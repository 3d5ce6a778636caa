/* SPDX-License-Identifier: MIT
 *
 * The memory oracle: a workload that changes its memory in every way that could fool a tracker of dirty pages, and
 * can tell at any time whether all of it is what it must be. Checkpoint it at any instant, restore it anywhere,
 * and ask it: `check` is the verdict. What it hunts: a page in the image that is older than the frozen instant,
 * zeros, or of another place.
 *
 *   mutator --seed N --threads N --memory-mib N --scratch DIR [--port N] [--bind ADDRESS] [--status FILE]
 *           [--rate STEPS_PER_S] [--only PATHS] [--without PATHS] [--no-file-changes] [--prepare]
 *
 * In: lines on a TCP port. `check`, `counters`, `pause`, `resume`, `map`, `stop`. Out: one line of JSON for each.
 * `--status` names a file that gets the port and our PID once all is set up. `--prepare` only makes the scratch
 * files. With `--no-file-changes` they are the same for a seed, and never change: a restored image finds what it
 * had mapped, whenever it was taken. Without, pause before the image that is to be restored.
 *
 * Why to trust it:
 * - What a page must contain follows from (seed, region, page, version) or from a file; versions are in a ledger,
 *   twice. Each step of any thread has a number of its own, which is the version of what it writes: no version of a
 *   page ever comes again.
 * - A stale ledger would confirm stale pages. But all of its changes are summed up in registers of the threads
 *   (oracle.h), which CRIU takes from the kernel at the frozen instant. So what must be current is known from
 *   something that was never in a page; how long ago a page was missed does not matter.
 * - Each thread's log, counters, and rings on its stack, thread-local, heap and static pages follow from its registers
 *   too.
 * - A restored process must not write over what it was restored with before someone has looked. Each thread asks before
 *   each step whether it has been restored (the inode numbers of two pipes change) and then stays where it is until
 *   a check was good. So between the image and the check only the steps that were under way are finished. A good check
 *   lets it go on.
 *
 * Not covered: pages of libc and of dead stack, which nobody reads again; io_uring, userfaultfd and AIO in flight,
 * which CRIU cannot dump; MAP_SHARED of files, which are not memory of the process.
 *
 * Ends with 0 when stopped, 2 for wrong options, 99 when a signal tells of corruption before a check does. Children
 * end with 98 when they find something wrong; `check` says what.
 */
#include "oracle.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CLIENTS = 8, LINE = 64, TEXT = 64 << 10, PARK_TRIES = 60000 /* of half a millisecond */ };

struct options options = {
	.seed = 1, .threads = 3, .memory_pages = 64 << 8, .rate = 4000, .scratch = "/tmp", .bind = "0.0.0.0", .place = -1
};

int listener = -1;
static char text[TEXT]; /* of the answer; only the thread of the port writes it */
static size_t text_size;

static void __attribute__((format(printf, 1, 2))) say(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	int size = vsnprintf(text + text_size, TEXT - text_size, format, arguments);
	va_end(arguments);
	text_size += (size_t)size < TEXT - text_size ? (size_t)size : TEXT - text_size - 1;
}

static void say_string(const char *name, const char *value)
{
	say(",\"%s\":\"", name);
	for (; *value; value++)
		say("%c", *value == '"' || *value == '\\' || (unsigned char)*value < ' ' ? ' ' : *value);
	say("\"");
}

/* ---- stopping all ---- */

static bool all_parked(void)
{
	for (int i = 0; i < THREADS; i++)
		if (atomic_load(&workers[i].live) && !atomic_load(&workers[i].parked))
			return false;
	for (int i = 0; i < CHILDREN; i++)
		if (atomic_load(&control->child[i].state) && !atomic_load(&control->child[i].parked))
			return false;
	return true;
}

/* Threads may start threads and children until they park: what was seen parked must be so twice. */
static bool wait_until_parked(void)
{
	for (int tries = 0; tries < PARK_TRIES; tries++) {
		if (all_parked() && all_parked())
			return true;
		nap(500000);
	}
	return false;
}

static bool wait_for_answers(u32 check)
{
	for (int tries = 0; tries < PARK_TRIES; tries++) {
		bool all = true;
		for (int i = 0; i < THREADS; i++)
			all = all && (!atomic_load(&workers[i].live) || atomic_load(&workers[i].answered) == check);
		for (int i = 0; i < CHILDREN; i++)
			all = all && (!atomic_load(&control->child[i].state) || atomic_load(&control->child[i].answered) == check);
		if (all)
			return true;
		nap(500000);
	}
	return false;
}

/* ---- the check ---- */

static bool sums_agree(char *error, size_t size)
{
	u64 sum = atomic_load(&retired_sum), steps = atomic_load(&retired_steps), counted = 0, found = ledger_sum();
	for (int path = 0; path < PATH_COUNT; path++)
		counted += atomic_load(&retired_counters[path]);
	if (counted != steps) {
		snprintf(error, size, "threads that have ended did %llu steps, their counters tell of %llu",
			 (unsigned long long)steps, (unsigned long long)counted);
		return false;
	}
	for (int i = 0; i < THREADS; i++)
		if (atomic_load(&workers[i].live)) {
			sum += workers[i].said_sum;
			steps += workers[i].said_count;
		}
	if (steps != atomic_load(&steps_begun)) {
		snprintf(error, size, "the threads' registers tell of %llu steps, memory of %llu", (unsigned long long)steps,
			 (unsigned long long)atomic_load(&steps_begun));
		return false;
	}
	if (sum != found)
		snprintf(error, size, "the ledger's sum is %llx, the registers' %llx: some page of it is stale",
			 (unsigned long long)found, (unsigned long long)sum);
	return sum == found;
}

static bool everything_is_right(char *error, size_t size, u64 *checked, u64 *children)
{
	if (!wait_until_parked()) {
		snprintf(error, size, "a thread or child does not park");
		return false;
	}
	if (!wait_for_answers(atomic_fetch_add(&control->check, 1) + 1)) {
		snprintf(error, size, "a thread or child does not answer");
		return false;
	}
	if (atomic_load(&sticky)) {
		snprintf(error, size, "%s", sticky_error);
		return false;
	}
	for (int i = 0; i < THREADS; i++)
		if (atomic_load(&workers[i].live) && workers[i].error[0]) {
			snprintf(error, size, "%s", workers[i].error);
			return false;
		}
	for (int i = 0; i < CHILDREN; i++) {
		*children += atomic_load(&control->child[i].state) != 0;
		if (atomic_load(&control->child[i].state) && atomic_load(&control->child[i].sick)) {
			snprintf(error, size, "child %d: %.200s", atomic_load(&control->child[i].pid), control->child[i].error);
			return false;
		}
	}
	return children_sane(error, size) && check_world(error, size, checked) && sums_agree(error, size);
}

static u64 counter(int path)
{
	u64 sum = atomic_load(&retired_counters[path]);
	for (int i = 0; i < THREADS; i++)
		sum += atomic_load(&workers[i].live) ? workers[i].counters[path] : 0;
	return sum;
}

static void say_counters(void)
{
	u64 steps = atomic_load(&steps_begun), running = 0;
	for (int i = 0; i < CHILDREN; i++)
		running += atomic_load(&control->child[i].state) != 0;
	say(",\"steps\":%llu,\"children_ended\":%llu,\"children_running\":%llu,\"threads_ended\":%llu,\"counters\":{",
	    (unsigned long long)steps, (unsigned long long)atomic_load(&children_ended), (unsigned long long)running,
	    (unsigned long long)atomic_load(&threads_ended));
	for (int path = 0; path < PATH_COUNT; path++)
		say("%s\"%s\":%llu", path ? "," : "", path_names[path], (unsigned long long)counter(path));
	const char *comma = "";
	say("},\"missing\":[");
	for (int path = 0; path < P_IDLE; path++) {
		if (path_off[path] || unavailable[path] || path == P_collapse || counter(path))
			continue;
		say("%s\"%s\"", comma, path_names[path]);
		comma = ",";
	}
	comma = "";
	say("],\"unavailable\":[");
	for (int path = 0; path < P_IDLE; path++) {
		if (!unavailable[path])
			continue;
		say("%s\"%s\"", comma, path_names[path]);
		comma = ",";
	}
	say("]");
}

static void answer_check(void)
{
	char error[ERROR_BYTES] = "";
	u64 checked = 0, children = 0, seen = canary();
	bool restored = seen != atomic_load(&control->canary);
	atomic_fetch_or(&control->hold, HOLD_CHECK);
	bool good = everything_is_right(error, sizeof error, &checked, &children);
	say("{\"ok\":%s,\"restored\":%s,\"checked_pages\":%llu,\"checked_children\":%llu", good ? "true" : "false",
	    restored ? "true" : "false", (unsigned long long)checked, (unsigned long long)children);
	if (!good)
		say_string("error", error);
	say_counters();
	say("}\n");
	if (good) { /* whoever was restored may go on */
		atomic_store(&control->canary, seen);
		atomic_fetch_and(&control->hold, ~(u32)(HOLD_CHECK | HOLD_OUTSIDE));
	} else { /* stay, so that one can look at it; a later check tries again */
		atomic_fetch_or(&control->hold, HOLD_OUTSIDE);
		atomic_fetch_and(&control->hold, ~(u32)HOLD_CHECK);
	}
}

/* ---- the port ---- */

/* Where everything is, for tests that damage it. */
static void say_map(void)
{
	u64 areas[8][2];
	int count = ledger_areas(areas);
	say("{\"ok\":true,\"hold\":%llu,\"control\":%llu,\"ledger\":[", (unsigned long long)&control->hold,
	    (unsigned long long)control);
	for (int i = 0; i < count; i++)
		say("%s[%llu,%llu]", i ? "," : "", (unsigned long long)areas[i][0], (unsigned long long)areas[i][1]);
	say("],\"threads\":[");
	const char *comma = "";
	for (int i = 0; i < THREADS; i++) {
		const struct worker *w = &workers[i];
		if (!atomic_load(&w->live))
			continue;
		say("%s{\"number\":%d,\"worker\":%llu,\"log\":%llu,\"stack_ring\":%llu,\"tls_ring\":%llu,\"heap_ring\":%llu,"
		    "\"static_ring\":%llu}",
		    comma, i, (unsigned long long)w, (unsigned long long)logs[i], (unsigned long long)w->stack_ring,
		    (unsigned long long)w->tls_ring, (unsigned long long)w->heap_ring, (unsigned long long)bss_ring[i]);
		comma = ",";
	}
	comma = "";
	say("],\"regions\":[");
	for (int slot = 0; slot < SLOTS; slot++) {
		const struct region *r = region_at(slot);
		if (r->kind == R_NONE || r->pages == 0)
			continue;
		say("%s{\"slot\":%d,\"kind\":%d,\"addr\":%llu,\"pages\":%llu,\"stride\":%llu,\"prot_first\":%llu,"
		    "\"prot_count\":%llu,\"file_pages\":%llu}",
		    comma, slot, (int)r->kind, (unsigned long long)r->addr, (unsigned long long)r->pages,
		    (unsigned long long)r->stride, (unsigned long long)r->prot_first, (unsigned long long)r->prot_count,
		    (unsigned long long)r->file_pages);
		comma = ",";
	}
	say("]}\n");
}

static void answer(const char *line)
{
	text_size = 0;
	if (!strcmp(line, "check")) {
		answer_check();
	} else if (!strcmp(line, "counters")) {
		say("{\"ok\":true");
		say_counters();
		say("}\n");
	} else if (!strcmp(line, "pause")) {
		atomic_fetch_or(&control->hold, HOLD_PAUSE);
		say("{\"ok\":%s}\n", wait_until_parked() ? "true" : "false");
	} else if (!strcmp(line, "resume")) {
		atomic_store(&control->canary, canary());
		atomic_fetch_and(&control->hold, ~(u32)(HOLD_PAUSE | HOLD_OUTSIDE));
		say("{\"ok\":true}\n");
	} else if (!strcmp(line, "map")) {
		say_map();
	} else if (!strcmp(line, "stop")) {
		say("{\"ok\":true}\n");
	} else {
		say("{\"ok\":false,\"error\":\"check, counters, pause, resume, map or stop\"}\n");
	}
}

struct client {
	int fd;
	size_t size;
	char line[LINE];
};

static void drop(struct client *client)
{
	close(client->fd);
	client->fd = -1;
	client->size = 0;
}

static void hear(struct client *client)
{
	char *end;
	ssize_t size = recv(client->fd, client->line + client->size, LINE - 1 - client->size, 0);
	if (size <= 0) {
		if (size == 0 || errno != EINTR) /* also what a restore has closed */
			drop(client);
		return;
	}
	client->size += (size_t)size;
	client->line[client->size] = 0;
	while (client->fd >= 0 && (end = strchr(client->line, '\n')) != NULL) {
		*end = 0;
		if (end > client->line && end[-1] == '\r')
			end[-1] = 0;
		answer(client->line);
		bool stop = !strcmp(client->line, "stop");
		for (size_t sent = 0; sent < text_size && client->fd >= 0;) {
			ssize_t part = send(client->fd, text + sent, text_size - sent, MSG_NOSIGNAL);
			if (part < 0 && errno != EINTR)
				drop(client);
			sent += part > 0 ? (size_t)part : 0;
		}
		if (stop) {
			world_end();
			_exit(0);
		}
		if (client->fd >= 0) {
			client->size -= (size_t)(end + 1 - client->line);
			memmove(client->line, end + 1, client->size + 1);
		}
	}
	if (client->size >= LINE - 1)
		drop(client);
}

static void write_status(int port)
{
	char name[512], said[256];
	if (options.status == NULL)
		return;
	snprintf(name, sizeof name, "%s.new", options.status);
	int size = snprintf(said, sizeof said, "{\"pid\":%d,\"port\":%d,\"hold\":%llu}\n", (int)getpid(), port,
			    (unsigned long long)&control->hold);
	int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, said, (size_t)size) != size || rename(name, options.status))
		dprintf(2, "oracle: cannot write %s: %s\n", options.status, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void listen_on_port(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)options.port) };
	int one = 1;
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	bool good = inet_pton(AF_INET, options.bind, &address.sin_addr) == 1;
	/* Children of one that was killed have the port until they notice that they are orphans. */
	for (int tries = 0; good && bind(listener, (struct sockaddr *)&address, sizeof address); tries++) {
		good = errno == EADDRINUSE && tries < 100;
		nap(10000000);
	}
	if (!good || listen(listener, CLIENTS)) {
		dprintf(2, "oracle: cannot listen on %s port %d: %s\n", options.bind, options.port, strerror(errno));
		_exit(2);
	}
}

void *serve(void *nothing)
{
	struct client clients[CLIENTS];
	struct sockaddr_in address;
	socklen_t size = sizeof address;
	getsockname(listener, (struct sockaddr *)&address, &size);
	write_status(ntohs(address.sin_port));
	for (int i = 0; i < CLIENTS; i++)
		clients[i] = (struct client){ .fd = -1 };
	for (;;) {
		struct pollfd polled[CLIENTS + 1] = { { listener, POLLIN, 0 } };
		for (int i = 0; i < CLIENTS; i++)
			polled[i + 1] = (struct pollfd){ clients[i].fd, POLLIN, 0 };
		if (poll(polled, CLIENTS + 1, -1) < 0)
			continue;
		for (int i = 0; i < CLIENTS; i++)
			if (clients[i].fd >= 0 && polled[i + 1].revents)
				hear(&clients[i]);
		if (!polled[0].revents)
			continue;
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC), place = 0;
		while (place < CLIENTS && clients[place].fd >= 0)
			place++;
		if (fd >= 0 && place < CLIENTS)
			clients[place].fd = fd;
		else if (fd >= 0)
			close(fd);
	}
	return nothing;
}

/* ---- options ---- */

static void __attribute__((noreturn)) refuse(const char *what)
{
	dprintf(2, "oracle: %s\n", what);
	_exit(2);
}

static void for_paths(char *list, bool off)
{
	for (char *name = strtok(list, ","); name != NULL; name = strtok(NULL, ",")) {
		int path = 0;
		while (path < P_IDLE && strcmp(path_names[path], name) != 0)
			path++;
		if (path == P_IDLE)
			refuse("no such path; `counters` names them all");
		path_off[path] = off;
	}
}

static void read_options(int count, char **words)
{
	enum { SEED, THREAD_COUNT, MEMORY, SCRATCH, STATUS, RATE, ONLY, WITHOUT, PORT, BIND, NO_FILES, PREPARE, SMALL, CONTROL,
	       PLACE, RNG, STEPS };
	static const struct option known[] = {
		{ "seed", 1, 0, SEED },		{ "threads", 1, 0, THREAD_COUNT }, { "memory-mib", 1, 0, MEMORY },
		{ "scratch", 1, 0, SCRATCH },	{ "status", 1, 0, STATUS },	   { "rate", 1, 0, RATE },
		{ "only", 1, 0, ONLY },		{ "without", 1, 0, WITHOUT },	   { "port", 1, 0, PORT },
		{ "bind", 1, 0, BIND },		{ "no-file-changes", 0, 0, NO_FILES }, { "prepare", 0, 0, PREPARE },
		{ "small", 0, 0, SMALL },	{ "control-fd", 1, 0, CONTROL },   { "place", 1, 0, PLACE },
		{ "rng", 1, 0, RNG },		{ "steps", 1, 0, STEPS },	   { 0 }
	};
	static const int file_changes[] = { P_file_pwrite, P_file_truncate, P_file_extend, P_file_new };
	bool rng = false;
	for (int got; (got = getopt_long(count, words, "", known, NULL)) != -1;)
		switch (got) {
		case SEED:
			options.seed = strtoull(optarg, NULL, 0);
			break;
		case THREAD_COUNT:
			options.threads = atoi(optarg);
			break;
		case MEMORY:
			options.memory_pages = strtoull(optarg, NULL, 0) << 8;
			break;
		case SCRATCH:
			options.scratch = optarg;
			break;
		case STATUS:
			options.status = optarg;
			break;
		case RATE:
			options.rate = atof(optarg);
			break;
		case ONLY:
			memset(path_off, true, sizeof path_off);
			for_paths(optarg, false);
			break;
		case WITHOUT:
			for_paths(optarg, true);
			break;
		case PORT:
			options.port = atoi(optarg);
			break;
		case BIND:
			options.bind = optarg;
			break;
		case NO_FILES:
			options.no_file_changes = true;
			break;
		case PREPARE:
			options.prepare = true;
			break;
		case SMALL:
			options.small = true;
			break;
		case CONTROL:
			options.control_fd = atoi(optarg);
			break;
		case PLACE:
			options.place = atoi(optarg);
			break;
		case RNG:
			options.rng = strtoull(optarg, NULL, 0);
			rng = true;
			break;
		case STEPS:
			options.steps = strtoull(optarg, NULL, 0);
			break;
		default:
			refuse("see the head of mutator.c for the options");
		}
	if (options.threads < 1 || options.threads > 8 || options.rate <= 0 || options.memory_pages < 256 ||
	    options.memory_pages > ANON_SLOTS * SLOT_PAGES / 4)
		refuse("1 to 8 threads, 1 to 224 MiB, a positive rate");
	for (size_t i = 0; options.no_file_changes && i < sizeof file_changes / sizeof *file_changes; i++)
		path_off[file_changes[i]] = true;
	if (!rng)
		options.rng = mix64(options.seed);
}

/* ---- main ---- */

static void make_control(void)
{
	size_t size = (sizeof(struct control) + PAGE - 1) / PAGE * PAGE;
	if (!options.small) {
		options.control_fd = memfd_create("oracle-control", 0); /* exec'd children map it too */
		if (options.control_fd < 0 || ftruncate(options.control_fd, (off_t)size))
			refuse("no memfd");
	}
	control = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, options.control_fd, 0);
	if (control == MAP_FAILED)
		refuse("cannot map the control page");
	if (options.small) {
		if (options.place < 0 || options.place >= CHILDREN)
			refuse("no such child's place");
		my_child = &control->child[options.place];
		return;
	}
	for (int i = 0; i < 2; i++) {
		int ends[2];
		if (pipe(ends))
			refuse("no pipe for the canary");
		close(ends[1]);
		control->canary_fd[i] = ends[0];
	}
	atomic_store(&control->canary, canary());
}

int main(int count, char **words)
{
	read_options(count, words);
	ssize_t size = readlink("/proc/self/exe", options.self, sizeof options.self - 1);
	options.self[size > 0 ? size : 0] = 0;
	if (options.prepare) {
		options.no_file_changes = true;
		scratch_make();
		return 0;
	}
	make_control();
	note_birth();
	ledger_make();
	if (!options.small) {
		scratch_make();
		listen_on_port();
	}
	struct worker *w = &workers[0];
	family_begin();
	atomic_store(&w->live, 1);
	worker_begin(w, 0, options.rng, options.small ? options.steps : UINT64_MAX);
	reg_sum = 0;
	catch_faults();
	fault_stack();
	worker_open(w);
	choose_weights(options.small);
	worker_loop(w);
	child_end(true);
}
