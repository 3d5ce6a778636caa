/* SPDX-License-Identifier: MIT
 *
 * What a pagemap says of pages on kernels that cannot be asked by PAGEMAP_SCAN: soft_dirty.c has the rules.
 */
#ifndef OUTLIVE_SOFT_DIRTY_H
#define OUTLIVE_SOFT_DIRTY_H

#include <stdbool.h>
#include <stdint.h>

/* Which mappings there were at one instant, and which frame of memory (or place in swap) each page had. */
struct frames {
	uint64_t *bounds;     /* of pages that there are: start, end, start, end ... ascending */
	uint64_t *frames;     /* of each page within, in order */
	uint64_t *mappings;   /* start, end, start, end ... ascending */
	uint64_t ranges_room;
	uint64_t pages_room;
	uint64_t mappings_room;
	uint64_t ranges;
	uint64_t pages;
	uint64_t mapped;      /* how many mappings */
};

enum {
	SOFT_DIRTY_TRACKS = 1,  /* believe the kernel's bit and `before`; else every page counts as written */
	SOFT_DIRTY_RECORDS = 2, /* fill `now`: for a scan that is followed by a clear */
};

struct soft_dirty {
	uint64_t options;
	uint64_t zero_frame;  /* of the kernel's page of zeros */
	struct frames before; /* in: at the last clear */
	struct frames now;    /* out */
	uint64_t range_at;    /* how far the scan is in `before` */
	uint64_t page_at;
	uint64_t mapping_at;
};

/* Told of neighbouring pages that are alike; an errno ends the scan. */
typedef int soft_dirty_found(void *context, uint64_t start, uint64_t end, bool written);

/* Begin a scan of one address space. */
void soft_dirty_begin(struct soft_dirty *soft);

/* Scan one private mapping after the other, ascending; `pagemap` is /proc/PID/pagemap, open. An errno; ENOSPC if
 * `now` has too little room. */
int soft_dirty_scan(struct soft_dirty *soft, int pagemap, uint64_t start, uint64_t end, soft_dirty_found *found,
		    void *context);

/* From now on, no page of the process is written. To be called only while it stands still. An errno. */
int soft_dirty_clear(int pid);

#endif
