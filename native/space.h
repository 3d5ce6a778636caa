/* SPDX-License-Identifier: MIT
 *
 * What the parts of the page reader share: the pages of one process, as runs. primary/pages.py lays the same out.
 */
#ifndef OUTLIVE_SPACE_H
#define OUTLIVE_SPACE_H

#include <stdint.h>

#include "maps.h"
#include "soft_dirty.h"

#define PAGE 4096u
#define EXPORTED __attribute__((visibility("default"))) /* all else stays within the library */

enum {
	RUN_DIRTY = 1,
	RUN_UNREADABLE = 2, /* in a mapping without read permission */
	RUN_WRITTEN = 4,    /* dirty by what the kernel says, not only because it is not known; told for soft-dirty only */
	RUN_EARLY = 8,      /* told by outlive_early, and copied then if it was dirty: it is not any more */
};

/* Neighbouring pages that are treated alike. */
struct run {
	uint64_t start, end;
	uint32_t flags;
	uint32_t unused;
};

enum {
	SPACE_PROTECT = 1, /* protect what is found written, or clear the soft-dirty bits */
	SPACE_STALE = 2,   /* out: pages were protected that could not be copied */
};

struct space {
	int32_t pid;
	int32_t error;          /* out: an errno; the space is worth nothing then. Too little room: for text E2BIG, for
				 * mappings EMLINK, for runs ENOBUFS; EBADMSG: the maps were read while they changed */
	uint32_t options;
	uint32_t unused;
	const uint64_t *known;  /* start, end, start, end ... ascending, of pages whose content is known */
	uint64_t known_pairs;
	struct run *runs;       /* out: all present pages, ascending; neighbours differ in flags */
	uint64_t runs_room;
	uint64_t runs_count;
	uint64_t dirty_pages;   /* out */
	uint64_t present_pages; /* out */
	uint64_t content_at;    /* out: page in the buffer from which the dirty ones stand, in order */
	char *text;             /* room for its maps */
	uint64_t text_room;
	struct vma *vmas;
	uint64_t vmas_room;
	uint64_t vmas_count;    /* out */
	struct space *early;    /* what outlive_early made of the same process, or NULL */
	struct soft_dirty *soft; /* NULL: PAGEMAP_SCAN and write protection; else soft_dirty.h, or no tracking at all */
};

/* Open a file of /proc/PID; -1 and errno. */
int open_of(int pid, const char *name, int flags);

#endif
