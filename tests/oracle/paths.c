/* SPDX-License-Identifier: MIT
 *
 * Every way in which memory is changed, one function each, and the loop that chooses among them.
 *
 * A step: its number is its version; an op takes the lock of a region (or does something else, if all that it
 * tried are taken), tells the ledger what begins, does it, tells the ledger that it is done. Then the thread
 * notes in its log what it did, and writes the step into four rings (stack, thread-local, heap, static), whose
 * whole content follows from `reg_count`. Between two steps a thread owns nothing, so there it parks.
 */
#include "oracle.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

enum { IMAGE_PAGES = 256, FIRST_VERSION = 1 };

__thread struct worker *me;
struct log_entry logs[THREADS][LOG] __attribute__((aligned(4096)));
u64 bss_ring[THREADS][RING] __attribute__((aligned(4096)));
_Atomic u64 steps_begun;
u64 steps_before;
bool unavailable[PATH_COUNT], path_off[PATH_COUNT];

static __thread u64 tls_ring[RING];
static u64 *image; /* the first pages of the file `direct`, to copy from */
static u32 weights[PATH_COUNT], all_weights; /* cumulative */
static int sysv_id = -1;

/* ---- choosing regions and ranges ---- */

typedef bool fits(const struct region *r);

static int take(struct worker *w, int from, int slots, enum region_kind kind, fits *wanted)
{
	for (int tries = 0; tries < 12; tries++) {
		int slot = from + (int)below(w, (u64)slots);
		if (!try_lock(slot, w))
			continue;
		const struct region *r = region_at(slot);
		if (r->kind == kind && (wanted == NULL || wanted(r)))
			return slot;
		unlock(slot);
	}
	return -1;
}

static int take_anon(struct worker *w, fits *wanted)
{
	return take(w, 0, ANON_SLOTS, R_ANON, wanted);
}

static bool in_one_piece(const struct region *r)
{
	return r->prot_count == 0 && r->splits == 0 && !(r->flags & F_PARTS);
}

/* What was never written becomes one mapping with whatever it is moved beside; and if that is a part of a region, held
 * apart from the rest by mprotect(2), Linux ends the tracking of that part alone: until it is tracked again, the region
 * would be several mappings. So such are not moved, and nothing is moved beside a region that may be one with others. */
static bool may_move(const struct region *r)
{
	return in_one_piece(r) && written_to[r - region_at(0)];
}

static bool stands_alone(const struct region *r)
{
	return in_one_piece(r) && (r->flags & F_GUARD);
}

static bool no_prot(const struct region *r)
{
	return r->prot_count == 0;
}

static bool huge_inside(const struct region *r)
{
	u64 skip = (HUGE_PAGES - (r->addr / PAGE) % HUGE_PAGES) % HUGE_PAGES;
	return in_one_piece(r) && r->pages >= skip + HUGE_PAGES;
}

/* Pick a range that may be written, up to `most` pages; small ones are likelier. */
static bool pick(struct worker *w, const struct region *r, u64 most, u64 *first, u64 *count)
{
	u64 low = 0, high = r->kind == R_FILE ? r->file_pages : r->pages;
	if (r->kind == R_SHARED) {
		low = (u64)role * PART_PAGES;
		high = low + PART_PAGES;
	}
	if (r->prot_count) {
		if (below(w, high) < r->prot_first)
			high = r->prot_first;
		else
			low = r->prot_first + r->prot_count;
	}
	if (low >= high)
		return false;
	u64 room = high - low;
	most = r->stride > 1 ? 1 : most;
	*count = 1 + below(w, 1 + below(w, most < room ? most : room));
	*first = low + below(w, room - *count + 1);
	w->first = *first;
	w->count = *count;
	return true;
}

/* Take any anonymous region and a range in it. */
static int take_range(struct worker *w, u64 most, u64 *first, u64 *count)
{
	int slot = take_anon(w, NULL);
	if (slot >= 0 && !pick(w, region_at(slot), most, first, count)) {
		unlock(slot);
		return -1;
	}
	return slot;
}

static bool finish(struct worker *w, int slot)
{
	w->slot = slot;
	unlock(slot);
	return true;
}

/* ---- stores ---- */

static void fill(volatile u64 *at, u64 key, u64 version)
{
	for (u64 i = 0; i < WORDS; i++)
		at[i] = word_at(key, version, i);
}

static void write_pages(int slot, u64 first, u64 count, u64 v)
{
	const struct region *r = region_at(slot);
	range_begin(slot, first, count, DATA, v, 0);
	for (u64 page = first; page < first + count; page++)
		fill(page_at(r, page), page_key(r->uid, page), v);
	range_end(slot, first, count);
}

static void write_words(struct worker *w, int slot, u64 page, u64 v)
{
	const struct region *r = region_at(slot);
	if (!patchable(slot, page)) {
		write_pages(slot, page, 1, v);
		return;
	}
	u64 from = below(w, WORDS), words = below(w, 4) ? 1 : 1 + below(w, WORDS - from < 8 ? WORDS - from : 8);
	range_begin(slot, page, 1, PATCH, v, from << 10 | words);
	volatile u64 *at = page_at(r, page);
	for (u64 i = from; i < from + words; i++)
		at[i] = word_at(page_key(r->uid, page), v, i);
	range_end(slot, page, 1);
}

/* One store instruction that changes the last word of a page and the first of the next. */
static bool write_straddling(int slot, u64 page, u64 v)
{
	const struct region *r = region_at(slot);
	if (r->stride != 1 || !patchable(slot, page) || !patchable(slot, page + 1))
		return false;
	u64 both[2] = { word_at(page_key(r->uid, page), v, WORDS - 1), word_at(page_key(r->uid, page + 1), v, 0) };
	range_begin(slot, page, 1, PATCH, v, (WORDS - 1) << 10 | 1);
	range_begin(slot, page + 1, 1, PATCH, v, 1);
	u64 *at = page_at(r, page) + WORDS - 1;
#if defined(__x86_64__)
	__asm__ volatile("movdqu %1, %%xmm0\n\tmovdqu %%xmm0, %0" : "=m"(*(u64(*)[2])at) : "m"(both) : "xmm0");
#else
	memcpy(at, both, sizeof both);
#endif
	range_end(slot, page, 2);
	return true;
}

static void write_somehow(struct worker *w, int slot, u64 first, u64 count, u64 v)
{
	if (count > 1 && below(w, 3) == 0 && write_straddling(slot, first, v)) {
		w->count = 2;
	} else if (below(w, 2)) {
		w->count = 1;
		write_words(w, slot, first, v);
	} else {
		write_pages(slot, first, count, v);
	}
}

static bool op_store_word(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_range(w, 1, &first, &count);
	if (slot < 0)
		return false;
	write_words(w, slot, first, v);
	return finish(w, slot);
}

static bool op_store_page(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_range(w, 8, &first, &count);
	if (slot < 0)
		return false;
	write_pages(slot, first, count, v);
	return finish(w, slot);
}

