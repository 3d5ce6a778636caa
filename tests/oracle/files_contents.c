/* SPDX-License-Identifier: MIT
 *
 * Every way in which contents are changed, one function each; those that need what is kept open are in files_held.c.
 *
 * The content of afterwards is written down first, and what is written is made from it. A block has room for a few
 * parts of different versions; what would be one more is done to whole blocks instead. What can be seen half done
 * (stores through a mapping, copies by the kernel) is said to be `torn`.
 */
#include "files.h"

#include <errno.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ROOM = SPAN + 2 * PAGE, ALLOCATED = BLOCKS * PAGE /* further than that nothing is allocated ahead */ };

static __thread char buffer[ROOM] __attribute__((aligned(4096)));

/* ---- choosing ---- */

u64 some_length(struct worker *w)
{
	return 1 + below(w, 1 + below(w, 1 + below(w, SPAN)));
}

/* A place in a file, or up to so much beyond its end; every other time near a block that has content. */
u64 some_offset(struct worker *w, u32 id, u64 beyond)
{
	const struct node *n = &model->node[id];
	if (n->blocks && below(w, 2)) {
		u64 at = blocks_of(model, id, n)[below(w, n->blocks)].index * PAGE + below(w, 2 * PAGE);
		return smaller(at, n->size + beyond);
	}
	return below(w, n->size + beyond + 1);
}

bool may_open(struct worker *w, u32 id)
{
	return model->node[id].links > 0 && !locked_by_process(id, w->process);
}

static bool may_shrink(struct worker *w, u32 id)
{
	return may_open(w, id) && model->node[id].size > 0 && !privately_mapped(id);
}

int open_node(struct worker *w, u32 id, u32 entry, int flags)
{
	char path[PATH_ROOM], told[200];
	(void)w;
	entry_path(entry, path);
	int fd = open(path, flags | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0 && !(errno == EINVAL && (flags & O_DIRECT))) {
		int error = errno;
		escape(path, told, sizeof told);
		fail("cannot open %s, file %u: %s", told, id, strerror(error));
	}
	return fd;
}

static u32 take_file(struct worker *w, fits *wanted, int flags, int *fd)
{
	u32 id = take(w, K_FILE, wanted);
	*fd = id ? open_node(w, id, random_entry(w, id), flags) : -1;
	return *fd >= 0 ? id : 0;
}

/* ---- what writing does ---- */

/* Write down that the content of a file changes; what the kernel does to it besides is read back. */
static struct node *change_content(struct worker *w, u32 id)
{
	const struct node *n = &model->node[id];
	u32 wild = W_MTIME | (n->mode & 06000 ? W_MODE : 0) | (n->cap_bytes && n->links ? W_CAP : 0);
	struct node *after = change_node(w, id, wild);
	start_content(w, id);
	return after;
}

static u64 most_size(u32 id)
{
	return model->node[id].links ? model->sparse_blocks * PAGE : GHOST_BYTES;
}

static bool within_limits(u32 id, const struct node *after)
{
	i64 more = (i64)after->blocks - (i64)model->node[id].blocks;
	return after->size <= most_size(id) &&
	       (more <= 0 || atomic_load(&model->blocks) + more <= (i64)model->most_blocks);
}

static bool try_range(struct worker *w, u32 id, u64 offset, u64 bytes, bool zeros)
{
	struct node *after = change_content(w, id);
	if (!put_range(w, id, offset, bytes, zeros ? 0 : w->version))
		return false;
	if (!zeros && offset + bytes > after->size)
		after->size = offset + bytes;
	return within_limits(id, after);
}

/* Write down a range, or the whole blocks that it touches; false: it may not be. */
static bool prepare(struct worker *w, u32 id, u64 *offset, u64 *bytes, bool zeros)
{
	if (try_range(w, id, *offset, *bytes, zeros))
		return true;
	u64 end = (*offset + *bytes + PAGE - 1) / PAGE * PAGE;
	*offset = *offset / PAGE * PAGE;
	*bytes = end - *offset;
	if (try_range(w, id, *offset, *bytes, zeros))
		return true;
	undo(w);
	return false;
}

bool prepare_range(struct worker *w, u32 id, u64 *offset, u64 *bytes)
{
	return prepare(w, id, offset, bytes, false);
}

