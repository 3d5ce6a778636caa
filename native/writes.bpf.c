/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * Tells which parts of some files are written: for primary/file_writes.py, which says what that is good for. It watches,
 * and changes nothing. The kernel lends its tracing to programs under the GPL alone, so this file may be used under it
 * too.
 *
 * A page of a block file system is told when it becomes dirty, and then not again before it was written back. A direct
 * write is told when its data is there, and a direct read as well: which one it was is not for other kernels to rely on.
 *
 * What becomes dirty is a folio, which may be large. File systems that write by iomap say first which bytes they are
 * about to write, or to let a mapping write: then only these are told, each time.
 *
 * What shifts or exchanges blocks makes no page dirty. It is told when it begins, with the file locked.
 */
#include <linux/types.h>

#include <linux/bpf.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define CORE __attribute__((preserve_access_index))
#define PAGE_SHIFT 12
#define BEYOND (~0ull >> PAGE_SHIFT)
#define RING_BYTES (8u << 20)
#define MOST_FILES 65536
#define MOST_TASKS 65536
#define IOMAP_WRITE_OR_ZERO 3 /* <linux/iomap.h> */
#define IOMAP_DIRECT 16

/* Of the kernel's own types, what is read here; libbpf finds where it is in the kernel that runs. */
struct inode {
	unsigned long i_ino;
} CORE;

struct file {
	struct inode *f_inode;
} CORE;

struct kiocb {
	struct file *ki_filp;
	long long ki_pos;
} CORE;

typedef struct {
	int counter;
} atomic_t;

struct address_space {
	struct inode *host;
	atomic_t i_mmap_writable;
} CORE;

struct iomap_iter {
	struct inode *inode;
	long long pos;
	__u64 len;
	unsigned int flags;
} CORE;

struct xfs_inode {
	struct inode i_vnode;
} CORE;

struct folio {
	unsigned long flags;
	unsigned long index;
	unsigned int _nr_pages;
} CORE;

struct folio___wrapped { /* since Linux 6.18 */
	struct {
		unsigned long f;
	} flags;
} CORE;

struct folio___before { /* until Linux 6.13 */
	unsigned int _folio_nr_pages;
} CORE;

enum pageflags { PG_head = 6 };

/* Keep in step with `_WRITTEN` of primary/file_writes.py. */
struct written {
	__u64 inode;
	__u64 first; /* page of the file */
	__u64 end;   /* behind the last one; 0: behind those of a folio whose size is not known; or MOVES */
};

#define MOVES (1ull << 63) /* in `end`: blocks are about to move */

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RING_BYTES);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MOST_FILES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u8);
} files SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

/* What a task is about to write, by pid_tgid. */
struct about {
	__u64 inode, first, end;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MOST_TASKS);
	__type(key, __u64);
	__type(value, struct about);
} tasks SEC(".maps");

char LICENSE[] SEC("license") = "Dual MIT/GPL";

static void tell(struct inode *inode, __u64 first, __u64 end)
{
	const __u64 number = inode->i_ino;
	const __u32 zero = 0;
	struct written *written;

	if (!bpf_map_lookup_elem(&files, &number))
		return;
	written = bpf_ringbuf_reserve(&ring, sizeof(*written), 0);
	if (!written) {
		__u64 *const count = bpf_map_lookup_elem(&lost, &zero);

		if (count)
			__sync_fetch_and_add(count, 1);
		return;
	}
	written->inode = number;
	written->first = first;
	written->end = end;
	bpf_ringbuf_submit(written, BPF_RB_NO_WAKEUP);
}

static __u64 pages_of(struct folio *folio)
{
	unsigned long flags;

	if (bpf_core_field_exists(((struct folio___wrapped *)folio)->flags.f))
		flags = ((struct folio___wrapped *)folio)->flags.f;
	else
		flags = folio->flags;
	if (!(flags >> bpf_core_enum_value(enum pageflags, PG_head) & 1))
		return 1;
	if (bpf_core_field_exists(folio->_nr_pages))
		return folio->_nr_pages;
	if (bpf_core_field_exists(((struct folio___before *)folio)->_folio_nr_pages))
		return ((struct folio___before *)folio)->_folio_nr_pages;
	return 0;
}

