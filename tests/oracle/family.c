/* SPDX-License-Identifier: MIT
 *
 * Threads and child processes: how they start, park, check themselves and end.
 *
 * A fork is no snapshot: while the kernel copies page tables, other threads go on writing, and the child gets
 * some pages of before and some of after. So the forking thread first takes the locks of some regions; those are
 * the child's, exactly; all others it disowns. In shared regions each process writes the pages of its own part,
 * and answers for them with its own register; a part changes hands at the fork and when the child was reaped.
 *
 * Lifetimes are counted in steps, not in time: a restored process may be on a host with another clock.
 */
#include "oracle.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PASSING_THREADS = 4, STACK_BYTES = 1 << 20, FAULT_STACK = 64 << 10, FAILED_CHECK = 98, FAULT = 99, ORPHAN = 97 };

struct worker workers[THREADS], child_worker;
struct control *control;
struct child *my_child;
int role;
_Atomic u32 sticky;
char sticky_error[ERROR_BYTES];
_Atomic u64 retired_steps, retired_sum, threads_ended, children_ended;
_Atomic u64 retired_counters[PATH_COUNT];

static char fault_stacks[THREADS][FAULT_STACK] __attribute__((aligned(4096)));
static _Atomic u32 children_lock, helper_lock;
static struct {
	u32 state;
	int pid, type;
} children_known[CHILDREN]; /* what the shared page must say of them */
static int helper_fd = -1, helper_left;
static pid_t parent_pid;
extern char **environ;

/* To be called first in the main process and in exec'd ones: a child ends when its parent has changed. */
void family_begin(void)
{
	parent_pid = getppid();
}

/* ---- what went wrong ---- */

/* Something was noticed outside of a check: a child says so and ends; the main process remembers the first. */
void fail(const char *format, ...)
{
	char text[ERROR_BYTES];
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	dprintf(2, "oracle %d: %s\n", (int)getpid(), text);
	if (my_child) {
		memcpy(my_child->error, text, sizeof text);
		atomic_store(&my_child->sick, 1);
		_exit(FAILED_CHECK);
	}
	u32 none = 0;
	if (atomic_compare_exchange_strong(&sticky, &none, 1)) {
		memcpy(sticky_error, text, sizeof text);
		atomic_store(&sticky, 2);
	}
}

/* Print the mappings around an address. */
static void say_mappings(const void *address)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[3][256] = { "", "", "" };
	for (int at = 0; maps && fgets(line[at % 3], sizeof line[0], maps); at++)
		if (strtoull(strchr(line[at % 3], '-') + 1, NULL, 16) > (u64)address) {
			dprintf(2, "%s%s%s", line[(at + 1) % 3], line[(at + 2) % 3], line[at % 3]);
			if (fgets(line[0], sizeof line[0], maps))
				dprintf(2, "%s", line[0]);
			return;
		}
}

static void on_fault(int number, siginfo_t *info, void *context)
{
	char text[ERROR_BYTES];
	(void)context;
	int size = snprintf(text, sizeof text, "oracle %d: signal %d (%d) at %p, thread %d, path %s\n", (int)getpid(),
			    number, info->si_code, info->si_addr, me ? me->number : -1,
			    me ? path_names[me->path] : "-");
	if (write(2, text, (size_t)size) < 0)
		_exit(FAULT);
	say_mappings(info->si_addr);
	if (my_child)
		memcpy(my_child->error, text, sizeof text);
	_exit(FAULT);
}

static void on_term(int number)
{
	(void)number;
	world_end();
	_exit(0);
}

void catch_faults(void)
{
	static const int faults[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE };
	struct sigaction action = { .sa_flags = SA_ONSTACK | SA_SIGINFO };
	action.sa_sigaction = on_fault;
	for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
		sigaction(faults[i], &action, NULL);
	struct sigaction write_it = { .sa_flags = SA_ONSTACK | SA_RESTART }, end = { 0 }, ignore = { 0 };
	write_it.sa_handler = on_signal_write;
	sigaction(SIGUSR1, &write_it, NULL);
	end.sa_handler = on_term;
	if (!options.small)
		sigaction(SIGTERM, &end, NULL);
	ignore.sa_handler = SIG_IGN;
	sigaction(SIGPIPE, &ignore, NULL);
}

/* Give the calling thread its alternative signal stack. */
void fault_stack(void)
{
	stack_t stack = { .ss_sp = fault_stacks[me->number], .ss_size = FAULT_STACK };
	if (sigaltstack(&stack, NULL))
		fail("sigaltstack: %s", strerror(errno));
}

