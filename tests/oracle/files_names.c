/* SPDX-License-Identifier: MIT
 *
 * Every way in which names are changed, one function each. See files_model.c for what a change goes through. Those of
 * directories with content are made while nobody uses a path (files_workers.c sees to that).
 */
#include "files.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static u32 take_directory(struct worker *w)
{
	u32 newest = atomic_load(&model->newest_dir);
	if (below(w, 3) == 0 && newest && hold(w, newest) && model->node[newest].type == T_DIR) /* they become deep */
		return newest;
	return take(w, K_DIR, NULL);
}

static void read_back_dir(struct worker *w, u32 dir)
{
	char path[PATH_ROOM];
	node_path(dir, path);
	read_back(w, dir, -1, path);
}

/* ---- making ---- */

/* A new name, and its path; false if that is too long. */
static bool name_in(struct worker *w, u32 dir, struct entry *e, char *path)
{
	int length = dir == ROOT ? 0 : node_path(dir, path);
	make_name(w, e);
	e->parent = dir;
	if (length < 0 || length + (int)e->bytes + 1 > PATH_MOST)
		return false;
	sprintf(path + length, "%s%s", length ? "/" : "", e->name);
	return true;
}

/* Write down that a node is made in a directory; 0: there is no room for it. */
u32 born(struct worker *w, u32 dir, u32 type, u32 mode, char *path)
{
	const struct node *parent = &model->node[dir];
	if (atomic_load(&model->nodes) >= (i64)model->most_nodes)
		return 0;
	u32 id = take_free_node(w), entry = id ? take_free_entry(w) : 0;
	if (!entry)
		return 0;
	bool inherits = parent->default_bytes && type != T_LINK;
	u32 wild = W_MTIME | (inherits ? W_MODE | W_ACL : 0) | (inherits && type == T_DIR ? W_DEFAULT : 0);
	struct node *n = change_node(w, id, wild);
	struct entry *e = change_entry(w, entry);
	bool given = parent->mode & S_ISGID;
	*n = (struct node){ .type = type, .mode = mode | (given && type == T_DIR ? S_ISGID : 0) };
	n->gid = given ? parent->gid : 0;
	e->node = id;
	add_link(n, entry);
	change_node(w, dir, W_MTIME);
	if (name_in(w, dir, e, path))
		return id;
	undo(w);
	return 0;
}

static bool made(struct worker *w, u32 id, u32 dir, const char *path)
{
	read_back(w, id, -1, path);
	read_back_dir(w, dir);
	settle(w);
	return true;
}

bool op_create(struct worker *w)
{
	char path[PATH_ROOM];
	u32 dir = take_directory(w), mode = (u32)below(w, 01000);
	u32 id = dir ? born(w, dir, T_FILE, mode, path) : 0;
	if (!id)
		return false;
	go(w);
	int fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, mode);
	if (fd < 0)
		return refused(w, "open", path);
	close(fd);
	return made(w, id, dir, path);
}

bool op_mkdir(struct worker *w)
{
	char path[PATH_ROOM];
	u32 dir = take_directory(w), mode = below(w, 3) ? 0755 : (u32)below(w, 01000);
	u32 id = dir && depth_of(dir) < DEPTH_MOST ? born(w, dir, T_DIR, mode, path) : 0;
	if (!id)
		return false;
	go(w);
	if (mkdir(path, mode))
		return refused(w, "mkdir", path);
	made(w, id, dir, path);
	atomic_store(&model->newest_dir, id);
	return true;
}

static bool make_link(struct worker *w, u64 kind, u32 bytes)
{
	char path[PATH_ROOM], target[TARGET_BYTES + 1];
	u32 dir = take_directory(w), id = dir ? born(w, dir, T_LINK, 0777, path) : 0;
	if (!id)
		return false;
	struct node *n = change_node(w, id, 0);
	n->target = key_of(w->version, kind);
	target_text(n->target, bytes, target);
	n->target_bytes = (u32)strlen(target);
	go(w);
	if (symlink(target, path)) {
		if (errno != ENAMETOOLONG || bytes <= TARGET_SURE)
			return refused(w, "symlink", path);
		undo(w);
		return false;
	}
	return made(w, id, dir, path);
}

