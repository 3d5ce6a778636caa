/* SPDX-License-Identifier: MIT
 *
 * The file oracle: what its parts share. See files.c for what it is, how a freeze is judged, and how to trust it.
 *
 *   files_model.c      what there must be: locks, intents, names
 *   files_blocks.c     what files contain
 *   files_names.c      every way in which names are changed
 *   files_attributes.c every way in which attributes are changed
 *   files_contents.c   every way in which contents are changed by a name
 *   files_held.c       what goes through descriptors, mappings and locks that are kept
 *   files_held_check.c whether those are what they must be
 *   files_judge.c      whether a directory is what the model says
 *   files_workers.c    threads and processes, and their steps
 *   files_port.c       the control port and the check of everything
 *   files.c            options
 */
#ifndef FILES_H
#define FILES_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

typedef uint64_t u64;
typedef int64_t i64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;

enum {
	PAGE = 4096,
	WORDS = PAGE / 8,
	NODES = 512,
	ENTRIES = 1024,
	LINKS = 6,
	BLOCKS = 128, /* with content, in one file; all others are zeros */
	PATCHES = 3,
	SPAN = 64 << 10, /* the most that one step writes */
	WORKERS = 4,
	PROCESSES = 3, /* the first has two workers, as threads; the others one each */
	HANDLES = 12,
	MAPPED = 8, /* pages of a mapping */
	XATTRS = 4,
	XATTR_BYTES = 1000,
	ACL_BYTES = 64,
	CAP_BYTES = 24,
	TARGET_BYTES = 3900,
	TARGET_SURE = 1000, /* XFS takes no more */
	PATH_MOST = 1500,   /* so that CRIU and others may put something in front of it */
	PATH_ROOM = PATH_MOST + 512,
	DEPTH_MOST = 24,
	GHOST_BYTES = 256 << 10, /* of an unlinked file: CRIU's ghost_limit is 1 MiB */
	GHOST_NAME = 220,	 /* bytes of its name, to which CRIU appends some */
	RANGE = 64,		 /* bytes of each handle that it may lock: those of no other */
	CHANGED_NODES = 4,
	CHANGED_ENTRIES = 2,
	ERROR_BYTES = 600,
	ERRORS = 8,
	ROOT = 1, /* node of the directory itself; 0 is none */
};

enum type { T_NONE, T_FILE, T_DIR, T_LINK, T_FIFO, T_SOCKET, T_CHAR, T_BLOCK };
enum { K_FILE = 1 << T_FILE, K_DIR = 1 << T_DIR, K_LINK = 1 << T_LINK, K_ANY = 0xfe, K_FLAT = K_ANY & ~K_DIR };

/* What a block was last told to contain. A key is (version << 24 | block), where the version is the number of the
 * step that wrote it and the block is where it did: both can be read from what is found. 0: zeros. */
struct block {
	u64 index;
	u64 base;
	u64 patch[PATCHES];
	u16 from[PATCHES], to[PATCHES]; /* oldest first; from == to: none */
};

struct node {
	u32 type, mode, uid, gid;
	u64 size, device;
	i64 mtime_s;
	u32 mtime_ns, unsure; /* unsure: nobody knows its mtime */
	u32 links, entry[LINKS];
	u32 which, blocks; /* of its two contents, and how many blocks it has there */
	u32 pinned;	   /* never loses its name */
	u32 target_bytes;
	u64 target;
	struct {
		u64 key;
		u32 bytes;
	} xattr[XATTRS];
	u32 acl_bytes, default_bytes, cap_bytes;
	u8 acl[ACL_BYTES], default_acl[ACL_BYTES], cap[CAP_BYTES];
};

struct entry {
	u32 parent; /* 0: there is no such entry */
	u32 node;
	u32 bytes;
	char name[256];
};

enum lock_kind { L_NONE, L_FLOCK_SHARED, L_FLOCK, L_POSIX_READ, L_POSIX, L_OFD_READ, L_OFD };

/* A descriptor or a mapping that is kept over many steps. Changed by its owner, with the node's lock. */
struct handle {
	u32 used, node;
	int fd, flags;
	u64 offset;
	u32 entry;     /* through which it was opened; 0: that is gone, */
	u32 lost_from; /* and this is the directory that had it */
	u32 lock;      /* enum lock_kind */
	u32 private;
	u64 at, first, pages;	 /* of the mapping */
	u64 private_key[MAPPED]; /* 0: the page is the file's */
};

/* Of a node whose change is under way these are not judged, and are read back when it is done. */
enum { W_MTIME = 1, W_MODE = 2, W_OWNER = 4, W_ACL = 8, W_CAP = 16, W_DEFAULT = 32 };
enum intent_state { I_NONE, I_BEGUN, I_DONE };

