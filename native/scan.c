/* SPDX-License-Identifier: MIT
 *
 * Finds out which pages a process has, and which of them are dirty. In: its pagemap, and of which pages the content is
 * known. Out: runs.
 *
 * A page counts as dirty unless all of this is so: it can be tracked (WPALLOWED), it was not written since it was
 * protected, it is no marker in a file mapping, and the caller knows its content (`known`). Whatever is in doubt
 * is dirty. Where the kernel has soft-dirty bits instead, soft_dirty.c says what was written.
 */
#define _GNU_SOURCE
#include "scan.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REGIONS 512u /* of one ioctl */
#define USER_MODE_ONLY 1             /* UFFD_USER_MODE_ONLY, since Linux 5.11 */
#define FEATURES (1u << 13 | 1u << 15) /* UFFD_FEATURE_WP_UNPOPULATED and _WP_ASYNC, since Linux 6.4 and 6.7 */
#define TABLE (512u * PAGE) /* what one page table maps */
#define AT_ONCE (64u * TABLE) /* the kernel holds the address space's lock meanwhile, and CRIU needs it to map its parasite */

int read_maps(struct space *space)
{
	const int fd = open_of(space->pid, "maps", O_RDONLY);
	uint64_t size = 0;
	ssize_t got = -1;

	if (fd < 0)
		return errno;
	while (size < space->text_room && (got = read(fd, space->text + size, space->text_room - size)) > 0)
		size += (uint64_t)got;
	const int failure = got < 0 ? errno : got ? E2BIG : 0;
	close(fd);
	if (failure)
		return failure;
	const long count = maps_parse(space->text, size, space->vmas, space->vmas_room);
	if (count < 0)
		return count == -2 ? EMLINK : EBADMSG;
	space->vmas_count = (uint64_t)count;
	return 0;
}

/* Append to the runs, or lengthen the last one. */
int append(struct space *space, uint64_t start, uint64_t end, uint32_t flags)
{
	struct run *last = space->runs_count ? &space->runs[space->runs_count - 1] : NULL;

	if (last && last->end == start && last->flags == flags) {
		last->end = end;
	} else {
		if (space->runs_count == space->runs_room)
			return ENOBUFS;
		space->runs[space->runs_count++] = (struct run){ start, end, flags, 0 };
	}
	space->present_pages += (end - start) / PAGE;
	if (flags & RUN_DIRTY)
		space->dirty_pages += (end - start) / PAGE;
	return 0;
}

/* Append present pages that are clean as far as the kernel knows: dirty where their content is not known. */
static int append_clean(struct space *space, uint64_t *pair, uint64_t start, uint64_t end, uint32_t flags)
{
	while (start < end) {
		while (*pair < space->known_pairs && space->known[2 * *pair + 1] <= start)
			++*pair;
		const bool any = *pair < space->known_pairs;
		const uint64_t from = any ? space->known[2 * *pair] : UINT64_MAX;
		const uint64_t to = any ? space->known[2 * *pair + 1] : UINT64_MAX;
		const bool known = from <= start;
		const uint64_t edge = known ? to : from;
		const uint64_t stop = edge < end ? edge : end;
		const int failure = append(space, start, stop, known ? flags : flags | RUN_DIRTY);

		if (failure)
			return failure;
		start = stop;
	}
	return 0;
}

/* Add to a question that it is about pages with content: not the zero page, no guard page, no page of the file's
 * own. Whether a page is the file's is asked only where it may be: the kernel then looks at each page's record, which
 * costs five times the rest. Regions found, or -errno. */
long scan_content(int fd, struct pm_scan_arg *ask, bool file)
{
	static uint64_t guard = PAGE_IS_GUARD; /* zero on kernels that do not know it */
	const uint64_t wanted = ask->category_mask;

	ask->category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
	for (;;) {
		ask->category_inverted = PAGE_IS_PFNZERO | guard | (file ? PAGE_IS_FILE : 0);
		ask->category_mask = wanted | ask->category_inverted;
		const long got = ioctl(fd, PAGEMAP_SCAN, ask);

		if (got >= 0)
			return got;
		if (errno != EINVAL || !guard)
			return -errno;
		guard = 0;
	}
}

