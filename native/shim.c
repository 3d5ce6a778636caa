/* SPDX-License-Identifier: MIT
 *
 * The shim: preloaded into the criu processes that Outlive starts, it keeps the memory that the agent captures
 * out of criu's frozen time.
 *
 *   open of /proc/PID/smaps    what the agent read just before the freeze, if the frozen maps confirm it
 *   ioctl(PAGEMAP_SCAN)        no pages for owned mappings (maps.h), the kernel's answer for all others; and to
 *                              the question for guard pages the kernel's answer, asked in a faster way
 *   pread of /proc/PID/pagemap the same for kernels without that ioctl: zeros for owned mappings
 *
 * Everything else goes to libc untouched: it intercepts open, openat, ioctl and pread, and looks at nothing but
 * these three.
 *
 * What must hold, and where:
 * - smaps are never served unless /proc/PID/maps, read now, while all tasks stand still, is byte for byte what
 *   the served text's own header lines say (`confirmed`, the only caller of `serve`). criu sets protections back
 *   to what smaps told it: serving a stale one kills the workload.
 * - Pages are hidden only of a process whose frozen maps were read, and only those of its owned mappings. The
 *   agent captures exactly these; it learns from the report which processes they are.
 * - Whatever is not as expected (no plan, no memory, a scan of another form) goes to the kernel, and is reported.
 *   criu then dumps more than it need, never less.
 * - It writes no file. It takes itself out of the environment, so that criu's children do not get it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "maps.h"
#include "pagemap_scan.h"
#include "shim_protocol.h"

#define PAGE 4096u
#define TEXT_ROOM (16u << 20) /* of one maps file: about 160,000 mappings */
#define MAPPINGS 131072u      /* twice what vm.max_map_count allows by default */
#define DESCRIPTORS 1024u

struct process {
	uint32_t pid;
	struct shim_report *report;
	struct vma *others; /* the mappings that are not owned, in order */
	size_t count;
	bool hides;
};

static int (*libc_openat)(int, const char *, int, ...);
static int (*libc_open)(const char *, int, ...);
static int (*libc_ioctl)(int, unsigned long, ...);
static ssize_t (*libc_pread)(int, void *, size_t, off_t);

static struct shim_shared *shared;
static char *text;             /* TEXT_ROOM */
static struct vma *mappings;   /* MAPPINGS, for parsing */
static struct vma *kept;       /* MAPPINGS, for `others` of all processes */
static size_t kept_count;
static struct process processes[SHIM_ROOM];
static size_t process_count;
static struct process *parsed; /* the process whose mappings stand in `mappings` */
static size_t parsed_count;
static struct process *pagemap_of[DESCRIPTORS]; /* which process an open pagemap is of */

static void *take(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return memory == MAP_FAILED ? NULL : memory;
}

/* Touch what a usual dump needs now, while nothing is frozen. */
static void touch(void *memory, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += PAGE)
		((volatile char *)memory)[at] = 0;
}

__attribute__((constructor)) static void start(void)
{
	libc_openat = dlsym(RTLD_NEXT, "openat64");
	libc_open = dlsym(RTLD_NEXT, "open64");
	libc_ioctl = dlsym(RTLD_NEXT, "ioctl");
	libc_pread = dlsym(RTLD_NEXT, "pread64");

	const char *descriptor = getenv("OUTLIVE_SHIM_FD");
	if (!descriptor || strcmp(program_invocation_short_name, "criu"))
		return; /* the shell that starts criu, for one */
	unsetenv("LD_PRELOAD");
	unsetenv("OUTLIVE_SHIM_FD");

	const int fd = atoi(descriptor);
	struct stat status;
	if (fstat(fd, &status) || (size_t)status.st_size < sizeof(struct shim_shared))
		return;
	void *memory = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (memory == MAP_FAILED)
		return;
	struct shim_shared *found = memory;
	text = take(TEXT_ROOM);
	mappings = take(MAPPINGS * sizeof(struct vma));
	kept = take(MAPPINGS * sizeof(struct vma));
	if (found->magic != SHIM_MAGIC || found->bytes != (uint64_t)status.st_size || !text || !mappings || !kept)
		return;
	touch(text, 256 << 10);
	touch(mappings, 64 << 10);
	touch(kept, 64 << 10);
	shared = found;
	shared->loaded = 1;
}