/* What a worker is about to do to the files: everything that it changes, as it will be. See files.c. */
struct intent {
	_Atomic u32 state;
	u32 nodes, entries;
	u32 torn;      /* the content of the first node changes bit by bit, from its beginning on */
	u32 lock_node; /* a lock on it is taken or given back */
	struct {
		u32 id, wild;
		struct node after;
	} node[CHANGED_NODES];
	struct {
		u32 id, spare;
		struct entry after;
	} entry[CHANGED_ENTRIES];
};

#define PATHS(X)                                                                                             \
	/* name, weight */                                                                                   \
	X(create, 200) X(mkdir, 45) X(symlink, 20) X(symlink_dangling, 20) X(symlink_long, 10) X(fifo, 12)   \
	X(socket, 12) X(char_device, 8) X(block_device, 8) X(tmpfile_link, 40) X(link, 60) X(unlink, 230)    \
	X(unlink_linked, 40) X(unlink_open, 25) X(unlink_remap, 20) X(rmdir, 40) X(rename, 80) X(move, 80)   \
	X(rename_over, 60) X(replace, 40) X(exchange, 30) X(rename_dir, 30) X(move_dir, 30)                  \
	X(exchange_dir, 15) X(chmod, 60) X(chmod_special, 30) X(chmod_dir, 20) X(chown, 60) X(chown_link, 15)\
	X(chown_dir, 20) X(times, 60) X(times_dir, 25) X(times_link, 15) X(xattr_set, 80) X(xattr_dir, 20)   \
	X(xattr_remove, 40) X(acl, 40) X(acl_default, 10) X(acl_remove, 25) X(capability, 40)                \
	X(write, 400) X(write_linked, 60) X(write_sparse, 60) X(append, 100) X(direct_write, 40)             \
	X(truncate_down, 80) X(truncate_up, 60) X(truncate_open, 25) X(punch, 60) X(zero_range, 30)          \
	X(allocate, 40) X(allocate_keep, 30) X(collapse_range, 20) X(insert_range, 20) X(copy_range, 60)     \
	X(clone, 20) X(fsync, 10) X(map_close, 50)                                                           \
	X(open, 80) X(open_unlinked, 8) X(close, 80) X(held_write, 200) X(held_pwrite, 100)                  \
	X(held_append, 120) X(held_read, 100) X(held_seek, 60) X(held_truncate, 40) X(held_chmod, 20)        \
	X(ghost_write, 40) X(ghost_read, 40) X(shared_write, 60) X(shared_append, 60) X(map_shared, 60)      \
	X(mapped_store, 150) X(mapped_only_store, 50) X(unmap, 30) X(map_unmap, 60) X(map_private, 40)       \
	X(private_store, 60) X(flock, 40) X(fcntl_lock, 40) X(ofd_lock, 40) X(unlock, 60)

enum path {
#define X(name, weight) P_##name,
	PATHS(X)
#undef X
	    P_IDLE, /* a step that found nothing to do */
	PATH_COUNT
};

/* A thread of a process that changes files. All of this is shared, so that who checks can see it. */
struct worker {
	u64 counters[PATH_COUNT];
	u64 rng, version, steps, period_ns, next_ns;
	u32 number, process, path, held;
	u32 holds[16]; /* nodes whose locks it has */
	u32 claims, claimed[4];
	_Atomic u32 live, parked, answered, sick;
	_Atomic int pid; /* of its process */
	u64 checked_handles;
	char error[ERROR_BYTES];
	struct intent intent;
} __attribute__((aligned(4096)));

enum { HOLD_PAUSE = 1, HOLD_CHECK = 2, HOLD_OUTSIDE = 4, HOLD_STEPS = 8 };
#define MODEL_MAGIC 0x3130656c69666f75u

/* All that is expected, and all that its processes tell each other. A memfd, mapped by all of them. */
struct model {
	u64 magic, bytes, seed;
	u64 most_blocks, most_nodes, slots, sparse_blocks;
	_Atomic u32 hold; /* whoever sees a bit in it stops at the next step */
	_Atomic u32 check;
	_Atomic u64 canary; /* what `canary()` gives as long as no one has restored us */
	int canary_fd[2];
	_Atomic u64 steps, last_step; /* begun, each of which is a version; and when to pause */
	_Atomic i64 blocks, nodes;
	_Atomic int topology; /* how many use paths; -1: one changes those of directories */
	_Atomic u32 topology_wanted, tables, newest_dir;
	_Atomic u32 sticky;
	char sticky_error[ERROR_BYTES];
	_Atomic u8 unavailable[PATH_COUNT];
	u32 unavailable_errno[PATH_COUNT];
	_Atomic u64 orphaned_tmpfiles; /* that had no name when they were restored: such can never get one */
	struct handle handle[WORKERS + 1][HANDLES]; /* the last row: opened before the fork, so of all processes */
	_Atomic u32 lock[NODES], claim[ENTRIES];
	struct worker worker[WORKERS];
	struct node node[NODES];
	struct entry entry[ENTRIES];
	struct block content[NODES][2][BLOCKS];
};