static bool op_store_straddle(struct worker *w, u64 v)
{
	for (int tries = 0; tries < 4; tries++) {
		u64 first, count;
		int slot = take_range(w, 2, &first, &count);
		if (slot < 0)
			return false;
		if (count == 2 && write_straddling(slot, first, v))
			return finish(w, slot);
		unlock(slot);
	}
	return false;
}

static bool op_memset(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_range(w, 256, &first, &count);
	if (slot < 0)
		return false;
	range_begin(slot, first, count, ZERO, v, 0);
	memset(page_at(region_at(slot), first), 0, count * PAGE);
	range_end(slot, first, count);
	return finish(w, slot);
}

static bool copy_in(struct worker *w, u64 v, bool by_rep_movs)
{
	u64 first, count;
	int slot = take_range(w, IMAGE_PAGES, &first, &count);
	if (slot < 0)
		return false;
	u64 from = below(w, IMAGE_PAGES - count + 1);
	void *to = page_at(region_at(slot), first), *source = image + from * WORDS;
	size_t size = count * PAGE;
	range_begin(slot, first, count, COPY, v, from << 40 | FIRST_VERSION);
#if defined(__x86_64__)
	if (by_rep_movs)
		__asm__ volatile("rep movsb" : "+D"(to), "+S"(source), "+c"(size) : : "memory");
	else
#endif
		memcpy(to, source, size);
	(void)by_rep_movs;
	range_end(slot, first, count);
	return finish(w, slot);
}

static bool op_memcpy(struct worker *w, u64 v)
{
	return copy_in(w, v, false);
}

static bool op_rep_movs(struct worker *w, u64 v)
{
	return copy_in(w, v, true);
}

static int take_zeros(struct worker *w, u64 *first, u64 *count)
{
	for (int tries = 0; tries < 8; tries++) {
		int slot = take_range(w, 1, first, count);
		if (slot < 0)
			return -1;
		if (kind_of(entry_at(slot, *first)->done) == ZERO)
			return slot;
		unlock(slot);
	}
	return -1;
}

/* A read fault, if nothing was there: maps the zero page. */
static bool op_zero_read(struct worker *w, u64 v)
{
	u64 first, count, any = 0;
	int slot = take_zeros(w, &first, &count);
	if (slot < 0)
		return false;
	const volatile u64 *at = page_at(region_at(slot), first);
	for (u64 i = 0; i < WORDS; i++)
		any |= at[i];
	if (any)
		fail("region %d page %llu: zeros were expected at step %llu", slot, (unsigned long long)first,
		     (unsigned long long)v);
	w->slot = -1; /* read only: its version is none that the log may want */
	unlock(slot);
	return true;
}

static bool op_zero_write(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_zeros(w, &first, &count);
	if (slot < 0)
		return false;
	range_begin(slot, first, 1, ZERO, v, 0);
	*(volatile u64 *)page_at(region_at(slot), first) = 0;
	range_end(slot, first, 1);
	return finish(w, slot);
}

/* ---- mappings ---- */

/* Map pages, with a PROT_NONE page at each end if `guard`; large ones on the border of a huge page. */
static u64 map_pages(u64 pages, bool guard)
{
	u64 edge = guard ? PAGE : 0, size = pages * PAGE + 2 * edge, more = pages >= HUGE_PAGES ? HUGE_PAGES * PAGE : 0;
	char *at = mmap(NULL, size + more, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (at == MAP_FAILED)
		return 0;
	if (more) {
		u64 unit = HUGE_PAGES * PAGE, start = ((u64)at + edge + unit - 1) / unit * unit - edge;
		u64 behind = (u64)at + size + more - (start + size);
		if (start > (u64)at)
			munmap(at, start - (u64)at);
		if (behind)
			munmap((char *)start + size, behind);
		at = (char *)start;
	}
	if (mmap(at + edge, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	    MAP_FAILED)
		return 0;
	return (u64)at + edge;
}

static void unmap_guards(struct region *r)
{
	if (!(r->flags & F_GUARD))
		return;
	munmap((char *)r->addr - PAGE, PAGE);
	munmap((char *)r->addr + r->pages * PAGE, PAGE);
	r->flags &= ~(u64)F_GUARD;
}

static void set_pages(int slot, u64 first, u64 count, enum kind kind, u64 v)
{
	range_begin(slot, first, count, kind, v, 0);
	range_end(slot, first, count);
}

static bool map_anon(struct worker *w, u64 v)
{
	u64 average = options.memory_pages / ANON_SLOTS, pages = 8 + below(w, 2 * average);
	if (options.memory_pages >= 8 * HUGE_PAGES && below(w, 8) == 0)
		pages = HUGE_PAGES + below(w, HUGE_PAGES / 4); /* some have room for a huge page, however small all are */
	if (pages > SLOT_PAGES)
		pages = SLOT_PAGES;
	if (anonymous_pages() + pages > options.memory_pages)
		return false;
	int slot = take(w, 0, ANON_SLOTS, R_NONE, NULL);
	if (slot < 0)
		return false;
	bool guard = below(w, 3) == 0;
	struct region r = { .uid = v, .pages = pages, .stride = 1, .kind = R_ANON, .version = v };
	r.flags = guard ? F_GUARD : 0;
	r.addr = map_pages(pages, guard);
	if (r.addr == 0) {
		unlock(slot);
		return false;
	}
	set_pages(slot, 0, pages, ZERO, v);
	region_store(slot, &r);
	w->first = 0;
	w->count = pages;
	return finish(w, slot);
}

static bool op_mmap(struct worker *w, u64 v)
{
	return map_anon(w, v);
}

static bool op_munmap(struct worker *w, u64 v)
{
	if (anonymous_pages() < options.memory_pages / 2)
		return false;
	int slot = take_anon(w, NULL);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot), nothing = { .version = v };
	set_pages(slot, 0, r.pages, ABSENT, v);
	region_store(slot, &nothing);
	unmap_guards(&r);
	munmap((char *)r.addr, r.pages * PAGE);
	w->first = 0;
	w->count = r.pages;
	return finish(w, slot);
}

static bool op_mmap_fixed(struct worker *w, u64 v)
{
	int slot = take_anon(w, no_prot);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	u64 first = 0, count = r.pages;
	if (r.splits < 2 && !(r.flags & ~(u64)F_GUARD) && below(w, 4)) {
		pick(w, &r, 64, &first, &count);
		r.splits++;
	} else { /* all of it */
		r.splits = 0;
		r.flags &= F_GUARD;
		r.uid = v;
	}
	r.version = v;
	range_begin(slot, first, count, ZERO, v, 0);
	if (mmap(page_at(&r, first), count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
		 0) == MAP_FAILED)
		fail("mmap fixed: %s", strerror(errno));
	region_store(slot, &r);
	range_end(slot, first, count);
	w->first = first;
	w->count = count;
	return finish(w, slot);
}

static bool op_mremap_grow(struct worker *w, u64 v)
{
	int slot = take_anon(w, may_move);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	u64 more = 1 + below(w, 64);
	bool can = r.pages + more <= SLOT_PAGES && anonymous_pages() + more <= options.memory_pages;
	if (can) {
		unmap_guards(&r);
		void *at = mremap((void *)r.addr, r.pages * PAGE, (r.pages + more) * PAGE, MREMAP_MAYMOVE);
		can = at != MAP_FAILED;
		if (!can && errno != ENOMEM && !(errno == EFAULT && was_restored()))
			fail("mremap to grow %p, %llu pages: %s", (void *)r.addr, (unsigned long long)r.pages,
			     strerror(errno));
		if (can) {
			r.addr = (u64)at;
			set_pages(slot, r.pages, more, ZERO, v);
			w->first = r.pages;
			w->count = more;
			r.pages += more;
		}
		r.version = v;
		region_store(slot, &r);
	}
	return finish(w, slot) && can;
}

static bool op_mremap_shrink(struct worker *w, u64 v)
{
	int slot = take_anon(w, in_one_piece);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	bool can = r.pages >= 16;
	if (can) {
		u64 less = 1 + below(w, r.pages / 4 < 64 ? r.pages / 4 : 64);
		unmap_guards(&r);
		u64 old = r.pages;
		r.pages -= less;
		r.version = v;
		set_pages(slot, r.pages, less, ABSENT, v);
		region_store(slot, &r);
		if (mremap((void *)r.addr, old * PAGE, r.pages * PAGE, 0) == MAP_FAILED)
			fail("mremap to shrink: %s", strerror(errno));
		w->first = r.pages;
		w->count = less;
	}
	return finish(w, slot) && can;
}

/* Move a mapping onto pages of ours. NULL if the kernel cannot: it has no memory for it, or no such flag. What was at
 * `to` may be gone then, and be another thread's by the time that anybody looks, so nobody does. EFAULT would tell that
 * the kernel holds for several mappings what we made one: somebody else has split it, unless CRIU has made it. */
static void *move_onto(void *from, u64 size, int flags, void *to)
{
	void *at = mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED | flags, to);

	if (at != MAP_FAILED)
		return at;
	if (errno != ENOMEM && !(errno == EINVAL && flags) && !(errno == EFAULT && was_restored()))
		fail("mremap to move %p, %llu bytes, to %p, flags %d: %s", from, (unsigned long long)size, to, flags,
		     strerror(errno));
	return NULL;
}

