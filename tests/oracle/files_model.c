/* SPDX-License-Identifier: MIT
 *
 * What there must be. In: what each worker is about to change, and that it has been changed. Out: names, paths, and who
 * has what open.
 *
 * A step takes the locks of all nodes that it changes (taken or not taken, never waited for), so that no two steps
 * under way change the same thing, and each can be judged by itself. Paths hold still meanwhile: who changes that of a
 * directory does so alone (`topology`). Entries that are under way are claimed, that no one takes a slot half empty.
 *
 * A change goes through three states, of which `files.c` tells why: `change_node` and `change_entry` write down how it
 * will be, `go` says that it begins, `settle` that it is done, and makes it the model.
 */
#include "files.h"

#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

struct model *model;
const char *const xattr_names[XATTRS] = { "user.one", "user.two.\xc3\xa4", "user.\xff\xfe", "user.long" };

/* ---- locks ---- */

bool hold(struct worker *w, u32 id)
{
	u32 mine = w->number + 1, nobody = 0;
	if (atomic_load(&model->lock[id]) == mine)
		return true;
	if (w->held == sizeof w->holds / sizeof *w->holds ||
	    !atomic_compare_exchange_strong(&model->lock[id], &nobody, mine))
		return false;
	w->holds[w->held++] = id;
	return true;
}

/* After a step: all locks and claims. */
void give_back(struct worker *w)
{
	while (w->claims > 0)
		atomic_store(&model->claim[w->claimed[--w->claims]], 0);
	while (w->held > 0)
		atomic_store(&model->lock[w->holds[--w->held]], 0);
}

/* Take a node of some kinds at random, with its lock; 0: found none. */
u32 take(struct worker *w, u32 kinds, fits *wanted)
{
	for (int tries = 0; tries < 60; tries++) {
		u32 id = ROOT + (u32)below(w, model->slots - ROOT);
		bool had = atomic_load(&model->lock[id]) == w->number + 1;
		if (!(kinds >> model->node[id].type & 1) || !hold(w, id))
			continue;
		if ((kinds >> model->node[id].type & 1) && (wanted == NULL || wanted(w, id)))
			return id;
		if (!had)
			atomic_store(&model->lock[w->holds[--w->held]], 0);
	}
	return 0;
}

u32 take_free_node(struct worker *w)
{
	for (u32 id = ROOT + 1; id < model->slots; id++)
		if (model->node[id].type == T_NONE && hold(w, id)) {
			if (model->node[id].type == T_NONE)
				return id;
			atomic_store(&model->lock[w->holds[--w->held]], 0);
		}
	return 0;
}

static void lock_tables(void)
{
	while (atomic_exchange(&model->tables, 1))
		sched_yield();
}

static void claim_entry(struct worker *w, u32 id)
{
	u32 nobody = 0;
	while (!atomic_compare_exchange_strong(&model->claim[id], &nobody, w->number + 1)) {
		if (nobody == w->number + 1)
			return;
		nobody = 0; /* someone looks whether it is free */
		sched_yield();
	}
	w->claimed[w->claims++] = id;
}

u32 take_free_entry(struct worker *w)
{
	u32 found = 0;
	lock_tables();
	for (u32 id = 1; id < ENTRIES && !found; id++) {
		u32 nobody = 0;
		if (model->entry[id].parent ||
		    !atomic_compare_exchange_strong(&model->claim[id], &nobody, w->number + 1))
			continue;
		if (model->entry[id].parent)
			atomic_store(&model->claim[id], 0);
		else
			found = w->claimed[w->claims++] = id;
	}
	atomic_store(&model->tables, 0);
	return found;
}

/* ---- paths hold still, or one changes those of directories ---- */

void enter_paths(void)
{
	for (;;) {
		int users = atomic_load(&model->topology);
		if (users >= 0 && !atomic_load(&model->topology_wanted) &&
		    atomic_compare_exchange_strong(&model->topology, &users, users + 1))
			return;
		nap(20000);
	}
}

void leave_paths(void)
{
	atomic_fetch_sub(&model->topology, 1);
}

