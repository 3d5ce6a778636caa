/* SPDX-License-Identifier: MIT
 *
 * The memory oracle: what its four parts share. See mutator.c for what it is and how to trust it.
 *
 *   ledger.c   what every page must contain, and the check of it
 *   paths.c    every way in which memory is changed
 *   family.c   threads and child processes
 *   mutator.c  options, the control port, the check of everything
 */
#ifndef ORACLE_H
#define ORACLE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef uint64_t u64;
typedef uint32_t u32;

/* The root of trust: three registers of every thread, so never in a page while it runs or sleeps. CRIU takes
 * them from the kernel at the frozen instant, by a way that no tracker of pages is on. No other code in this
 * program may touch these registers; libc saves and restores them (they are callee-saved).
 *   reg_count  steps that this thread has done
 *   reg_sum    what this thread has added to the sum of the ledger (modulo 2^64)
 *   reg_chain  hash over all entries of this thread's log
 */
#if defined(__x86_64__)
register u64 reg_count __asm__("r13");
register u64 reg_sum __asm__("r14");
register u64 reg_chain __asm__("r15");
#elif defined(__aarch64__)
register u64 reg_count __asm__("x25");
register u64 reg_sum __asm__("x26");
register u64 reg_chain __asm__("x27");
#else
#error "name three callee-saved registers of this machine"
#endif

enum {
	PAGE = 4096,
	WORDS = PAGE / 8,
	HUGE_PAGES = 512, /* in a transparent huge page */
	ANON_SLOTS = 56,
	FILE_SLOTS = 4,
	SLOT_FILE = ANON_SLOTS,
	SLOT_BRK = SLOT_FILE + FILE_SLOTS,
	SLOT_SPARSE,
	SLOT_SHARED, /* three: anonymous, memfd, System V */
	SLOTS = SLOT_SHARED + 3,
	SLOT_PAGES = 4096, /* the most that a region may grow to */
	FILE_PAGES = 128,
	BRK_PAGES = 256,
	SPARSE_PAGES = 256,
	SPARSE_STRIDE = 8191, /* pages: 256 of them are 8 GiB, and odd, so every place in a page table comes up */
	DIRECT_PAGES = 1024,
	CHILDREN = 8,
	PART_PAGES = 16, /* of a shared region, for the parent and for each child */
	SHARED_PAGES = (CHILDREN + 1) * PART_PAGES,
	THREADS = 16,
	LOG = 4096,
	RING = 1024,
	STAGE_PAGES = 8,
	SPARES = 16,
	SPARE_PAGES = 4,
	ERROR_BYTES = 240,
};

/* What a page was last told to contain. An op is (version << 4 | kind); a version is the number of the step. */
enum kind {
	ZERO,	/* zeros, touched or not */
	DATA,	/* pattern of region, page and version */
	PATCH,	/* as before, but for some words of this version */
	FREED,	/* MADV_FREE: as before, or zeros */
	COPY,	/* the page of a file that `aux` names, copied */
	FOLLOW, /* whatever the mapped file contains: never written through this mapping */
	ABSENT, /* not there, or beyond the end of the file */
};

/* What the ledger holds of a page, in two copies in mappings of their own; the second is the complement.
 * Order of a change: pend, begun, (the page), aux, base or patch, done. */
struct entry {
	u64 begun, done;
	u64 base;     /* the last op on the whole page; patches with lower versions are void */
	u64 aux;      /* COPY: file << 56 | page << 40 | version of the file's page */
	u64 patch[3]; /* version << 20 | first word << 10 | words */
	u64 pend;     /* of the op that has begun: aux, or first word << 10 | words */
};

enum region_kind { R_NONE, R_ANON, R_FILE, R_BRK, R_SPARSE, R_SHARED };
/* F_PARTS: the kernel may hold it for several mappings, see `written_to`. */
enum { F_WIPE = 1, F_DONTFORK = 2, F_HUGE = 4, F_NOHUGE = 8, F_GUARD = 16, F_PARTS = 32 };

/* A mapping; in two copies as well. `version` is the step that last changed this record. */
struct region {
	u64 uid, addr, pages, stride, kind, flags;
	u64 prot_first, prot_count, prot; /* one range of it may be PROT_NONE or PROT_READ */
	u64 splits;			  /* ranges mapped anew in it, each of which may be a VMA */
	u64 file, file_pages;		  /* R_FILE */
	u64 version, spare[3];
};

