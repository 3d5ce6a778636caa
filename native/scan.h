/* SPDX-License-Identifier: MIT
 *
 * Which pages a process has, and which of them are dirty.
 */
#ifndef OUTLIVE_SCAN_H
#define OUTLIVE_SCAN_H

#include <stdbool.h>

#include "pagemap_scan.h"
#include "space.h"

/* Read the mappings of a space. An errno. */
int read_maps(struct space *space);

/* Append to the runs, or lengthen the last one. An errno. */
int append(struct space *space, uint64_t start, uint64_t end, uint32_t flags);

/* Ask about pages with content only: not the zero page, no guard page, no page of the file's own. Regions found, or
 * -errno. */
long scan_content(int fd, struct pm_scan_arg *ask, bool file);

/* Append all pages of a mapping; `fd` is the process's pagemap, `memory` its mem, `*pair` how far its known pages are
 * passed. An errno. */
int scan_vma(struct space *space, int fd, int memory, const struct vma *vma, uint64_t *pair);

/* Append all pages of all owned mappings, as soft-dirty bits have it. An errno. */
int scan_by_soft_dirty(struct space *space);

/* Protect the dirty pages that were found in the mappings, before they are copied; and no others. An errno, SPACE_STALE
 * with it. */
int protect_dirty(struct space *space, int fd);

#endif