/* ---- parking ---- */

/* In a process with one thread: check all that it answers for. */
bool check_own(struct worker *w, char *error, size_t size)
{
	u64 checked = 0;
	if (!worker_sane(w, error, size) || !check_world(error, size, &checked))
		return false;
	u64 begun = atomic_load(&steps_begun) - steps_before, sum = ledger_sum();
	if (begun != reg_count)
		snprintf(error, size, "the register tells of %llu steps, memory of %llu", (unsigned long long)reg_count,
			 (unsigned long long)begun);
	else if (sum != reg_sum)
		snprintf(error, size, "the ledger's sum is %llx, the register's %llx: some page of it is stale",
			 (unsigned long long)sum, (unsigned long long)reg_sum);
	return begun == reg_count && sum == reg_sum;
}

static void answer(struct worker *w, u32 check)
{
	if (my_child) {
		char error[ERROR_BYTES];
		if (!check_own(w, error, sizeof error)) {
			memcpy(my_child->error, error, sizeof error);
			atomic_store(&my_child->sick, 1);
		} else {
			atomic_store(&my_child->sick, 0);
		}
		atomic_store(&my_child->answered, check);
		return;
	}
	w->said_count = reg_count;
	w->said_sum = reg_sum;
	w->said_chain = reg_chain;
	w->error[0] = 0;
	worker_sane(w, w->error, sizeof w->error);
	atomic_store(&w->answered, check);
}

static void end_if_orphan(void)
{
	if (my_child && getppid() != parent_pid)
		_exit(ORPHAN);
}

/* Stay here, between two steps, while there is reason to; answer each check once. */
void park(struct worker *w)
{
	_Atomic u32 *parked = my_child ? &my_child->parked : &w->parked;
	_Atomic u32 *answered = my_child ? &my_child->answered : &w->answered;
	do {
		atomic_store(parked, 1);
		while (must_hold()) {
			u32 check = atomic_load(&control->check);
			if (atomic_load(answered) != check)
				answer(w, check);
			if (w->number == 0 && !my_child)
				reap();
			end_if_orphan();
			nap(300000);
		}
		atomic_store(parked, 0);
	} while (must_hold()); /* whoever set it in between may have seen us parked */
}

/* ---- threads ---- */

static void *worker_thread(void *argument)
{
	struct worker *w = argument;
	worker_begin(w, (int)(w - workers), w->rng, w->steps_left);
	reg_sum = 0;
	fault_stack();
	worker_open(w);
	worker_loop(w);
	worker_close(w);
	atomic_fetch_add(&retired_sum, reg_sum);
	atomic_fetch_add(&retired_steps, reg_count);
	for (int path = 0; path < PATH_COUNT; path++)
		atomic_fetch_add(&retired_counters[path], w->counters[path]);
	atomic_fetch_add(&threads_ended, 1);
	atomic_store(&w->live, 0);
	return NULL;
}

static bool start_thread(int number, u64 rng, u64 steps)
{
	struct worker *w = &workers[number];
	u32 dead = 0;
	if (!atomic_compare_exchange_strong(&w->live, &dead, 1))
		return false;
	atomic_store(&w->parked, 0);
	atomic_store(&w->answered, atomic_load(&control->check));
	w->rng = rng;
	w->steps_left = steps;
	pthread_attr_t attributes;
	pthread_t thread;
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	bool started = pthread_create(&thread, &attributes, worker_thread, w) == 0;
	pthread_attr_destroy(&attributes);
	if (!started)
		atomic_store(&w->live, 0);
	return started;
}

bool op_thread(struct worker *w, u64 v)
{
	int number = options.threads + (int)below(w, PASSING_THREADS);
	(void)v;
	return number < THREADS && start_thread(number, random64(w), 20 + below(w, 1 + below(w, 2000)));
}

void start_workers(void)
{
	pthread_t thread;
	for (int number = 1; number < options.threads; number++)
		if (!start_thread(number, options.rng + 1000003 * (u64)number, UINT64_MAX))
			fail("cannot start thread %d", number);
	if (pthread_create(&thread, NULL, serve, NULL)) {
		dprintf(2, "oracle: cannot start the thread of the control port\n");
		_exit(2);
	}
}

/* ---- children ---- */

static bool lock_children(void)
{
	u32 free_ = 0;
	return atomic_compare_exchange_strong(&children_lock, &free_, 1);
}

