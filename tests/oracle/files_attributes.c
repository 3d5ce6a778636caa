/* SPDX-License-Identifier: MIT
 *
 * Every way in which attributes are changed: modes, owners, times, extended attributes, access control lists and
 * capabilities. What the kernel makes of them (the mode of who gets a list, the list of who gets a mode) is read back.
 */
#include "files.h"

#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { K_MODE = K_FLAT & ~K_LINK, K_ATTRIBUTED = K_FILE | K_DIR };

/* A node of some kinds, held, and a path of it. */
static u32 take_named(struct worker *w, u32 kinds, fits *wanted, char *path)
{
	u32 id = take(w, kinds, wanted);
	if (!id || (id != ROOT && model->node[id].links == 0))
		return 0;
	if (id == ROOT)
		node_path(ROOT, path);
	else
		entry_path(random_entry(w, id), path);
	return id;
}

static bool change_mode(struct worker *w, u32 kinds, u32 mode)
{
	char path[PATH_ROOM];
	u32 id = take_named(w, kinds, NULL, path);
	if (!id)
		return false;
	change_node(w, id, model->node[id].acl_bytes ? W_ACL : 0)->mode = mode;
	go(w);
	if (chmod(path, mode))
		return refused(w, "chmod", path);
	read_back(w, id, -1, path);
	settle(w);
	return true;
}

bool op_chmod(struct worker *w)
{
	return change_mode(w, K_MODE, (u32)below(w, 01000));
}

bool op_chmod_special(struct worker *w)
{
	return change_mode(w, K_FILE, 01000 * (u32)(1 + below(w, 7)) + (u32)below(w, 01000));
}

bool op_chmod_dir(struct worker *w)
{
	return change_mode(w, K_DIR, (u32)below(w, 010000));
}

static u32 some_id(struct worker *w)
{
	return (u32)(below(w, 2) ? below(w, 65536) : below(w, 0xfffffff0u));
}

static bool change_owner(struct worker *w, u32 kinds)
{
	char path[PATH_ROOM];
	u32 id = take_named(w, kinds, NULL, path), uid = some_id(w), gid = some_id(w);
	if (!id)
		return false;
	struct node *n = change_node(w, id, W_MODE | (model->node[id].cap_bytes ? W_CAP : 0));
	n->uid = uid;
	n->gid = gid;
	go(w);
	if (lchown(path, uid, gid))
		return refused(w, "lchown", path);
	read_back(w, id, -1, path);
	settle(w);
	return true;
}

bool op_chown(struct worker *w)
{
	return change_owner(w, K_MODE);
}

bool op_chown_link(struct worker *w)
{
	return change_owner(w, K_LINK);
}

bool op_chown_dir(struct worker *w)
{
	return change_owner(w, K_DIR);
}

static bool change_times(struct worker *w, u32 kinds)
{
	char path[PATH_ROOM];
	u32 id = take_named(w, kinds, NULL, path);
	if (!id)
		return false;
	struct node *n = change_node(w, id, 0);
	n->mtime_s = (i64)below(w, (u64)5 << 30) - (1 << 30); /* also before 1970 and after 2038 */
	n->mtime_ns = (u32)below(w, 1000000000);
	n->unsure = has_lost(model, id);
	struct timespec times[2] = { { .tv_nsec = UTIME_OMIT }, { .tv_sec = n->mtime_s, .tv_nsec = n->mtime_ns } };
	go(w);
	if (utimensat(AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW))
		return refused(w, "utimensat", path);
	settle(w);
	return true;
}

bool op_times(struct worker *w)
{
	return change_times(w, K_MODE);
}

bool op_times_dir(struct worker *w)
{
	return change_times(w, K_DIR);
}

bool op_times_link(struct worker *w)
{
	return change_times(w, K_LINK);
}

static bool set_xattr(struct worker *w, u32 kinds)
{
	char path[PATH_ROOM], value[XATTR_BYTES];
	u32 id = take_named(w, kinds, NULL, path), which = (u32)below(w, XATTRS);
	if (!id)
		return false;
	u32 bytes = (u32)below(w, which == XATTRS - 1 ? XATTR_BYTES : 60);
	struct node *n = change_node(w, id, 0);
	n->xattr[which].key = key_of(w->version, which);
	n->xattr[which].bytes = bytes;
	pattern(n->xattr[which].key, 0, bytes, value);
	go(w);
	if (lsetxattr(path, xattr_names[which], value, bytes, 0))
		return refused(w, "setxattr", path);
	settle(w);
	return true;
}

