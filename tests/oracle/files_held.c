/* SPDX-License-Identifier: MIT
 *
 * What goes through descriptors, mappings and locks that are kept over many steps, also when the file has no name any
 * more.
 *
 * A handle is one descriptor, or one mapping, or both; it belongs to one worker, which changes it with its node's lock
 * held. Those of the last row were opened before the processes were forked: all have them, and share their offsets.
 * Each handle locks bytes of its own, and only through flock(2) do they meet: then who gets it follows from the model.
 */
#include "files.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

enum { APPENDED_MOST = 256 << 10, READ_MOST = 32 << 10 };

static __thread char buffer[2][READ_MOST];

/* ---- choosing ---- */

static bool reads(const struct handle *h)
{
	return h->fd >= 0 && (h->flags & O_ACCMODE) != O_WRONLY;
}

static bool writes(const struct handle *h)
{
	return h->fd >= 0 && (h->flags & O_ACCMODE) != O_RDONLY;
}

static bool writes_anywhere(const struct handle *h)
{
	return writes(h) && !(h->flags & O_APPEND);
}

static bool appends(const struct handle *h)
{
	return writes(h) && (h->flags & O_APPEND);
}

static bool is_ghost(const struct handle *h)
{
	return model->node[h->node].links == 0;
}

static bool any(const struct handle *h)
{
	return h->used;
}

/* One of this worker's handles, with its node held; NULL: found none. */
static struct handle *pick(struct worker *w, bool wanted(const struct handle *h))
{
	u64 first = below(w, HANDLES);
	for (u64 i = 0; i < HANDLES; i++) {
		struct handle *h = &model->handle[w->number][(first + i) % HANDLES];
		if (h->used && wanted(h) && hold(w, h->node))
			return h;
	}
	return NULL;
}

static struct handle *free_handle(struct worker *w)
{
	for (u64 i = 0; i < HANDLES; i++)
		if (!model->handle[w->number][i].used)
			return &model->handle[w->number][i];
	return NULL;
}

/* ---- opening and closing ---- */

bool op_open(struct worker *w)
{
	static const int flags[] = { O_RDWR,   O_RDWR,	 O_RDWR,	  O_RDWR | O_APPEND, O_WRONLY | O_APPEND,
				     O_WRONLY, O_RDONLY, O_RDWR | O_DSYNC };
	struct handle *h = free_handle(w);
	u32 id = h ? take(w, K_FILE, may_open) : 0;
	if (!id)
		return false;
	struct handle opened = { .node = id, .flags = flags[below(w, sizeof flags / sizeof *flags)] };
	opened.entry = random_entry(w, id);
	opened.fd = open_node(w, id, opened.entry, opened.flags);
	if (opened.fd < 0)
		return false;
	*h = opened;
	h->used = true;
	return true;
}

/* A file that never has a name. */
bool op_open_unlinked(struct worker *w)
{
	char path[PATH_ROOM];
	struct handle *h = free_handle(w);
	u32 dir = h ? take(w, K_DIR, NULL) : 0, id = dir ? take_free_node(w) : 0, mode = (u32)below(w, 01000);
	if (!id || path_off[P_unlink_open])
		return false;
	bool inherits = model->node[dir].default_bytes, given = model->node[dir].mode & S_ISGID;
	struct node *n = change_node(w, id, inherits ? W_MODE : 0);
	*n = (struct node){ .type = T_FILE, .mode = mode, .gid = given ? model->node[dir].gid : 0 };
	change_node(w, dir, 0)->unsure = true;
	node_path(dir, path);
	go(w);
	int fd = open(path, O_TMPFILE | O_RDWR | O_CLOEXEC, mode);
	if (fd < 0)
		return refused(w, "O_TMPFILE", path);
	read_back(w, id, fd, NULL);
	*h = (struct handle){ .node = id, .fd = fd, .flags = O_RDWR, .lost_from = dir };
	h->used = true;
	settle(w);
	return true;
}

static void close_handle(struct worker *w, struct handle *h)
{
	if (h->at)
		munmap((void *)h->at, h->pages * PAGE); // NOLINT: an address is what it is
	if (model->node[h->node].links == 0 && handles_on(h->node, 0, PROCESSES) == 1)
		change_node(w, h->node, 0)->type = T_NONE;
	w->intent.lock_node = h->node; /* if it has a lock, that is gone before we can say so */
	go(w);
	if (h->fd >= 0)
		close(h->fd);
	h->used = false;
	settle(w);
}

bool op_close(struct worker *w)
{
	struct handle *h = pick(w, any);
	if (h == NULL)
		return false;
	close_handle(w, h);
	return true;
}