#define PATHS(X)                                                                                             \
	/* name, weight in the main process, weight in children */                                           \
	X(store_word, 2000, 1500) X(store_page, 1600, 1500) X(store_straddle, 400, 300) X(memset, 150, 150)  \
	X(memcpy, 150, 150) X(rep_movs, 150, 100) X(zero_read, 200, 100) X(zero_write, 100, 50)              \
	X(mmap, 60, 20) X(munmap, 50, 10) X(mmap_fixed, 60, 30) X(mremap_grow, 60, 30)                       \
	X(mremap_shrink, 50, 20) X(mremap_move, 60, 30) X(mremap_beside, 40, 20) X(mprotect_none, 80, 40) X(mprotect_read, 100, 40)   \
	X(mprotect_back, 300, 100) X(dontneed, 300, 200) X(free, 200, 100) X(hugepage, 12, 0)                 \
	X(nohugepage, 15, 0) X(collapse, 6, 0) X(wipeonfork, 20, 0) X(dontfork, 20, 0) X(guard, 40, 0)       \
	X(fork, 4, 0) X(exec, 2, 0) X(vfork_exec, 1, 0) X(thread, 6, 0) X(file_cow, 300, 100)                \
	X(file_dontneed, 60, 30) X(file_pageout, 20, 0) X(file_pwrite, 60, 0) X(file_truncate, 20, 0)        \
	X(file_extend, 30, 0) X(file_new, 5, 0) X(stack, 60, 20) X(brk_grow, 40, 0) X(brk_shrink, 40, 0)     \
	X(brk_store, 150, 60) X(direct_read, 500, 60) X(pipe_read, 150, 100) X(socket_read, 150, 60)         \
	X(file_read, 150, 80) X(vm_writev, 80, 0) X(proc_mem, 60, 0) X(proc_mem_force, 60, 0)                \
	X(shared_anon, 150, 150) X(shared_memfd, 150, 150) X(shared_sysv, 150, 150)                          \
	X(shared_remove, 40, 30) X(signal, 120, 60) X(sparse, 150, 60) X(verify, 60, 60) X(pageout, 20, 0)

enum path {
#define X(name, weight, in_child) P_##name,
	PATHS(X)
#undef X
	    P_IDLE, /* a step that found nothing to do */
	PATH_COUNT
};

/* One thread, or the one thread of a child. Page-aligned, so that each has pages of its own. */
struct worker {
	u64 counters[PATH_COUNT]; /* sums up to reg_count */
	u64 rng;
	u64 uid;
	u64 version; /* of the step that it is at */
	u64 steps_left; /* UINT64_MAX: until the end of the process */
	u64 period_ns;
	u64 next_ns;
	int number;
	int path;
	int pipe[2], socket[2];
	int direct, direct_uses;
	u64 spare[SPARES]; /* mapped some time ago and never touched, for mremap_beside */
	int spare_at;
	int slot; /* what the step did, for the log: slot -1: nothing that has an entry */
	u64 first, count;
	u64 *heap_ring, *stack_ring, *tls_ring;
	struct {
		volatile u64 *at;
		u64 key, version, count;
	} by_signal;
	/* Said while parked, anew for each check: */
	u64 said_count, said_sum, said_chain;
	char error[ERROR_BYTES];
	_Atomic u32 live, parked, answered;
} __attribute__((aligned(4096)));

struct log_entry {
	u64 where; /* path << 56 | slot << 48 | first << 24 | count */
	u64 uid, version, chain;
};

/* Shared by all processes of the family (memfd). */
struct child {
	_Atomic u32 state, answered, parked, sick; /* state: 0 free, 1 in use */
	_Atomic int pid;
	_Atomic int type; /* enum child_type */
	_Atomic u64 steps, steps_complement;
	char error[ERROR_BYTES];
};
enum child_type { CHILD_FORK, CHILD_EXEC, CHILD_VFORK, CHILD_HELPER };
enum { HOLD_PAUSE = 1, HOLD_CHECK = 2, HOLD_OUTSIDE = 4 };

struct control {
	_Atomic u32 hold; /* whoever sees a bit in it stops at the next step */
	_Atomic u32 check;
	_Atomic u64 canary; /* what `canary()` gives as long as no one has restored us */
	int canary_fd[2];
	struct child child[CHILDREN];
};

struct options {
	u64 seed, rng;
	u64 memory_pages;
	int threads, port;
	double rate;
	bool no_file_changes, small, prepare;
	const char *scratch, *status, *bind;
	char self[512]; /* our own program, for exec */
	int control_fd, place;
	u64 steps;
};

