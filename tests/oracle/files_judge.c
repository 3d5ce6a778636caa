/* SPDX-License-Identifier: MIT
 *
 * Is a directory what the model says? In: a model that nobody is changing (all are parked, stopped or frozen, or it is a
 * copy), and the directory as working directory. Out: what is different.
 *
 * 1. A copy of the tables is made, and what was done but not entered yet is entered into it.
 * 2. Everything that no change under way concerns is compared: names, nothing beside them, attributes, contents, links.
 * 3. Each change under way must be as before it or as after it, in all that it concerns; a torn one anywhere between.
 *    Directories that are renamed are walked once it is known where they are.
 *
 * Nothing of what it says depends on the order of names or on inode numbers, which are others on another host.
 */
#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/xattr.h>
#include <unistd.h>

enum {
	CHUNK = 64 << 10,
	DOUBTED = WORKERS * CHANGED_ENTRIES * 2,
	PLACES = CHANGED_ENTRIES * 2,
	MESSAGE = 280,
	NAMED = 200
};

/* A name that a change under way makes or takes away. */
struct doubted {
	u32 worker, parent, bytes;
	const char *name;
	bool found;
	struct stat status;
	char *path;
};

static const struct model *m;
static struct verdict *verdict;
static bool live, same_pids;
static struct node nodes[NODES];
static struct entry entries[ENTRIES];
static u32 first_in[NODES], next_in[ENTRIES];
static bool entry_seen[ENTRIES];
static u32 doubt_of_node[NODES], doubt_of_entry[ENTRIES]; /* worker + 1 */
static bool lock_doubted[NODES];
static struct {
	char *path; /* NULL: not seen yet */
	dev_t dev;
	ino_t ino;
} seen[NODES];
static struct doubted doubted[DOUBTED];
static u32 doubted_count;
static char found[CHUNK], wanted[CHUNK], wanted_too[CHUNK];

static bool note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One more difference; always false. */
static bool note(const char *format, ...)
{
	va_list arguments;
	if (verdict->count < ERRORS) {
		va_start(arguments, format);
		vsnprintf(verdict->error[verdict->count], ERROR_BYTES, format, arguments);
		va_end(arguments);
	}
	verdict->count++;
	return false;
}

static bool say(char *out, const char *format, ...) __attribute__((format(printf, 2, 3)));

static bool say(char *out, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(out, MESSAGE, format, arguments);
	va_end(arguments);
	return false;
}

static const char *shown(const char *path)
{
	static char out[2][NAMED];
	static int at;
	at = !at;
	escape(path, out[at], NAMED);
	return out[at];
}

/* ---- contents ---- */

static u64 key_at(const struct block *blocks, u32 count, u64 offset)
{
	for (u32 at = 0; at < count; at++) {
		const struct block *b = &blocks[at];
		if (b->index != offset / PAGE)
			continue;
		for (int i = PATCHES - 1; i >= 0; i--)
			if (offset % PAGE >= b->from[i] && offset % PAGE < b->to[i])
				return b->patch[i];
		return b->base;
	}
	return 0;
}

static void tell_key(u64 key, char *out, size_t room)
{
	if (key)
		snprintf(out, room, "what step %llu wrote to block %llu", (unsigned long long)(key >> 24),
			 (unsigned long long)(key & 0xffffff));
	else
		snprintf(out, room, "zeros");
}

/* Say what there is at a byte, and what must be; words can be inverted, so both tell of which step they are. */
static bool say_byte(u32 id, const struct node *n, u64 chunk, u64 bytes, u64 at, char *out)
{
	u64 offset = chunk + at, word, start = at / 8 * 8;
	char is[80] = "something else", must[80];
	tell_key(key_at(blocks_of(m, id, n), n->blocks, offset), must, sizeof must);
	if (start + 8 <= bytes) {
		memcpy(&word, found + start, 8);
		u64 key = key_in(word, (chunk + start) % PAGE / 8);
		if (word == 0)
			tell_key(0, is, sizeof is);
		else if (key >> 24 && key >> 24 <= atomic_load(&m->steps))
			tell_key(key, is, sizeof is);
	}
	return say(out, "byte %llu (block %llu) has %s, and must have %s", (unsigned long long)offset,
		   (unsigned long long)(offset / PAGE), is, must);
}