static bool op_mremap_move(struct worker *w, u64 v)
{
	int slot = take_anon(w, may_move);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	unmap_guards(&r);
	void *from = (void *)r.addr, *to = (void *)map_pages(r.pages, false), *at = NULL;
	u64 size = r.pages * PAGE;
	if (to != NULL && below(w, 3) == 0) {
		at = move_onto(from, size, MREMAP_DONTUNMAP, to);
		if (at != NULL)
			munmap(from, size);
		else
			to = (void *)map_pages(r.pages, false);
	}
	if (to != NULL && at == NULL)
		at = move_onto(from, size, 0, to);
	if (at != NULL)
		r.addr = (u64)at;
	r.version = v;
	region_store(slot, &r);
	w->slot = -1; /* no page has changed */
	unlock(slot);
	return at != NULL;
}

/* `moved`: what is between its guard pages now may be anybody's. */
static void spare_unmap(u64 at, bool moved)
{
	u64 size = SPARE_PAGES * PAGE, edge = moved ? PAGE : size + 2 * PAGE;
	if (at && (munmap((char *)at - PAGE, edge) || (moved && munmap((char *)at + size, PAGE))))
		fail("munmap: %s", strerror(errno));
}

/* Move pages that were mapped some time ago and never touched behind a region, so that the kernel makes one mapping of
 * both, and give them back. The region's own pages are made read-only and writable again. None of this changes what
 * they hold. */
