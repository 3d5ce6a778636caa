/* SPDX-License-Identifier: MIT
 *
 * The PAGEMAP_SCAN ioctl (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst), which the headers of most
 * distributions lack.
 */
#ifndef OUTLIVE_PAGEMAP_SCAN_H
#define OUTLIVE_PAGEMAP_SCAN_H

#include <stdint.h>
#include <sys/ioctl.h>

enum {
	PAGE_IS_WPALLOWED = 1 << 0,
	PAGE_IS_WRITTEN = 1 << 1,
	PAGE_IS_FILE = 1 << 2,
	PAGE_IS_PRESENT = 1 << 3,
	PAGE_IS_SWAPPED = 1 << 4,
	PAGE_IS_PFNZERO = 1 << 5,
	PAGE_IS_HUGE = 1 << 6,
	PAGE_IS_SOFT_DIRTY = 1 << 7,
	PAGE_IS_GUARD = 1 << 8, /* newer; a kernel that lacks it answers EINVAL to a request that names it */
};

enum {
	PM_SCAN_WP_MATCHING = 1 << 0,
	PM_SCAN_CHECK_WPASYNC = 1 << 1,
};

struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)

/* Ask for what is not protected in [start, end): what was written, and entries of a page table that are empty or
 * marks. For just this question the kernel passes over a protected page without a look at it. What has no page
 * table is not reported. EPERM where writes are not tracked. */
static inline struct pm_scan_arg ask_unprotected(uint64_t start, uint64_t end, struct page_region *regions,
						 uint64_t room)
{
	return (struct pm_scan_arg){
		.size = sizeof(struct pm_scan_arg),
		.flags = PM_SCAN_CHECK_WPASYNC,
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)regions,
		.vec_len = room,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};
}

enum {
	SCAN_NEAR = 32, /* pages: to look at as many takes as long as another call */
};

#endif