/* Is a range as it must be? Or, of a torn change: as after it up to some byte, from there on as before it. */
static bool range_is_right(u32 id, const struct node *n, const struct node *before, bool *turned, u64 offset,
			   u64 bytes, char *out)
{
	render(blocks_of(m, id, n), n->blocks, offset, bytes, wanted);
	if (!*turned && memcmp(found, wanted, bytes) == 0)
		return true;
	u64 at = 0;
	while (!*turned && found[at] == wanted[at])
		at++;
	if (before == NULL)
		return say_byte(id, n, offset, bytes, at, out);
	*turned = true;
	render(blocks_of(m, id, before), before->blocks, offset, bytes, wanted_too);
	for (; at < bytes; at++)
		if (found[at] != wanted_too[at])
			return say_byte(id, before, offset, bytes, at, out);
	return true;
}

static bool content_is_right(int fd, u32 id, const struct node *n, const struct node *before, u64 size, char *out)
{
	bool turned = false;
	u64 offset = 0;
	const struct block *blocks = blocks_of(m, id, n);
	u32 next = 0;
	while (offset < size) {
		off_t data = lseek(fd, (off_t)offset, SEEK_DATA);
		if (data < 0 && errno != ENXIO)
			return say(out, "looking for its data: %s", strerror(errno));
		u64 start = data < 0 ? size : smaller((u64)data, size) / PAGE * PAGE;
		if (start < offset) /* a hole that begins within a page */
			start = offset;
		memset(found, 0, PAGE);
		for (; next < n->blocks && blocks[next].index * PAGE < start;
		     next++) { /* what must be here reads as zeros */
			u64 at = blocks[next].index * PAGE;
			if (at >= offset && at < size &&
			    !range_is_right(id, n, before, &turned, at, smaller(PAGE, size - at), out))
				return false;
		}
		if (start >= size)
			break;
		off_t hole = lseek(fd, (off_t)start, SEEK_HOLE);
		u64 end = hole < 0 ? size : smaller((u64)hole, size);
		for (offset = start; offset < end;) {
			u64 bytes = smaller(CHUNK, end - offset);
			ssize_t got = pread(fd, found, bytes, (off_t)offset);
			if (got <= 0)
				return say(out, "it cannot be read at %llu: %s", (unsigned long long)offset,
					   got ? strerror(errno) : "it ends");
			if (!range_is_right(id, n, before, &turned, offset, (u64)got, out))
				return false;
			offset += (u64)got;
			verdict->bytes += (u64)got;
		}
		while (next < n->blocks && (blocks[next].index + 1) * PAGE <= offset)
			next++;
	}
	return true;
}

/* ---- locks ---- */

static bool flock_is(int fd, int how, bool granted, const char *what, char *out)
{
	bool got = flock(fd, how | LOCK_NB) == 0;
	if (got)
		flock(fd, LOCK_UN);
	return got == granted ||
	       say(out, "%s lock of flock(2) is %s", what, got ? "not held any more" : "held by nobody known");
}

static bool range_lock_is(int fd, u32 row, u32 at, char *out)
{
	const struct handle *h = &m->handle[row][at];
	u64 start = (row * HANDLES + at) * RANGE;
	bool reading = h->lock == L_OFD_READ || h->lock == L_POSIX_READ,
	     posix = h->lock == L_POSIX || h->lock == L_POSIX_READ;
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)start, .l_len = RANGE };
	if (fcntl(fd, F_OFD_GETLK, &lock))
		return say(out, "its locks cannot be read: %s", strerror(errno));
	if (lock.l_type == F_UNLCK)
		return say(out, "worker %u's %s lock of bytes %llu (descriptor %d) is not held any more", row,
			   posix ? "POSIX" : "OFD", (unsigned long long)start, h->fd);
	if (lock.l_type != (reading ? F_RDLCK : F_WRLCK) || lock.l_start != (off_t)start || lock.l_len != RANGE)
		return say(out, "worker %u's lock of bytes %llu is one of kind %d of bytes %lld", row,
			   (unsigned long long)start, lock.l_type, (long long)lock.l_start);
	if (same_pids && lock.l_pid != (posix ? atomic_load(&m->worker[row].pid) : -1))
		return say(out, "worker %u's lock of bytes %llu is that of process %d", row,
			   (unsigned long long)start, lock.l_pid);
	return true;
}