/* Write what was prepared: at its place, or wherever the descriptor is. */
bool write_to(struct worker *w, u32 id, int fd, u64 offset, u64 bytes, bool positioned)
{
	const struct node *after = change_node(w, id, 0);
	render(model->content[id][after->which], after->blocks, offset, bytes, buffer);
	go(w);
	ssize_t written = positioned ? pwrite(fd, buffer, bytes, (off_t)offset) : write(fd, buffer, bytes);
	if (written < 0)
		return refused(w, "write", "a file");
	if ((u64)written != bytes)
		fail("step %llu: only %zd of %llu bytes were written", (unsigned long long)w->version, written,
		     (unsigned long long)bytes);
	read_back(w, id, fd, NULL);
	settle(w);
	return true;
}

static bool write_somewhere(struct worker *w, u32 id, int fd, u64 offset, u64 bytes)
{
	bool done = prepare_range(w, id, &offset, &bytes) && write_to(w, id, fd, offset, bytes, true);
	close(fd);
	return done;
}

bool op_write(struct worker *w)
{
	int fd;
	u32 id = take_file(w, may_open, O_WRONLY, &fd);
	return id && write_somewhere(w, id, fd, some_offset(w, id, below(w, 4) ? 0 : SPAN), some_length(w));
}

static bool several_names(struct worker *w, u32 id)
{
	return may_open(w, id) && model->node[id].links > 1;
}

/* By one of its names. */
bool op_write_linked(struct worker *w)
{
	int fd;
	u32 id = take_file(w, several_names, O_WRONLY, &fd);
	return id && write_somewhere(w, id, fd, some_offset(w, id, PAGE), some_length(w));
}

/* Far beyond the end of a file. */
bool op_write_sparse(struct worker *w)
{
	int fd;
	u32 id = take_file(w, may_open, O_WRONLY, &fd);
	u64 most = below(w, 4) ? ALLOCATED * 4 : model->sparse_blocks * PAGE - SPAN;
	return id && write_somewhere(w, id, fd, below(w, most), 1 + below(w, 2 * PAGE));
}

bool op_append(struct worker *w)
{
	int fd;
	u32 id = take_file(w, may_open, O_WRONLY | O_APPEND, &fd);
	if (!id)
		return false;
	u64 offset = model->node[id].size, bytes = some_length(w);
	bool done = try_range(w, id, offset, bytes, false) && write_to(w, id, fd, offset, bytes, false);
	if (!done)
		undo(w);
	close(fd);
	return done;
}

bool op_direct_write(struct worker *w)
{
	u32 id = take(w, K_FILE, may_open);
	int fd = id ? open_node(w, id, random_entry(w, id), O_WRONLY | O_DIRECT) : -1;
	if (id && fd < 0)
		return refused(w, "O_DIRECT", "a file");
	if (!id)
		return false;
	u64 offset = some_offset(w, id, PAGE) / PAGE * PAGE, bytes = PAGE * (1 + below(w, 1 + below(w, SPAN / PAGE)));
	return write_somewhere(w, id, fd, offset, bytes);
}

/* ---- sizes and holes ---- */

/* Cut off or lengthen; a size that would leave a block in too many parts becomes a multiple of blocks. */
bool truncate_to(struct worker *w, u32 id, int fd, u64 size)
{
	for (int tries = 0; tries < 2; tries++) {
		struct node *after = change_content(w, id);
		u64 old = after->size, whole = (old + PAGE - 1) / PAGE * PAGE;
		after->size = size;
		if (size >= old || put_range(w, id, size, whole - size, 0))
			break;
		size = size / PAGE * PAGE;
	}
	if (!within_limits(id, change_node(w, id, 0))) {
		undo(w);
		return false;
	}
	go(w);
	if (ftruncate(fd, (off_t)size))
		return refused(w, "ftruncate", "a file");
	read_back(w, id, fd, NULL);
	settle(w);
	return true;
}

static bool truncate_file(struct worker *w, u32 id, int fd, u64 size)
{
	bool done = id && truncate_to(w, id, fd, size);
	if (id)
		close(fd);
	return done;
}

bool op_truncate_down(struct worker *w)
{
	int fd;
	u32 id = take_file(w, may_shrink, O_WRONLY, &fd);
	return truncate_file(w, id, fd, id ? below(w, model->node[id].size) : 0);
}

bool op_truncate_up(struct worker *w)
{
	int fd;
	u32 id = take_file(w, may_open, O_WRONLY, &fd);
	u64 more = 1 + below(w, below(w, 8) ? 4 * PAGE : model->sparse_blocks * PAGE / 4);
	return truncate_file(w, id, fd, id ? model->node[id].size + more : 0);
}