bool op_xattr_set(struct worker *w)
{
	return set_xattr(w, K_FILE);
}

bool op_xattr_dir(struct worker *w)
{
	return set_xattr(w, K_DIR);
}

static u32 some_xattr(u32 id)
{
	u32 which = 0;
	while (which < XATTRS && model->node[id].xattr[which].key == 0)
		which++;
	return which;
}

static bool attributed(struct worker *w, u32 id)
{
	(void)w;
	return some_xattr(id) < XATTRS;
}

bool op_xattr_remove(struct worker *w)
{
	char path[PATH_ROOM];
	u32 id = take_named(w, K_ATTRIBUTED, attributed, path), which = id ? some_xattr(id) : 0;
	if (!id)
		return false;
	change_node(w, id, 0)->xattr[which].key = 0;
	go(w);
	if (lremovexattr(path, xattr_names[which]))
		return refused(w, "removexattr", path);
	settle(w);
	return true;
}

/* As the kernel has it (include/uapi/linux/posix_acl_xattr.h): version, then tag, permissions and id, little-endian. */
static size_t some_acl(struct worker *w, u8 *out)
{
	enum { USER_OBJ = 1, USER = 2, GROUP_OBJ = 4, GROUP = 8, MASK = 16, OTHER = 32 };
	static const u16 tags[] = { USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER };
	size_t at = 4;
	memcpy(out, "\2\0\0\0", 4);
	for (size_t i = 0; i < sizeof tags / sizeof *tags; i++) {
		u16 permissions = (u16)below(w, 8);
		u32 id = tags[i] == USER || tags[i] == GROUP ? some_id(w) : 0xffffffffu;
		memcpy(out + at, &tags[i], 2);
		memcpy(out + at + 2, &permissions, 2);
		memcpy(out + at + 4, &id, 4);
		at += 8;
	}
	return at;
}

static bool set_acl(struct worker *w, u32 kinds, const char *name, u32 wild)
{
	char path[PATH_ROOM];
	u8 acl[ACL_BYTES];
	u32 id = take_named(w, kinds, NULL, path);
	size_t bytes = some_acl(w, acl);
	if (!id)
		return false;
	change_node(w, id, wild);
	go(w);
	if (lsetxattr(path, name, acl, bytes, 0))
		return refused(w, "setxattr", path);
	read_back(w, id, -1, path);
	settle(w);
	return true;
}

bool op_acl(struct worker *w)
{
	return set_acl(w, K_ATTRIBUTED, "system.posix_acl_access", W_ACL | W_MODE);
}

bool op_acl_default(struct worker *w)
{
	return set_acl(w, K_DIR, "system.posix_acl_default", W_DEFAULT);
}

static bool has_acl(struct worker *w, u32 id)
{
	(void)w;
	return model->node[id].acl_bytes || model->node[id].default_bytes;
}

bool op_acl_remove(struct worker *w)
{
	char path[PATH_ROOM];
	u32 id = take_named(w, K_ATTRIBUTED, has_acl, path);
	if (!id)
		return false;
	bool access = model->node[id].acl_bytes;
	change_node(w, id, access ? W_ACL | W_MODE : W_DEFAULT);
	go(w);
	if (lremovexattr(path, access ? "system.posix_acl_access" : "system.posix_acl_default"))
		return refused(w, "removexattr", path);
	read_back(w, id, -1, path);
	settle(w);
	return true;
}

/* Revision 2, effective, some bits permitted (include/uapi/linux/capability.h). */
bool op_capability(struct worker *w)
{
	char path[PATH_ROOM];
	u32 id = take_named(w, K_FILE, NULL, path);
	if (!id)
		return false;
	u32 data[5] = { 0x02000001, 1 + (u32)below(w, 0x7fffffff), 0, 0, 0 };
	change_node(w, id, W_CAP);
	go(w);
	if (lsetxattr(path, "security.capability", data, sizeof data, 0))
		return refused(w, "setxattr", path);
	read_back(w, id, -1, path);
	settle(w);
	return true;
}