static bool locks_are_right(int fd, u32 id, char *out)
{
	u32 ranges = 0, shared = 0, alone = 0;
	for (u32 row = 0; row < WORKERS; row++)
		for (u32 at = 0; at < HANDLES; at++) {
			const struct handle *h = &m->handle[row][at];
			if (!h->used || h->node != id)
				continue;
			shared += h->lock == L_FLOCK_SHARED;
			alone += h->lock == L_FLOCK;
			if (h->lock < L_POSIX_READ)
				continue;
			ranges++;
			if (!range_lock_is(fd, row, at, out))
				return false;
		}
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	if (ranges == 0 && fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK)
		return say(out, "bytes %lld of it are locked, and nobody has that lock", (long long)lock.l_start);
	return flock_is(fd, LOCK_EX, !shared && !alone, shared ? "a shared" : "an exclusive", out) &&
	       flock_is(fd, LOCK_SH, !alone, "an exclusive", out);
}

/* ---- attributes ---- */

/* Others are labels of a security module, or how XFS shows a list that it has by another name too. */
static bool is_ours(const char *name)
{
	return !strncmp(name, "user.", 5) || !strncmp(name, "system.posix_acl", 16) ||
	       !strcmp(name, "security.capability") ||
	       (!strncmp(name, "trusted.", 8) && strncmp(name, "trusted.SGI_ACL", 15));
}

static bool value_is(const char *path, const char *name, const void *value, size_t bytes, char *out)
{
	char is[1 << 12];
	ssize_t size = lgetxattr(path, name, is, sizeof is);
	if (size < 0)
		return say(out, "its attribute %s cannot be read: %s", shown(name), strerror(errno));
	if ((size_t)size == bytes && memcmp(is, value, bytes) == 0)
		return true;
	return say(out, "its attribute %s has %zd bytes that are not the %zu that it must have", shown(name), size,
		   bytes);
}

/* All that there must be, and no more. */
static bool xattrs_are_right(const char *path, const struct node *n, u32 wild, char *out)
{
	static const char *const kernels[] = { "system.posix_acl_access", "system.posix_acl_default",
					       "security.capability" };
	const u32 bytes[] = { n->acl_bytes, n->default_bytes, n->cap_bytes }, wilds[] = { W_ACL, W_DEFAULT, W_CAP };
	const u8 *const values[] = { n->acl, n->default_acl, n->cap };
	char value[XATTR_BYTES], names[1 << 12];
	if (n->type == T_LINK)
		return true;
	for (u32 i = 0; i < XATTRS; i++) {
		if (n->xattr[i].key == 0)
			continue;
		pattern(n->xattr[i].key, 0, n->xattr[i].bytes, value);
		if (!value_is(path, xattr_names[i], value, n->xattr[i].bytes, out))
			return false;
	}
	for (u32 i = 0; i < 3; i++)
		if (bytes[i] && !(wild & wilds[i]) && !value_is(path, kernels[i], values[i], bytes[i], out))
			return false;
	ssize_t size = llistxattr(path, names, sizeof names);
	if (size < 0 && errno != EOPNOTSUPP)
		return say(out, "its attributes cannot be listed: %s", strerror(errno));
	for (const char *name = names; size > 0 && name < names + size; name += strlen(name) + 1) {
		bool known = !is_ours(name);
		for (u32 i = 0; i < XATTRS; i++)
			known = known || (n->xattr[i].key && !strcmp(name, xattr_names[i]));
		for (u32 i = 0; i < 3; i++)
			known = known || ((bytes[i] || (wild & wilds[i])) && !strcmp(name, kernels[i]));
		if (!known)
			return say(out, "it has an attribute %s, and must not", shown(name));
	}
	return true;
}

static bool target_is_right(const char *path, const struct node *n, char *out)
{
	char is[TARGET_BYTES + 2], must[TARGET_BYTES + 1];
	ssize_t size = readlink(path, is, sizeof is);
	target_text(n->target, n->target_bytes, must);
	if (size == (ssize_t)n->target_bytes && memcmp(is, must, n->target_bytes) == 0)
		return true;
	is[size > 0 ? smaller((u64)size, TARGET_BYTES) : 0] = 0;
	return say(out, "its target is %.80s (%zd bytes), and must have %u", shown(is), size, n->target_bytes);
}

static bool file_is_right(u32 id, const struct node *n, const struct node *before, const char *path, u64 size,
			  char *out)
{
	int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NOCTTY);
	if (fd < 0)
		return say(out, "it cannot be opened: %s", strerror(errno));
	bool right = content_is_right(fd, id, n, before, size, out) &&
		     (!live || lock_doubted[id] || locks_are_right(fd, id, out));
	close(fd);
	return right;
}