static void unlock_children(void)
{
	atomic_store(&children_lock, 0);
}

/* A child has got a PID (0: it is gone). The lock is held. */
static void know_child(int number, pid_t pid)
{
	children_known[number].pid = pid;
	children_known[number].type = atomic_load(&control->child[number].type);
	children_known[number].state = pid > 0;
	atomic_store(&control->child[number].pid, pid > 0 ? pid : 0);
	atomic_store(&control->child[number].state, pid > 0);
}

/* With all parked: is the shared page the present one? */
bool children_sane(char *error, size_t size)
{
	for (int i = 0; i < CHILDREN; i++) {
		struct child *child = &control->child[i];
		if (atomic_load(&child->state) == children_known[i].state && atomic_load(&child->pid) == children_known[i].pid &&
		    (!children_known[i].state || atomic_load(&child->type) == children_known[i].type))
			continue;
		snprintf(error, size, "the shared page tells of a child %d, in use %u; it is %d, in use %u",
			 atomic_load(&child->pid), atomic_load(&child->state), children_known[i].pid, children_known[i].state);
		return false;
	}
	return true;
}

/* Find a free child's place; fill it in. The lock is held. -1: none. */
static int new_child(enum child_type type)
{
	for (int i = 0; i < CHILDREN; i++) {
		struct child *child = &control->child[i];
		if (atomic_load(&child->state))
			continue;
		memset(child->error, 0, sizeof child->error);
		atomic_store(&child->pid, 0);
		atomic_store(&child->type, type);
		atomic_store(&child->sick, 0);
		atomic_store(&child->parked, 0);
		atomic_store(&child->steps, 0);
		atomic_store(&child->steps_complement, ~(u64)0);
		atomic_store(&child->answered, atomic_load(&control->check));
		atomic_store(&child->state, 1);
		return i;
	}
	return -1;
}

/* ---- who this process is ---- */

static u64 birth;
static bool from_restored;

/* When the kernel made a process: the 22nd field of its stat (proc(5)). 0 if that cannot be read. */
static u64 made_at(pid_t pid)
{
	char text[1024] = "", path[32], *end;
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC), field = 2;
	if (fd >= 0 && read(fd, text, sizeof text - 1) < 0)
		text[0] = 0;
	if (fd >= 0)
		close(fd);
	if ((end = strrchr(text, ')')) == NULL)
		return 0;
	for (end++; *end && field < 22; end++)
		field += *end == ' ';
	return strtoull(end, NULL, 10);
}

void note_birth(void)
{
	birth = made_at(getpid());
}

/* A forked child has the mappings of its parent, as they are. */
static void note_fork(void)
{
	from_restored = from_restored || made_at(parent_pid) != birth;
	note_birth();
}

/* Restored by CRIU, or forked by who was: what mprotect(2) held apart then is several mappings for ever. */
bool was_restored(void)
{
	return from_restored || made_at(getpid()) != birth;
}

/* What an exec'd child does to make its world are steps too. */
void child_began(void)
{
	atomic_store(&my_child->steps, reg_count);
	atomic_store(&my_child->steps_complement, ~reg_count);
}

void child_stepped(void)
{
	u64 steps = atomic_load(&my_child->steps);
	if (steps + 1 != reg_count || atomic_load(&my_child->steps_complement) != ~steps)
		fail("the shared page tells of %llu steps before this one, the register of %llu", (unsigned long long)steps,
		     (unsigned long long)reg_count - 1);
	atomic_store(&my_child->steps, steps + 1);
	atomic_store(&my_child->steps_complement, ~(steps + 1));
	end_if_orphan();
}

/* The end of a child's life. Forked ones look at everything only now and then: it is 100 MiB. */
void child_end(bool check)
{
	char error[ERROR_BYTES];
	if (check && !check_own(me, error, sizeof error))
		fail("at its end: %s", error);
	_exit(0);
}