extern struct options options;
extern struct control *control;
extern int role; /* 0: main or exec'd; n: forked child n - 1. Also the part of shared regions that is ours */
extern __thread struct worker *me;
extern struct worker workers[THREADS];
extern struct worker child_worker;
extern struct log_entry logs[THREADS][LOG];
extern u64 bss_ring[THREADS][RING];
extern _Atomic u64 steps_begun; /* versions given out: one for each step of any thread */
extern u64 steps_before;	/* of the process that we were forked from */
extern bool unavailable[PATH_COUNT];
extern bool path_off[PATH_COUNT];
extern const char *const path_names[PATH_COUNT];
extern int listener;
extern _Atomic u32 sticky;
extern char sticky_error[ERROR_BYTES];

static inline u64 mix64(u64 x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static inline u64 random64(struct worker *w)
{
	w->rng += 0x9e3779b97f4a7c15u;
	return mix64(w->rng);
}

static inline u64 below(struct worker *w, u64 limit)
{
	return limit ? random64(w) % limit : 0;
}

/* The pattern: words are invertible, so that the check can say which version a wrong one is of. */
static inline u64 word_at(u64 key, u64 version, u64 index)
{
	return mix64(key + index * 0x9e3779b97f4a7c15u) ^ version * 0xd1342543de82ef95u;
}

static inline u64 version_of(u64 op)
{
	return op >> 4;
}

static inline enum kind kind_of(u64 op)
{
	return (enum kind)(op & 15);
}

static inline u64 *page_at(const struct region *r, u64 page)
{
	return (u64 *)(r->addr + page * r->stride * PAGE); // NOLINT: an address is what it is
}

/* ledger.c */
extern bool written_to[SLOTS]; /* since it was mapped. Else what mprotect(2) makes of it stays several mappings: pages
				* first written in two of them are of two anon_vmas, and the kernel joins no such two. */
void ledger_make(void);
const struct region *region_at(int slot);
void region_store(int slot, const struct region *r);
struct entry *entry_at(int slot, u64 page);
void range_begin(int slot, u64 first, u64 count, enum kind kind, u64 version, u64 pend);
void range_end(int slot, u64 first, u64 count);
bool patchable(int slot, u64 page);
u64 page_key(u64 uid, u64 page);
u64 file_key(u64 file, u64 page);
u64 file_version(u64 file, u64 page);
void file_store(u64 file, u64 page, u64 version);
void fill_file_page(u64 file, u64 page, u64 version, u64 *out);
u64 anonymous_pages(void);
u64 ledger_sum(void);
void disown_region(int slot);
void ledger_adopt(void);
u64 part_sum(int part);
bool part_is_ours(int part);
bool check_pages(int slot, u64 first, u64 count, char *error, size_t size);
bool check_world(char *error, size_t size, u64 *checked);
bool try_lock(int slot, struct worker *w);
void unlock(int slot);
void forget_locks(void);
void part_give(int part);
void part_take(int part);
int locked_by(int slot);
int ledger_areas(u64 out[][2]);

/* paths.c */
void world_make(struct worker *w);
void worker_loop(struct worker *w);
void worker_begin(struct worker *w, int number, u64 rng, u64 steps);
void worker_open(struct worker *w);
void worker_close(struct worker *w);
bool worker_sane(struct worker *w, char *error, size_t size);
void scratch_make(void);
u64 canary(void);
bool must_hold(void);
void choose_weights(bool child);
void on_signal_write(int number);
void world_end(void);
void nap(u64 ns);

/* family.c */
bool op_fork(struct worker *w, u64 v);
bool op_exec(struct worker *w, u64 v);
bool op_vfork_exec(struct worker *w, u64 v);
bool op_thread(struct worker *w, u64 v);
void park(struct worker *w);
void child_began(void);
void note_birth(void);
bool was_restored(void);
void child_stepped(void);
void reap(void);
void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Ask a forked helper to write pages of ours. mode 0: process_vm_writev, 1: /proc/PID/mem. Returns errno or 0. */
int helper_write(int mode, const struct region *r, u64 first, u64 count, u64 version);
bool helper_take(struct worker *w);
void helper_drop(void);
void start_workers(void);
void family_begin(void);
void child_end(bool check) __attribute__((noreturn));
extern struct child *my_child; /* NULL: we are the main process */
void catch_faults(void);
void fault_stack(void);
bool unreadable(const void *at);
void *serve(void *nothing); /* mutator.c: the thread of the control port */
bool children_sane(char *error, size_t size);
bool check_own(struct worker *w, char *error, size_t size);
extern _Atomic u64 retired_steps, retired_sum, threads_ended, children_ended;
extern _Atomic u64 retired_counters[PATH_COUNT];

#endif