bool op_symlink(struct worker *w)
{
	return make_link(w, below(w, 3), 2);
}

bool op_symlink_dangling(struct worker *w)
{
	return make_link(w, 3, 1 + (u32)below(w, 100));
}

bool op_symlink_long(struct worker *w)
{
	return make_link(w, 3, below(w, 2) ? TARGET_SURE : TARGET_BYTES - (u32)below(w, 500));
}

static bool make_special(struct worker *w, u32 type, u64 device)
{
	char path[PATH_ROOM];
	u32 dir = take_directory(w), mode = (u32)below(w, 01000), id = dir ? born(w, dir, type, mode, path) : 0;
	if (!id)
		return false;
	change_node(w, id, 0)->device = device;
	go(w);
	if (mknod(path, kind_of(type) | mode, device))
		return refused(w, "mknod", path);
	return made(w, id, dir, path);
}

bool op_fifo(struct worker *w)
{
	return make_special(w, T_FIFO, 0);
}

bool op_socket(struct worker *w)
{
	return make_special(w, T_SOCKET, 0);
}

/* XFS takes no larger ones. */
static u64 some_device(struct worker *w)
{
	return makedev(1 + below(w, 511), below(w, 2) ? below(w, 256) : below(w, 1 << 18));
}

bool op_char_device(struct worker *w)
{
	return make_special(w, T_CHAR, some_device(w));
}

bool op_block_device(struct worker *w)
{
	return make_special(w, T_BLOCK, some_device(w));
}

/* A file that gets its name when its content is there. */
bool op_tmpfile_link(struct worker *w)
{
	char path[PATH_ROOM], parent[PATH_ROOM], self[40];
	static __thread char content[4 * PAGE];
	u32 dir = take_directory(w), mode = (u32)below(w, 01000), id = dir ? born(w, dir, T_FILE, mode, path) : 0;
	if (!id)
		return false;
	u64 bytes = 1 + below(w, sizeof content);
	struct node *n = change_node(w, id, 0);
	put_range(w, id, 0, bytes, w->version);
	n->size = bytes;
	render(model->content[id][n->which], n->blocks, 0, bytes, content);
	node_path(dir, parent);
	int fd = open(parent, O_TMPFILE | O_RDWR | O_CLOEXEC, mode);
	if (fd < 0)
		return refused(w, "O_TMPFILE", parent);
	if (pwrite(fd, content, bytes, 0) != (ssize_t)bytes)
		fail("writing an unnamed file: %s", strerror(errno));
	snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
	go(w);
	if (linkat(AT_FDCWD, self, AT_FDCWD, path, AT_SYMLINK_FOLLOW)) {
		int error = errno;
		close(fd);
		if (error != ENOENT || !was_restored()) {
			errno = error;
			return refused(w, "linkat", path);
		}
		undo(w); /* CRIU has brought it back as one that was unlinked, and such are never linked again */
		atomic_fetch_add(&model->orphaned_tmpfiles, 1);
		change_node(w, dir, W_MTIME); /* and had it there for an instant */
		read_back_dir(w, dir);
		settle(w);
		return false;
	}
	close(fd);
	return made(w, id, dir, path);
}

static bool has_room(struct worker *w, u32 id)
{
	(void)w;
	return model->node[id].links > 0 && model->node[id].links < LINKS;
}

bool op_link(struct worker *w)
{
	char path[PATH_ROOM], old[PATH_ROOM];
	u32 dir = take_directory(w), id = dir ? take(w, below(w, 8) ? K_FILE : K_FLAT, has_room) : 0;
	u32 entry = id ? take_free_entry(w) : 0;
	if (!entry)
		return false;
	struct node *n = change_node(w, id, 0);
	struct entry *e = change_entry(w, entry);
	change_node(w, dir, W_MTIME);
	entry_path(random_entry(w, id), old);
	add_link(n, entry);
	e->node = id;
	if (!name_in(w, dir, e, path)) {
		undo(w);
		return false;
	}
	go(w);
	if (link(old, path))
		return refused(w, "link", path);
	read_back_dir(w, dir);
	settle(w);
	return true;
}

