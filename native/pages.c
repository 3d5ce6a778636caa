/* SPDX-License-Identifier: MIT
 *
 * The page reader: finds out which pages a process has and which were written, and copies them. A library for
 * primary/pages.py, because a freeze has no room for Python: the whole of what is done inside it is one call.
 *
 *   running   outlive_scan        what was written since the last protection, and protect it anew
 *             outlive_read        copy pages; says of each whether it could be read
 *   frozen    outlive_early       while CRIU is at work: which pages there are where CRIU never writes, which of them
 *                                 are dirty, and the content of the dirty ones, which are protected
 *             outlive_capture     when CRIU is done, of all processes of the tree: which pages there are at all, and
 *                                 the same of the rest; with no room for content, only a look
 *
 * A page counts as dirty unless all of this is so: it can be tracked (WPALLOWED), it was not written since it was
 * protected, it is no marker in a file mapping, and the caller knows its content (`known`). Whatever is in doubt
 * is dirty. Where the kernel has soft-dirty bits instead, soft_dirty.c says what was written.
 *
 * No call keeps state between calls, none allocates memory while frozen but in what the caller gave.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#include "maps.h"
#include "pagemap_scan.h"
#include "soft_dirty.h"

#define PAGE 4096u
#define REGIONS 512u /* of one ioctl */
#define PIECES 1024u /* iovecs of one call: IOV_MAX */
#define TABLE (512u * PAGE) /* what one page table maps */

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

static int open_of(int pid, const char *name, int flags)
{
	char path[64];
	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	return open(path, flags | O_CLOEXEC);
}

static int read_maps(struct space *space)
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
static int append(struct space *space, uint64_t start, uint64_t end, uint32_t flags)
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
static long scan_content(int fd, struct pm_scan_arg *ask, bool file)
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

/* Append what stands in [start, end), of which nothing is unprotected. A page there is protected, so it is there;
 * unless its whole page table was dropped: kernels report that as unprotected only since the summer of 2026 (mm/uffd,
 * "PMD hole is reported written"; also in stable ones, 6.18.44 for one). One page tells for its table, and so does a
 * neighbour at either end that was reported. */