/* One scan of [start, end) for pages that there are; regions found, or -errno. Room for no more regions than there
 * can be: the kernel allocates as many. */
static long scan_present(int fd, uint64_t start, uint64_t end, bool file, struct page_region *regions,
			 uint64_t *walk_end)
{
	const uint64_t pages = (end - start) / PAGE;
	struct pm_scan_arg ask = {
		.size = sizeof(ask),
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)regions,
		.vec_len = pages < REGIONS ? pages : REGIONS,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED,
	};
	const long got = scan_content(fd, &ask, file);

	*walk_end = ask.walk_end;
	return got;
}

/* A page of a file mapping that is only SWAPPED may be content that was written out, or a marker that tracking
 * left where a written page was dropped. Touching it tells: a marker becomes the file's page, or nothing. */
static int append_marked(struct space *space, int fd, int memory, uint64_t start, uint64_t end, uint32_t flags)
{
	for (uint64_t page = start; page < end; page += PAGE) {
		struct page_region region;
		uint64_t walk_end;
		char byte;

		const ssize_t got = pread(memory, &byte, 1, (off_t)page);
		if (got != 1) {
			if (got == 0) /* the address space is gone */
				return ESRCH;
			if (errno != EIO)
				return errno;
			continue; /* behind the end of its file: there is nothing */
		}
		const long count = scan_present(fd, page, page + PAGE, true, &region, &walk_end);
		if (count < 0)
			return (int)-count;
		const int failure = count ? append(space, page, page + PAGE, flags | RUN_DIRTY) : 0;
		if (failure)
			return failure;
	}
	return 0;
}

/* Look at every page of [start, end). */
static int scan_closely(struct space *space, int fd, int memory, const struct vma *vma, uint64_t start, uint64_t end,
			uint64_t *pair)
{
	struct page_region regions[REGIONS];
	const uint32_t base = vma->flags & VMA_READABLE ? 0 : RUN_UNREADABLE;
	const bool file = vma->flags & VMA_FILE;

	while (start < end) {
		uint64_t walk_end = start;
		const long count = scan_present(fd, start, end, file, regions, &walk_end);

		if (count < 0)
			return (int)-count;
		for (long each = 0; each < count; each++) {
			const uint64_t is = regions[each].categories;
			int failure;

			const bool marker = file && !(is & PAGE_IS_PRESENT);
			if (marker)
				failure = append_marked(space, fd, memory, regions[each].start, regions[each].end,
							base);
			else if (!(is & PAGE_IS_WPALLOWED) || is & PAGE_IS_WRITTEN)
				failure = append(space, regions[each].start, regions[each].end, base | RUN_DIRTY);
			else
				failure = append_clean(space, pair, regions[each].start, regions[each].end, base);
			if (failure)
				return failure;
		}
		if (walk_end <= start)
			return EIO;
		start = walk_end;
	}
	return 0;
}

static bool tells_holes; /* the kernel reports what has no page table as unprotected */

/* Whether it is reported that two page tables, in [start, start + 2 * TABLE), are gone. */
static bool told_gone(int fd, uint64_t start)
{
	struct page_region regions[2];
	struct pm_scan_arg ask = ask_unprotected(start, start + 2 * TABLE, regions, 2);
	const long got = ioctl(fd, PAGEMAP_SCAN, &ask);

	return got == 1 && regions[0].start == start && regions[0].end == start + 2 * TABLE;
}

/* Try it in this process: one page table that never was beside one that is dropped, with protected pages. */
static bool learn_holes(int pagemap, int userfault, uint64_t start)
{
	struct uffdio_api api = { .api = UFFD_API, .features = FEATURES };
	struct uffdio_register part = {
		.range = { start, 2 * TABLE },
		.mode = UFFDIO_REGISTER_MODE_WP,
	};
	struct page_region region;
	struct pm_scan_arg protect = {
		.size = sizeof(protect),
		.flags = PM_SCAN_WP_MATCHING,
		.start = start,
		.end = start + TABLE,
		.vec = (uint64_t)(uintptr_t)&region,
		.vec_len = 1,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};
	char *const page = (char *)(uintptr_t)start;

	if (ioctl(userfault, UFFDIO_API, &api) || ioctl(userfault, UFFDIO_REGISTER, &part))
		return false;
	memset(page, 1, TABLE);
	if (ioctl(pagemap, PAGEMAP_SCAN, &protect) < 0)
		return false;
	return !told_gone(pagemap, start) && !madvise(page, TABLE, MADV_DONTNEED) && told_gone(pagemap, start);
}