/* Before the fork: two files that never lose their names, one of which is only appended to. */
bool open_shared(struct worker *w)
{
	for (u32 i = 0; i < 2; i++) {
		char path[PATH_ROOM];
		int flags = i ? O_WRONLY | O_APPEND : O_RDWR;
		u32 id = hold(w, ROOT) ? born(w, ROOT, T_FILE, 0644, path) : 0;
		if (!id)
			return false;
		change_node(w, id, 0)->pinned = true;
		go(w);
		int fd = open(path, O_CREAT | O_EXCL | O_CLOEXEC | flags, 0644);
		if (fd < 0)
			return refused(w, "open", path);
		read_back(w, id, fd, NULL);
		read_back(w, ROOT, -1, ".");
		settle(w);
		model->handle[WORKERS][i] = (struct handle){ .node = id, .fd = fd, .flags = flags };
		model->handle[WORKERS][i].entry = model->node[id].entry[0];
		model->handle[WORKERS][i].used = true;
		give_back(w);
	}
	return true;
}

/* ---- reading and writing ---- */

/* Write where the descriptor is; if that is too far out or too crowded, go elsewhere. */
static bool write_on(struct worker *w, struct handle *h, u64 bytes)
{
	u64 offset = h->offset, wanted = bytes;
	if (!prepare_range(w, h->node, &offset, &bytes))
		return false;
	if (offset != h->offset || bytes != wanted) {
		undo(w);
		return false;
	}
	if (!write_to(w, h->node, h->fd, offset, bytes, false))
		return false;
	h->offset = offset + bytes;
	return true;
}

/* Append; or, where the end is too crowded, cut it off. */
static bool append_to(struct worker *w, struct handle *h)
{
	u64 before = h->offset, size = model->node[h->node].size;
	h->offset = size; /* as O_APPEND has it */
	if (size <= APPENDED_MOST && write_on(w, h, some_length(w)))
		return true;
	h->offset = before;
	return !privately_mapped(h->node) &&
	       truncate_to(w, h->node, h->fd, size > APPENDED_MOST ? 0 : size / PAGE * PAGE);
}

static bool read_on(struct worker *w, struct handle *h)
{
	const struct node *n = &model->node[h->node];
	u64 bytes = 1 + below(w, READ_MOST), there = h->offset < n->size ? smaller(bytes, n->size - h->offset) : 0;
	ssize_t got = read(h->fd, buffer[0], bytes);
	if (got != (ssize_t)there) {
		fail("step %llu: %zd bytes were read at %llu of a file of %llu: %s", (unsigned long long)w->version,
		     got, (unsigned long long)h->offset, (unsigned long long)n->size,
		     got < 0 ? strerror(errno) : "too few or many");
		return false;
	}
	render(blocks_of(model, h->node, n), n->blocks, h->offset, there, buffer[1]);
	if (memcmp(buffer[0], buffer[1], there) != 0)
		fail("step %llu: what was read at %llu, %llu bytes of file %u, is not what was written",
		     (unsigned long long)w->version, (unsigned long long)h->offset, (unsigned long long)there,
		     h->node);
	h->offset += there;
	return true;
}

static bool seek_to(struct handle *h, u64 offset)
{
	if (lseek(h->fd, (off_t)offset, SEEK_SET) != (off_t)offset)
		fail("lseek: %s", strerror(errno));
	h->offset = offset;
	return true;
}

static void note_ghost(struct worker *w, const struct handle *h, int path)
{
	if (is_ghost(h))
		w->path = (u32)path;
}

static bool write_or_seek(struct worker *w, struct handle *h)
{
	if (write_on(w, h, some_length(w)))
		return true;
	return seek_to(h, some_offset(w, h->node, 0) / PAGE * PAGE) && write_on(w, h, PAGE);
}

bool op_held_write(struct worker *w)
{
	struct handle *h = pick(w, writes_anywhere);
	if (h == NULL)
		return false;
	note_ghost(w, h, P_ghost_write);
	return write_or_seek(w, h);
}

bool op_held_pwrite(struct worker *w)
{
	struct handle *h = pick(w, writes_anywhere);
	if (h == NULL)
		return false;
	note_ghost(w, h, P_ghost_write);
	u64 offset = some_offset(w, h->node, PAGE), bytes = some_length(w);
	return prepare_range(w, h->node, &offset, &bytes) && write_to(w, h->node, h->fd, offset, bytes, true);
}

bool op_held_append(struct worker *w)
{
	struct handle *h = pick(w, appends);
	if (h == NULL)
		return false;
	note_ghost(w, h, P_ghost_write);
	return append_to(w, h);
}

bool op_held_read(struct worker *w)
{
	struct handle *h = pick(w, reads);
	if (h == NULL)
		return false;
	note_ghost(w, h, P_ghost_read);
	return read_on(w, h);
}

