/* SPDX-License-Identifier: MIT
 *
 * The control port, what is answered there, and the check of everything. In: words. Out: one line of JSON for each.
 */
#include "files.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CLIENTS = 8, LINE = 64, TEXT = 64 << 10, PARK_TRIES = 60000 /* of half a millisecond */ };

static char text[TEXT]; /* of the answer */
static size_t text_size;

/* ---- answers ---- */

static void __attribute__((format(printf, 1, 2))) say(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	int size = vsnprintf(text + text_size, TEXT - text_size, format, arguments);
	va_end(arguments);
	text_size += (size_t)size < TEXT - text_size ? (size_t)size : TEXT - text_size - 1;
}

static void say_string(const char *value)
{
	say("\"");
	for (; *value; value++)
		say("%c", *value == '"' || *value == '\\' || (u8)*value < ' ' || (u8)*value > 126 ? ' ' : *value);
	say("\"");
}

static void say_verdict(const struct verdict *verdict)
{
	say("{\"ok\":%s,\"checked_files\":%llu,\"checked_bytes\":%llu,\"in_flight\":%llu,\"differences\":%u,"
	    "\"errors\":[",
	    verdict->count ? "false" : "true", (unsigned long long)verdict->files, (unsigned long long)verdict->bytes,
	    (unsigned long long)verdict->in_flight, verdict->count);
	for (u32 i = 0; i < verdict->count && i < ERRORS; i++) {
		say("%s", i ? "," : "");
		say_string(verdict->error[i]);
	}
	say("],\"error\":");
	say_string(verdict->count ? verdict->error[0] : "");
}

static u64 counter(u32 path)
{
	u64 sum = 0;
	for (u32 i = 0; i < WORKERS; i++)
		sum += model->worker[i].counters[path];
	return sum;
}

static void say_paths(const char *name, bool missing)
{
	const char *comma = "";
	say(",\"%s\":[", name);
	for (u32 path = 0; path < P_IDLE; path++) {
		bool unavailable = atomic_load(&model->unavailable[path]);
		if (missing ? path_off[path] || unavailable || counter(path) : !unavailable)
			continue;
		say("%s\"%s\"", comma, path_names[path]);
		comma = ",";
	}
	say("]");
}

static void say_counters(void)
{
	u64 handles = 0, unlinked = 0;
	for (u32 row = 0; row <= WORKERS; row++)
		for (u32 i = 0; i < HANDLES; i++) {
			const struct handle *h = &model->handle[row][i];
			handles += h->used;
			unlinked += h->used && model->node[h->node].links == 0;
		}
	say(",\"steps\":%llu,\"files\":%lld,\"bytes\":%lld,\"handles\":%llu,\"unlinked_handles\":%llu,\"orphaned_"
	    "tmpfiles\":%llu",
	    (unsigned long long)atomic_load(&model->steps), (long long)atomic_load(&model->nodes),
	    (long long)atomic_load(&model->blocks) * PAGE, (unsigned long long)handles, (unsigned long long)unlinked,
	    (unsigned long long)atomic_load(&model->orphaned_tmpfiles));
	say(",\"steps_of_workers\":[");
	for (u32 i = 0; i < WORKERS; i++)
		say("%s%llu", i ? "," : "", (unsigned long long)model->worker[i].steps);
	say("],\"counters\":{");
	for (u32 path = 0; path < PATH_COUNT; path++)
		say("%s\"%s\":%llu", path ? "," : "", path_names[path], (unsigned long long)counter(path));
	say("}");
	say_paths("missing", true);
	say_paths("unavailable", false);
}

/* ---- the check ---- */

static bool wait_until(bool all(u32 check), u32 check)
{
	for (int tries = 0; tries < PARK_TRIES; tries++) {
		if (all(check))
			return true;
		reap();
		nap(500000);
	}
	return false;
}

static bool all_parked(u32 check)
{
	(void)check;
	for (u32 i = 0; i < WORKERS; i++)
		if (atomic_load(&model->worker[i].pid) && !atomic_load(&model->worker[i].parked))
			return false;
	return true;
}

static bool all_answered(u32 check)
{
	for (u32 i = 0; i < WORKERS; i++)
		if (atomic_load(&model->worker[i].pid) && atomic_load(&model->worker[i].answered) != check)
			return false;
	return true;
}

static void add(struct verdict *verdict, const char *error)
{
	if (verdict->count < ERRORS)
		snprintf(verdict->error[verdict->count], ERROR_BYTES, "%s", error);
	verdict->count++;
}

static void check_all(struct verdict *verdict, u64 *handles)
{
	if (!wait_until(all_parked, 0)) {
		add(verdict, "a worker does not park");
		return;
	}
	u32 check = atomic_fetch_add(&model->check, 1) + 1;
	if (!wait_until(all_answered, check)) {
		add(verdict, "a worker does not answer");
		return;
	}
	judge(model, true, true, verdict);
	for (u32 i = 0; i < WORKERS; i++) {
		*handles += model->worker[i].checked_handles;
		if (atomic_load(&model->worker[i].sick))
			add(verdict, model->worker[i].error);
	}
	if (atomic_load(&model->sticky))
		add(verdict, model->sticky_error);
}