static bool op_mremap_beside(struct worker *w, u64 v)
{
	u64 *spare = &w->spare[w->spare_at++ % SPARES], size = SPARE_PAGES * PAGE;
	int slot = *spare ? take_anon(w, stands_alone) : -1;
	void *at = NULL;
	if (slot >= 0) {
		struct region r = *region_at(slot);
		unmap_guards(&r);
		char *to = (char *)r.addr + r.pages * PAGE;
		void *room = mmap(to, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		if (room == to)
			at = move_onto((void *)*spare, size, 0, to);
		if (room != MAP_FAILED && (room != to || at != NULL) && munmap(room, size))
			fail("munmap: %s", strerror(errno));
		if (at != NULL && (mprotect((void *)r.addr, r.pages * PAGE, PROT_READ) ||
					 mprotect((void *)r.addr, r.pages * PAGE, PROT_READ | PROT_WRITE)))
			fail("mprotect: %s", strerror(errno));
		r.version = v;
		region_store(slot, &r);
		unlock(slot);
	}
	if (!*spare || at != NULL) {
		spare_unmap(*spare, true);
		*spare = map_pages(SPARE_PAGES, true);
	}
	return at != NULL;
}

static bool protect(struct worker *w, u64 v, int prot)
{
	int slot = take_anon(w, no_prot);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	pick(w, &r, 64, &r.prot_first, &r.prot_count);
	r.prot = (u64)prot;
	if (!written_to[slot])
		r.flags |= F_PARTS;
	r.version = v;
	region_store(slot, &r);
	if (mprotect(page_at(&r, r.prot_first), r.prot_count * PAGE, prot))
		fail("mprotect: %s", strerror(errno));
	w->slot = -1;
	unlock(slot);
	return true;
}

static bool op_mprotect_none(struct worker *w, u64 v)
{
	return protect(w, v, PROT_NONE);
}

static bool op_mprotect_read(struct worker *w, u64 v)
{
	return protect(w, v, PROT_READ);
}

static bool has_prot(const struct region *r)
{
	return r->prot_count != 0;
}

static bool op_mprotect_back(struct worker *w, u64 v)
{
	int slot = take_anon(w, has_prot);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	if (mprotect(page_at(&r, r.prot_first), r.prot_count * PAGE, PROT_READ | PROT_WRITE))
		fail("mprotect back: %s", strerror(errno));
	r.prot_first = r.prot_count = r.prot = 0;
	r.version = v;
	region_store(slot, &r);
	w->slot = -1;
	unlock(slot);
	return true;
}

static bool guarded(const struct region *r)
{
	return (r->flags & F_GUARD) != 0;
}

bool unreadable(const void *at)
{
	char byte;
	struct iovec here = { &byte, 1 }, there = { (void *)at, 1 };
	return process_vm_readv(getpid(), &here, 1, &there, 1, 0) == -1 && errno == EFAULT;
}

static bool op_guard(struct worker *w, u64 v)
{
	int slot = take_anon(w, guarded);
	if (slot < 0)
		return false;
	const struct region *r = region_at(slot);
	if (!unreadable((char *)r->addr - PAGE) || !unreadable((char *)r->addr + r->pages * PAGE))
		fail("region %d: a guard page can be read at step %llu", slot, (unsigned long long)v);
	w->slot = -1;
	unlock(slot);
	return true;
}

/* ---- advice ---- */

static bool forget(struct worker *w, int slot, u64 first, u64 count, u64 v, enum kind becomes)
{
	range_begin(slot, first, count, becomes, v, 0);
	if (madvise(page_at(region_at(slot), first), count * PAGE, MADV_DONTNEED))
		fail("MADV_DONTNEED: %s", strerror(errno));
	range_end(slot, first, count);
	return finish(w, slot);
}

static bool op_dontneed(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_anon(w, NULL);
	if (slot < 0)
		return false;
	const struct region *r = region_at(slot);
	if (r->prot_count && below(w, 4) == 0) { /* what can't be written can be dropped */
		w->first = r->prot_first;
		w->count = r->prot_count;
		return forget(w, slot, r->prot_first, r->prot_count, v, ZERO);
	}
	if (!pick(w, r, 64, &first, &count)) {
		unlock(slot);
		return false;
	}
	return forget(w, slot, first, count, v, ZERO);
}

static bool op_free(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_range(w, 32, &first, &count);
	if (slot < 0)
		return false;
	void *at = page_at(region_at(slot), first);
	range_begin(slot, first, count, FREED, v, 0);
	if (madvise(at, count * PAGE, MADV_FREE))
		fail("MADV_FREE: %s", strerror(errno));
	if (below(w, 3) == 0)
		madvise(at, count * PAGE, MADV_PAGEOUT); /* lets the kernel drop some at once */
	range_end(slot, first, count);
	return finish(w, slot);
}

static bool advise_huge(struct worker *w, u64 v, bool huge)
{
	int slot = take_anon(w, huge ? huge_inside : in_one_piece);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	if (madvise((void *)r.addr, r.pages * PAGE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE)) {
		unavailable[huge ? P_hugepage : P_nohugepage] = true;
		unlock(slot);
		return false;
	}
	r.flags = (r.flags & ~(u64)(F_HUGE | F_NOHUGE)) | (huge ? F_HUGE : F_NOHUGE);
	r.version = v;
	region_store(slot, &r);
	w->first = 0;
	w->count = 1;
	if (huge) { /* make it fault in whole */
		u64 first = (HUGE_PAGES - (r.addr / PAGE) % HUGE_PAGES) % HUGE_PAGES;
		madvise(page_at(&r, first), HUGE_PAGES * PAGE, MADV_DONTNEED);
		write_pages(slot, first, HUGE_PAGES, v);
		w->first = first;
		w->count = HUGE_PAGES;
		return finish(w, slot);
	}
	w->slot = -1;
	unlock(slot);
	return true;
}

static bool op_hugepage(struct worker *w, u64 v)
{
	return advise_huge(w, v, true);
}

static bool op_nohugepage(struct worker *w, u64 v)
{
	return advise_huge(w, v, false);
}

/* Small pages become a huge one; contents stay. The kernel may decline. */
static bool op_collapse(struct worker *w, u64 v)
{
	int slot = take_anon(w, huge_inside);
	(void)v;
	if (slot < 0)
		return false;
	const struct region *r = region_at(slot);
	u64 first = (HUGE_PAGES - (r->addr / PAGE) % HUGE_PAGES) % HUGE_PAGES;
	bool done = madvise(page_at(r, first), HUGE_PAGES * PAGE, MADV_COLLAPSE) == 0;
	w->slot = -1;
	unlock(slot);
	return done;
}

static bool toggle(struct worker *w, u64 v, u64 flag, int on, int off)
{
	int slot = take_anon(w, in_one_piece);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	if (madvise((void *)r.addr, r.pages * PAGE, r.flags & flag ? off : on))
		fail("madvise %d: %s", on, strerror(errno));
	r.flags ^= flag;
	r.version = v;
	region_store(slot, &r);
	w->slot = -1;
	unlock(slot);
	return true;
}

static bool op_wipeonfork(struct worker *w, u64 v)
{
	return toggle(w, v, F_WIPE, MADV_WIPEONFORK, MADV_KEEPONFORK);
}

static bool op_dontfork(struct worker *w, u64 v)
{
	return toggle(w, v, F_DONTFORK, MADV_DONTFORK, MADV_DOFORK);
}

static bool op_pageout(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_range(w, 256, &first, &count);
	(void)v;
	if (slot < 0)
		return false;
	madvise(page_at(region_at(slot), first), count * PAGE, MADV_PAGEOUT);
	w->slot = -1;
	unlock(slot);
	return true;
}

/* ---- private mappings of files ---- */

static void file_name(char *name, size_t size, int file, u64 generation)
{
	snprintf(name, size, "%s/map-%d-%llu", options.scratch, file, (unsigned long long)generation);
}

static void write_all(int fd, const void *from, size_t size, off_t at)
{
	for (size_t done = 0; done < size;) {
		ssize_t part = pwrite(fd, (const char *)from + done, size - done, at + (off_t)done);
		if (part < 0 && errno != EINTR)
			fail("writing to a scratch file: %s", strerror(errno));
		done += part > 0 ? (size_t)part : 0;
	}
}

/* Make a file with known content. One that is there and begins and ends as it must is left alone: a restored
 * process, or the original of one, may have it open. */
static void make_file(const char *name, u64 file, u64 pages, u64 version, bool anew)
{
	u64 page[WORDS], found[WORDS];
	struct stat status;
	int fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || fstat(fd, &status)) {
		fail("%s: %s", name, strerror(errno));
		return;
	}
	bool there = (u64)status.st_size == pages * PAGE && !anew;
	for (u64 each = 0; each < pages && there; each += pages - 1) {
		fill_file_page(file, each, version, page);
		there = pread(fd, found, PAGE, (off_t)(each * PAGE)) == PAGE && !memcmp(page, found, PAGE);
	}
	if (!there && ftruncate(fd, 0))
		fail("%s: %s", name, strerror(errno));
	for (u64 each = 0; each < pages && !there; each++) {
		fill_file_page(file, each, version, page);
		write_all(fd, page, PAGE, (off_t)(each * PAGE));
	}
	close(fd);
}

static void direct_name(char *name, size_t size)
{
	snprintf(name, size, "%s/direct", options.scratch);
}

void scratch_make(void)
{
	char name[512];
	direct_name(name, sizeof name);
	make_file(name, 0, DIRECT_PAGES, FIRST_VERSION, false);
	for (int file = 1; file <= FILE_SLOTS; file++) {
		file_name(name, sizeof name, file, 0);
		make_file(name, (u64)file, FILE_PAGES, FIRST_VERSION, !options.no_file_changes);
	}
}