/* Keep what is surely whole, with what fork(2) says of it; disown the rest. */
static void inherit(int thread)
{
	u64 newest = atomic_load(&steps_begun);
	for (int slot = SLOT_SHARED; slot < SLOTS; slot++)
		for (u64 page = (u64)role * PART_PAGES; page < (u64)(role + 1) * PART_PAGES; page++)
			if (version_of(entry_at(slot, page)->begun) > newest)
				newest = version_of(entry_at(slot, page)->begun);
	atomic_store(&steps_begun, newest + 1);
	for (int slot = 0; slot < SLOT_SHARED; slot++) {
		const struct region *r = region_at(slot);
		char error[ERROR_BYTES];
		if (locked_by(slot) != thread || (r->kind == R_FILE && !options.no_file_changes)) {
			disown_region(slot);
		} else if (r->flags & F_DONTFORK) {
			if (!unreadable(page_at(r, 0)))
				fail("region %d: a child got it in spite of MADV_DONTFORK", slot);
			disown_region(slot);
		} else if (r->flags & F_WIPE) {
			range_begin(slot, 0, r->pages, ZERO, newest + 1, 0);
			range_end(slot, 0, r->pages);
			if (!check_pages(slot, 0, r->pages, error, sizeof error))
				fail("a child after MADV_WIPEONFORK: %s", error);
			written_to[slot] = false;
		}
		if (r->kind == R_ANON && r->prot_count) { /* each part got an anon_vma of its own */
			struct region parts = *r;
			parts.flags |= F_PARTS;
			region_store(slot, &parts);
		}
	}
	steps_before = atomic_load(&steps_begun);
	forget_locks();
	ledger_adopt();
}

static void __attribute__((noreturn)) live_as_child(int number, struct worker *parent, u64 rng, u64 steps)
{
	close(listener);
	my_child = &control->child[number];
	role = number + 1;
	note_fork();
	inherit(parent->number);
	u64 sum = reg_sum;
	child_worker.heap_ring = parent->heap_ring;
	worker_begin(&child_worker, parent->number, rng, steps);
	reg_sum = sum;
	worker_open(&child_worker);
	choose_weights(true);
	worker_loop(&child_worker);
	child_end(below(&child_worker, 4) == 0);
}

bool op_fork(struct worker *w, u64 v)
{
	(void)v;
	if (!lock_children())
		return false;
	int number = new_child(CHILD_FORK);
	if (number < 0) {
		unlock_children();
		return false;
	}
	u64 mine[SLOT_SHARED], count = 0;
	for (int slot = 0; slot < SLOT_SHARED; slot++)
		if (below(w, 4) && try_lock(slot, w))
			mine[count++] = (u64)slot;
	u64 rng = random64(w), steps = 5 + below(w, 1 + below(w, 900));
	pid_t here = getpid();
	part_give(number + 1);
	pid_t pid = fork();
	if (pid == 0) {
		parent_pid = here;
		live_as_child(number, w, rng, steps);
	}
	if (pid < 0)
		part_take(number + 1);
	know_child(number, pid);
	while (count > 0)
		unlock((int)mine[--count]);
	unlock_children();
	return pid > 0;
}

/* The same program anew, small and by itself: another address space altogether. */
static bool start_small(struct worker *w, enum child_type type)
{
	if (!lock_children())
		return false;
	int number = new_child(type);
	if (number < 0) {
		unlock_children();
		return false;
	}
	char fd[16], place[16], seed[24], rng[24], steps[24];
	snprintf(fd, sizeof fd, "%d", options.control_fd);
	snprintf(place, sizeof place, "%d", number);
	snprintf(seed, sizeof seed, "%llu", (unsigned long long)options.seed);
	snprintf(rng, sizeof rng, "%llu", (unsigned long long)(random64(w) >> 1));
	snprintf(steps, sizeof steps, "%llu", (unsigned long long)(20 + below(w, 600)));
	char *const words[] = { options.self, "--small", "--control-fd", fd, "--place", place, "--seed", seed, "--rng", rng,
				"--steps", steps, "--scratch", (char *)options.scratch, "--memory-mib", "4", NULL };
	pid_t pid = -1;
	if (type == CHILD_VFORK) {
		if (posix_spawn(&pid, options.self, NULL, NULL, words, environ))
			pid = -1;
	} else if ((pid = fork()) == 0) {
		execv(options.self, words);
		_exit(127);
	}
	know_child(number, pid);
	unlock_children();
	return pid > 0;
}

bool op_exec(struct worker *w, u64 v)
{
	(void)v;
	return start_small(w, CHILD_EXEC);
}

bool op_vfork_exec(struct worker *w, u64 v)
{
	(void)v;
	return start_small(w, CHILD_VFORK);
}