static void answer_check(void)
{
	static struct verdict verdict;
	u64 seen = canary(), handles = 0;
	bool restored = seen != atomic_load(&model->canary);
	memset(&verdict, 0, sizeof verdict);
	atomic_fetch_or(&model->hold, HOLD_CHECK);
	check_all(&verdict, &handles);
	say_verdict(&verdict);
	say(",\"restored\":%s,\"checked_handles\":%llu", restored ? "true" : "false", (unsigned long long)handles);
	say_counters();
	say("}\n");
	if (verdict.count == 0) { /* whoever was restored may go on */
		atomic_store(&model->canary, seen);
		atomic_fetch_and(&model->hold, ~(u32)(HOLD_CHECK | HOLD_OUTSIDE));
	} else { /* stay, so that one can look at it; a later check tries again */
		atomic_fetch_or(&model->hold, HOLD_OUTSIDE);
		atomic_fetch_and(&model->hold, ~(u32)HOLD_CHECK);
	}
}

static void answer(const char *line)
{
	text_size = 0;
	if (!strcmp(line, "check")) {
		answer_check();
	} else if (!strcmp(line, "counters")) {
		say("{\"ok\":true,\"parked\":%s", all_parked(0) ? "true" : "false");
		say_counters();
		say("}\n");
	} else if (!strcmp(line, "pause")) {
		atomic_fetch_or(&model->hold, HOLD_PAUSE);
		say("{\"ok\":%s}\n", wait_until(all_parked, 0) ? "true" : "false");
	} else if (!strcmp(line, "resume")) {
		atomic_store(&model->canary, canary());
		atomic_store(&model->last_step, 0);
		atomic_store(&model->hold, 0);
		say("{\"ok\":true}\n");
	} else if (!strcmp(line, "stop")) {
		say("{\"ok\":true}\n");
	} else {
		say("{\"ok\":false,\"error\":\"check, counters, pause, resume or stop\"}\n");
	}
}

/* ---- the port ---- */

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
		answer(client->line);
		bool stop = !strcmp(client->line, "stop");
		for (size_t sent = 0; sent < text_size && client->fd >= 0;) {
			ssize_t part = send(client->fd, text + sent, text_size - sent, MSG_NOSIGNAL);
			if (part < 0 && errno != EINTR)
				drop(client);
			sent += part > 0 ? (size_t)part : 0;
		}
		if (stop)
			end_all(SIGTERM);
		if (client->fd >= 0) {
			client->size -= (size_t)(end + 1 - client->line);
			memmove(client->line, end + 1, client->size + 1);
		}
	}
	if (client->size >= LINE - 1)
		drop(client);
}

/* Tell where we listen, who we are, and which of our descriptors is the model's. */
void write_status(const char *file, int port, int model_fd)
{
	char name[512], said[256];
	snprintf(name, sizeof name, "%s.new", file);
	int size =
		snprintf(said, sizeof said, "{\"pid\":%d,\"port\":%d,\"model\":%d}\n", (int)getpid(), port, model_fd);
	int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, said, (size_t)size) != size || rename(name, file))
		dprintf(2, "files: cannot write %s: %s\n", file, strerror(errno));
	if (fd >= 0)
		close(fd);
}

/* Returns the port: another one, if it was 0. */
int listen_on_port(const char *host, int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
	socklen_t room = sizeof address;
	int one = 1;
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	bool good = inet_pton(AF_INET, host, &address.sin_addr) == 1;
	/* Children of one that was killed have the port until they notice that they are orphans. */
	for (int tries = 0; good && bind(listener, (struct sockaddr *)&address, sizeof address); tries++) {
		good = errno == EADDRINUSE && tries < 100;
		nap(10000000);
	}
	if (!good || listen(listener, CLIENTS))
		refuse("cannot listen on that address and port");
	getsockname(listener, (struct sockaddr *)&address, &room);
	return ntohs(address.sin_port);
}

void serve(void)
{
	struct client clients[CLIENTS];
	for (int i = 0; i < CLIENTS; i++)
		clients[i] = (struct client){ .fd = -1 };
	for (;;) {
		struct pollfd polled[CLIENTS + 1] = { { listener, POLLIN, 0 } };
		for (int i = 0; i < CLIENTS; i++)
			polled[i + 1] = (struct pollfd){ clients[i].fd, POLLIN, 0 };
		int ready = poll(polled, CLIENTS + 1, 200);
		reap();
		if (ready <= 0)
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
}

/* From outside: a verdict for each line of standard input. */
void judge_on_demand(bool live)
{
	static struct verdict verdict;
	char line[LINE];
	while (fgets(line, sizeof line, stdin)) {
		text_size = 0;
		judge(model, live, false, &verdict);
		if (atomic_load(&model->sticky))
			add(&verdict, model->sticky_error);
		say_verdict(&verdict);
		say("}\n");
		if (write(1, text, text_size) != (ssize_t)text_size)
			break;
	}
	_exit(0);
}
