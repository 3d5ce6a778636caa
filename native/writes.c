/* SPDX-License-Identifier: MIT
 *
 * What primary/file_writes.py has to know of a large file at once, within a freeze: which pages were reported as
 * written, where its blocks are, what some of its pages hold, and which of those are dirty.
 *
 * It reads, and changes nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/bpf.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/magic.h>

#define EXPORTED __attribute__((visibility("default")))
#define PAGE 4096u
#define CACHESTAT 451 /* __NR_cachestat, on all architectures */
#define PATIENCE 100000
#define EXTENTS_AT_ONCE 512
#define XFS_MAGIC 0x58465342
#ifndef STATX_ATTR_DAX
#define STATX_ATTR_DAX 0x00200000
#endif

/* What makes an extent another one: all but how it was told, and who shares it. */
#define TELLING (~(FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED | FIEMAP_EXTENT_SHARED))

/* Keep in step with `_WRITTEN` and `_EXTENT` of primary/file_writes.py. */
struct written {
	uint64_t inode, first, end;
};

struct extent {
	uint64_t start, end, shift, flags; /* bytes of the file; how far from there they are on the device */
};

/* As <linux/mman.h> has it since Linux 6.5. */
struct range {
	uint64_t start, size;
};

struct cached {
	uint64_t pages, dirty, writeback, evicted, recently_evicted;
};

/* The type of an open file's file system (statfs(2)) if what the kernel tells of its pages is all that happens to them; or
 * else 0. */
EXPORTED uint64_t outlive_writes_fit(int fd)
{
	struct statfs system;
	struct statx attributes;
	unsigned int flags = 0;

	if (fstatfs(fd, &system) || statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &attributes))
		return 0;
	if (system.f_type != EXT4_SUPER_MAGIC && system.f_type != XFS_MAGIC && system.f_type != BTRFS_SUPER_MAGIC)
		return 0;
	if (ioctl(fd, FS_IOC_GETFLAGS, &flags) && errno != ENOTTY)
		return 0;
	if (attributes.stx_attributes & STATX_ATTR_DAX || flags & FS_JOURNAL_DATA_FL)
		return 0;
	return (uint64_t)system.f_type;
}

/* Begin to write back `runs` runs of pages (first and end of each). Done is what could be begun at once. */
EXPORTED void outlive_writes_flush(int fd, const uint64_t *bounds, uint64_t runs)
{
	for (uint64_t run = 0; run < runs; run++) {
		const uint64_t first = bounds[2 * run], end = bounds[2 * run + 1];

		sync_file_range(fd, (off_t)(first * PAGE), (off_t)((end - first) * PAGE), SYNC_FILE_RANGE_WRITE);
	}
}

/* Move up to `room` records from the ring whose pages these are into `into`. Returns how many; -1 if one is begun and
 * does not come. */
EXPORTED int64_t outlive_writes_drain(uint64_t *consumer, const uint64_t *producer, const uint8_t *ring, uint64_t size,
				      struct written *into, uint64_t room)
{
	const uint64_t end = __atomic_load_n(producer, __ATOMIC_ACQUIRE);
	uint64_t at = *consumer, count = 0;

	while (at < end && count < room) {
		const uint8_t *const record = ring + (at & (size - 1));
		uint32_t length, tries = 0;

		while ((length = __atomic_load_n((const uint32_t *)record, __ATOMIC_ACQUIRE)) & BPF_RINGBUF_BUSY_BIT) {
			if (tries++ == PATIENCE)
				return -1;
			sched_yield();
		}
		if (!(length & BPF_RINGBUF_DISCARD_BIT))
			memcpy(&into[count++], record + BPF_RINGBUF_HDR_SZ, sizeof(*into));
		at += (BPF_RINGBUF_HDR_SZ + (length & ~BPF_RINGBUF_DISCARD_BIT) + 7) & ~7ull;
	}
	__atomic_store_n(consumer, at, __ATOMIC_RELEASE);
	return (int64_t)count;
}