/* Collect children that have ended. Only by the main process's first thread: it takes their parts back. */
void reap(void)
{
	static const char *const types[] = { "forked", "exec'd", "vfork'd and exec'd", "helper" };
	int status;
	pid_t pid;
	if (!lock_children())
		return;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		for (int i = 0; i < CHILDREN; i++) {
			struct child *child = &control->child[i];
			if (!atomic_load(&child->state) || atomic_load(&child->pid) != pid)
				continue;
			int type = atomic_load(&child->type);
			if (WIFSIGNALED(status))
				fail("a %s child was killed by signal %d", types[type & 3], WTERMSIG(status));
			else if (WEXITSTATUS(status))
				fail("a %s child ended with %d: %.180s", types[type & 3], WEXITSTATUS(status), child->error);
			if (type == CHILD_FORK)
				part_take(i + 1);
			atomic_fetch_add(&children_ended, 1);
			know_child(i, 0);
		}
	unlock_children();
}

/* ---- the helper: a child that writes into its parent's memory ---- */

struct request {
	u64 mode, addr, uid, first, count, version; /* mode 2: end */
};

static int serve_request(const struct request *q)
{
	static u64 content[STAGE_PAGES * WORDS];
	size_t size = q->count * PAGE;
	for (u64 i = 0; i < q->count * WORDS; i++)
		content[i] = word_at(page_key(q->uid, q->first + i / WORDS), q->version, i % WORDS);
	ssize_t written;
	if (q->mode == 0) {
		struct iovec here = { content, size }, there = { (void *)q->addr, size };
		written = process_vm_writev(parent_pid, &here, 1, &there, 1, 0);
		return written == (ssize_t)size ? 0 : written < 0 ? errno : EIO;
	}
	char name[32];
	snprintf(name, sizeof name, "/proc/%d/mem", (int)parent_pid);
	int fd = open(name, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return errno;
	written = pwrite(fd, content, size, (off_t)q->addr);
	int error = written == (ssize_t)size ? 0 : written < 0 ? errno : EIO;
	close(fd);
	return error;
}

static void __attribute__((noreturn)) live_as_helper(int fd)
{
	struct request request;
	atomic_store(&my_child->parked, 1); /* it changes nothing unless a thread asks, and then that is not parked */
	for (;;) {
		struct pollfd ready = { fd, POLLIN, 0 };
		end_if_orphan();
		atomic_store(&my_child->answered, atomic_load(&control->check));
		if (poll(&ready, 1, 20) <= 0)
			continue;
		ssize_t size = recv(fd, &request, sizeof request, 0);
		if (size != sizeof request || request.mode == 2)
			_exit(size > 0 || size == 0 ? 0 : FAILED_CHECK);
		int error = serve_request(&request);
		if (send(fd, &error, sizeof error, 0) != sizeof error)
			_exit(FAILED_CHECK);
	}
}

static bool start_helper(struct worker *w)
{
	int ends[2];
	if (!lock_children())
		return false;
	int number = new_child(CHILD_HELPER);
	if (number < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) {
		if (number >= 0)
			know_child(number, 0);
		unlock_children();
		return false;
	}
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0); /* where Yama is, a child may not write to us without */
	pid_t here = getpid(), pid = fork();
	if (pid == 0) {
		my_child = &control->child[number];
		parent_pid = here;
		close(ends[0]);
		close(listener);
		live_as_helper(ends[1]);
	}
	close(ends[1]);
	if (pid < 0) {
		close(ends[0]);
	} else {
		helper_fd = ends[0];
		helper_left = 20 + (int)below(w, 400);
	}
	know_child(number, pid);
	unlock_children();
	return pid > 0;
}

/* Take the helper for one write, and start it if there is none. */
bool helper_take(struct worker *w)
{
	u32 free_ = 0;
	if (!atomic_compare_exchange_strong(&helper_lock, &free_, 1))
		return false;
	if (helper_fd < 0 && !start_helper(w)) {
		atomic_store(&helper_lock, 0);
		return false;
	}
	return true;
}

void helper_drop(void)
{
	if (helper_fd >= 0 && helper_left-- <= 0) {
		struct request end = { .mode = 2 };
		if (send(helper_fd, &end, sizeof end, 0) < 0)
			fail("the helper is gone: %s", strerror(errno));
		close(helper_fd);
		helper_fd = -1;
	}
	atomic_store(&helper_lock, 0);
}

int helper_write(int mode, const struct region *r, u64 first, u64 count, u64 version)
{
	struct request request = { (u64)mode, (u64)page_at(r, first), r->uid, first, count, version };
	int error = 0;
	if (send(helper_fd, &request, sizeof request, 0) != sizeof request)
		return errno;
	ssize_t size;
	do
		size = recv(helper_fd, &error, sizeof error, 0);
	while (size < 0 && errno == EINTR);
	return size == sizeof error ? error : EPIPE;
}