bool enter_topology(void)
{
	u32 nobody = 0;
	if (!atomic_compare_exchange_strong(&model->topology_wanted, &nobody, 1))
		return false;
	for (int none = 0; !atomic_compare_exchange_strong(&model->topology, &none, -1); none = 0)
		nap(20000);
	return true;
}

void leave_topology(void)
{
	atomic_store(&model->topology, 0);
	atomic_store(&model->topology_wanted, 0);
}

/* ---- intents ---- */

struct node *change_node(struct worker *w, u32 id, u32 wild)
{
	struct intent *intent = &w->intent;
	u32 at = 0;
	while (at < intent->nodes && intent->node[at].id != id)
		at++;
	if (at == intent->nodes) {
		intent->node[at].id = id;
		intent->node[at].wild = 0;
		intent->node[at].after = model->node[id];
		intent->nodes++;
	}
	intent->node[at].wild |= wild;
	return &intent->node[at].after;
}

/* How an entry will be; its claim is taken. */
struct entry *change_entry(struct worker *w, u32 id)
{
	struct intent *intent = &w->intent;
	claim_entry(w, id);
	u32 at = intent->entries++;
	intent->entry[at].id = id;
	intent->entry[at].after = model->entry[id];
	return &intent->entry[at].after;
}

static void say_state(struct worker *w, enum intent_state state)
{
	atomic_signal_fence(memory_order_seq_cst);
	atomic_store(&w->intent.state, state);
	atomic_signal_fence(memory_order_seq_cst);
}

/* All is written down; from here on it may be done or not. */
void go(struct worker *w)
{
	say_state(w, I_BEGUN);
}

static void forget(struct worker *w)
{
	say_state(w, I_NONE);
	w->intent.nodes = w->intent.entries = w->intent.torn = w->intent.lock_node = 0;
}

/* It was not done, and will not be. */
void undo(struct worker *w)
{
	forget(w);
}

/* It is done: what was written down is the model. */
void settle(struct worker *w)
{
	struct intent *intent = &w->intent;
	say_state(w, I_DONE);
	for (u32 at = 0; at < intent->nodes; at++) {
		struct node *now = &model->node[intent->node[at].id], *after = &intent->node[at].after;
		atomic_fetch_add(&model->blocks,
				 (after->type ? (i64)after->blocks : 0) - (now->type ? (i64)now->blocks : 0));
		atomic_fetch_add(&model->nodes, (after->type != T_NONE) - (now->type != T_NONE));
		*now = *after;
	}
	lock_tables();
	for (u32 at = 0; at < intent->entries; at++)
		model->entry[intent->entry[at].id] = intent->entry[at].after;
	atomic_store(&model->tables, 0);
	forget(w);
}

static u32 read_xattr(int fd, const char *path, const char *name, u8 *out, size_t room)
{
	ssize_t size = fd >= 0 ? fgetxattr(fd, name, out, room) : lgetxattr(path, name, out, room);
	if (size < 0 && errno != ENODATA && errno != EOPNOTSUPP)
		fail("reading %s back: %s", name, strerror(errno));
	return size > 0 ? (u32)size : 0;
}

/* What nobody can foretell (the time, or what the kernel makes of a mode) is as it is found when it is done. */
void read_back(struct worker *w, u32 id, int fd, const char *path)
{
	struct stat status;
	u32 at = 0;
	while (at < w->intent.nodes && w->intent.node[at].id != id)
		at++;
	u32 wild = w->intent.node[at].wild;
	struct node *after = &w->intent.node[at].after;
	if (fd < 0 && path == NULL) { /* written through a mapping whose descriptor is closed */
		after->unsure = true;
		return;
	}
	if (fd >= 0 ? fstat(fd, &status) : lstat(path, &status)) {
		fail("reading back what step %llu did: %s", (unsigned long long)w->version, strerror(errno));
		return;
	}
	if (wild & W_MTIME) {
		after->mtime_s = status.st_mtim.tv_sec;
		after->mtime_ns = (u32)status.st_mtim.tv_nsec;
		after->unsure = has_lost(model, id);
	}
	if (wild & W_MODE)
		after->mode = status.st_mode & 07777;
	if (wild & W_OWNER) {
		after->uid = status.st_uid;
		after->gid = status.st_gid;
	}
	if (wild & W_ACL)
		after->acl_bytes = read_xattr(fd, path, "system.posix_acl_access", after->acl, ACL_BYTES);
	if (wild & W_DEFAULT)
		after->default_bytes =
			read_xattr(fd, path, "system.posix_acl_default", after->default_acl, ACL_BYTES);
	if (wild & W_CAP)
		after->cap_bytes = read_xattr(fd, path, "security.capability", after->cap, CAP_BYTES);
}