bool op_held_seek(struct worker *w)
{
	struct handle *h = pick(w, reads);
	return h && seek_to(h, some_offset(w, h->node, PAGE));
}

bool op_held_truncate(struct worker *w)
{
	struct handle *h = pick(w, writes);
	if (h == NULL || privately_mapped(h->node))
		return false;
	return truncate_to(w, h->node, h->fd, below(w, model->node[h->node].size + PAGE));
}

static bool has_descriptor(const struct handle *h)
{
	return h->fd >= 0;
}

bool op_held_chmod(struct worker *w)
{
	struct handle *h = pick(w, has_descriptor);
	if (h == NULL)
		return false;
	u32 mode = (u32)below(w, 01000);
	change_node(w, h->node, model->node[h->node].acl_bytes ? W_ACL : 0)->mode = mode;
	go(w);
	if (fchmod(h->fd, mode))
		return refused(w, "fchmod", "a file");
	read_back(w, h->node, h->fd, NULL);
	settle(w);
	return true;
}

static bool ghost_writes(const struct handle *h)
{
	return is_ghost(h) && writes_anywhere(h);
}

static bool ghost_reads(const struct handle *h)
{
	return is_ghost(h) && reads(h);
}

bool op_ghost_write(struct worker *w)
{
	struct handle *h = pick(w, ghost_writes);
	return h && write_or_seek(w, h);
}

bool op_ghost_read(struct worker *w)
{
	struct handle *h = pick(w, ghost_reads);
	return h && (h->offset < model->node[h->node].size || seek_to(h, 0)) && read_on(w, h);
}

/* Through a descriptor that all processes have, so that its offset is all of theirs. */
bool op_shared_write(struct worker *w)
{
	struct handle *h = &model->handle[WORKERS][0];
	if (!hold(w, h->node))
		return false;
	if (h->offset > APPENDED_MOST)
		seek_to(h, 0);
	return write_or_seek(w, h);
}

bool op_shared_append(struct worker *w)
{
	struct handle *h = &model->handle[WORKERS][1];
	return hold(w, h->node) && append_to(w, h);
}

/* ---- mappings ---- */

static bool is_posix(const struct handle *h)
{
	return h->lock == L_POSIX || h->lock == L_POSIX_READ;
}

/* CRIU opens and closes a file once more to map it, by which the process loses its POSIX locks: not both. */
static bool may_map(const struct handle *h)
{
	return h->fd >= 0 && h->at == 0 && (h->flags & O_ACCMODE) == O_RDWR && model->node[h->node].size > 0 &&
	       !is_posix(h);
}

static bool map_some(struct worker *w, struct handle *h, int flags)
{
	const struct node *n = &model->node[h->node];
	u64 there = (n->size + PAGE - 1) / PAGE, first = smaller(some_offset(w, h->node, 0) / PAGE, there - 1);
	u64 pages = smaller(1 + below(w, MAPPED), there - first);
	void *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, h->fd, (off_t)(first * PAGE));
	if (at == MAP_FAILED) {
		fail("mmap: %s", strerror(errno));
		return false;
	}
	h->first = first;
	h->pages = pages;
	h->private = flags == MAP_PRIVATE;
	memset(h->private_key, 0, sizeof h->private_key);
	h->at = (u64)at;
	return true;
}

/* Every other mapping stays without its descriptor. */
bool op_map_shared(struct worker *w)
{
	struct handle *h = pick(w, may_map);
	if (h == NULL || !map_some(w, h, MAP_SHARED))
		return false;
	if (h->lock == L_NONE && below(w, 2)) {
		close(h->fd);
		h->fd = -1;
	}
	return true;
}

bool op_map_private(struct worker *w)
{
	struct handle *h = pick(w, may_map);
	return h && map_some(w, h, MAP_PRIVATE);
}

static bool mapped(const struct handle *h)
{
	return h->at && !h->private && h->fd >= 0;
}

static bool mapped_only(const struct handle *h)
{
	return h->at && !h->private && h->fd < 0;
}

static bool store(struct worker *w, struct handle *h)
{
	if (h == NULL || !store_to(w, h->node, h->fd, h->at, h->first, h->pages))
		return false;
	if (below(w, 16) == 0 && msync((void *)h->at, h->pages * PAGE, MS_ASYNC)) // NOLINT
		fail("msync: %s", strerror(errno));
	return true;
}

bool op_mapped_store(struct worker *w)
{
	return store(w, pick(w, mapped));
}

bool op_mapped_only_store(struct worker *w)
{
	return store(w, pick(w, mapped_only));
}

static bool has_mapping(const struct handle *h)
{
	return h->at;
}

bool op_unmap(struct worker *w)
{
	struct handle *h = pick(w, has_mapping);
	if (h == NULL)
		return false;
	if (h->fd < 0) {
		close_handle(w, h);
		return true;
	}
	munmap((void *)h->at, h->pages * PAGE); // NOLINT
	h->at = h->pages = h->private = 0;
	return true;
}