static int open_map_file(const struct region *r)
{
	char name[512];
	file_name(name, sizeof name, (int)r->file, r->spare[0]);
	int fd = open(name, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail("%s: %s", name, strerror(errno));
	return fd;
}

static int take_file(struct worker *w)
{
	return take(w, SLOT_FILE, FILE_SLOTS, R_FILE, NULL);
}

static bool op_file_cow(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_file(w);
	if (slot < 0)
		return false;
	bool can = pick(w, region_at(slot), 4, &first, &count);
	if (can)
		write_somehow(w, slot, first, count, v);
	return finish(w, slot) && can;
}

static bool op_file_dontneed(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_file(w);
	if (slot < 0)
		return false;
	if (!pick(w, region_at(slot), 16, &first, &count)) {
		unlock(slot);
		return false;
	}
	return forget(w, slot, first, count, v, FOLLOW);
}

static bool op_file_pageout(struct worker *w, u64 v)
{
	int slot = take_file(w);
	(void)v;
	if (slot < 0)
		return false;
	const struct region *r = region_at(slot);
	madvise((void *)r->addr, r->file_pages * PAGE, MADV_PAGEOUT);
	w->slot = -1;
	unlock(slot);
	return true;
}

/* Change the file underneath: pages never written through the mapping follow, copies stay. */
static bool op_file_pwrite(struct worker *w, u64 v)
{
	u64 first, count, content[WORDS];
	int slot = take_file(w);
	if (slot < 0)
		return false;
	const struct region *r = region_at(slot);
	int fd = pick(w, r, 8, &first, &count) ? open_map_file(r) : -1;
	if (fd >= 0) {
		for (u64 page = first; page < first + count; page++) {
			fill_file_page(r->file, page, v, content);
			write_all(fd, content, PAGE, (off_t)(page * PAGE));
			file_store(r->file, page, v);
		}
		close(fd);
	}
	w->slot = -1;
	unlock(slot);
	return fd >= 0;
}

/* Shorter: copies beyond the end are dropped too, and nobody may touch what was there. Longer: zeros. */
static bool resize_file(struct worker *w, u64 v, bool longer)
{
	int slot = take_file(w);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	u64 size = longer ? r.file_pages + 1 + below(w, r.pages - r.file_pages) : below(w, r.file_pages);
	bool can = longer ? r.file_pages < r.pages : r.file_pages > 8;
	int fd = can ? open_map_file(&r) : -1;
	if (fd < 0) {
		unlock(slot);
		return false;
	}
	u64 first = longer ? r.file_pages : size, count = longer ? size - first : r.file_pages - size;
	range_begin(slot, first, count, longer ? FOLLOW : ABSENT, v, 0);
	if (ftruncate(fd, (off_t)(size * PAGE)))
		fail("ftruncate: %s", strerror(errno));
	close(fd);
	for (u64 page = first; page < first + count; page++)
		file_store(r.file, page, 0);
	range_end(slot, first, count);
	r.file_pages = size;
	r.version = v;
	region_store(slot, &r);
	w->first = first;
	w->count = count;
	return finish(w, slot);
}

static bool op_file_truncate(struct worker *w, u64 v)
{
	return resize_file(w, v, false);
}

static bool op_file_extend(struct worker *w, u64 v)
{
	return resize_file(w, v, true);
}

static u64 map_file(const struct region *r, void *at)
{
	int fd = open_map_file(r);
	int flags = MAP_PRIVATE | (at ? MAP_FIXED : 0);
	void *mapped = mmap(at, FILE_PAGES * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (mapped == MAP_FAILED)
		fail("mapping a scratch file: %s", strerror(errno));
	close(fd);
	return (u64)mapped;
}

/* The next generation: another file takes the place of the mapped one. */
static bool op_file_new(struct worker *w, u64 v)
{
	char name[512];
	int slot = take_file(w);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot), old = r;
	r.spare[0]++;
	r.file_pages = FILE_PAGES;
	r.version = v;
	file_name(name, sizeof name, (int)r.file, r.spare[0]);
	make_file(name, r.file, FILE_PAGES, v, true);
	range_begin(slot, 0, FILE_PAGES, FOLLOW, v, 0);
	map_file(&r, (void *)r.addr);
	for (u64 page = 0; page < FILE_PAGES; page++)
		file_store(r.file, page, v);
	region_store(slot, &r);
	range_end(slot, 0, FILE_PAGES);
	file_name(name, sizeof name, (int)old.file, old.spare[0]);
	unlink(name);
	w->first = 0;
	w->count = FILE_PAGES;
	return finish(w, slot);
}

/* ---- stack and heap ---- */

static __thread u64 lowest_frame;

/* Frames of about a page, recognisable, verified on the way back. At the bottom it often stays a while. */
static __attribute__((noinline)) bool descend(struct worker *w, u64 v, u64 depth)
{
	volatile u64 frame[480];
	u64 key = v << 20 | depth;
	bool good = true;
	for (u64 i = 0; i < 480; i++)
		frame[i] = word_at(key, v, i);
	if (depth == 0) {
		lowest_frame = (u64)frame;
		if (below(w, 2) == 0)
			nap(below(w, 4000000));
	} else {
		good = descend(w, v, depth - 1);
	}
	for (u64 i = 0; i < 480; i++)
		good = good && frame[i] == word_at(key, v, i);
	return good;
}

static bool op_stack(struct worker *w, u64 v)
{
	bool main_thread = w->number == 0 && role == 0;
	if (!descend(w, v, below(w, main_thread && below(w, 4) == 0 ? 400 : 40)))
		fail("a stack frame of step %llu has changed", (unsigned long long)v);
	u64 here = (u64)__builtin_frame_address(0) / PAGE * PAGE - 8 * PAGE, low = lowest_frame / PAGE * PAGE;
	if (here > low && below(w, 4) == 0) /* let the kernel forget what lies below us */
		madvise((void *)low, here - low, MADV_DONTNEED);
	w->slot = -1;
	return true;
}

static bool resize_brk(struct worker *w, u64 v, bool more)
{
	int slot = take(w, SLOT_BRK, 1, R_BRK, NULL);
	if (slot < 0)
		return false;
	struct region r = *region_at(slot);
	u64 by = 1 + below(w, 16);
	bool can = more ? r.pages + by <= BRK_PAGES : r.pages >= by;
	if (can && (u64)sbrk(0) != r.addr + r.pages * PAGE) {
		unavailable[P_brk_grow] = unavailable[P_brk_shrink] = true; /* someone else has moved it */
		can = false;
	}
	if (can) {
		u64 first = more ? r.pages : r.pages - by;
		range_begin(slot, first, by, more ? ZERO : ABSENT, v, 0);
		if (sbrk(more ? (intptr_t)(by * PAGE) : -(intptr_t)(by * PAGE)) == (void *)-1)
			fail("brk: %s", strerror(errno));
		r.pages = first + (more ? by : 0);
		r.version = v;
		region_store(slot, &r);
		range_end(slot, first, by);
		w->first = first;
		w->count = by;
	}
	return finish(w, slot) && can;
}

static bool op_brk_grow(struct worker *w, u64 v)
{
	return resize_brk(w, v, true);
}

static bool op_brk_shrink(struct worker *w, u64 v)
{
	return resize_brk(w, v, false);
}

static bool write_in(struct worker *w, u64 v, int slot, enum region_kind kind)
{
	u64 first, count;
	if (take(w, slot, 1, kind, NULL) < 0)
		return false;
	bool can = pick(w, region_at(slot), 4, &first, &count);
	if (can && below(w, 8) == 0 && kind != R_SHARED)
		return forget(w, slot, first, count, v, ZERO);
	if (can)
		write_somehow(w, slot, first, count, v);
	return finish(w, slot) && can;
}

static bool op_brk_store(struct worker *w, u64 v)
{
	return write_in(w, v, SLOT_BRK, R_BRK);
}

static bool op_sparse(struct worker *w, u64 v)
{
	return write_in(w, v, SLOT_SPARSE, R_SPARSE);
}

/* ---- shared memory ---- */

static bool op_shared_anon(struct worker *w, u64 v)
{
	return write_in(w, v, SLOT_SHARED, R_SHARED);
}

static bool op_shared_memfd(struct worker *w, u64 v)
{
	return write_in(w, v, SLOT_SHARED + 1, R_SHARED);
}

static bool op_shared_sysv(struct worker *w, u64 v)
{
	return write_in(w, v, SLOT_SHARED + 2, R_SHARED);
}

static bool op_shared_remove(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take(w, SLOT_SHARED, 3, R_SHARED, NULL);
	if (slot < 0)
		return false;
	if (!pick(w, region_at(slot), 8, &first, &count)) {
		unlock(slot);
		return false;
	}
	void *at = page_at(region_at(slot), first);
	range_begin(slot, first, count, ZERO, v, 0);
	if (madvise(at, count * PAGE, MADV_REMOVE))
		memset(at, 0, count * PAGE);
	range_end(slot, first, count);
	return finish(w, slot);
}

/* ---- writes by the kernel on our behalf ---- */

static bool op_direct_read(struct worker *w, u64 v)
{
	u64 first, count;
	if (w->direct < 0) {
		char name[512];
		if (below(w, 4)) /* most of the time there is such a descriptor, but not always */
			return false;
		direct_name(name, sizeof name);
		w->direct = open(name, O_RDONLY | O_DIRECT | O_CLOEXEC);
		w->direct_uses = (int)below(w, 60);
		if (w->direct < 0) {
			unavailable[P_direct_read] = true;
			return false;
		}
	}
	int slot = take_range(w, 192, &first, &count);
	if (slot < 0)
		return false;
	u64 from = below(w, DIRECT_PAGES - count + 1);
	range_begin(slot, first, count, COPY, v, from << 40 | FIRST_VERSION);
	char *at = (char *)page_at(region_at(slot), first);
	for (u64 done = 0; done < count * PAGE;) {
		ssize_t part = pread(w->direct, at + done, count * PAGE - done, (off_t)(from * PAGE + done));
		if (part <= 0 && errno != EINTR) {
			fail("O_DIRECT read: %s", part ? strerror(errno) : "the file is too short");
			break;
		}
		done += part > 0 ? (u64)part : 0;
	}
	range_end(slot, first, count);
	if (w->direct_uses-- == 0) {
		close(w->direct);
		w->direct = -1;
	}
	return finish(w, slot);
}

static bool op_file_read(struct worker *w, u64 v)
{
	char name[512];
	u64 first, count;
	direct_name(name, sizeof name);
	int fd = open(name, O_RDONLY | O_CLOEXEC);
	int slot = fd >= 0 ? take_range(w, 32, &first, &count) : -1;
	if (slot >= 0) {
		u64 from = below(w, DIRECT_PAGES - count + 1), size = count * PAGE, half = below(w, size);
		char *at = (char *)page_at(region_at(slot), first);
		struct iovec parts[2] = { { at, half }, { at + half, size - half } };
		range_begin(slot, first, count, COPY, v, from << 40 | FIRST_VERSION);
		if (preadv(fd, parts, 2, (off_t)(from * PAGE)) != (ssize_t)size)
			fail("preadv: %s", strerror(errno));
		range_end(slot, first, count);
	}
	if (fd >= 0)
		close(fd);
	return slot >= 0 && finish(w, slot);
}

static bool receive(struct worker *w, u64 v, int to, int from, bool readv_it)
{
	u64 first, count, content[WORDS];
	int slot = take_range(w, STAGE_PAGES, &first, &count);
	if (slot < 0)
		return false;
	const struct region *r = region_at(slot);
	for (u64 page = first; page < first + count; page++) {
		fill(content, page_key(r->uid, page), v);
		if (write(to, content, PAGE) != PAGE)
			fail("writing to a pipe or socket of our own: %s", strerror(errno));
	}
	range_begin(slot, first, count, DATA, v, 0);
	char *at = (char *)page_at(r, first);
	u64 size = count * PAGE;
	for (u64 done = 0; done < size;) {
		u64 half = (size - done) / 2;
		struct iovec parts[2] = { { at + done, half }, { at + done + half, size - done - half } };
		ssize_t part = readv_it ? readv(from, parts, 2) : recv(from, at + done, size - done, 0);
		if (part <= 0 && errno != EINTR) {
			fail("reading from a pipe or socket of our own: %s", strerror(errno));
			break;
		}
		done += part > 0 ? (u64)part : 0;
	}
	range_end(slot, first, count);
	return finish(w, slot);
}

static bool op_pipe_read(struct worker *w, u64 v)
{
	return receive(w, v, w->pipe[1], w->pipe[0], true);
}

static bool op_socket_read(struct worker *w, u64 v)
{
	return receive(w, v, w->socket[1], w->socket[0], false);
}

/* ---- writes by others: another process, a signal handler ---- */

static bool by_helper(struct worker *w, u64 v, int path, int mode, bool forced)
{
	u64 first, count;
	if (!helper_take(w))
		return false;
	int slot = take_anon(w, forced ? has_prot : NULL);
	bool can = slot >= 0;
	if (can && forced) {
		const struct region *r = region_at(slot);
		can = r->prot == PROT_READ;
		count = 1 + below(w, r->prot_count < STAGE_PAGES ? r->prot_count : STAGE_PAGES);
		first = r->prot_first + below(w, r->prot_count - count + 1);
		w->first = first;
		w->count = count;
	} else if (can) {
		can = pick(w, region_at(slot), STAGE_PAGES, &first, &count);
	}
	if (can) {
		const struct region *r = region_at(slot);
		range_begin(slot, first, count, DATA, v, 0);
		int error = helper_write(mode, r, first, count, v);
		if (error) { /* it is not allowed here: do it ourselves */
			unavailable[path] = true;
			mprotect(page_at(r, first), count * PAGE, PROT_READ | PROT_WRITE);
			for (u64 page = first; page < first + count; page++)
				fill(page_at(r, page), page_key(r->uid, page), v);
			if (forced)
				mprotect(page_at(r, first), count * PAGE, PROT_READ);
			can = false;
		}
		range_end(slot, first, count);
	}
	helper_drop();
	return slot >= 0 && finish(w, slot) && can;
}

static bool op_vm_writev(struct worker *w, u64 v)
{
	return by_helper(w, v, P_vm_writev, 0, false);
}

static bool op_proc_mem(struct worker *w, u64 v)
{
	return by_helper(w, v, P_proc_mem, 1, false);
}

static bool op_proc_mem_force(struct worker *w, u64 v)
{
	return by_helper(w, v, P_proc_mem_force, 1, true);
}

void on_signal_write(int number)
{
	(void)number;
	for (u64 page = 0; page < me->by_signal.count; page++)
		fill(me->by_signal.at + page * WORDS, page_key(me->by_signal.key, me->first + page), me->by_signal.version);
}

/* The handler runs on the alternative stack, and may not touch the registers: they are put back after it. */
static bool op_signal(struct worker *w, u64 v)
{
	u64 first, count;
	int slot = take_range(w, 4, &first, &count);
	if (slot < 0)
		return false;
	const struct region *r = region_at(slot);
	range_begin(slot, first, count, DATA, v, 0);
	w->by_signal.at = page_at(r, first);
	w->by_signal.key = r->uid;
	w->by_signal.version = v;
	w->by_signal.count = count;
	syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1);
	range_end(slot, first, count);
	return finish(w, slot);
}