bool op_truncate_open(struct worker *w)
{
	u32 id = take(w, K_FILE, may_shrink);
	if (!id)
		return false;
	struct node *after = change_content(w, id);
	after->size = after->blocks = 0;
	go(w);
	int fd = open_node(w, id, random_entry(w, id), O_WRONLY | O_TRUNC);
	if (fd < 0)
		return false;
	read_back(w, id, fd, NULL);
	settle(w);
	close(fd);
	return true;
}

/* The calls of fallocate(2) that change nothing but what was written down. A signal may send it back. */
static bool allocate(struct worker *w, u32 id, int fd, int mode, u64 offset, u64 bytes)
{
	int failed;
	go(w);
	do
		failed = fallocate(fd, mode, (off_t)offset, (off_t)bytes);
	while (failed && errno == EINTR);
	if (failed)
		return refused(w, "fallocate", "a file");
	read_back(w, id, fd, NULL);
	settle(w);
	return true;
}

static bool with_content(struct worker *w, u32 id)
{
	return may_open(w, id) && model->node[id].size > PAGE;
}

static bool make_zeros(struct worker *w, int mode)
{
	int fd;
	u32 id = take_file(w, with_content, O_WRONLY, &fd);
	if (!id)
		return false;
	u64 offset = some_offset(w, id, 0), bytes = some_length(w);
	if (mode == FALLOC_FL_ZERO_RANGE)
		offset = smaller(offset, ALLOCATED);
	mode |= FALLOC_FL_KEEP_SIZE;
	bool done = prepare(w, id, &offset, &bytes, true) && allocate(w, id, fd, mode, offset, bytes);
	close(fd);
	return done;
}

bool op_punch(struct worker *w)
{
	return make_zeros(w, FALLOC_FL_PUNCH_HOLE);
}

bool op_zero_range(struct worker *w)
{
	return make_zeros(w, FALLOC_FL_ZERO_RANGE);
}

static bool allocate_ahead(struct worker *w, int mode)
{
	int fd;
	u32 id = take_file(w, may_open, O_WRONLY, &fd);
	if (!id)
		return false;
	u64 offset = smaller(some_offset(w, id, PAGE), ALLOCATED), bytes = 1 + below(w, 8 * PAGE);
	struct node *after = change_content(w, id);
	if (mode == 0 && offset + bytes > after->size)
		after->size = offset + bytes;
	bool done = allocate(w, id, fd, mode, offset, bytes);
	close(fd);
	return done;
}

bool op_allocate(struct worker *w)
{
	return allocate_ahead(w, 0);
}

bool op_allocate_keep(struct worker *w)
{
	return allocate_ahead(w, FALLOC_FL_KEEP_SIZE);
}

static bool several_pages(struct worker *w, u32 id)
{
	return may_shrink(w, id) && model->node[id].size > 2 * PAGE;
}

bool op_collapse_range(struct worker *w)
{
	int fd;
	u32 id = take_file(w, several_pages, O_RDWR, &fd);
	if (!id)
		return false;
	u64 pages = (model->node[id].size - 1) / PAGE, from = below(w, pages),
	    count = 1 + below(w, smaller(pages - from, 4));
	struct node *after = change_content(w, id);
	after->size -= count * PAGE;
	bool done = shift_blocks(w, id, from, count, true) &&
		    allocate(w, id, fd, FALLOC_FL_COLLAPSE_RANGE, from * PAGE, count * PAGE);
	if (!done)
		undo(w);
	close(fd);
	return done;
}

bool op_insert_range(struct worker *w)
{
	int fd;
	u32 id = take_file(w, several_pages, O_RDWR, &fd);
	if (!id)
		return false;
	u64 from = below(w, model->node[id].size / PAGE), count = 1 + below(w, 4);
	struct node *after = change_content(w, id);
	after->size += count * PAGE;
	bool done = within_limits(id, after) && shift_blocks(w, id, from, count, false) &&
		    allocate(w, id, fd, FALLOC_FL_INSERT_RANGE, from * PAGE, count * PAGE);
	if (!done)
		undo(w);
	close(fd);
	return done;
}

/* ---- from file to file ---- */

static bool copy_all(int from, int to, u64 source, u64 target, u64 bytes)
{
	loff_t in = (loff_t)source, out = (loff_t)target;
	while ((u64)out < target + bytes) {
		ssize_t part = copy_file_range(from, &in, to, &out, target + bytes - (u64)out, 0);
		if (part == 0)
			errno = EIO;
		if (part == 0 || (part < 0 && errno != EINTR))
			return false;
	}
	return true;
}