/* To be called once, with nothing frozen: what scans may rely on in this kernel; with `trust` 0, as little as in any. */
EXPORTED int outlive_learn(int trust)
{
	const uint64_t size = 4 * TABLE;
	void *const room = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	const int userfault = (int)syscall(SYS_userfaultfd, O_CLOEXEC | USER_MODE_ONLY);

	tells_holes = false;
	if (trust && room != MAP_FAILED && pagemap >= 0 && userfault >= 0) {
		const uint64_t start = ((uint64_t)(uintptr_t)room + TABLE - 1) / TABLE * TABLE;

		madvise(room, size, MADV_NOHUGEPAGE);
		tells_holes = learn_holes(pagemap, userfault, start);
	}
	if (userfault >= 0)
		close(userfault);
	if (pagemap >= 0)
		close(pagemap);
	if (room != MAP_FAILED)
		munmap(room, size);
	return tells_holes;
}

/* Append what stands in [start, end), of which nothing is unprotected. A page there is protected, so it is there;
 * unless its whole page table was dropped: kernels report that as unprotected only since the summer of 2026 (mm/uffd,
 * "PMD hole is reported written"; also in stable ones, 6.18.44 for one), and whether this one does was learnt. Else one
 * page tells for its table, and so does a neighbour at either end that was reported. */
static int append_standing(struct space *space, int fd, const struct vma *vma, uint64_t start, uint64_t end,
			   uint64_t *pair)
{
	const uint32_t base = vma->flags & VMA_READABLE ? 0 : RUN_UNREADABLE;
	bool stands = start > vma->start && start % TABLE;

	if (tells_holes)
		return append_clean(space, pair, start, end, base);
	while (start < end) {
		const uint64_t table = start - start % TABLE;
		const uint64_t stop = table + TABLE < end ? table + TABLE : end;

		if (!stands && !(stop == end && end < vma->end && end % TABLE)) {
			struct page_region region;
			struct pm_scan_arg ask = {
				.size = sizeof(ask),
				.start = start,
				.end = end,
				.vec = (uint64_t)(uintptr_t)&region,
				.vec_len = 1,
				.max_pages = 1,
				.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
				.return_mask = PAGE_IS_PRESENT,
			};
			const long got = ioctl(fd, PAGEMAP_SCAN, &ask);
			if (got < 0)
				return errno;
			if (!got)
				return 0;
			if (region.start >= stop) { /* nothing until there */
				start = region.start - region.start % TABLE;
				continue;
			}
			if (region.start > start) /* does not happen: what is missing there was not reported */
				return EIO;
		}
		const int failure = append_clean(space, pair, start, stop, base);
		if (failure)
			return failure;
		start = stop;
		stands = false;
	}
	return 0;
}

/* Look closely only at what is not protected. Only for anonymous memory: in file mappings a dropped page may leave a
 * protected marker. EPERM if it is not tracked. */
static int scan_fast(struct space *space, int fd, int memory, const struct vma *vma, uint64_t *pair)
{
	struct page_region regions[REGIONS];
	uint64_t at = vma->start; /* everything before it is appended */

	for (uint64_t scanned = vma->start; scanned < vma->end;) {
		const uint64_t stop = vma->end - scanned > AT_ONCE ? scanned + AT_ONCE : vma->end;
		struct pm_scan_arg ask = ask_unprotected(scanned, stop, regions, REGIONS);
		const long got = ioctl(fd, PAGEMAP_SCAN, &ask);
		if (got < 0)
			return errno;
		if (ask.walk_end <= scanned)
			return EIO;
		for (long each = 0; each < got;) {
			const uint64_t from = regions[each].start;
			uint64_t to = regions[each++].end;

			/* To look at a few pages between costs less than to ask twice. */
			while (each < got && regions[each].start - to <= SCAN_NEAR * PAGE)
				to = regions[each++].end;
			int failure = append_standing(space, fd, vma, at, from, pair);
			if (!failure)
				failure = scan_closely(space, fd, memory, vma, from, to, pair);
			if (failure)
				return failure;
			at = to;
		}
		scanned = ask.walk_end;
	}
	return append_standing(space, fd, vma, at, vma->end, pair);
}

