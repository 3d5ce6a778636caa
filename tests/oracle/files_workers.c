/* SPDX-License-Identifier: MIT
 *
 * Who changes files: threads and processes, and the steps that they make. Each step is one path (files.h); between two
 * of them a worker has no lock and is at nothing, so there it parks. Their parent only sees to it that none of them ends.
 */
#include "files.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ORPHAN = 97, FAULT = 99 };

const char *const path_names[PATH_COUNT] = {
#define X(name, weight) #name,
	PATHS(X)
#undef X
		"idle",
};
static const u32 weights[P_IDLE] = {
#define X(name, weight) weight,
	PATHS(X)
#undef X
};
static op *const ops[P_IDLE] = {
#define X(name, weight) op_##name,
	PATHS(X)
#undef X
};

int listener = -1;
static pid_t parent_pid;
static u64 own_steps[WORKERS]; /* of this process's workers: in its memory, while the model's are in shared memory */

/* ---- small things ---- */

void nap(u64 ns)
{
	struct timespec span = { (time_t)(ns / 1000000000), (long)(ns % 1000000000) };
	nanosleep(&span, NULL);
}

static u64 now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (u64)now.tv_sec * 1000000000 + (u64)now.tv_nsec;
}

/* Inode numbers of two pipes that all processes hold: a restored one has new pipes. */
u64 canary(void)
{
	u64 sum = 0;
	struct stat status;
	for (int i = 0; i < 2; i++) {
		if (fstat(model->canary_fd[i], &status))
			fail("the canary's pipe is gone: %s", strerror(errno));
		sum = mix64(sum + status.st_ino);
	}
	return sum;
}

/* Since someone has last looked. */
bool was_restored(void)
{
	return canary() != atomic_load(&model->canary);
}

static bool must_hold(void)
{
	return atomic_load(&model->hold) != 0 || was_restored();
}

/* ---- workers ---- */

static void end_if_orphan(void)
{
	if (getppid() != parent_pid)
		_exit(ORPHAN);
}

/* What a path needs: that paths hold still, that it alone changes them, or neither. */
enum need { PATHS_STILL, ALONE, NOTHING };

static enum need need_of(u32 path)
{
	switch (path) {
	case P_rename_dir:
	case P_move_dir:
	case P_exchange_dir:
		return ALONE;
	case P_open:
	case P_open_unlinked:
		return PATHS_STILL;
	default:
		return path > P_open_unlinked ? NOTHING : PATHS_STILL;
	}
}

static u32 choose_path(struct worker *w)
{
	u64 all = 0, at;
	for (u32 path = 0; path < P_IDLE; path++)
		all += path_off[path] || atomic_load(&model->unavailable[path]) ? 0 : weights[path];
	at = below(w, all);
	for (u32 path = 0; path < P_IDLE; path++) {
		u64 weight = path_off[path] || atomic_load(&model->unavailable[path]) ? 0 : weights[path];
		if (at < weight)
			return path;
		at -= weight;
	}
	return P_IDLE;
}

static void step(struct worker *w)
{
	w->version = atomic_fetch_add(&model->steps, 1) + 1;
	w->path = choose_path(w);
	enum need need = w->path == P_IDLE ? NOTHING : need_of(w->path);
	u32 path = w->path;
	bool may = path != P_IDLE && (need != ALONE || enter_topology());
	if (may && need == PATHS_STILL)
		enter_paths();
	if (!may || !ops[path](w))
		w->path = P_IDLE;
	give_back(w);
	if (may && need == PATHS_STILL)
		leave_paths();
	if (may && need == ALONE)
		leave_topology();
	w->counters[w->path]++;
	w->steps++;
	own_steps[w->number]++;
	if (atomic_load(&model->last_step) && w->version >= atomic_load(&model->last_step))
		atomic_fetch_or(&model->hold, HOLD_STEPS);
}

/* What this worker alone can look at. All are parked, so paths hold still. */
static void answer_for(struct worker *w, u32 check)
{
	u64 counted = 0;
	w->checked_handles = 0;
	for (u32 path = 0; path < PATH_COUNT; path++)
		counted += w->counters[path];
	bool right = check_handles(w, w->error, sizeof w->error, &w->checked_handles);
	if (right && (w->steps != own_steps[w->number] || counted != w->steps)) {
		snprintf(w->error, sizeof w->error,
			 "worker %u did %llu steps, the model tells of %llu, its counters of %llu", w->number,
			 (unsigned long long)own_steps[w->number], (unsigned long long)w->steps,
			 (unsigned long long)counted);
		right = false;
	}
	atomic_store(&w->sick, !right);
	atomic_store(&w->answered, check);
}