static bool op_verify(struct worker *w, u64 v)
{
	char error[ERROR_BYTES];
	u64 first, count;
	int slot = take_range(w, 64, &first, &count);
	(void)v;
	if (slot < 0)
		return false;
	if (!check_pages(slot, first, count, error, sizeof error))
		fail("%s", error);
	w->slot = -1;
	unlock(slot);
	return true;
}

/* ---- the loop ---- */

static bool (*const ops[])(struct worker *, u64) = {
#define X(name, weight, in_child) op_##name,
	PATHS(X)
#undef X
};

const char *const path_names[PATH_COUNT] = {
#define X(name, weight, in_child) #name,
	PATHS(X)
#undef X
	"idle"
};

static const u32 all_path_weights[2][PATH_COUNT] = {
	{
#define X(name, weight, in_child) weight,
		PATHS(X)
#undef X
		0 },
	{
#define X(name, weight, in_child) in_child,
		PATHS(X)
#undef X
		0 },
};

void choose_weights(bool child)
{
	u32 sum = 0;
	for (int path = 0; path < P_IDLE; path++) {
		sum += path_off[path] ? 0 : all_path_weights[child][path];
		weights[path] = sum;
	}
	all_weights = sum;
}

static int choose_path(struct worker *w)
{
	u32 dice = (u32)below(w, all_weights);
	int path = 0;
	while (path < P_IDLE && weights[path] <= dice)
		path++;
	return path;
}