/* ---- removing ---- */

/* May a name be taken away from a node? Not if CRIU could not bring back what is then open without one: it makes such
 * files anew with a longer name, and not the largest ones. */
static bool may_lose(struct worker *w, u32 id, u32 entry)
{
	const struct node *n = &model->node[id];
	bool open = handles_on(id, entry, PROCESSES);
	(void)w;
	if (n->pinned || n->links == 0 || (open && model->entry[entry].bytes > GHOST_NAME))
		return false;
	if (n->links == 1)
		return !handles_on(id, 0, PROCESSES) || (!path_off[P_unlink_open] && n->size <= GHOST_BYTES);
	return !open || !path_off[P_unlink_remap];
}

/* The name is gone: those who have it open came through none. The node's lock is held. */
static void lose_entry(u32 entry, u32 dir)
{
	for (u32 row = 0; row < WORKERS; row++)
		for (u32 i = 0; i < HANDLES; i++) {
			struct handle *h = &model->handle[row][i];
			if (!h->used || h->entry != entry)
				continue;
			h->entry = 0;
			h->lost_from = dir;
		}
}

/* Write down that a name is lost. */
static void plan_loss(struct worker *w, u32 id, u32 entry)
{
	struct node *n = change_node(w, id, 0);
	change_node(w, model->entry[entry].parent, W_MTIME);
	drop_link(n, entry);
	if (n->links == 0 && !handles_on(id, 0, PROCESSES))
		n->type = T_NONE;
}

static bool remove_entry(struct worker *w, u32 id, u32 entry)
{
	char path[PATH_ROOM];
	u32 dir = model->entry[entry].parent;
	if (!hold(w, dir))
		return false;
	entry_path(entry, path);
	plan_loss(w, id, entry);
	*change_entry(w, entry) = (struct entry){ 0 };
	go(w);
	if (model->node[id].type == T_DIR ? rmdir(path) : unlink(path))
		return refused(w, "removal", path);
	lose_entry(entry, dir);
	read_back_dir(w, dir);
	settle(w);
	return true;
}

static bool plenty(void)
{
	return atomic_load(&model->nodes) > (i64)model->most_nodes / 2;
}

static bool single_and_closed(struct worker *w, u32 id)
{
	(void)w;
	return model->node[id].links == 1 && !model->node[id].pinned && !handles_on(id, 0, PROCESSES);
}

bool op_unlink(struct worker *w)
{
	u32 id = plenty() ? take(w, K_FLAT, single_and_closed) : 0;
	return id && remove_entry(w, id, model->node[id].entry[0]);
}

static bool linked(struct worker *w, u32 id)
{
	(void)w;
	return model->node[id].links > 1;
}

bool op_unlink_linked(struct worker *w)
{
	u32 id = take(w, K_FLAT, linked), entry = id ? random_entry(w, id) : 0;
	return id && !handles_on(id, entry, PROCESSES) && !model->node[id].pinned && remove_entry(w, id, entry);
}

static bool single_and_open(struct worker *w, u32 id)
{
	const struct node *n = &model->node[id];
	return n->links == 1 && may_lose(w, id, n->entry[0]) && handles_on(id, 0, PROCESSES);
}

bool op_unlink_open(struct worker *w)
{
	u32 id = take(w, K_FILE, single_and_open);
	return id && remove_entry(w, id, model->node[id].entry[0]);
}

static u32 open_name(u32 id)
{
	for (u32 at = 0; at < model->node[id].links; at++)
		if (handles_on(id, model->node[id].entry[at], PROCESSES))
			return model->node[id].entry[at];
	return 0;
}

static bool linked_and_open(struct worker *w, u32 id)
{
	return model->node[id].links > 1 && open_name(id) && may_lose(w, id, open_name(id));
}