/* How often the kernel did not run a program because it ran on that processor already; ~0 if that is not told. */
EXPORTED uint64_t outlive_writes_missed(int program)
{
	struct bpf_prog_info info = {0};
	union bpf_attr attributes = {
		.info = {
			.bpf_fd = (uint32_t)program,
			.info_len = sizeof(info),
			.info = (uint64_t)(uintptr_t)&info,
		},
	};

	return syscall(SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &attributes, sizeof(attributes)) ? ~0ull : info.recursion_misses;
}

/* Find where an open file has its blocks: neighbours as one. Returns how many extents; more than `room` if there were
 * more; -1 with errno. */
EXPORTED int64_t outlive_writes_extents(int fd, struct extent *into, uint64_t room)
{
	struct {
		struct fiemap head;
		struct fiemap_extent extents[EXTENTS_AT_ONCE];
	} map;
	struct extent *last = NULL;
	uint64_t count = 0, start = 0;

	for (;;) {
		memset(&map.head, 0, sizeof(map.head));
		map.head.fm_start = start;
		map.head.fm_length = FIEMAP_MAX_OFFSET - start;
		map.head.fm_extent_count = EXTENTS_AT_ONCE;
		if (ioctl(fd, FS_IOC_FIEMAP, &map))
			return -1;
		for (uint32_t at = 0; at < map.head.fm_mapped_extents; at++) {
			const struct fiemap_extent *const found = &map.extents[at];
			const struct extent extent = {
				.start = found->fe_logical,
				.end = found->fe_logical + found->fe_length,
				.shift = found->fe_physical - found->fe_logical,
				.flags = found->fe_flags & TELLING,
			};

			start = extent.end;
			if (last && last->end == extent.start && last->shift == extent.shift &&
			    last->flags == extent.flags) {
				last->end = extent.end;
				continue;
			}
			if (count == room)
				return (int64_t)room + 1;
			last = &into[count++];
			*last = extent;
		}
		if (!map.head.fm_mapped_extents ||
		    map.extents[map.head.fm_mapped_extents - 1].fe_flags & FIEMAP_EXTENT_LAST)
			return (int64_t)count;
	}
}

/* Mark those pages of a range that are dirty, and all if that cannot be told. */
static void mark_dirty(int fd, uint64_t first, uint64_t end, uint8_t *marks)
{
	struct range range = {first * PAGE, (end - first) * PAGE};
	struct cached cached;

	if (syscall(CACHESTAT, fd, &range, &cached, 0) || cached.dirty >= end - first) {
		memset(marks, 1, end - first);
	} else if (!cached.dirty) {
		memset(marks, 0, end - first);
	} else {
		const uint64_t middle = first + (end - first) / 2;

		mark_dirty(fd, first, middle, marks);
		mark_dirty(fd, middle, end, marks + (middle - first));
	}
}

static int read_pages(int fd, uint8_t *into, uint64_t first, uint64_t pages)
{
	for (uint64_t done = 0; done < pages * PAGE;) {
		const ssize_t got = pread(fd, into + done, pages * PAGE - done, (off_t)(first * PAGE + done));

		if (got < 0)
			return -1;
		if (!got) { /* behind the end of the file */
			memset(into + done, 0, pages * PAGE - done);
			return 0;
		}
		done += (uint64_t)got;
	}
	return 0;
}

/* Read `runs` runs of pages (first and end of each) one after the other, and mark those that were dirty before they were
 * read: of these a further change is not reported. Returns 0, or -1 with errno. */
EXPORTED int outlive_writes_read(int fd, const uint64_t *bounds, uint64_t runs, uint8_t *into, uint8_t *dirty)
{
	for (uint64_t run = 0; run < runs; run++) {
		const uint64_t first = bounds[2 * run], end = bounds[2 * run + 1];

		mark_dirty(fd, first, end, dirty);
		dirty += end - first;
		if (read_pages(fd, into, first, end - first))
			return -1;
		into += (end - first) * PAGE;
	}
	return 0;
}