/* Stay here, between two steps, while there is reason to; answer each check once. */
static void park(struct worker *w)
{
	do {
		atomic_store(&w->parked, 1);
		while (must_hold()) {
			u32 check = atomic_load(&model->check);
			if (atomic_load(&w->answered) != check)
				answer_for(w, check);
			end_if_orphan();
			nap(300000);
		}
		atomic_store(&w->parked, 0);
	} while (must_hold()); /* whoever set it in between may have seen us parked */
}

/* Keep the rate; whatever the clock does (another host has another one), sleep no longer than two periods. */
static void pace(struct worker *w)
{
	u64 now = now_ns();
	w->next_ns += w->period_ns;
	if (w->next_ns + 20 * w->period_ns < now || w->next_ns > now + 2 * w->period_ns)
		w->next_ns = now;
	if (w->next_ns > now + 50000)
		nap(w->next_ns - now);
}

static void *work(void *argument)
{
	struct worker *w = argument;
	atomic_store(&w->pid, getpid());
	atomic_store(&w->live, 1);
	for (;;) {
		if (must_hold())
			park(w);
		step(w);
		end_if_orphan();
		pace(w);
	}
	return NULL;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
	char said[ERROR_BYTES];
	(void)context;
	int size = snprintf(said, sizeof said, "files %d: signal %d (%d) at %p\n", (int)getpid(), number,
			    info->si_code, info->si_addr);
	if (write(2, said, (size_t)size) < 0)
		_exit(FAULT);
	_exit(FAULT);
}

static void end_workers(void)
{
	for (u32 i = 0; i < WORKERS; i++)
		if (atomic_load(&model->worker[i].pid))
			kill(atomic_load(&model->worker[i].pid), SIGKILL);
}

/* End: all of us, if we are the parent. */
void end_all(int number)
{
	(void)number;
	if (getpid() == parent_pid)
		end_workers();
	_exit(0);
}

void catch_signals(void)
{
	static const int faults[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE };
	struct sigaction action = { .sa_flags = SA_SIGINFO }, end = { 0 }, ignore = { 0 };
	action.sa_sigaction = on_fault;
	for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
		sigaction(faults[i], &action, NULL);
	end.sa_handler = end_all;
	sigaction(SIGTERM, &end, NULL);
	sigaction(SIGINT, &end, NULL);
	ignore.sa_handler = SIG_IGN;
	sigaction(SIGPIPE, &ignore, NULL);
}

static void __attribute__((noreturn)) live_as_process(u32 process)
{
	close(listener);
	for (u32 i = 1; i < WORKERS; i++) {
		pthread_t thread;
		if (process == 0 && model->worker[i].process == 0 &&
		    pthread_create(&thread, NULL, work, &model->worker[i]))
			refuse("cannot start a thread");
	}
	u32 mine = 0;
	while (model->worker[mine].process != process)
		mine++;
	work(&model->worker[mine]);
	_exit(0);
}

void start_workers(void)
{
	parent_pid = getpid();
	for (u32 process = 0; process < PROCESSES; process++) {
		pid_t pid = fork();
		if (pid == 0)
			live_as_process(process);
		if (pid < 0)
			refuse("cannot fork");
		for (u32 i = 0; i < WORKERS; i++)
			if (model->worker[i].process == process)
				atomic_store(&model->worker[i].pid, pid);
	}
}

/* No child may end, as long as we do not. */
void reap(void)
{
	int status;
	pid_t pid = waitpid(-1, &status, WNOHANG);
	if (pid <= 0)
		return;
	if (WIFSIGNALED(status))
		fail("process %d was killed by signal %d", pid, WTERMSIG(status));
	else
		fail("process %d ended with %d", pid, WEXITSTATUS(status));
	for (u32 i = 0; i < WORKERS; i++)
		if (atomic_load(&model->worker[i].pid) == pid) {
			atomic_store(&model->worker[i].pid, 0);
			atomic_store(&model->worker[i].live, 0);
		}
}
