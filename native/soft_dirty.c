/* SPDX-License-Identifier: MIT
 *
 * Which pages a process has and which of them were written, by the soft-dirty bits of /proc/PID/pagemap (Linux,
 * Documentation/admin-guide/mm/soft-dirty.rst and pagemap.rst).
 *
 * In: a pagemap, and which mappings there were and which frame each page had when the bits were last cleared. Out:
 * pages that there are, each written since or not. A page is not written only if its bit is clear, it still is in the
 * frame that it was in, and its mapping is the one that it was in, from the same start to the same end:
 *
 * - The bit alone does not tell of page tables that mremap(2) moves as a whole (2 MiB and more, both ends aligned),
 *   whose pages come to another address with their bits as they were; nor, it seems, of pages that the kernel has
 *   merged (KSM).
 * - A mapping that is new, or became one with a new one, is written as a whole (VM_SOFTDIRTY), and then its pages'
 *   bits are not kept: mprotect(2) makes them writable again as they are (from Linux 6.0 on), and whoever writes by
 *   force (/proc/PID/mem) leaves no bit. When it becomes one with yet another neighbour, kernels before 6.19 may
 *   forget that it is written (bf14d4a05387, "mm: propagate VM_SOFTDIRTY on merge"): what was written since shows in
 *   no bit. That it has other bounds now tells.
 *
 * What is no content: the kernel's page of zeros, pages that are a file's still, guard pages. The huge page of
 * zeros shows as a file's in every kernel that has soft-dirty bits and no PAGEMAP_SCAN.
 *
 * Reading and clearing are two steps: a write in between would be lost. Whoever clears sees to it that the process
 * stood still from before the scan until after the clear, or takes everything for written.
 */
#define _GNU_SOURCE
#include "soft_dirty.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#define PAGE 4096u
#define BLOCK 8192u /* entries of one read: 32 MiB of address space */

#define ENTRY_FRAME ((UINT64_C(1) << 55) - 1)
#define ENTRY_SOFT_DIRTY (UINT64_C(1) << 55)
#define ENTRY_GUARD (UINT64_C(1) << 58)
#define ENTRY_FILE (UINT64_C(1) << 61) /* or anonymous shared memory */
#define ENTRY_SWAPPED (UINT64_C(1) << 62)
#define ENTRY_PRESENT (UINT64_C(1) << 63)

static bool is_there(const struct soft_dirty *soft, uint64_t entry)
{
	if (!(entry & (ENTRY_PRESENT | ENTRY_SWAPPED)) || entry & (ENTRY_FILE | ENTRY_GUARD))
		return false;
	return !(entry & ENTRY_PRESENT) || (entry & ENTRY_FRAME) != soft->zero_frame;
}

static uint64_t frame_of(uint64_t entry)
{
	return entry & (ENTRY_FRAME | ENTRY_PRESENT | ENTRY_SWAPPED);
}

/* The frame that a page had before; 0, which no page has, if it was not there. Pages are asked for in order. */
static uint64_t frame_before(struct soft_dirty *soft, uint64_t page)
{
	const struct frames *before = &soft->before;

	while (soft->range_at < before->ranges && before->bounds[2 * soft->range_at + 1] <= page) {
		soft->page_at += (before->bounds[2 * soft->range_at + 1] - before->bounds[2 * soft->range_at]) / PAGE;
		soft->range_at++;
	}
	if (soft->range_at == before->ranges || before->bounds[2 * soft->range_at] > page)
		return 0;
	return before->frames[soft->page_at + (page - before->bounds[2 * soft->range_at]) / PAGE];
}

/* Whether a mapping had these bounds before. Mappings are asked for in order. */
static bool was_mapped(struct soft_dirty *soft, uint64_t start, uint64_t end)
{
	const struct frames *before = &soft->before;

	while (soft->mapping_at < before->mapped && before->mappings[2 * soft->mapping_at + 1] <= start)
		soft->mapping_at++;
	return soft->mapping_at < before->mapped && before->mappings[2 * soft->mapping_at] == start &&
	       before->mappings[2 * soft->mapping_at + 1] == end;
}

static bool is_written(struct soft_dirty *soft, uint64_t entry, uint64_t page)
{
	if (entry & ENTRY_SOFT_DIRTY)
		return true;
	return frame_before(soft, page) != frame_of(entry);
}

static int record_mapping(struct frames *now, uint64_t start, uint64_t end)
{
	if (now->mapped == now->mappings_room)
		return ENOSPC;
	now->mappings[2 * now->mapped] = start;
	now->mappings[2 * now->mapped++ + 1] = end;
	return 0;
}

static int record(struct frames *now, uint64_t page, uint64_t frame)
{
	if (now->pages == now->pages_room)
		return ENOSPC;
	if (!now->ranges || now->bounds[2 * now->ranges - 1] != page) {
		if (now->ranges == now->ranges_room)
			return ENOSPC;
		now->bounds[2 * now->ranges++] = page;
	}
	now->bounds[2 * now->ranges - 1] = page + PAGE;
	now->frames[now->pages++] = frame;
	return 0;
}

void soft_dirty_begin(struct soft_dirty *soft)
{
	soft->range_at = soft->page_at = soft->mapping_at = 0;
	soft->now.ranges = soft->now.pages = soft->now.mapped = 0;
}

int soft_dirty_scan(struct soft_dirty *soft, int pagemap, uint64_t start, uint64_t end, soft_dirty_found *found,
		    void *context)
{
	uint64_t entries[BLOCK];
	uint64_t from = start; /* of the pages that are alike, up to where the scan is */
	const bool same = soft->options & SOFT_DIRTY_TRACKS && was_mapped(soft, start, end);
	const int full = soft->options & SOFT_DIRTY_RECORDS ? record_mapping(&soft->now, start, end) : 0;
	bool there = false;
	bool written = false;

	if (full)
		return full;
	while (start < end) {
		const uint64_t left = (end - start) / PAGE;
		const ssize_t got = pread(pagemap, entries, (left < BLOCK ? left : BLOCK) * sizeof(*entries),
					  (off_t)(start / PAGE * sizeof(*entries)));

		if (got < 0)
			return errno;
		if (!got || (size_t)got % sizeof(*entries))
			return EIO;
		for (size_t at = 0; at < (size_t)got / sizeof(*entries); at++, start += PAGE) {
			const bool is = is_there(soft, entries[at]);
			const bool was_written = is && (!same || is_written(soft, entries[at], start));
			int failure = 0;

			if (is && soft->options & SOFT_DIRTY_RECORDS)
				failure = record(&soft->now, start, frame_of(entries[at]));
			if (!failure && there && (!is || was_written != written))
				failure = found(context, from, start, written);
			if (failure)
				return failure;
			if (!there || !is || was_written != written)
				from = start;
			there = is;
			written = was_written;
		}
	}
	return there ? found(context, from, end, written) : 0;
}

int soft_dirty_clear(int pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/clear_refs", pid);
	const int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return errno;
	const int failure = write(fd, "4", 1) == 1 ? 0 : errno ? errno : EIO;
	close(fd);
	return failure;
}
