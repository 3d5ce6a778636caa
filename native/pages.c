/* SPDX-License-Identifier: MIT
 *
 * The page reader: finds out which pages a process has and which were written, and copies them. A library for
 * primary/pages.py, because a freeze has no room for Python: the whole of what is done inside it is one call.
 *
 *   running   outlive_maps        the mappings
 *             outlive_written     how much was written since the last protection, about
 *             outlive_protect     what was written since the last protection, and protect it anew
 *             outlive_read        copy pages; says of each whether it could be read (copy.c)
 *   frozen    outlive_early       while CRIU is at work: which pages there are where CRIU never writes, which of them
 *                                 are dirty, and the content of the dirty ones, which are protected
 *             outlive_capture     when CRIU is done, of all processes of the tree: which pages there are at all, and
 *                                 the same of the rest; with no room for content, only a look
 *
 * scan.c says what is dirty. No call keeps state between calls, none allocates memory while frozen but in what the
 * caller gave.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "copy.h"
#include "scan.h"

#define REGIONS 512u /* of one ioctl */
#define LIFT_BYTES (256ul << 20) /* about a millisecond */
#define LIFT_TRIES 64

int open_of(int pid, const char *name, int flags)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	return open(path, flags | O_CLOEXEC);
}

enum told {
	TOLD_NOTHING, /* nothing about this mapping */
	TOLD_ALL,
	TOLD_ANOTHER, /* of mappings that stood here, and are others now */
};

/* What outlive_early has told of a mapping. */
static enum told told_early(const struct space *early, const struct vma *vma, uint64_t *at)
{
	enum told told = TOLD_NOTHING;

	if (!early)
		return TOLD_NOTHING;
	while (*at < early->vmas_count && early->vmas[*at].end <= vma->start)
		++*at;
	for (uint64_t each = *at; each < early->vmas_count && early->vmas[each].start < vma->end; each++) {
		const struct vma *same = &early->vmas[each];

		if (!same->early)
			continue;
		/* CRIU opens a closed mapping for its own reading, and closes it again. */
		if (same->start == vma->start && same->end == vma->end && !((same->flags ^ vma->flags) & ~VMA_READABLE))
			return TOLD_ALL;
		told = TOLD_ANOTHER;
	}
	return told;
}

static int append_early(struct space *space, const struct vma *vma, uint64_t *at)
{
	const struct space *early = space->early;

	while (*at < early->runs_count && early->runs[*at].end <= vma->start)
		++*at;
	for (uint64_t each = *at; each < early->runs_count && early->runs[each].start < vma->end; each++) {
		const struct run *run = &early->runs[each];
		const uint64_t from = run->start > vma->start ? run->start : vma->start;
		const uint64_t to = run->end < vma->end ? run->end : vma->end;
		const int failure = append(space, from, to, (run->flags & ~(uint32_t)RUN_DIRTY) | RUN_EARLY);

		if (failure)
			return failure;
	}
	return 0;
}

static int scan_space(struct space *space)
{
	uint64_t pair = 0, none = space->known_pairs, vma = 0, run = 0;
	int failure = read_maps(space);

	space->runs_count = space->dirty_pages = space->present_pages = 0;
	if (failure)
		return failure;
	if (space->soft)
		return scan_by_soft_dirty(space);
	const int fd = open_of(space->pid, "pagemap", O_RDWR);
	const int memory = open_of(space->pid, "mem", O_RDONLY);
	if (fd < 0 || memory < 0)
		failure = errno;
	for (uint64_t at = 0; at < space->vmas_count && !failure; at++) {
		const struct vma *here = &space->vmas[at];

		if (!(here->flags & VMA_OWNED))
			continue;
		const enum told told = told_early(space->early, here, &vma);
		if (told == TOLD_ALL)
			failure = append_early(space, here, &run);
		else /* what was protected early, and is another mapping's now, looks clean, but is not known */
			failure = scan_vma(space, fd, memory, here, told == TOLD_NOTHING ? &pair : &none);
	}
	if (!failure && space->options & SPACE_PROTECT)
		failure = protect_dirty(space, fd);
	if (fd >= 0)
		close(fd);
	if (memory >= 0)
		close(memory);
	return failure;
}

/* Running: whether the process has a descriptor through which a device may write into its memory beside the
 * kernel's page tables (O_DIRECT): 1, 0, or -errno. */