/* One inode against its record. `before`: of a change that may be half done, what it was. */
static bool node_is_right(u32 id, const struct node *n, u32 wild, const struct node *before, const char *path,
			  char *out)
{
	struct stat is;
	verdict->files++;
	if (lstat(path, &is))
		return say(out, "it cannot be found: %s", strerror(errno));
	if ((is.st_mode & S_IFMT) != kind_of(n->type))
		return say(out, "its kind is %o, and must be %o", is.st_mode & S_IFMT, kind_of(n->type));
	if (n->type != T_LINK && !(wild & W_MODE) && (is.st_mode & 07777) != n->mode)
		return say(out, "its mode is %o, and must be %o", is.st_mode & 07777, n->mode);
	if (!(wild & W_OWNER) && (is.st_uid != n->uid || is.st_gid != n->gid))
		return say(out, "its owner is %u:%u, and must be %u:%u", is.st_uid, is.st_gid, n->uid, n->gid);
	if (n->type != T_DIR && is.st_nlink != n->links)
		return say(out, "it has %lu links, and must have %u", (unsigned long)is.st_nlink, n->links);
	if ((n->type == T_CHAR || n->type == T_BLOCK) && is.st_rdev != n->device)
		return say(out, "its device is %llx, and must be %llx", (unsigned long long)is.st_rdev,
			   (unsigned long long)n->device);
	u64 size = (u64)is.st_size, least = before ? smaller(before->size, n->size) : n->size;
	if (n->type == T_FILE && (size < least || size > n->size))
		return say(out, "its size is %llu, and must be %llu", (unsigned long long)size,
			   (unsigned long long)n->size);
	if (n->type == T_LINK && !target_is_right(path, n, out))
		return false;
	if (!xattrs_are_right(path, n, wild, out))
		return false;
	if (n->type == T_FILE && !file_is_right(id, n, before, path, size, out))
		return false;
	if (!(wild & W_MTIME) && !n->unsure && (is.st_mtim.tv_sec != n->mtime_s || is.st_mtim.tv_nsec != n->mtime_ns))
		return say(out, "its mtime is %lld.%09ld, and must be %lld.%09u", (long long)is.st_mtim.tv_sec,
			   is.st_mtim.tv_nsec, (long long)n->mtime_s, n->mtime_ns);
	return true;
}

/* ---- names ---- */

static bool same_name(u32 parent, const char *name, const struct entry *e)
{
	return e->parent == parent && !strcmp(e->name, name);
}

static struct doubted *doubted_name(u32 parent, const char *name)
{
	for (u32 i = 0; i < doubted_count; i++)
		if (doubted[i].parent == parent && !strcmp(doubted[i].name, name))
			return &doubted[i];
	return NULL;
}

static u32 entry_of(u32 parent, const char *name)
{
	for (u32 entry = first_in[parent]; entry; entry = next_in[entry])
		if (!strcmp(entries[entry].name, name))
			return entry;
	return 0;
}

static void walk(u32 dir, const char *path);

static void remember(u32 id, const char *path, const struct stat *status)
{
	free(seen[id].path);
	seen[id].path = strdup(path);
	seen[id].dev = status->st_dev;
	seen[id].ino = status->st_ino;
}

static void take_name(u32 entry, const char *path, const struct stat *status)
{
	char out[MESSAGE];
	u32 id = entries[entry].node;
	entry_seen[entry] = true;
	if (seen[id].path) {
		if (seen[id].dev != status->st_dev || seen[id].ino != status->st_ino)
			note("%s: it is another file than %s, and must be the same", shown(path),
			     shown(seen[id].path));
		return;
	}
	remember(id, path, status);
	if (!doubt_of_node[id] && !node_is_right(id, &nodes[id], 0, NULL, path, out))
		note("%s: %s", shown(path), out);
	if (nodes[id].type == T_DIR && S_ISDIR(status->st_mode))
		walk(id, path);
}