static u64 ring_word(const struct worker *w, u64 count)
{
	return mix64(w->uid + count * 0x9e3779b97f4a7c15u);
}

static u64 link_of(u64 before, const struct log_entry *e)
{
	return mix64(mix64(before ^ e->where) ^ mix64(e->uid + 1) ^ e->version);
}

static void account(struct worker *w, int path, u64 v)
{
	struct log_entry *e = &logs[w->number][(reg_count - 1) % LOG];
	u64 slot = w->slot >= 0 ? (u64)w->slot : 255, at = reg_count % RING, word = ring_word(w, reg_count);
	w->counters[path]++;
	e->where = (u64)path << 56 | slot << 48 | w->first << 24 | w->count;
	e->uid = w->slot >= 0 ? region_at(w->slot)->uid : 0;
	e->version = v;
	reg_chain = e->chain = link_of(reg_chain, e);
	w->stack_ring[at] = w->tls_ring[at] = w->heap_ring[at] = bss_ring[w->number][at] = word;
}

static u64 begin_step(struct worker *w)
{
	w->slot = -1;
	w->first = w->count = 0;
	reg_count++;
	return w->version = atomic_fetch_add(&steps_begun, 1) + 1;
}

static void step(struct worker *w)
{
	u64 v = begin_step(w);
	int path = choose_path(w);
	w->path = path;
	if (path >= P_IDLE || unavailable[path] || !ops[path](w, v)) {
		path = P_IDLE;
		w->slot = -1;
	}
	account(w, path, v);
}

/* Check what this thread itself remembers against its registers; all others are parked. */
bool worker_sane(struct worker *w, char *error, size_t size)
{
	u64 sum = 0, count = reg_count, oldest = count > RING ? count - RING + 1 : 1;
	for (int path = 0; path < PATH_COUNT; path++)
		sum += w->counters[path];
	if (sum != count) {
		snprintf(error, size, "thread %d: the counters tell of %llu steps, its register of %llu", w->number,
			 (unsigned long long)sum, (unsigned long long)count);
		return false;
	}
	const u64 *rings[] = { w->stack_ring, w->tls_ring, w->heap_ring, bss_ring[w->number] };
	static const char *const names[] = { "stack", "thread-local", "heap", "static" };
	for (u64 each = oldest; each <= count; each++)
		for (int ring = 0; ring < 4; ring++)
			if (rings[ring][each % RING] != ring_word(w, each)) {
				snprintf(error, size, "thread %d: the %s ring does not have step %llu of %llu", w->number, names[ring],
					 (unsigned long long)each, (unsigned long long)count);
				return false;
			}
	u64 chain = reg_chain, entries = count < LOG ? count : LOG;
	for (u64 back = 0; back < entries; back++) {
		const struct log_entry *e = &logs[w->number][(count - 1 - back) % LOG];
		u64 before = count - 1 - back ? logs[w->number][(count - 2 - back) % LOG].chain : w->uid;
		if (e->chain != chain || (back + 1 < LOG && link_of(before, e) != chain)) {
			snprintf(error, size, "thread %d: the log entry %llu steps ago is not what it wrote", w->number,
				 (unsigned long long)back);
			return false;
		}
		chain = before;
		u64 slot = e->where >> 48 & 255, first = e->where >> 24 & 0xffffff, pages = e->where & 0xffffff;
		if (slot >= SLOTS || region_at((int)slot)->uid != e->uid)
			continue;
		for (u64 page = first; page < first + pages; page++)
			if (version_of(entry_at((int)slot, page)->begun) < e->version) {
				snprintf(error, size, "thread %d wrote version %llu to region %llu page %llu, but the ledger has %llu",
					 w->number, (unsigned long long)e->version, (unsigned long long)slot, (unsigned long long)page,
					 (unsigned long long)version_of(entry_at((int)slot, page)->begun));
				return false;
			}
	}
	return true;
}

void nap(u64 ns)
{
	struct timespec span = { (time_t)(ns / 1000000000), (long)(ns % 1000000000) };
	syscall(SYS_nanosleep, &span, NULL);
}

static u64 now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (u64)now.tv_sec * 1000000000 + (u64)now.tv_nsec;
}

/* Keep the rate; whatever the clock does (another host has another one), sleep no longer than two periods. */
static void pace(struct worker *w)
{
	u64 now = now_ns();
	w->next_ns += w->period_ns;
	if (w->next_ns + 20 * w->period_ns < now || w->next_ns > now + 2 * w->period_ns)
		w->next_ns = now;
	if (w->next_ns > now + 50000)
		nap(w->next_ns - now);
}