EXPORTED int outlive_reads_directly(int pid)
{
	char path[64];
	int found = 0;

	snprintf(path, sizeof(path), "/proc/%d/fdinfo", pid);
	DIR *directory = opendir(path);
	if (!directory)
		return -errno;
	for (struct dirent *entry; !found && (entry = readdir(directory));) {
		char text[128];
		if (entry->d_name[0] == '.')
			continue;
		const int fd = openat(dirfd(directory), entry->d_name, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue; /* closed since */
		const ssize_t size = read(fd, text, sizeof(text) - 1);
		close(fd);
		if (size <= 0)
			continue;
		text[size] = 0;
		const char *flags = strstr(text, "flags:");
		found = flags && strtoul(flags + 6, NULL, 8) & O_DIRECT;
	}
	closedir(directory);
	return found;
}

/* CRIU has a frozen process make calls by writing them over executable memory for a moment, and what it maps there for
 * itself is shared memory. All other pages hold what they held when the process was frozen; but for the rseq area of a
 * thread that CRIU runs, which the kernel keeps up to date and a restore makes anew. It counts as written afterwards. */
static bool criu_leaves_alone(const struct vma *vma)
{
	return vma->flags & VMA_OWNED && !(vma->flags & VMA_EXECUTABLE);
}

/* As read_runs; but while CRIU is at work, a mapping may be closed for reading after the maps were read. */
static int read_early(const struct space *space, uint8_t *into)
{
	int failure = read_runs(space->pid, space->runs, space->runs_count, RUN_DIRTY, into);

	if (failure != EFAULT)
		return failure;
	failure = 0;
	for (uint64_t at = 0; at < space->runs_count && !failure; at++) {
		const struct run *run = &space->runs[at];

		if (!(run->flags & RUN_DIRTY))
			continue;
		failure = read_unreadable(space->pid, run->start, run->end - run->start, into);
		into += run->end - run->start;
	}
	return failure;
}

/* One process, into `buffer` with `room` for so many pages; an errno. */
static int take_early(struct space *space, uint8_t *buffer, uint64_t room)
{
	uint64_t pair = 0;
	const int fd = open_of(space->pid, "pagemap", O_RDWR);
	const int memory = open_of(space->pid, "mem", O_RDONLY);
	int failure = fd < 0 || memory < 0 ? errno : 0;

	for (uint64_t at = 0; at < space->vmas_count && !failure; at++) {
		struct vma *vma = &space->vmas[at];

		if (!criu_leaves_alone(vma))
			continue;
		vma->early = 1;
		failure = scan_vma(space, fd, memory, vma, &pair);
	}
	if (!failure && space->dirty_pages > room)
		failure = EXFULL;
	if (!failure)
		failure = protect_dirty(space, fd);
	if (!failure) {
		failure = read_early(space, buffer);
		if (failure)
			space->options |= SPACE_STALE;
	}
	if (fd >= 0)
		close(fd);
	if (memory >= 0)
		close(memory);
	return failure;
}

/* Frozen, while CRIU is at work: tell and copy what it leaves alone. What is dirty is protected before it is copied, so
 * that it is known from then on, even if the freeze comes to nothing. Returns the pages that stand in `buffer`. A
 * space that failed says so itself: EXFULL if it has too many of them, EBUSY if it has files open for direct I/O, so
 * that a device may write past the tracking. outlive_capture must not be given it as `early`; and with SPACE_STALE, none
 * of its pages is known any more. */
EXPORTED int64_t outlive_early(struct space *spaces, uint64_t count, uint8_t *buffer, uint64_t buffer_pages)
{
	uint64_t taken = 0;

	for (uint64_t at = 0; at < count; at++) { /* of all, before CRIU opens closed mappings for its own reading */
		const int direct = outlive_reads_directly(spaces[at].pid);

		spaces[at].error = direct < 0 ? -direct : direct ? EBUSY : read_maps(&spaces[at]);
	}
	for (uint64_t at = 0; at < count; at++) {
		struct space *space = &spaces[at];

		space->runs_count = space->dirty_pages = space->present_pages = 0;
		if (space->error)
			continue;
		space->error = take_early(space, buffer + taken * PAGE, buffer_pages - taken);
		space->content_at = taken;
		if (!space->error)
			taken += space->dirty_pages;
	}
	return (int64_t)taken;
}

/* Frozen: take all spaces. Returns the dirty pages of all, which stand in `buffer` unless they are more than
 * `buffer_pages`: then nothing was copied. A space that failed says so itself, and counts for nothing. */
EXPORTED int64_t outlive_capture(struct space *spaces, uint64_t count, uint8_t *buffer, uint64_t buffer_pages)
{
	uint64_t dirty = 0;

	for (uint64_t at = 0; at < count; at++) {
		spaces[at].error = scan_space(&spaces[at]);
		if (spaces[at].error)
			continue;
		spaces[at].content_at = dirty;
		dirty += spaces[at].dirty_pages;
	}
	/* All are scanned before any is cleared: two processes may share their memory. */
	for (uint64_t at = 0; at < count; at++)
		if (!spaces[at].error && spaces[at].soft && spaces[at].options & SPACE_PROTECT)
			spaces[at].error = soft_dirty_clear(spaces[at].pid);
	if (dirty > buffer_pages)
		return (int64_t)dirty;
	for (uint64_t at = 0; at < count; at++)
		if (!spaces[at].error && spaces[at].dirty_pages)
			spaces[at].error = read_runs(spaces[at].pid, spaces[at].runs, spaces[at].runs_count,
						     RUN_DIRTY, buffer + spaces[at].content_at * PAGE);
	return (int64_t)dirty;
}

/* Running: list the mappings of a process; how many, or -errno. */
EXPORTED int64_t outlive_maps(struct space *space)
{
	const int failure = read_maps(space);
	return failure ? -failure : (int64_t)space->vmas_count;
}

/* Running: find what was written in [start, end) and protect it, both in one step of the kernel's. Pages that are a
 * file's or the zero page are left as they are: the first write makes another page of them, which is written. Fills `runs`
 * from where `runs_count` stands. Mappings that are not registered are passed over. An errno; ENOBUFS with
 * `*reached` behind the last page that was protected: go on from there. */
EXPORTED int outlive_protect(int fd, uint64_t start, uint64_t end, int file, uint32_t flags, struct run *runs, uint64_t room,
		    uint64_t *count, uint64_t *reached)
{
	*reached = start;
	while (*reached < end) {
		struct page_region regions[REGIONS];
		const uint64_t left = room - *count;
		struct pm_scan_arg ask = {
			.size = sizeof(ask),
			.flags = PM_SCAN_WP_MATCHING,
			.start = *reached,
			.end = end,
			.vec = (uint64_t)(uintptr_t)regions,
			.vec_len = left < REGIONS ? left : REGIONS,
			.category_mask = PAGE_IS_WRITTEN,
			.return_mask = PAGE_IS_WRITTEN,
		};
		if (!left)
			return ENOBUFS;
		const long got = scan_content(fd, &ask, file);
		if (got < 0)
			return (int)-got;
		if (ask.walk_end <= *reached)
			return EIO;
		for (long at = 0; at < got; at++)
			runs[(*count)++] = (struct run){ regions[at].start, regions[at].end, flags, 0 };
		*reached = ask.walk_end;
	}
	return 0;
}

/* Running: touch the markers that tracking left in a file mapping, so that no freeze has to. An errno. */
EXPORTED int outlive_settle(int fd, int memory, uint64_t start, uint64_t end)
{
	while (start < end) {
		struct page_region regions[64];
		struct pm_scan_arg ask = {
			.size = sizeof(ask),
			.start = start,
			.end = end,
			.vec = (uint64_t)(uintptr_t)regions,
			.vec_len = 64,
			.category_inverted = PAGE_IS_PRESENT,
			.category_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
			.return_mask = PAGE_IS_SWAPPED,
		};
		const long got = ioctl(fd, PAGEMAP_SCAN, &ask);
		if (got < 0)
			return errno;
		for (long at = 0; at < got; at++)
			for (uint64_t page = regions[at].start; page < regions[at].end; page += PAGE) {
				char byte;
				if (pread(memory, &byte, 1, (off_t)page) != 1)
					break; /* behind the end of its file */
			}
		if (ask.walk_end <= start)
			return EIO;
		start = ask.walk_end;
	}
	return 0;
}

/* Running: which of the mappings are not tracked, by their first page; what cannot be asked is none of them. */
EXPORTED void outlive_untracked(int fd, const struct vma *vmas, uint64_t count, uint8_t *untracked)
{
	for (uint64_t at = 0; at < count; at++) {
		struct page_region region;
		struct pm_scan_arg ask = {
			.size = sizeof(ask),
			.start = vmas[at].start,
			.end = vmas[at].start + PAGE,
			.vec = (uint64_t)(uintptr_t)&region,
			.vec_len = 1,
			.category_inverted = PAGE_IS_WPALLOWED,
			.category_mask = PAGE_IS_WPALLOWED,
			.return_mask = PAGE_IS_WPALLOWED,
		};
		untracked[at] = ioctl(fd, PAGEMAP_SCAN, &ask) != 0;
	}
}

/* Running: how many pages with content there are in the mappings, counted up to `most`; -errno. */
EXPORTED int64_t outlive_count(int fd, const struct vma *vmas, uint64_t count, uint64_t most)
{
	uint64_t pages = 0;

	for (uint64_t at = 0; at < count; at++)
		for (uint64_t start = vmas[at].start; start < vmas[at].end && pages < most;) {
			struct page_region regions[64];
			struct pm_scan_arg ask = {
				.size = sizeof(ask),
				.start = start,
				.end = vmas[at].end,
				.vec = (uint64_t)(uintptr_t)regions,
				.vec_len = 64,
				.max_pages = most - pages,
				.return_mask = PAGE_IS_PRESENT,
			};
			const long got = scan_content(fd, &ask, vmas[at].flags & VMA_FILE);
			if (got < 0)
				return got;
			for (long each = 0; each < got; each++)
				pages += (regions[each].end - regions[each].start) / PAGE;
			if (ask.walk_end <= start)
				return -EIO;
			start = ask.walk_end;
		}
	return (int64_t)pages;
}

/* Running: how many pages were written in tracked mappings since they were protected, counted up to `most`; -errno.
 * Unless it is to be `exact`, entries of page tables that are empty count as well: it takes a fifth of the time.
 * Nothing is protected. */
EXPORTED int64_t outlive_written(int fd, const struct vma *vmas, uint64_t count, uint64_t most, int exact)
{
	uint64_t pages = 0;

	for (uint64_t at = 0; at < count; at++)
		for (uint64_t start = vmas[at].start; start < vmas[at].end && pages < most;) {
			struct page_region regions[REGIONS];
			struct pm_scan_arg ask = ask_unprotected(start, vmas[at].end, regions, REGIONS);
			ask.max_pages = most - pages;
			/* What was never written of a file is not protected either. */
			const int file = vmas[at].flags & VMA_FILE;
			long got = exact || file ? scan_content(fd, &ask, file) : ioctl(fd, PAGEMAP_SCAN, &ask);
			if (got == -1)
				got = -errno;
			if (got == -EPERM)
				break; /* it is another one by now, and not tracked */
			if (got < 0)
				return got;
			for (long each = 0; each < got; each++)
				pages += (regions[each].end - regions[each].start) / PAGE;
			if (ask.walk_end <= start)
				return -EIO;
			start = ask.walk_end;
		}
	return (int64_t)pages;
}

/* One piece of what outlive_lift lifts. */
static int lift_piece(int userfault, int fd, uint64_t start, uint64_t end)
{
	int tries = 0;

	while (start < end) {
		struct page_region regions[64];
		struct pm_scan_arg ask = {
			.size = sizeof(ask),
			.start = start,
			.end = end,
			.vec = (uint64_t)(uintptr_t)regions,
			.vec_len = 64,
			.category_inverted = PAGE_IS_WRITTEN,
			.category_mask = PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED,
			.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
			.return_mask = PAGE_IS_PRESENT,
		};
		bool lifted = true;
		const long got = ioctl(fd, PAGEMAP_SCAN, &ask);

		if (got < 0)
			return errno;
		for (long at = 0; at < got; at++) {
			struct uffdio_writeprotect lift = {
				.range = { regions[at].start, regions[at].end - regions[at].start },
			};
			lifted &= ioctl(userfault, UFFDIO_WRITEPROTECT, &lift) == 0;
		}
		if (lifted && ask.walk_end <= start)
			return EIO;
		if (lifted)
			start = ask.walk_end;
		else if (++tries == LIFT_TRIES) /* they change all the time */
			return EAGAIN;
	}
	return 0;
}

/* Running: lift the protection of all pages that are protected in what is tracked in [start, end), so that they count
 * as written. A mapping that is tracked gets no protected pages but those that we protect: mremap ends the tracking of
 * what it moves. So nothing is left once there was nothing left to be found. An errno. */
EXPORTED int outlive_lift(int userfault, int fd, uint64_t start, uint64_t end)
{
	while (start < end) { /* so that nobody who maps memory has to wait for long */
		const uint64_t stop = end - start > LIFT_BYTES ? start + LIFT_BYTES : end;
		const int failure = lift_piece(userfault, fd, start, stop);

		if (failure)
			return failure;
		start = stop;
	}
	return 0;
}