/* It stays open through a name that is gone, while others of its names are there. */
bool op_unlink_remap(struct worker *w)
{
	u32 id = take(w, K_FILE, linked_and_open);
	return id && remove_entry(w, id, open_name(id));
}

/* What was unlinked in a directory may come back there for an instant, when CRIU restores it: such are kept. */
static bool empty(struct worker *w, u32 id)
{
	(void)w;
	if (id == ROOT || has_lost(model, id))
		return false;
	for (u32 entry = 1; entry < ENTRIES; entry++)
		if (model->entry[entry].parent == id)
			return false;
	return true;
}

bool op_rmdir(struct worker *w)
{
	u32 id = take(w, K_DIR, empty);
	return id && remove_entry(w, id, model->node[id].entry[0]);
}

/* ---- renaming ---- */

/* Rename; both directories and the node are held. `over`: the entry that is replaced, or 0. */
static bool rename_entry(struct worker *w, u32 id, u32 entry, u32 to, u32 over)
{
	char old[PATH_ROOM], path[PATH_ROOM];
	u32 from = model->entry[entry].parent;
	struct entry *e = change_entry(w, entry);
	change_node(w, id, model->node[id].type == T_DIR ? W_MTIME : 0);
	change_node(w, from, W_MTIME);
	change_node(w, to, W_MTIME);
	entry_path(entry, old);
	if (over) {
		const struct entry *there = &model->entry[over];
		memcpy(e->name, there->name, sizeof e->name);
		e->bytes = there->bytes;
		e->parent = to;
		entry_path(over, path);
		plan_loss(w, there->node, over);
		*change_entry(w, over) = (struct entry){ 0 };
	} else if (!name_in(w, to, e, path)) {
		undo(w);
		return false;
	}
	go(w);
	if (rename(old, path))
		return refused(w, "rename", path);
	if (over)
		lose_entry(over, to);
	if (model->node[id].type == T_DIR)
		read_back(w, id, -1, path);
	if (model->node[from].type == T_DIR)
		read_back_dir(w, from);
	read_back_dir(w, to);
	settle(w);
	return true;
}

static bool named(struct worker *w, u32 id)
{
	(void)w;
	return model->node[id].links > 0;
}

bool op_rename(struct worker *w)
{
	u32 id = take(w, K_FLAT, named), entry = id ? random_entry(w, id) : 0;
	return id && hold(w, model->entry[entry].parent) && rename_entry(w, id, entry, model->entry[entry].parent, 0);
}

bool op_move(struct worker *w)
{
	u32 id = take(w, K_FLAT, named), entry = id ? random_entry(w, id) : 0, to = id ? take_directory(w) : 0;
	return to && to != model->entry[entry].parent && hold(w, model->entry[entry].parent) &&
	       rename_entry(w, id, entry, to, 0);
}

/* Two nodes with their names and directories, all held. */
static bool take_two(struct worker *w, u32 kinds, u32 id[2], u32 entry[2])
{
	for (int i = 0; i < 2; i++) {
		id[i] = take(w, kinds, named);
		if (!id[i] || id[i] == ROOT)
			return false;
		entry[i] = random_entry(w, id[i]);
		if (!hold(w, model->entry[entry[i]].parent))
			return false;
	}
	return id[0] != id[1]; /* two names of one file stay as they are */
}

bool op_rename_over(struct worker *w)
{
	u32 id[2], entry[2];
	return plenty() && take_two(w, K_FLAT, id, entry) && may_lose(w, id[1], entry[1]) &&
	       rename_entry(w, id[0], entry[0], model->entry[entry[1]].parent, entry[1]);
}