/* Inode numbers of two pipes that all of the family hold: a restored one has new pipes. */
u64 canary(void)
{
	u64 sum = 0;
	struct stat status;
	for (int i = 0; i < 2; i++) {
		if (fstat(control->canary_fd[i], &status))
			fail("the canary's pipe is gone: %s", strerror(errno));
		sum = mix64(sum + status.st_ino);
	}
	return sum;
}

bool must_hold(void)
{
	return atomic_load(&control->hold) != 0 || canary() != atomic_load(&control->canary);
}

void worker_begin(struct worker *w, int number, u64 rng, u64 steps)
{
	u64 *heap_ring = w->heap_ring;
	memset(w, 0, offsetof(struct worker, live));
	w->number = number;
	w->rng = rng;
	w->steps_left = steps;
	w->uid = mix64(rng ^ atomic_load(&steps_begun));
	w->heap_ring = heap_ring ? heap_ring : malloc(RING * 8);
	w->tls_ring = tls_ring;
	w->pipe[0] = w->pipe[1] = w->socket[0] = w->socket[1] = w->direct = -1;
	w->slot = -1;
	w->period_ns = my_child ? 3000000 + below(w, 2000000) : (u64)(options.threads * 1e9 / options.rate);
	me = w;
	reg_count = 0;
	reg_chain = w->uid;
}

void worker_open(struct worker *w)
{
	if (pipe2(w->pipe, O_CLOEXEC) || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, w->socket))
		fail("pipe or socketpair: %s", strerror(errno));
}

void worker_close(struct worker *w)
{
	int *all[] = { &w->pipe[0], &w->pipe[1], &w->socket[0], &w->socket[1], &w->direct };
	for (size_t i = 0; i < sizeof all / sizeof *all; i++)
		if (*all[i] >= 0)
			close(*all[i]);
	for (int i = 0; i < SPARES; i++)
		spare_unmap(w->spare[i], false);
	free(w->heap_ring);
	w->heap_ring = NULL;
}

static __attribute__((noinline)) void run_steps(struct worker *w)
{
	while (w->steps_left) {
		if (must_hold())
			park(w);
		step(w);
		if (my_child)
			child_stepped();
		else if (w->number == 0)
			reap();
		if (w->steps_left != UINT64_MAX)
			w->steps_left--;
		pace(w);
	}
}

/* Build the world first, if `w` is to; then step until its steps are used up. */
void worker_loop(struct worker *w)
{
	u64 ring[RING];
	u64 *volatile escaped = ring;
	w->stack_ring = escaped;
	if (w->number == 0 && role == 0) {
		world_make(w);
		if (my_child)
			child_began();
		else
			start_workers();
	}
	run_steps(w);
	if (must_hold())
		park(w);
}

/* ---- the world ---- */

static void place(struct worker *w, int slot, struct region r, enum kind kind, int path)
{
	u64 v = begin_step(w);
	r.uid = r.version = v;
	set_pages(slot, 0, r.pages, kind, v);
	region_store(slot, &r);
	account(w, path, v);
}

static void make_shared(struct worker *w)
{
	size_t size = SHARED_PAGES * PAGE;
	int flags = PROT_READ | PROT_WRITE, fd = memfd_create("oracle-shared", MFD_CLOEXEC);
	void *at[3] = { mmap(NULL, size, flags, MAP_SHARED | MAP_ANONYMOUS, -1, 0), MAP_FAILED, MAP_FAILED };
	if (fd >= 0 && ftruncate(fd, (off_t)size) == 0)
		at[1] = mmap(NULL, size, flags, MAP_SHARED, fd, 0);
	if (!path_off[P_shared_sysv])
		sysv_id = shmget(IPC_PRIVATE, size, IPC_CREAT | 0600);
	if (sysv_id >= 0)
		at[2] = shmat(sysv_id, NULL, 0);
	for (int i = 0; i < 3; i++) {
		struct region r = { .addr = (u64)at[i], .pages = SHARED_PAGES, .stride = 1, .kind = R_SHARED };
		if (at[i] == MAP_FAILED)
			unavailable[P_shared_anon + i] = true;
		else
			place(w, SLOT_SHARED + i, r, ZERO, P_shared_anon + i);
	}
}

static bool swap_exists(void)
{
	char text[512] = "";
	int fd = open("/proc/swaps", O_RDONLY | O_CLOEXEC);
	ssize_t size = fd >= 0 ? read(fd, text, sizeof text - 1) : 0;
	if (fd >= 0)
		close(fd);
	const char *line = size > 0 ? strchr(text, '\n') : NULL;
	return line != NULL && line[1] != 0;
}

/* Make all that is there from the start. Each mapping is a step of the calling thread. */
void world_make(struct worker *w)
{
	image = mmap(NULL, IMAGE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (u64 page = 0; page < IMAGE_PAGES; page++)
		fill_file_page(0, page, FIRST_VERSION, image + page * WORDS);
	unavailable[P_pageout] = !swap_exists();

	void *here = sbrk(0);
	if (sbrk((intptr_t)(PAGE - (u64)here % PAGE)) != (void *)-1) {
		struct region r = { .addr = (u64)sbrk(0), .stride = 1, .kind = R_BRK };
		place(w, SLOT_BRK, r, ZERO, P_brk_grow);
	}
	void *sparse = mmap(NULL, (size_t)SPARSE_PAGES * SPARSE_STRIDE * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (sparse == MAP_FAILED)
		unavailable[P_sparse] = true;
	else
		place(w, SLOT_SPARSE,
		      (struct region){
			      .addr = (u64)sparse, .pages = SPARSE_PAGES, .stride = SPARSE_STRIDE, .kind = R_SPARSE },
		      ZERO, P_sparse);
	if (!options.small) {
		for (u64 page = 0; page < DIRECT_PAGES; page++)
			file_store(0, page, FIRST_VERSION);
		for (int file = 1; file <= FILE_SLOTS; file++) {
			struct region r = { .pages = FILE_PAGES, .stride = 1, .kind = R_FILE };
			r.file = (u64)file;
			r.file_pages = FILE_PAGES;
			r.addr = map_file(&r, NULL);
			for (u64 page = 0; page < FILE_PAGES; page++)
				file_store((u64)file, page, FIRST_VERSION);
			place(w, SLOT_FILE + file - 1, r, FOLLOW, P_file_dontneed);
		}
		make_shared(w);
	}
	for (int tries = 0; tries < 200 && anonymous_pages() < options.memory_pages * 3 / 4; tries++) {
		u64 v = begin_step(w);
		bool made = map_anon(w, v);
		account(w, made ? P_mmap : P_IDLE, v);
		if (!made)
			continue;
		int slot = w->slot;
		u64 pages = region_at(slot)->pages;
		v = begin_step(w);
		write_pages(slot, 0, pages / 2, v);
		w->slot = slot;
		w->count = pages / 2;
		account(w, P_store_page, v);
	}
}

void world_end(void)
{
	if (sysv_id >= 0)
		shmctl(sysv_id, IPC_RMID, NULL);
}