int scan_vma(struct space *space, int fd, int memory, const struct vma *vma, uint64_t *pair)
{
	int failure = vma->flags & VMA_FILE ? EPERM : scan_fast(space, fd, memory, vma, pair);

	if (failure == EPERM) /* nothing was appended */
		failure = scan_closely(space, fd, memory, vma, vma->start, vma->end, pair);
	return failure;
}

/* Protect what is written in [start, end), of which all is dirty. An errno. */
static int protect_run(int fd, uint64_t start, uint64_t end, bool file)
{
	while (start < end) {
		struct page_region regions[64];
		const uint64_t pages = (end - start) / PAGE;
		struct pm_scan_arg ask = {
			.size = sizeof(ask),
			.flags = PM_SCAN_WP_MATCHING,
			.start = start,
			.end = end,
			.vec = (uint64_t)(uintptr_t)regions,
			.vec_len = pages < 64 ? pages : 64,
			.category_mask = PAGE_IS_WRITTEN,
			.return_mask = PAGE_IS_WRITTEN,
		};
		const long got = scan_content(fd, &ask, file);
		if (got < 0)
			return (int)-got;
		if (ask.walk_end <= start)
			return EIO;
		start = ask.walk_end;
	}
	return 0;
}

/* Protect the dirty pages that were found in the mappings, before they are copied; and no others: what somebody who is
 * not frozen has written since (the kernel too, for a thread that CRIU had run for a moment: its rseq area) would pass
 * for read. An errno, SPACE_STALE with it. */
int protect_dirty(struct space *space, int fd)
{
	uint64_t at = 0;
	int failure = 0;

	for (uint64_t each = 0; each < space->vmas_count && !failure; each++) {
		const struct vma *vma = &space->vmas[each];

		while (at < space->runs_count && space->runs[at].end <= vma->start)
			at++;
		for (uint64_t next = at; next < space->runs_count && space->runs[next].start < vma->end && !failure; next++) {
			const struct run *run = &space->runs[next];

			if (run->flags & RUN_DIRTY)
				failure = protect_run(fd, run->start > vma->start ? run->start : vma->start,
						      run->end < vma->end ? run->end : vma->end, vma->flags & VMA_FILE);
		}
	}
	if (failure)
		space->options |= SPACE_STALE;
	return failure;
}

struct soft_scan {
	struct space *space;
	uint64_t pair;
	uint32_t flags; /* of the mapping */
};

static int found_by_soft_dirty(void *context, uint64_t start, uint64_t end, bool written)
{
	struct soft_scan *scan = context;

	if (written)
		return append(scan->space, start, end, scan->flags | RUN_DIRTY | RUN_WRITTEN);
	return append_clean(scan->space, &scan->pair, start, end, scan->flags);
}

int scan_by_soft_dirty(struct space *space)
{
	struct soft_scan scan = { space, 0, 0 };
	int failure = 0;
	const int fd = open_of(space->pid, "pagemap", O_RDONLY);

	if (fd < 0)
		return errno;
	soft_dirty_begin(space->soft);
	for (uint64_t at = 0; at < space->vmas_count && !failure; at++) {
		const struct vma *vma = &space->vmas[at];

		scan.flags = vma->flags & VMA_READABLE ? 0 : RUN_UNREADABLE;
		if (vma->flags & VMA_OWNED)
			failure = soft_dirty_scan(space->soft, fd, vma->start, vma->end, found_by_soft_dirty, &scan);
	}
	close(fd);
	return failure;
}