SEC("tp_btf/writeback_dirty_folio")
int BPF_PROG(outlive_dirtied, struct folio *folio, struct address_space *mapping)
{
	const __u64 pages = pages_of(folio), task = bpf_get_current_pid_tgid();
	const struct about *about;
	__u64 first = folio->index, end = pages ? folio->index + pages : 0;

	if (!mapping) /* the verifier cannot know that there is one */
		return 0;
	/* Through a mapping, other parts may be written as long as it is dirty, and by a device without another word. */
	about = pages > 1 && mapping->i_mmap_writable.counter <= 0 ? bpf_map_lookup_elem(&tasks, &task) : NULL;
	if (about && about->inode == mapping->host->i_ino && about->first < end && about->end > first) {
		first = about->first > first ? about->first : first;
		end = about->end < end ? about->end : end;
	}
	tell(mapping->host, first, end);
	return 0;
}

SEC("tp_btf/iomap_iter")
int BPF_PROG(outlive_about, struct iomap_iter *iter)
{
	const __u64 task = bpf_get_current_pid_tgid();
	const __u64 number = iter->inode->i_ino;
	const struct about about = {
		.inode = number,
		.first = (__u64)iter->pos >> PAGE_SHIFT,
		.end = (((__u64)iter->pos + iter->len - 1) >> PAGE_SHIFT) + 1,
	};
	const int writes = iter->flags & IOMAP_WRITE_OR_ZERO && !(iter->flags & IOMAP_DIRECT);

	if (writes && iter->len && bpf_map_lookup_elem(&files, &number)) {
		if (bpf_map_update_elem(&tasks, &task, &about, BPF_ANY))
			bpf_map_delete_elem(&tasks, &task);
		tell(iter->inode, about.first, about.end);
	} else if (bpf_map_lookup_elem(&tasks, &task)) {
		bpf_map_delete_elem(&tasks, &task);
	}
	return 0;
}

SEC("tp_btf/iomap_dio_complete")
int BPF_PROG(outlive_direct, struct kiocb *iocb, int error, long done)
{
	const __u64 at = iocb->ki_pos; /* behind it, or before it if it failed to become durable */

	if (error || done <= 0 || (__u64)done > at)
		tell(iocb->ki_filp->f_inode, 0, BEYOND);
	else
		tell(iocb->ki_filp->f_inode, (at - done) >> PAGE_SHIFT, ((at + done - 1) >> PAGE_SHIFT) + 1);
	return 0;
}

SEC("tp_btf/ext4_collapse_range")
int BPF_PROG(outlive_ext4_collapsed, struct inode *inode, long long at)
{
	tell(inode, (__u64)at >> PAGE_SHIFT, BEYOND | MOVES);
	return 0;
}

SEC("tp_btf/ext4_insert_range")
int BPF_PROG(outlive_ext4_inserted, struct inode *inode, long long at)
{
	tell(inode, (__u64)at >> PAGE_SHIFT, BEYOND | MOVES);
	return 0;
}

SEC("tp_btf/xfs_collapse_file_space")
int BPF_PROG(outlive_xfs_collapsed, struct xfs_inode *inode)
{
	tell(&inode->i_vnode, 0, BEYOND | MOVES);
	return 0;
}

SEC("tp_btf/xfs_insert_file_space")
int BPF_PROG(outlive_xfs_inserted, struct xfs_inode *inode)
{
	tell(&inode->i_vnode, 0, BEYOND | MOVES);
	return 0;
}

SEC("tp_btf/xfs_reflink_remap_range")
int BPF_PROG(outlive_xfs_cloned, struct xfs_inode *from, long long from_at, long long size, struct xfs_inode *to,
	     long long at)
{
	const __u64 end = size > 0 ? (((__u64)at + size - 1) >> PAGE_SHIFT) + 1 : BEYOND;

	tell(&to->i_vnode, (__u64)at >> PAGE_SHIFT, end | MOVES);
	return 0;
}