/* How programs replace a file: a new one beside it, written, synced, renamed over it. */
bool op_replace(struct worker *w)
{
	char path[PATH_ROOM];
	u32 old = take(w, K_FILE, named), entry = old ? random_entry(w, old) : 0,
	    dir = old ? model->entry[entry].parent : 0;
	if (!old || !may_lose(w, old, entry) || !hold(w, dir))
		return false;
	u32 id = born(w, dir, T_FILE, 0600, path);
	if (!id)
		return false;
	go(w);
	int fd = open(path, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0)
		return refused(w, "open", path);
	made(w, id, dir, path);
	u64 offset = 0, bytes = some_length(w);
	if (prepare_range(w, id, &offset, &bytes))
		write_to(w, id, fd, offset, bytes, true);
	if (below(w, 8) == 0 && fdatasync(fd))
		fail("fdatasync: %s", strerror(errno));
	close(fd);
	return rename_entry(w, id, model->node[id].entry[0], dir, entry);
}

static bool exchange_entries(struct worker *w, const u32 id[2], const u32 entry[2])
{
	char path[2][PATH_ROOM];
	for (int i = 0; i < 2; i++) {
		const struct entry *other = &model->entry[entry[!i]];
		struct entry *e = change_entry(w, entry[i]);
		entry_path(entry[i], path[i]);
		e->parent = other->parent;
		e->bytes = other->bytes;
		memcpy(e->name, other->name, sizeof e->name);
		change_node(w, id[i], model->node[id[i]].type == T_DIR ? W_MTIME : 0);
		change_node(w, other->parent, W_MTIME);
	}
	go(w);
	if (renameat2(AT_FDCWD, path[0], AT_FDCWD, path[1], RENAME_EXCHANGE))
		return refused(w, "exchange", path[0]);
	for (int i = 0; i < 2; i++) {
		if (model->node[id[i]].type == T_DIR)
			read_back(w, id[i], -1, path[!i]);
		read_back_dir(w, model->entry[entry[i]].parent);
	}
	settle(w);
	return true;
}

bool op_exchange(struct worker *w)
{
	u32 id[2], entry[2];
	return take_two(w, K_FLAT, id, entry) && exchange_entries(w, id, entry);
}

/* Would the paths of all that is below a directory fit, if its own became so much longer and deeper? */
static bool subtree_fits(u32 dir, int longer, int deeper)
{
	char path[PATH_ROOM];
	for (u32 entry = 1; entry < ENTRIES; entry++) {
		u32 parent = model->entry[entry].parent;
		if (!parent || !inside(parent, dir))
			continue;
		if (entry_path(entry, path) + longer > PATH_MOST || (int)depth_of(parent) + deeper > DEPTH_MOST)
			return false;
	}
	return true;
}

static int length_of(u32 dir)
{
	char path[PATH_ROOM];
	return node_path(dir, path);
}

static bool populated(struct worker *w, u32 id)
{
	return id != ROOT && !empty(w, id);
}

bool op_rename_dir(struct worker *w)
{
	u32 id = take(w, K_DIR, populated), entry = id ? model->node[id].entry[0] : 0;
	return id && hold(w, model->entry[entry].parent) && subtree_fits(id, 255, 0) &&
	       rename_entry(w, id, entry, model->entry[entry].parent, 0);
}

bool op_move_dir(struct worker *w)
{
	u32 id = take(w, K_DIR, populated), entry = id ? model->node[id].entry[0] : 0,
	    to = id ? take_directory(w) : 0;
	return to && to != model->entry[entry].parent && !inside(to, id) && hold(w, model->entry[entry].parent) &&
	       subtree_fits(id, 256 + length_of(to), (int)depth_of(to) + 1) && rename_entry(w, id, entry, to, 0);
}

/* A directory changes places with another one, or with a file. */
bool op_exchange_dir(struct worker *w)
{
	u32 id[2], entry[2];
	if (!take_two(w, K_DIR | (below(w, 3) ? 0 : K_FLAT), id, entry))
		return false;
	bool dir[2] = { model->node[id[0]].type == T_DIR, model->node[id[1]].type == T_DIR };
	if (!dir[0] && !dir[1])
		return false;
	for (int i = 0; i < 2; i++) {
		u32 to = model->entry[entry[!i]].parent;
		if (dir[i] && (inside(to, id[i]) || !subtree_fits(id[i], 256 + length_of(to), (int)depth_of(to) + 1)))
			return false;
	}
	return exchange_entries(w, id, entry);
}