static void walk(u32 dir, const char *path)
{
	char below[PATH_ROOM];
	DIR *stream = opendir(path);
	if (stream == NULL) {
		note("%s: it cannot be opened: %s", shown(path), strerror(errno));
		return;
	}
	for (;;) {
		struct stat status;
		errno = 0;
		const struct dirent *each = readdir(stream);
		if (each == NULL && errno)
			note("%s: it cannot be read: %s", shown(path), strerror(errno));
		if (each == NULL)
			break;
		if (!strcmp(each->d_name, ".") || !strcmp(each->d_name, ".."))
			continue;
		snprintf(below, sizeof below, "%s%s%s", dir == ROOT ? "" : path, dir == ROOT ? "" : "/",
			 each->d_name);
		struct doubted *in_doubt = doubted_name(dir, each->d_name);
		u32 entry = entry_of(dir, each->d_name);
		if (lstat(below, &status)) {
			note("%s: it cannot be found: %s", shown(below), strerror(errno));
		} else if (in_doubt) {
			in_doubt->found = true;
			in_doubt->status = status;
			in_doubt->path = strdup(below);
		} else if (entry) {
			take_name(entry, below, &status);
		} else {
			note("%s: it is there, and must not be", shown(below));
		}
	}
	closedir(stream);
}

/* Are the names in a directory those that it must have? It tells which of two it is that changed places. */
static bool lists(u32 dir, const char *path, char *out)
{
	u32 there = 0, must = 0;
	DIR *stream = opendir(path);
	if (stream == NULL)
		return say(out, "it cannot be opened: %s", strerror(errno));
	for (const struct dirent *each; (each = readdir(stream)) != NULL;)
		there += entry_of(dir, each->d_name) != 0;
	closedir(stream);
	for (u32 entry = first_in[dir]; entry; entry = next_in[entry])
		must++;
	return there == must || say(out, "it has %u of the %u names that it must have", there, must);
}

/* ---- changes under way ---- */

static void doubt_name(u32 worker, const struct entry *e)
{
	if (e->parent == 0 || doubted_name(e->parent, e->name))
		return;
	doubted[doubted_count++] =
		(struct doubted){ .worker = worker, .parent = e->parent, .bytes = e->bytes, .name = e->name };
}

static void load(void)
{
	memcpy(nodes, m->node, sizeof nodes);
	memcpy(entries, m->entry, sizeof entries);
	memset(doubt_of_node, 0, sizeof doubt_of_node);
	memset(doubt_of_entry, 0, sizeof doubt_of_entry);
	memset(lock_doubted, 0, sizeof lock_doubted);
	memset(entry_seen, 0, sizeof entry_seen);
	memset(first_in, 0, sizeof first_in);
	doubted_count = 0;
	for (u32 worker = 0; worker < WORKERS; worker++) {
		const struct intent *intent = &m->worker[worker].intent;
		u32 state = atomic_load(&intent->state);
		for (u32 at = 0; state == I_DONE && at < intent->nodes; at++)
			nodes[intent->node[at].id] = intent->node[at].after;
		for (u32 at = 0; state == I_DONE && at < intent->entries; at++)
			entries[intent->entry[at].id] = intent->entry[at].after;
		for (u32 at = 0; state == I_BEGUN && at < intent->nodes; at++)
			doubt_of_node[intent->node[at].id] = worker + 1;
		for (u32 at = 0; state == I_BEGUN && at < intent->entries; at++) {
			doubt_of_entry[intent->entry[at].id] = worker + 1;
			doubt_name(worker, &m->entry[intent->entry[at].id]);
			doubt_name(worker, &intent->entry[at].after);
		}
		if (intent->lock_node && state != I_NONE)
			lock_doubted[intent->lock_node] = true;
		verdict->in_flight += state == I_BEGUN;
	}
	for (u32 entry = 1; entry < ENTRIES; entry++)
		if (entries[entry].parent && !doubt_of_entry[entry]) {
			next_in[entry] = first_in[entries[entry].parent];
			first_in[entries[entry].parent] = entry;
		}
}

/* Where nodes are, as one state of a change has it. */
struct place {
	u32 node;
	const struct doubted *name;
};

static const struct place *place_of(const struct place *places, u32 count, u32 node)
{
	for (u32 i = 0; i < count; i++)
		if (places[i].node == node)
			return &places[i];
	return NULL;
}