bool op_copy_range(struct worker *w)
{
	int from, to;
	u32 source = take_file(w, with_content, O_RDONLY, &from),
	    id = source ? take_file(w, may_open, O_WRONLY, &to) : 0;
	bool done = false;
	if (id && id != source) {
		u64 there = model->node[source].size / PAGE, first = below(w, there);
		u64 count = 1 + below(w, smaller(there - first, SPAN / PAGE)),
		    target = some_offset(w, id, PAGE) / PAGE;
		struct node *after = change_content(w, id);
		w->intent.torn = true;
		if ((target + count) * PAGE > after->size)
			after->size = (target + count) * PAGE;
		if (after->blocks + count <= BLOCKS) {
			copy_blocks(w, id, source, target, first, count);
			done = within_limits(id, after);
		}
		if (done)
			go(w);
		if (done && !copy_all(from, to, first * PAGE, target * PAGE, count * PAGE))
			done = refused(w, "copy_file_range", "a file");
		if (done) {
			read_back(w, id, to, NULL);
			settle(w);
		}
		if (!done)
			undo(w);
	}
	if (source)
		close(from);
	if (id)
		close(to);
	return done;
}

static bool clone_into(struct worker *w, u32 id, u32 source, int to, int from)
{
	const struct node *theirs = &model->node[source];
	if (id == source || theirs->size == 0 || model->node[id].size > theirs->size || privately_mapped(id))
		return false;
	struct node *after = change_content(w, id);
	after->blocks = 0;
	after->size = theirs->size;
	copy_blocks(w, id, source, 0, 0, (theirs->size + PAGE - 1) / PAGE);
	if (!within_limits(id, after)) {
		undo(w);
		return false;
	}
	go(w);
	int failed;
	do
		failed = ioctl(to, FICLONE, from);
	while (failed && errno == EINTR);
	if (failed)
		return refused(w, "FICLONE", "a file");
	read_back(w, id, to, NULL);
	settle(w);
	return true;
}

bool op_clone(struct worker *w)
{
	int from, to;
	u32 source = take_file(w, may_open, O_RDONLY, &from), id = source ? take_file(w, may_open, O_RDWR, &to) : 0;
	bool done = id && clone_into(w, id, source, to, from);
	if (source)
		close(from);
	if (id)
		close(to);
	return done;
}

bool op_fsync(struct worker *w)
{
	int fd;
	u32 id = take_file(w, may_open, O_WRONLY, &fd);
	if (!id)
		return false;
	if (below(w, 2) ? fsync(fd) : sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE))
		fail("fsync: %s", strerror(errno));
	close(fd);
	return true;
}

/* ---- stores ---- */

/* Words through a mapping of some pages, inside of the file. `fd`: to read the time back, or -1. */
bool store_to(struct worker *w, u32 id, int fd, u64 at, u64 first, u64 pages)
{
	u64 start = first * PAGE, end = smaller((first + pages) * PAGE, model->node[id].size) / 8 * 8;
	if (start >= end)
		return false;
	u64 offset = start + below(w, end - start) / 8 * 8, bytes = (1 + below(w, below(w, 2) ? 8 : WORDS * 2)) * 8;
	bytes = smaller(bytes, end - offset);
	if (!try_range(w, id, offset, bytes, false)) {
		offset = offset / PAGE * PAGE;
		bytes = smaller(PAGE, end - offset);
		if (!try_range(w, id, offset, bytes, false)) {
			undo(w);
			return false;
		}
	}
	const struct node *after = change_node(w, id, 0);
	render(model->content[id][after->which], after->blocks, offset, bytes, buffer);
	w->intent.torn = true;
	go(w);
	volatile u64 *to = (volatile u64 *)(at + (offset - start)); // NOLINT: an address is what it is
	for (u64 i = 0; i < bytes / 8; i++)
		to[i] = ((const u64 *)buffer)[i];
	read_back(w, id, fd, NULL);
	settle(w);
	return true;
}

/* Mapped, written, unmapped, closed. */
bool op_map_close(struct worker *w)
{
	int fd;
	u32 id = take_file(w, with_content, O_RDWR, &fd);
	if (!id)
		return false;
	u64 there = (model->node[id].size + PAGE - 1) / PAGE,
	    first = smaller(some_offset(w, id, 0) / PAGE, there - 1);
	u64 pages = smaller(MAPPED, there - first);
	char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(first * PAGE));
	bool done = false;
	if (at == MAP_FAILED) {
		fail("mmap: %s", strerror(errno));
	} else {
		done = store_to(w, id, fd, (u64)at, first, pages);
		munmap(at, pages * PAGE);
	}
	close(fd);
	return done;
}