/* Mapped, written, unmapped; the descriptor stays open. */
bool op_map_unmap(struct worker *w)
{
	struct handle *h = pick(w, may_map);
	if (h == NULL || !map_some(w, h, MAP_SHARED))
		return false;
	bool done = store_to(w, h->node, h->fd, h->at, h->first, h->pages);
	munmap((void *)h->at, h->pages * PAGE); // NOLINT
	h->at = h->pages = 0;
	return done;
}

static bool privately(const struct handle *h)
{
	return h->at && h->private;
}

/* A whole page, which is ours from then on. */
bool op_private_store(struct worker *w)
{
	struct handle *h = pick(w, privately);
	u64 page = h ? below(w, h->pages) : 0, key = key_of(w->version, 0xffff00 + page);
	if (h == NULL || (h->first + page) * PAGE >= model->node[h->node].size)
		return false;
	volatile u64 *at = (volatile u64 *)(h->at + page * PAGE); // NOLINT
	for (u64 i = 0; i < WORDS; i++)
		at[i] = word_of(key, i);
	h->private_key[page] = key;
	return true;
}

/* ---- locks ---- */

static bool may_lock(const struct handle *h)
{
	return h->fd >= 0 && h->lock == L_NONE;
}

/* Would flock(2) have to wait? */
static bool flock_conflicts(const struct handle *mine, bool shared)
{
	for (u32 row = 0; row < WORKERS; row++)
		for (u32 i = 0; i < HANDLES; i++) {
			const struct handle *h = &model->handle[row][i];
			if (h != mine && h->used && h->node == mine->node &&
			    (h->lock == L_FLOCK || (h->lock == L_FLOCK_SHARED && !shared)))
				return true;
		}
	return false;
}

bool op_flock(struct worker *w)
{
	struct handle *h = pick(w, may_lock);
	if (h == NULL)
		return false;
	bool shared = below(w, 2), conflicts = flock_conflicts(h, shared);
	w->intent.lock_node = h->node;
	go(w);
	int failed = flock(h->fd, (shared ? LOCK_SH : LOCK_EX) | LOCK_NB);
	if (failed && errno != EWOULDBLOCK)
		return refused(w, "flock", "a file");
	if ((failed != 0) != conflicts)
		fail("step %llu: flock of file %u was %s, and others %s it", (unsigned long long)w->version, h->node,
		     failed ? "refused" : "granted", conflicts ? "have" : "do not have");
	if (!failed)
		h->lock = shared ? L_FLOCK_SHARED : L_FLOCK;
	settle(w);
	return true;
}

static bool set_lock(struct worker *w, struct handle *h, int command, int type)
{
	u64 place = (u64)(h - &model->handle[0][0]);
	struct flock lock = {
		.l_type = (short)type, .l_whence = SEEK_SET, .l_start = (off_t)(place * RANGE), .l_len = RANGE
	};
	w->intent.lock_node = h->node;
	go(w);
	if (fcntl(h->fd, command, &lock))
		return refused(w, "fcntl", "a file");
	return true;
}

static bool lock_range(struct worker *w, struct handle *h, bool posix)
{
	bool reading = !writes(h) || (reads(h) && below(w, 2));
	if (!set_lock(w, h, posix ? F_SETLK : F_OFD_SETLK, reading ? F_RDLCK : F_WRLCK))
		return false;
	h->lock = posix ? (reading ? L_POSIX_READ : L_POSIX) : (reading ? L_OFD_READ : L_OFD);
	settle(w);
	return true;
}

/* Of its process; so no other descriptor of the file may be closed by it, and none is there. */
bool op_fcntl_lock(struct worker *w)
{
	struct handle *h = pick(w, may_lock);
	return h && !h->at && handles_on(h->node, 0, w->process) == 1 && lock_range(w, h, true);
}

bool op_ofd_lock(struct worker *w)
{
	struct handle *h = pick(w, may_lock);
	return h && lock_range(w, h, false);
}

static bool has_lock(const struct handle *h)
{
	return h->lock != L_NONE;
}

bool op_unlock(struct worker *w)
{
	struct handle *h = pick(w, has_lock);
	if (h == NULL)
		return false;
	if (h->lock == L_FLOCK || h->lock == L_FLOCK_SHARED) {
		w->intent.lock_node = h->node;
		go(w);
		if (flock(h->fd, LOCK_UN))
			return refused(w, "flock", "a file");
	} else if (!set_lock(w, h, is_posix(h) ? F_SETLK : F_OFD_SETLK, F_UNLCK)) {
		return false;
	}
	h->lock = L_NONE;
	settle(w);
	return true;
}
