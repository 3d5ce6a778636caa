/* SPDX-License-Identifier: MIT
 *
 * Are descriptors, mappings and files without a name what they must be? Only the process that has them can tell. All
 * are parked, so nothing changes and paths hold still. Nothing is changed here either: no offset, no lock.
 */
#include "files.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { READ_MOST = 32 << 10 };

static __thread char is[READ_MOST], must[READ_MOST];

static bool compare(const struct node *n, u32 id, u64 offset, const char *found, u64 bytes, const char *how,
		    char *error, size_t size)
{
	render(blocks_of(model, id, n), n->blocks, offset, bytes, must);
	if (memcmp(found, must, bytes) == 0)
		return true;
	u64 at = 0;
	while (found[at] == must[at])
		at++;
	snprintf(error, size, "%s: byte %llu is not what it must be", how, (unsigned long long)(offset + at));
	return false;
}

/* The content through the descriptor; of what has a name, and so is looked at by it, only the beginning. */
static bool check_content(const struct handle *h, char *error, size_t size)
{
	const struct node *n = &model->node[h->node];
	u64 end = n->links ? smaller(n->size, READ_MOST) : n->size;
	for (u64 offset = 0; offset < end; offset += READ_MOST) {
		u64 bytes = smaller(READ_MOST, end - offset);
		ssize_t got = pread(h->fd, is, bytes, (off_t)offset);
		if (got != (ssize_t)bytes) {
			snprintf(error, size, "%zd bytes can be read at %llu, of %llu", got,
				 (unsigned long long)offset, (unsigned long long)bytes);
			return false;
		}
		if (!compare(n, h->node, offset, is, bytes, "read through the descriptor", error, size))
			return false;
	}
	return true;
}

static bool check_descriptor(const struct handle *h, char *error, size_t size)
{
	const struct node *n = &model->node[h->node];
	struct stat status, named;
	char path[PATH_ROOM];
	int flags = fcntl(h->fd, F_GETFL), kept = O_ACCMODE | O_APPEND | O_DSYNC;
	if (fstat(h->fd, &status) || flags < 0) {
		snprintf(error, size, "the descriptor: %s", strerror(errno));
		return false;
	}
	off_t offset = lseek(h->fd, 0, SEEK_CUR);
	if ((flags & kept) != h->flags)
		snprintf(error, size, "the flags are %o, and must be %o", flags & kept, h->flags);
	else if (offset != (off_t)h->offset)
		snprintf(error, size, "the offset is %lld, and must be %llu", (long long)offset,
			 (unsigned long long)h->offset);
	else if (status.st_mode != (S_IFREG | n->mode))
		snprintf(error, size, "the mode is %o, and must be %o", status.st_mode, S_IFREG | n->mode);
	else if (status.st_uid != n->uid || status.st_gid != n->gid)
		snprintf(error, size, "the owner is %u:%u, and must be %u:%u", status.st_uid, status.st_gid, n->uid,
			 n->gid);
	else if (status.st_size != (off_t)n->size)
		snprintf(error, size, "the size is %lld, and must be %llu", (long long)status.st_size,
			 (unsigned long long)n->size);
	else if (status.st_nlink != n->links)
		snprintf(error, size, "there are %lu links, and must be %u", (unsigned long)status.st_nlink,
			 n->links);
	else if (n->links && (entry_path(n->entry[0], path) < 0 || lstat(path, &named)))
		snprintf(error, size, "its name is gone: %s", strerror(errno));
	else if (n->links && (named.st_ino != status.st_ino || named.st_dev != status.st_dev))
		snprintf(error, size, "it is another file than the one with its name");
	else
		return (h->flags & O_ACCMODE) == O_WRONLY || check_content(h, error, size);
	return false;
}

static bool check_mapping(const struct handle *h, char *error, size_t size)
{
	const struct node *n = &model->node[h->node];
	for (u64 page = 0; page < h->pages && (h->first + page) * PAGE < n->size; page++) {
		const char *found = (const char *)(h->at + page * PAGE); // NOLINT
		if (h->private && h->private_key[page]) {
			pattern(h->private_key[page], 0, PAGE, must);
			if (memcmp(found, must, PAGE) == 0)
				continue;
			snprintf(error, size, "page %llu of the private mapping is not as it was written",
				 (unsigned long long)page);
			return false;
		}
		u64 offset = (h->first + page) * PAGE, bytes = smaller(PAGE, n->size - offset);
		if (!compare(n, h->node, offset, found, bytes,
			     h->private ? "the private mapping" : "the shared mapping", error, size))
			return false;
	}
	return true;
}

/* Check all that a worker has kept; of several threads or processes, each does it for its own. */
bool check_handles(struct worker *w, char *error, size_t size, u64 *checked)
{
	char what[200], name[120], path[PATH_ROOM];
	for (u32 row = 0; row <= WORKERS; row++)
		for (u32 i = 0; i < HANDLES; i++) {
			const struct handle *h = &model->handle[row][i];
			if (!h->used || (row != WORKERS && row != w->number))
				continue;
			++*checked;
			if ((h->fd < 0 || check_descriptor(h, what, sizeof what)) &&
			    (!h->at || check_mapping(h, what, sizeof what)))
				continue;
			strcpy(path, "unlinked");
			if (model->node[h->node].links)
				entry_path(model->node[h->node].entry[0], path);
			escape(path, name, sizeof name);
			snprintf(error, size, "worker %u, handle %u on %s (file %u): %s", w->number, i, name, h->node,
				 what);
			return false;
		}
	return true;
}