/* A call has failed. What this system or file system cannot do is noted, and not tried again; else it is wrong. */
bool refused(struct worker *w, const char *what, const char *path)
{
	int error = errno;
	bool never = error == EOPNOTSUPP || error == ENOSYS || (error == EPERM && w->path == P_char_device) ||
		     (error == EPERM && w->path == P_block_device) || (error == EINVAL && w->path == P_direct_write);
	if (never) {
		model->unavailable_errno[w->path] = (u32)error;
		atomic_store(&model->unavailable[w->path], 1);
	} else {
		char told[200];
		escape(path, told, sizeof told);
		fail("step %llu, %s, %s of %s: %s", (unsigned long long)w->version, path_names[w->path], what, told,
		     strerror(error));
	}
	undo(w);
	return false;
}

/* Remember the first thing that went wrong outside of a check; every later check tells it. */
void fail(const char *format, ...)
{
	char text[ERROR_BYTES];
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	dprintf(2, "files %d: %s\n", (int)getpid(), text);
	u32 none = 0;
	if (atomic_compare_exchange_strong(&model->sticky, &none, 1)) {
		memcpy(model->sticky_error, text, sizeof text);
		atomic_store(&model->sticky, 2);
	}
	atomic_fetch_or(&model->hold, HOLD_OUTSIDE);
}

/* ---- names ---- */

bool add_link(struct node *n, u32 entry)
{
	if (n->links == LINKS)
		return false;
	n->entry[n->links++] = entry;
	return true;
}

void drop_link(struct node *n, u32 entry)
{
	u32 at = 0;
	while (at < n->links && n->entry[at] != entry)
		at++;
	if (at < n->links)
		n->entry[at] = n->entry[--n->links];
}

/* The path of a directory; its length, or -1 if it is too long. */
int node_path(u32 dir, char *out)
{
	if (dir != ROOT)
		return entry_path(model->node[dir].entry[0], out);
	out[0] = '.';
	out[1] = 0;
	return 1;
}

int entry_path(u32 entry, char *out)
{
	const struct entry *e = &model->entry[entry];
	int length = e->parent == ROOT ? 0 : node_path(e->parent, out);
	if (length < 0 || length + (int)e->bytes + 1 > PATH_MOST)
		return -1;
	if (length)
		out[length++] = '/';
	memcpy(out + length, e->name, e->bytes);
	length += (int)e->bytes;
	out[length] = 0;
	return length;
}

u32 depth_of(u32 dir)
{
	u32 depth = 0;
	for (; dir != ROOT && depth < ENTRIES; dir = model->entry[model->node[dir].entry[0]].parent)
		depth++;
	return depth;
}

bool inside(u32 dir, u32 ancestor)
{
	for (u32 depth = 0; dir != ROOT && depth < ENTRIES; depth++) {
		if (dir == ancestor)
			return true;
		dir = model->entry[model->node[dir].entry[0]].parent;
	}
	return dir == ancestor;
}

/* A name that there is no second time: it ends in the number of the step. */
void make_name(struct worker *w, struct entry *e)
{
	char tail[24];
	int tail_bytes = snprintf(tail, sizeof tail, "%llx", (unsigned long long)w->version);
	static const char *const fronts[] = { "-rf ", "..", " \t", "a\nb\n", "'\"\\$(x)*?", "\xc3\xa4\xe2\x82\xac",
					      "~",    "%s" };
	u64 kind = below(w, 16), front = 0;
	if (kind == 0) { /* no UTF-8 */
		front = 1 + below(w, 20);
		for (u64 i = 0; i < front; i++)
			e->name[i] = (char)(0x80 + below(w, 0x80));
	} else if (kind == 1) { /* as long as can be */
		front = 255 - (u64)tail_bytes;
		for (u64 i = 0; i < front; i++)
			e->name[i] = (char)(below(w, 8) ? 'a' + below(w, 26) : 0xa1 + below(w, 90));
	} else if (kind < 8) {
		const char *chosen = fronts[below(w, sizeof fronts / sizeof *fronts)];
		front = strlen(chosen);
		memcpy(e->name, chosen, front);
	} else {
		e->name[front++] = (char)('a' + below(w, 26));
	}
	memcpy(e->name + front, tail, (size_t)tail_bytes + 1);
	e->bytes = (u32)front + (u32)tail_bytes;
}