extern struct model *model;
extern bool path_off[PATH_COUNT];
extern const char *const path_names[PATH_COUNT];

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

static inline u64 smaller(u64 a, u64 b)
{
	return a < b ? a : b;
}

/* files_model.c */
typedef bool fits(struct worker *w, u32 id);
extern const char *const xattr_names[XATTRS];
bool hold(struct worker *w, u32 id);
void give_back(struct worker *w);
u32 take(struct worker *w, u32 kinds, fits *wanted);
u32 take_free_node(struct worker *w);
u32 take_free_entry(struct worker *w);
void enter_paths(void);
void leave_paths(void);
bool enter_topology(void);
void leave_topology(void);
struct node *change_node(struct worker *w, u32 id, u32 wild);
struct entry *change_entry(struct worker *w, u32 id);
void go(struct worker *w);
void undo(struct worker *w);
void settle(struct worker *w);
void read_back(struct worker *w, u32 id, int fd, const char *path);
bool refused(struct worker *w, const char *what, const char *path);
void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool add_link(struct node *n, u32 entry);
void drop_link(struct node *n, u32 entry);
int entry_path(u32 entry, char *out);
int node_path(u32 dir, char *out);
u32 depth_of(u32 dir);
bool inside(u32 dir, u32 ancestor);
void make_name(struct worker *w, struct entry *e);
void target_text(u64 key, u32 bytes, char *out);
void escape(const char *name, char *out, size_t room);
mode_t kind_of(u32 type);
u32 random_entry(struct worker *w, u32 id);
u32 handles_on(u32 node, u32 entry, u32 process);
bool privately_mapped(u32 node);
bool locked_by_process(u32 node, u32 process);
bool has_lost(const struct model *m, u32 dir);

/* files_blocks.c */
u64 key_of(u64 version, u64 block);
u64 word_of(u64 key, u64 index);
u64 key_in(u64 word, u64 index);
void pattern(u64 key, u64 from, size_t bytes, void *out);
const struct block *blocks_of(const struct model *m, u32 id, const struct node *n);
void render(const struct block *blocks, u32 count, u64 offset, u64 bytes, void *out);
void start_content(struct worker *w, u32 id);
bool put_range(struct worker *w, u32 id, u64 offset, u64 bytes, u64 version);
bool shift_blocks(struct worker *w, u32 id, u64 from, u64 count, bool away);
void copy_blocks(struct worker *w, u32 id, u32 source, u64 to, u64 from, u64 count);

/* files_names.c */
u32 born(struct worker *w, u32 dir, u32 type, u32 mode, char *path);

/* files_contents.c */
u64 some_offset(struct worker *w, u32 id, u64 beyond);
u64 some_length(struct worker *w);
bool may_open(struct worker *w, u32 id);
int open_node(struct worker *w, u32 id, u32 entry, int flags);
bool prepare_range(struct worker *w, u32 id, u64 *offset, u64 *bytes);
bool write_to(struct worker *w, u32 id, int fd, u64 offset, u64 bytes, bool positioned);
bool truncate_to(struct worker *w, u32 id, int fd, u64 size);
bool store_to(struct worker *w, u32 id, int fd, u64 at, u64 first, u64 pages);

/* files_held.c, files_held_check.c */
bool open_shared(struct worker *w);
bool check_handles(struct worker *w, char *error, size_t size, u64 *checked);

/* files_judge.c */
struct verdict {
	u32 count;
	u64 files, bytes, in_flight;
	char error[ERRORS][ERROR_BYTES];
};
void judge(const struct model *m, bool live, bool same_pids, struct verdict *verdict);

/* files_workers.c */
extern int listener;
void nap(u64 ns);
u64 canary(void);
bool was_restored(void);
void catch_signals(void);
void start_workers(void);
void reap(void);
void end_all(int number) __attribute__((noreturn));

/* files_port.c */
int listen_on_port(const char *host, int port);
void write_status(const char *file, int port, int model_fd);
void serve(void) __attribute__((noreturn));
void judge_on_demand(bool live) __attribute__((noreturn));

/* files.c */
void refuse(const char *what) __attribute__((noreturn));

typedef bool op(struct worker *w);
#define X(name, weight) op op_##name;
PATHS(X)
#undef X

#endif