/* The process that a directory of /proc is of, by what its `stat` begins with; 0 if it is none. */
static uint32_t pid_of(int directory)
{
	char buffer[32];
	const int fd = libc_openat(directory, "stat", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return 0;
	const ssize_t size = read(fd, buffer, sizeof(buffer) - 1);
	close(fd);
	if (size <= 0)
		return 0;
	buffer[size] = 0;
	const unsigned long pid = strtoul(buffer, NULL, 10);
	return pid == (unsigned long)getpid() ? 0 : (uint32_t)pid;
}

/* Read the maps of a process into `text`; its size, or 0. */
static size_t read_maps(int directory)
{
	const int fd = libc_openat(directory, "maps", O_RDONLY | O_CLOEXEC);
	size_t size = 0;
	ssize_t got = -1;

	if (fd < 0)
		return 0;
	while (size < TEXT_ROOM && (got = read(fd, text + size, TEXT_ROOM - size)) > 0)
		size += (size_t)got;
	close(fd);
	return got == 0 ? size : 0;
}

static struct process *process(uint32_t pid)
{
	for (size_t at = process_count; at-- > 0;)
		if (processes[at].pid == pid)
			return &processes[at];
	return NULL;
}

static bool within(uint64_t offset, uint64_t bytes)
{
	return offset >= sizeof(struct shim_shared) && offset <= shared->bytes && bytes <= shared->bytes - offset;
}

/* The plan of a process whose maps are `size` bytes of `text`, if it was made for just these maps. */
static const struct shim_plan *confirmed(uint32_t pid, size_t size)
{
	const uint32_t plans = shared->plans < SHIM_ROOM ? shared->plans : SHIM_ROOM;

	for (uint32_t at = 0; at < plans; at++) {
		const struct shim_plan *plan = &shared->plan[at];

		if (plan->pid != pid)
			continue;
		if (plan->maps_bytes != size || !within(plan->maps_offset, plan->maps_bytes) ||
		    !within(plan->smaps_offset, plan->smaps_bytes))
			return NULL;
		return memcmp((const char *)shared + plan->maps_offset, text, size) ? NULL : plan;
	}
	return NULL;
}

/* A descriptor from which the planned smaps are read; -1 if there is no memory for it. */
static int serve(const struct shim_plan *plan)
{
	const int fd = memfd_create("outlive-smaps", MFD_CLOEXEC);
	const char *from = (const char *)shared + plan->smaps_offset;

	if (fd < 0)
		return -1;
	for (uint64_t done = 0; done < plan->smaps_bytes;) {
		const ssize_t wrote = write(fd, from + done, plan->smaps_bytes - done);
		if (wrote <= 0) {
			close(fd);
			return -1;
		}
		done += (uint64_t)wrote;
	}
	if (lseek(fd, 0, SEEK_SET)) {
		close(fd);
		return -1;
	}
	return fd;
}

/* Remember which of the mappings in `text` are not owned; false if the text makes no sense. */
static bool keep_others(struct process *made, size_t size)
{
	parsed = NULL;
	const long count = maps_parse(text, size, mappings, MAPPINGS);

	if (count < 0 || kept_count + (size_t)count > MAPPINGS)
		return false;
	parsed = made;
	parsed_count = (size_t)count;
	made->others = kept + kept_count;
	for (long at = 0; at < count; at++)
		if (!(mappings[at].flags & VMA_OWNED))
			made->others[made->count++] = mappings[at];
	kept_count += made->count;
	return true;
}

/* criu opens the smaps of a process that it has stopped: answer, and remember what is hidden of it. */
static int open_smaps(int directory, int flags)
{
	const uint32_t pid = pid_of(directory);

	if (!pid || process(pid) || process_count == SHIM_ROOM)
		return libc_openat(directory, "smaps", flags);
	const uint32_t number = shared->reports++;
	if (number >= SHIM_ROOM)
		return libc_openat(directory, "smaps", flags);
	struct process *made = &processes[process_count++];
	made->pid = pid;
	made->report = &shared->report[number];
	made->report->pid = pid;
	const size_t size = read_maps(directory);
	const struct shim_plan *plan = size ? confirmed(pid, size) : NULL;
	made->hides = size && keep_others(made, size);
	if (!made->hides)
		made->report->flags |= SHIM_FAILED;
	const int served = plan ? serve(plan) : -1;
	made->report->flags |= served >= 0 ? SHIM_SMAPS_SERVED : SHIM_SMAPS_REAL;
	return served >= 0 ? served : libc_openat(directory, "smaps", flags);
}

static int open_pagemap(int directory, int flags)
{
	const int fd = libc_openat(directory, "pagemap", flags);

	if (fd >= 0 && fd < (int)DESCRIPTORS) {
		const uint32_t pid = pid_of(directory);
		pagemap_of[fd] = pid ? process(pid) : NULL;
	}
	return fd;
}

/* Whatever is opened under a number ends what that number meant before. */
static int opened(int fd)
{
	if (fd >= 0 && fd < (int)DESCRIPTORS)
		pagemap_of[fd] = NULL;
	return fd;
}

static int open_at(int directory, const char *path, int flags, mode_t mode)
{
	const int before = errno;

	if (shared && path && !strcmp(path, "smaps")) {
		const int fd = opened(open_smaps(directory, flags));
		if (fd >= 0)
			errno = before;
		return fd;
	}
	if (shared && path && !strcmp(path, "pagemap")) {
		const int fd = open_pagemap(directory, flags);
		if (fd >= 0)
			errno = before;
		return fd;
	}
	return opened(libc_openat(directory, path, flags, mode));
}

#define MODE(flags, mode)                                                                                    \
	do {                                                                                                 \
		if ((flags) & (O_CREAT | O_TMPFILE)) {                                                       \
			va_list arguments;                                                                   \
			va_start(arguments, flags);                                                          \
			mode = va_arg(arguments, mode_t);                                                    \
			va_end(arguments);                                                                   \
		}                                                                                            \
	} while (0)

int openat64(int directory, const char *path, int flags, ...)
{
	mode_t mode = 0;
	MODE(flags, mode);
	return open_at(directory, path, flags, mode);
}

int openat(int directory, const char *path, int flags, ...)
{
	mode_t mode = 0;
	MODE(flags, mode);
	return open_at(directory, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
	mode_t mode = 0;
	MODE(flags, mode);
	return opened(libc_open(path, flags, mode));
}

int open(const char *path, int flags, ...)
{
	mode_t mode = 0;
	MODE(flags, mode);
	return opened(libc_open(path, flags, mode));
}

/* criu's question which pages to dump, and no other (criu/pagemap-cache.c, CRIU 4.0 to 4.2). */
static bool asks_what_to_dump(const struct pm_scan_arg *ask)
{
	return ask->size == sizeof(*ask) && !ask->flags && !ask->max_pages && ask->vec &&
	       ask->category_inverted == (PAGE_IS_PFNZERO | PAGE_IS_FILE) &&
	       ask->category_mask == (PAGE_IS_PFNZERO | PAGE_IS_FILE) &&
	       ask->category_anyof_mask == (PAGE_IS_PRESENT | PAGE_IS_SWAPPED);
}

/* Append to what was found the kernel's answer for [start, end), cut to what was asked for. 1: there is no room for
 * more, and walk_end says how far it came; -1: errno. */
static int gather(int fd, struct pm_scan_arg *ask, uint64_t start, uint64_t end, uint64_t *found)
{
	struct pm_scan_arg part = *ask;

	part.start = start > ask->start ? start : ask->start;
	part.end = end < ask->end ? end : ask->end;
	part.vec = ask->vec + *found * sizeof(struct page_region);
	part.vec_len = ask->vec_len - *found;
	if (part.start >= part.end)
		return 0;
	ask->walk_end = part.start;
	if (!part.vec_len)
		return 1;
	const int got = libc_ioctl(fd, PAGEMAP_SCAN, &part);
	if (got < 0)
		return -1;
	*found += (uint64_t)got;
	ask->walk_end = part.walk_end;
	return part.walk_end < part.end;
}

/* Ask the kernel for the mappings between start and end that are not owned, one after the other. */
static int scan_others(int fd, const struct process *of, struct pm_scan_arg *ask)
{
	uint64_t found = 0;
	int ended = 0;

	for (size_t at = 0; at < of->count && !ended; at++)
		ended = gather(fd, ask, of->others[at].start, of->others[at].end, &found);
	if (ended < 0)
		return -1;
	if (!ended)
		ask->walk_end = ask->end;
	return (int)found;
}

/* Guard pages are not protected: ask the kernel only for what is not, where it can tell that quickly. */
static int gather_guards(int fd, const struct vma *vma, struct pm_scan_arg *ask, uint64_t *found)
{
	struct page_region regions[512];
	uint64_t start = vma->start > ask->start ? vma->start : ask->start;

	while (start < vma->end) {
		struct pm_scan_arg fast = ask_unprotected(start, vma->end, regions, 512);
		const int got = libc_ioctl(fd, PAGEMAP_SCAN, &fast);

		if (got < 0 || fast.walk_end <= start) /* not tracked */
			return gather(fd, ask, start, vma->end, found);
		for (int at = 0; at < got;) {
			const uint64_t from = regions[at].start;
			uint64_t to = regions[at++].end;

			while (at < got && regions[at].start - to <= SCAN_NEAR * PAGE)
				to = regions[at++].end;
			const int ended = gather(fd, ask, from, to, found);
			if (ended)
				return ended;
		}
		start = fast.walk_end;
	}
	return 0;
}

/* criu asks for the guard pages of the whole address space, right after it read the mappings. */
static int scan_guards(int fd, struct pm_scan_arg *ask)
{
	uint64_t found = 0;
	int ended = 0;

	for (size_t at = 0; at < parsed_count && !ended; at++) {
		const struct vma *vma = &mappings[at];

		if (vma->end <= ask->start || vma->start >= ask->end)
			continue;
		ended = vma->flags & VMA_OWNED && !(vma->flags & VMA_FILE) ?
				gather_guards(fd, vma, ask, &found) :
				gather(fd, ask, vma->start, vma->end, &found);
	}
	if (ended < 0)
		return -1;
	if (!ended)
		ask->walk_end = ask->end;
	return (int)found;
}

/* criu's question where the guard pages are, and no other (criu/mem.c, CRIU 4.2). */
static bool asks_for_guards(const struct pm_scan_arg *ask)
{
	return ask->size == sizeof(*ask) && !ask->flags && !ask->max_pages && ask->vec && !ask->category_inverted &&
	       !ask->category_anyof_mask && ask->category_mask == PAGE_IS_GUARD && ask->return_mask == PAGE_IS_GUARD;
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	void *argument = va_arg(arguments, void *);
	va_end(arguments);

	struct process *of = shared && fd >= 0 && fd < (int)DESCRIPTORS ? pagemap_of[fd] : NULL;
	if (!of || request != PAGEMAP_SCAN || !of->hides)
		return libc_ioctl(fd, request, argument);
	struct pm_scan_arg *ask = argument;
	if (asks_what_to_dump(ask)) {
		of->report->scans++;
		return scan_others(fd, of, ask);
	}
	if (!asks_for_guards(ask))
		of->report->flags |= SHIM_UNKNOWN_SCAN;
	else if (parsed == of)
		return scan_guards(fd, ask);
	return libc_ioctl(fd, request, argument);
}

/* Whether no mapping between start and end is another's than the agent's. */
static bool none_other(const struct process *of, uint64_t start, uint64_t end)
{
	size_t low = 0;
	size_t high = of->count;

	while (low < high) {
		const size_t middle = (low + high) / 2;
		if (of->others[middle].end <= start)
			low = middle + 1;
		else
			high = middle;
	}
	return low == of->count || of->others[low].start >= end;
}

static bool is_other(const struct process *of, uint64_t address)
{
	return !none_other(of, address, address + PAGE);
}

/* Eight bytes a page; zeros say that there is none. */
static ssize_t read_at(int fd, void *buffer, size_t size, off_t offset)
{
	struct process *of = shared && fd >= 0 && fd < (int)DESCRIPTORS ? pagemap_of[fd] : NULL;
	const uint64_t first = (uint64_t)offset / sizeof(uint64_t) * PAGE;

	if (of && of->hides && none_other(of, first, first + size / sizeof(uint64_t) * PAGE)) {
		/* The kernel would walk its page tables for nothing, while everything is frozen. */
		of->report->scans++;
		memset(buffer, 0, size);
		return (ssize_t)size;
	}
	const ssize_t got = libc_pread(fd, buffer, size, offset);

	if (!of || !of->hides || got <= 0)
		return got;
	of->report->scans++;
	uint64_t *entries = buffer;
	for (size_t at = 0; at < (size_t)got / sizeof(uint64_t); at++)
		if (!is_other(of, ((uint64_t)offset / sizeof(uint64_t) + at) * PAGE))
			entries[at] = 0;
	return got;
}

ssize_t pread64(int fd, void *buffer, size_t size, off_t offset)
{
	return read_at(fd, buffer, size, offset);
}

ssize_t pread(int fd, void *buffer, size_t size, off_t offset)
{
	return read_at(fd, buffer, size, offset);
}