static int append_standing(struct space *space, int fd, const struct vma *vma, uint64_t start, uint64_t end,
			   uint64_t *pair)
{
	const uint32_t base = vma->flags & VMA_READABLE ? 0 : RUN_UNREADABLE;
	bool stands = start > vma->start && start % TABLE;

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
		struct pm_scan_arg ask = ask_unprotected(scanned, vma->end, regions, REGIONS);
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

static int scan_vma(struct space *space, int fd, int memory, const struct vma *vma, uint64_t *pair)
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
static int protect_dirty(struct space *space, int fd)
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

static int scan_by_soft_dirty(struct space *space)
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

/* Copy one run by the file that needs no read permission. */
static int read_unreadable(int pid, uint64_t start, uint64_t bytes, uint8_t *into)
{
	const int fd = open_of(pid, "mem", O_RDONLY);

	if (fd < 0)
		return errno;
	for (uint64_t done = 0; done < bytes;) {
		const ssize_t got = pread(fd, into + done, bytes - done, (off_t)(start + done));
		if (got <= 0) {
			const int failure = got ? errno : EIO;
			close(fd);
			return failure;
		}
		done += (uint64_t)got;
	}
	close(fd);
	return 0;
}

/* Copy the pieces gathered so far, all of them or nothing. */
static int flush(int pid, struct iovec *pieces, unsigned *count, uint64_t *bytes, uint8_t **into)
{
	struct iovec target = { *into, *bytes };

	if (*count) {
		const ssize_t got = process_vm_readv(pid, &target, 1, pieces, *count, 0);

		if (got != (ssize_t)*bytes)
			return got < 0 ? errno : EFAULT; /* it came to a page that it may not read */
	}
	*into += *bytes;
	*count = 0;
	*bytes = 0;
	return 0;
}

/* Copy the runs that have `flag`; an errno, and nothing is to be believed then. */
static int read_runs(int pid, const struct run *runs, uint64_t count, uint32_t flag, uint8_t *into)
{
	struct iovec pieces[PIECES];
	unsigned gathered = 0;
	uint64_t bytes = 0;
	int failure = 0;

	errno = 0;
	for (uint64_t at = 0; at < count && !failure; at++) {
		const struct run *run = &runs[at];

		if ((run->flags & flag) != flag)
			continue;
		if (run->flags & RUN_UNREADABLE) {
			failure = flush(pid, pieces, &gathered, &bytes, &into);
			if (!failure)
				failure = read_unreadable(pid, run->start, run->end - run->start, into);
			into += run->end - run->start;
			continue;
		}
		for (uint64_t from = run->start; from < run->end && !failure;) {
			/* One call moves at most 2 GiB less a page. */
			const uint64_t most = (64u << 20) - bytes;
			const uint64_t size = run->end - from < most ? run->end - from : most;
			pieces[gathered++] = (struct iovec){ (void *)(uintptr_t)from, size };
			bytes += size;
			from += size;
			if (gathered == PIECES || bytes == 64u << 20)
				failure = flush(pid, pieces, &gathered, &bytes, &into);
		}
	}
	return failure ? failure : flush(pid, pieces, &gathered, &bytes, &into);
}

/* Running: whether the process has a descriptor through which a device may write into its memory beside the
 * kernel's page tables (O_DIRECT): 1, 0, or -errno. */
int outlive_reads_directly(int pid)
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
int64_t outlive_early(struct space *spaces, uint64_t count, uint8_t *buffer, uint64_t buffer_pages)
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
int64_t outlive_capture(struct space *spaces, uint64_t count, uint8_t *buffer, uint64_t buffer_pages)
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
int64_t outlive_maps(struct space *space)
{
	const int failure = read_maps(space);
	return failure ? -failure : (int64_t)space->vmas_count;
}

/* Running: find what was written in [start, end) and protect it, both in one step of the kernel's. Pages that are a
 * file's or the zero page are left as they are: the first write makes another page of them, which is written. Fills `runs`
 * from where `runs_count` stands. Mappings that are not registered are passed over. An errno; ENOBUFS with
 * `*reached` behind the last page that was protected: go on from there. */
int outlive_protect(int fd, uint64_t start, uint64_t end, int file, uint32_t flags, struct run *runs, uint64_t room,
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
int outlive_settle(int fd, int memory, uint64_t start, uint64_t end)
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

/* Running: whether the mapping at `start` can be tracked: 1, 0, or -errno. */
int outlive_tracked(int fd, uint64_t start)
{
	struct page_region region;
	struct pm_scan_arg ask = {
		.size = sizeof(ask),
		.start = start,
		.end = start + PAGE,
		.vec = (uint64_t)(uintptr_t)&region,
		.vec_len = 1,
		.category_inverted = PAGE_IS_WPALLOWED,
		.category_mask = PAGE_IS_WPALLOWED,
		.return_mask = PAGE_IS_WPALLOWED | PAGE_IS_PRESENT,
	};
	const long got = ioctl(fd, PAGEMAP_SCAN, &ask);
	return got < 0 ? -errno : got == 0;
}

/* Running: copy pages one run after the other; `good[i]` tells of each page whether it could be read. Pages that
 * vanish meanwhile are no failure. Returns how many were read, or -errno if the process is gone. */
int64_t outlive_read(int pid, const struct run *runs, uint64_t count, uint8_t *into, uint8_t *good)
{
	int64_t read = 0;

	for (uint64_t at = 0; at < count;) {
		/* As many runs as one call takes, and page by page only if that fails. */
		uint64_t last = at;
		uint64_t pages = 0;
		while (last < count && last - at < PIECES)
			pages += (runs[last].end - runs[last].start) / PAGE, last++;
		int failure = read_runs(pid, &runs[at], last - at, 0, into);
		if (failure == ESRCH)
			return -failure;
		for (uint64_t page = 0; page < pages; page++)
			good[page] = !failure;
		if (failure) {
			uint64_t page = 0;
			for (uint64_t each = at; each < last; each++)
				for (uint64_t from = runs[each].start; from < runs[each].end; from += PAGE, page++) {
					const struct run one = { from, from + PAGE, runs[each].flags, 0 };
					failure = read_runs(pid, &one, 1, 0, into + page * PAGE);
					if (failure == ESRCH)
						return -failure;
					good[page] = !failure;
				}
		}
		for (uint64_t page = 0; page < pages; page++)
			read += good[page];
		into += pages * PAGE;
		good += pages;
		at = last;
	}
	return read;
}