/* Are the names of a change those of before or after it? If so, fill in which node must be where. */
static bool names_are(u32 worker, bool after, struct place *places, u32 *count, char *out)
{
	const struct intent *intent = &m->worker[worker].intent;
	for (u32 i = 0; i < doubted_count; i++) {
		const struct doubted *name = &doubted[i];
		u32 node = 0;
		if (name->worker != worker)
			continue;
		for (u32 at = 0; at < intent->entries; at++) {
			const struct entry *e = after ? &intent->entry[at].after : &m->entry[intent->entry[at].id];
			if (same_name(name->parent, name->name, e))
				node = e->node;
		}
		if (node && !name->found)
			return say(out, "%s is missing", shown(name->name));
		if (!node && name->found)
			return say(out, "%s is there, and must not be", shown(name->name));
		if (!node)
			continue;
		const struct place *other = place_of(places, *count, node);
		if ((seen[node].path &&
		     (seen[node].dev != name->status.st_dev || seen[node].ino != name->status.st_ino)) ||
		    (other && other->name->status.st_ino != name->status.st_ino))
			return say(out, "%s is another file than the one that has its other name", shown(name->name));
		places[*count] = (struct place){ node, name };
		++*count;
	}
	return true;
}

/* Is all that a change concerns as before or after it; or, if it can be, between the two? */
static bool change_is(u32 worker, bool after, struct place *places, u32 *count, char *out)
{
	const struct intent *intent = &m->worker[worker].intent;
	char why[MESSAGE];
	*count = 0;
	if (!names_are(worker, after, places, count, out))
		return false;
	for (u32 at = 0; at < intent->nodes; at++) {
		u32 id = intent->node[at].id;
		const struct node *before = &m->node[id], *n = after ? &intent->node[at].after : before;
		const struct place *place = place_of(places, *count, id);
		const char *path = place ? place->name->path : seen[id].path;
		if (n->type == T_NONE || (n->links == 0 && id != ROOT)) /* it has no name */
			continue;
		if (path == NULL)
			return say(out, "file %u was not found", id);
		if (!node_is_right(id, n, intent->node[at].wild, intent->torn && at == 0 ? before : NULL, path,
				   why) ||
		    (n->type == T_DIR && place && !lists(id, path, why)))
			return say(out, "%.80s: %.180s", shown(path), why);
	}
	return true;
}

static void judge_change(u32 worker)
{
	const struct intent *intent = &m->worker[worker].intent;
	char told[2][MESSAGE] = { "", "" };
	struct place places[PLACES];
	u32 count = 0;
	bool right = change_is(worker, true, places, &count, told[1]) ||
		     (!intent->torn && change_is(worker, false, places, &count, told[0]));
	if (!right) {
		note("step %llu of worker %u, %s, under way: after it, %s; before it, %s",
		     (unsigned long long)m->worker[worker].version, worker, path_names[m->worker[worker].path],
		     told[1], intent->torn ? "the same" : told[0]);
		return;
	}
	for (u32 i = 0; i < count; i++) {
		u32 id = places[i].node;
		bool known = seen[id].path != NULL;
		if (!known)
			remember(id, places[i].name->path, &places[i].name->status);
		if (!known && S_ISDIR(places[i].name->status.st_mode))
			walk(id, places[i].name->path);
	}
}

static void judge_changes(bool of_names)
{
	for (u32 worker = 0; worker < WORKERS; worker++) {
		const struct intent *intent = &m->worker[worker].intent;
		if (atomic_load(&intent->state) == I_BEGUN && (intent->entries > 0) == of_names)
			judge_change(worker);
	}
}

/* Who asks has the directory as working directory. `alive`: the locks are those of this system too. */
void judge(const struct model *expected, bool alive, bool pids_are_ours, struct verdict *result)
{
	char out[MESSAGE];
	struct stat root;
	m = expected;
	verdict = result;
	live = alive;
	same_pids = pids_are_ours;
	memset(verdict, 0, sizeof *verdict);
	load();
	if (lstat(".", &root)) {
		note(".: %s", strerror(errno));
		return;
	}
	remember(ROOT, ".", &root);
	if (!doubt_of_node[ROOT] && !node_is_right(ROOT, &nodes[ROOT], 0, NULL, ".", out))
		note(".: %s", out);
	walk(ROOT, ".");
	judge_changes(true);
	judge_changes(false);
	for (u32 entry = 1; entry < ENTRIES; entry++) {
		const char *parent = seen[entries[entry].parent].path;
		if (!entries[entry].parent || entry_seen[entry] || doubt_of_entry[entry] || parent == NULL)
			continue; /* what is in a directory that is missing is not told for itself */
		note("%s in %s: it is missing", shown(entries[entry].name), shown(parent));
	}
	for (u32 id = 0; id < NODES; id++) {
		free(seen[id].path);
		seen[id].path = NULL;
	}
	for (u32 i = 0; i < doubted_count; i++)
		free(doubted[i].path);
}