/* What a symbolic link says: a key whose lowest bits name one that leads somewhere, or 3 for one that does not. */
void target_text(u64 key, u32 bytes, char *out)
{
	static const char *const real[] = { ".", "..", "/" };
	if ((key & 3) < 3) {
		snprintf(out, bytes + 1, "%s", real[key & 3]);
		return;
	}
	for (u32 i = 0; i < bytes; i++) {
		u64 at = word_of(key, i / 8) >> i % 8 * 8;
		out[i] = i % 100 == 99 ? '/' : (char)(at % 16 ? 'a' + at % 26 : 0x80 + at / 16 % 0x7f);
	}
	out[bytes] = 0;
}

/* A name as it can be printed: what is not plain becomes %XX, and of long ones the middle is left out. */
void escape(const char *name, char *out, size_t room)
{
	size_t length = strlen(name), most = (room - 4) / 3;
	char *to = out;
	for (size_t i = 0; i < length; i++) {
		u8 byte = (u8)name[i];
		if (length > most && i == most / 2) {
			to += snprintf(to, 4, "...");
			i = length - most / 2;
			byte = (u8)name[i];
		}
		if (byte > ' ' && byte < 127 && !strchr("\"\\%", byte))
			*to++ = (char)byte;
		else
			to += snprintf(to, 4, "%%%02X", byte);
	}
	*to = 0;
}

u32 random_entry(struct worker *w, u32 id)
{
	return model->node[id].entry[below(w, model->node[id].links)];
}

mode_t kind_of(u32 type)
{
	static const mode_t kinds[] = { 0, S_IFREG, S_IFDIR, S_IFLNK, S_IFIFO, S_IFSOCK, S_IFCHR, S_IFBLK };
	return kinds[type];
}

/* ---- who has it open; with its lock, this stays so ---- */

/* How many handles are on a node, opened through an entry (0: any), in a process (PROCESSES: any)? */
u32 handles_on(u32 node, u32 entry, u32 process)
{
	u32 count = 0;
	for (u32 row = 0; row <= WORKERS; row++)
		for (u32 i = 0; i < HANDLES; i++) {
			const struct handle *h = &model->handle[row][i];
			bool theirs = process == PROCESSES || row == WORKERS || model->worker[row].process == process;
			count += h->used && h->node == node && theirs && (entry == 0 || h->entry == entry);
		}
	return count;
}

/* What cuts off a file takes pages of private mappings with it, though they were copied. So it is not done to such. */
bool privately_mapped(u32 node)
{
	for (u32 row = 0; row < WORKERS; row++)
		for (u32 i = 0; i < HANDLES; i++) {
			const struct handle *h = &model->handle[row][i];
			if (h->used && h->node == node && h->at && h->private)
				return true;
		}
	return false;
}

/* POSIX locks of a process are lost when it closes any descriptor of the file: then it opens it no second time. */
bool locked_by_process(u32 node, u32 process)
{
	for (u32 row = 0; row < WORKERS; row++)
		for (u32 i = 0; i < HANDLES; i++) {
			const struct handle *h = &model->handle[row][i];
			if (h->used && h->node == node && model->worker[row].process == process &&
			    (h->lock == L_POSIX || h->lock == L_POSIX_READ))
				return true;
		}
	return false;
}

/* Has a directory lost a name that is still open? CRIU puts such ones there for an instant, which changes its mtime. */
bool has_lost(const struct model *m, u32 dir)
{
	for (u32 row = 0; row < WORKERS; row++)
		for (u32 i = 0; i < HANDLES; i++)
			if (m->handle[row][i].used && m->handle[row][i].lost_from == dir)
				return true;
	return false;
}
