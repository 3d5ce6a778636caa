/* SPDX-License-Identifier: MIT
 *
 * What every page must contain. In: begin and end of each op on a range, from the thread that holds the lock of
 * its region. Out: whether pages contain exactly what they must, and a sum over everything written here.
 *
 * The ledger is memory like any other and may be stale like any other. So:
 * - there are two copies, in mappings far apart, the second complemented;
 * - each change adds hash(new) - hash(old) to `reg_sum`, a register of the thread that made it. The sum over
 *   the whole ledger must be the sum over all threads' registers. If pages of both copies *and* the pages that
 *   they describe were stale, all of the same earlier instant, they would agree with each other, but not with
 *   the registers: each change has a version that was never there before, so each changes the sum.
 *
 * Checks are for when nobody changes anything: what has begun must be done. They tell the first wrong word and,
 * as words are invertible, which version it is of.
 */
#include "oracle.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

/* Of all threads together; each region's cell is changed by whoever holds its lock. */
static struct region table[2][SLOTS] __attribute__((aligned(4096)));
static struct entry *entries[2][SLOTS];
static u32 used[SLOTS]; /* entries from here on were never begun */
bool written_to[SLOTS];
static _Atomic u64 anon_pages; /* mapped in anonymous regions, for `memory_pages` */
static u64 file_versions[FILE_SLOTS + 1][DIRECT_PAGES] __attribute__((aligned(4096)));
static _Atomic u32 locks[SLOTS] __attribute__((aligned(4096)));
static bool ours[CHILDREN + 1];

static u64 hash(u64 slot, u64 page, u64 value)
{
	return value ? mix64(value ^ mix64((slot << 32 | page) + 0x6a09e667f3bcc909u)) : 0;
}

static u64 hash_region(int slot, const struct region *r)
{
	const u64 *words = (const u64 *)r;
	u64 sum = 0;
	for (size_t i = 0; i < sizeof *r / 8; i++)
		sum += hash(1000 + (u64)slot, i, words[i]);
	return sum;
}

static void *map_ledger(size_t size, int flags)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
	if (at == MAP_FAILED)
		fail("no memory for the ledger");
	return at;
}

enum { SLOT_BYTES = SLOT_PAGES * sizeof(struct entry), SHARED_BYTES = SHARED_PAGES * sizeof(struct entry) };

void ledger_make(void)
{
	for (int copy = 0; copy < 2; copy++) {
		char *own = map_ledger((size_t)SLOT_SHARED * SLOT_BYTES, MAP_PRIVATE);
		char *shared = map_ledger(3 * SHARED_BYTES, MAP_SHARED);
		for (int slot = 0; slot < SLOTS; slot++)
			entries[copy][slot] = (struct entry *)(slot < SLOT_SHARED
								   ? own + (size_t)slot * SLOT_BYTES
								   : shared + (slot - SLOT_SHARED) * SHARED_BYTES);
		if (copy == 0) /* keeps the two apart */
			mmap(NULL, 16 * PAGE, PROT_NONE, MAP_ANONYMOUS | MAP_PRIVATE, -1, 0);
	}
	for (int slot = 0; slot < SLOTS; slot++) {
		struct region nothing = { 0 };
		const u64 *words = (const u64 *)&nothing;
		for (size_t i = 0; i < sizeof nothing / 8; i++)
			((u64 *)&table[1][slot])[i] = ~words[i];
	}
	memset(ours, true, sizeof ours);
}

int ledger_areas(u64 out[][2])
{
	for (int copy = 0; copy < 2; copy++) {
		out[copy][0] = (u64)entries[copy][0];
		out[copy][1] = (u64)SLOT_SHARED * SLOT_BYTES;
		out[2 + copy][0] = (u64)entries[copy][SLOT_SHARED];
		out[2 + copy][1] = 3 * SHARED_BYTES;
	}
	out[4][0] = (u64)table;
	out[4][1] = sizeof table;
	out[5][0] = (u64)file_versions;
	out[5][1] = sizeof file_versions;
	return 6;
}

/* ---- locks: taken or not taken, never waited for ---- */

static u64 newest[SLOTS]; /* version of who had the lock last: those of a page only ever grow */

bool try_lock(int slot, struct worker *w)
{
	u32 nobody = 0;
	if (!atomic_compare_exchange_strong(&locks[slot], &nobody, (u32)w->number + 1))
		return false;
	if (newest[slot] < w->version)
		return true;
	atomic_store(&locks[slot], 0);
	return false;
}

void unlock(int slot)
{
	reg_sum += hash(3000, (u64)slot, me->version) - hash(3000, (u64)slot, newest[slot]);
	newest[slot] = me->version;
	atomic_store(&locks[slot], 0);
}

int locked_by(int slot)
{
	return (int)atomic_load(&locks[slot]) - 1;
}

void forget_locks(void)
{
	memset(newest, 0, sizeof newest);
	for (int slot = 0; slot < SLOTS; slot++)
		atomic_store(&locks[slot], 0);
}

/* ---- records and entries ---- */

const struct region *region_at(int slot)
{
	return &table[0][slot];
}

u64 anonymous_pages(void)
{
	return atomic_load(&anon_pages);
}

static void put_region(int slot, const struct region *r)
{
	const struct region *old = &table[0][slot];
	atomic_fetch_add(&anon_pages, (r->kind == R_ANON ? r->pages : 0) - (old->kind == R_ANON ? old->pages : 0));
	for (size_t i = 0; i < sizeof *r / 8; i++) {
		((volatile u64 *)&table[0][slot])[i] = ((const u64 *)r)[i];
		((volatile u64 *)&table[1][slot])[i] = ~((const u64 *)r)[i];
	}
}

void region_store(int slot, const struct region *r)
{
	reg_sum += hash_region(slot, r) - hash_region(slot, &table[0][slot]);
	if (r->uid != table[0][slot].uid)
		written_to[slot] = false;
	put_region(slot, r);
}

struct entry *entry_at(int slot, u64 page)
{
	return &entries[0][slot][page];
}

static void put(int slot, u64 page, size_t offset, u64 value)
{
	*(volatile u64 *)((char *)&entries[0][slot][page] + offset) = value;
	*(volatile u64 *)((char *)&entries[1][slot][page] + offset) = ~value;
}

#define PUT(slot, page, field, value) put(slot, page, offsetof(struct entry, field), value)

void range_begin(int slot, u64 first, u64 count, enum kind kind, u64 version, u64 pend)
{
	u64 op = version << 4 | kind;
	for (u64 page = first; page < first + count; page++) {
		struct entry *e = entry_at(slot, page);
		if (e->begun == 0) /* never used: make the second copy the complement of the zeros in the first */
			memset(&entries[1][slot][page], 0xff, sizeof *e);
		reg_sum += hash((u64)slot, page, op) - hash((u64)slot, page, e->begun);
		PUT(slot, page, pend, kind == COPY ? pend + ((page - first) << 40) : pend);
		PUT(slot, page, begun, op);
	}
	if (used[slot] < first + count)
		used[slot] = (u32)(first + count);
	written_to[slot] |= kind == DATA || kind == PATCH;
	atomic_signal_fence(memory_order_seq_cst);
}

static int free_patch(const struct entry *e)
{
	for (int i = 0; i < 3; i++)
		if (e->patch[i] >> 20 <= version_of(e->base))
			return i;
	return -1;
}

bool patchable(int slot, u64 page)
{
	struct entry *e = entry_at(slot, page);
	/* A freed page could be all patches, and then one could not tell whether it had become zeros. */
	return free_patch(e) >= 0 && kind_of(e->base) != ABSENT;
}

/* After some words of a page were written: on top of what are they? */
static void end_patch(int slot, u64 page)
{
	const struct region *r = region_at(slot);
	struct entry *e = entry_at(slot, page);
	u64 from = e->pend >> 10, words = e->pend & 1023;
	if (kind_of(e->done) == FREED) {
		/* The write ended the kernel's liberty to drop the page; did it drop it before? */
		const u64 *content = page_at(r, page);
		bool dropped = true;
		for (u64 i = 0; i < WORDS && dropped; i++)
			dropped = content[i] == 0 || (i >= from && i < from + words);
		if (dropped)
			PUT(slot, page, base, version_of(e->done) << 4 | ZERO);
	}
	if (kind_of(e->base) == FOLLOW) {
		PUT(slot, page, aux, r->file << 56 | page << 40 | file_version(r->file, page));
		PUT(slot, page, base, version_of(e->base) << 4 | COPY);
	}
	int which = free_patch(e);
	put(slot, page, offsetof(struct entry, patch) + 8 * (size_t)which, version_of(e->begun) << 20 | e->pend);
}

void range_end(int slot, u64 first, u64 count)
{
	atomic_signal_fence(memory_order_seq_cst);
	for (u64 page = first; page < first + count; page++) {
		struct entry *e = entry_at(slot, page);
		switch (kind_of(e->begun)) {
		case PATCH:
			end_patch(slot, page);
			break;
		case FREED:
			break;
		case COPY:
			PUT(slot, page, aux, e->pend);
			PUT(slot, page, base, e->begun);
			break;
		default:
			PUT(slot, page, base, e->begun);
		}
		PUT(slot, page, done, e->begun);
	}
}

/* ---- contents ---- */

u64 page_key(u64 uid, u64 page)
{
	return mix64(options.seed ^ uid * 0x9fb21c651e98df25u ^ page << 48);
}

u64 file_key(u64 file, u64 page)
{
	return mix64(options.seed + 0xf11e + (file << 32 | page));
}

u64 file_version(u64 file, u64 page)
{
	return file_versions[file][page];
}

void file_store(u64 file, u64 page, u64 version)
{
	reg_sum += hash(2000 + file, page, version) - hash(2000 + file, page, file_versions[file][page]);
	*(volatile u64 *)&file_versions[file][page] = version;
}

void fill_file_page(u64 file, u64 page, u64 version, u64 *out)
{
	u64 key = file_key(file, page);
	for (u64 i = 0; i < WORDS; i++)
		out[i] = version ? word_at(key, version, i) : 0;
}

static void expect(int slot, u64 page, u64 *out)
{
	const struct region *r = region_at(slot);
	const struct entry *e = entry_at(slot, page);
	u64 base = version_of(e->base), key = page_key(r->uid, page), since = base;
	switch (kind_of(e->base)) {
	case DATA:
		for (u64 i = 0; i < WORDS; i++)
			out[i] = word_at(key, base, i);
		break;
	case COPY:
		fill_file_page(e->aux >> 56, e->aux >> 40 & 0xffff, e->aux & 0xffffffffff, out);
		break;
	case FOLLOW:
		fill_file_page(r->file, page, file_version(r->file, page), out);
		break;
	default:
		memset(out, 0, PAGE);
	}
	for (;;) { /* patches, oldest first */
		u64 next = UINT64_MAX;
		for (int i = 0; i < 3; i++)
			if (e->patch[i] >> 20 > since && e->patch[i] < next)
				next = e->patch[i];
		if (next == UINT64_MAX)
			return;
		since = next >> 20;
		for (u64 i = next >> 10 & 1023; i < (next >> 10 & 1023) + (next & 1023) && i < WORDS; i++)
			out[i] = word_at(key, since, i);
	}
}

static bool all_zeros(const u64 *words)
{
	u64 any = 0;
	for (u64 i = 0; i < WORDS; i++)
		any |= words[i];
	return any == 0;
}

static void describe(int slot, u64 page, const u64 *found, const u64 *wanted, char *error, size_t size)
{
	const struct region *r = region_at(slot);
	const struct entry *e = entry_at(slot, page);
	static const char *const kinds[] = { "zeros", "data", "a patch", "freed", "a copy", "the file", "absent" };
	u64 at = 0, wrong = 0;
	for (u64 i = WORDS; i-- > 0;)
		if (found[i] != wanted[i]) {
			at = i;
			wrong++;
		}
	u64 is = (found[at] ^ word_at(page_key(r->uid, page), 0, at)) * 0x572b5ee77a54e3bdu;
	char what[48] = "of no version";
	if (all_zeros(found))
		snprintf(what, sizeof what, "zeros");
	else if (is > 0 && is <= atomic_load(&steps_begun))
		snprintf(what, sizeof what, "of version %llu", (unsigned long long)is);
	snprintf(error, size,
		 "region %d (kind %d, uid %llu) page %llu at %p: %llu words wrong, first %llu: want version %llu (%s, on %s "
		 "of version %llu), got words %s",
		 slot, (int)r->kind, (unsigned long long)r->uid, (unsigned long long)page, (void *)page_at(r, page),
		 (unsigned long long)wrong, (unsigned long long)at, (unsigned long long)version_of(e->done),
		 kinds[kind_of(e->done) % 7], kinds[kind_of(e->base) % 7], (unsigned long long)version_of(e->base), what);
}

static bool check_entry(int slot, u64 page, char *error, size_t size)
{
	const u64 *a = (const u64 *)&entries[0][slot][page], *b = (const u64 *)&entries[1][slot][page];
	u64 any = 0, differ = 0;
	for (size_t i = 0; i < sizeof(struct entry) / 8; i++) {
		any |= a[i] | b[i];
		differ |= a[i] ^ ~b[i];
	}
	if (any == 0) /* never used */
		return true;
	if (differ) {
		snprintf(error, size, "region %d page %llu: the copies of the ledger differ: begun %llx and %llx, done %llx and %llx",
			 slot, (unsigned long long)page, (unsigned long long)a[0], (unsigned long long)~b[0],
			 (unsigned long long)a[1], (unsigned long long)~b[1]);
		return false;
	}
	if (a[0] != a[1])
		snprintf(error, size, "region %d page %llu: op %llx has begun, %llx was done, and nobody is at it", slot,
			 (unsigned long long)page, (unsigned long long)a[0], (unsigned long long)a[1]);
	return a[0] == a[1];
}

static bool check_page(int slot, u64 page, char *error, size_t size)
{
	const struct region *r = region_at(slot);
	const struct entry *e = entry_at(slot, page);
	const u64 *found = page_at(r, page);
	u64 wanted[WORDS];
	if (!check_entry(slot, page, error, size))
		return false;
	if (kind_of(e->base) == ABSENT)
		return true;
	expect(slot, page, wanted);
	if (memcmp(found, wanted, PAGE) == 0 || (kind_of(e->done) == FREED && all_zeros(found)))
		return true;
	describe(slot, page, found, wanted, error, size);
	return false;
}

/* Check pages of a region whose lock is ours, or with all threads parked. */
bool check_pages(int slot, u64 first, u64 count, char *error, size_t size)
{
	const struct region *r = region_at(slot);
	bool hidden = r->prot_count && r->prot == PROT_NONE, good = true;
	char *from = (char *)page_at(r, r->prot_first);
	if (hidden) {
		char byte;
		struct iovec here = { &byte, 1 }, there = { from, 1 };
		if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != -1) {
			snprintf(error, size, "region %d page %llu is PROT_NONE but can be read", slot,
				 (unsigned long long)r->prot_first);
			return false;
		}
		mprotect(from, r->prot_count * PAGE, PROT_READ);
	}
	for (u64 page = first; page < first + count && good; page++)
		good = check_page(slot, page, error, size);
	if (hidden)
		mprotect(from, r->prot_count * PAGE, PROT_NONE);
	return good;
}

bool part_is_ours(int part)
{
	return ours[part];
}

/* Check everything that this process answers for. Nobody may be changing anything. */
bool check_world(char *error, size_t size, u64 *checked)
{
	u64 anonymous = 0;
	for (int slot = 0; slot < SLOTS; slot++) {
		const u64 *a = (const u64 *)&table[0][slot], *b = (const u64 *)&table[1][slot];
		for (size_t i = 0; i < sizeof(struct region) / 8; i++)
			if (a[i] != ~b[i]) {
				snprintf(error, size, "region %d: the copies of its record differ in word %zu: %llx and %llx", slot,
					 i, (unsigned long long)a[i], (unsigned long long)~b[i]);
				return false;
			}
		const struct region *r = region_at(slot);
		if (locked_by(slot) >= 0) {
			snprintf(error, size, "region %d: its lock is thread %d's, which is not at it", slot, locked_by(slot));
			return false;
		}
		anonymous += r->kind == R_ANON ? r->pages : 0;
		if (r->kind == R_SHARED) {
			for (int part = 0; part <= CHILDREN; part++) {
				/* The main process looks at what children have too: they are parked. */
				if (role != 0 && !ours[part])
					continue;
				*checked += PART_PAGES;
				if (!check_pages(slot, (u64)part * PART_PAGES, PART_PAGES, error, size))
					return false;
			}
			continue;
		}
		u64 pages = r->kind == R_NONE ? 0 : r->pages;
		*checked += pages;
		if (pages && !check_pages(slot, 0, pages, error, size))
			return false;
		for (u64 page = pages; page < used[slot]; page++)
			if (!check_entry(slot, page, error, size))
				return false;
	}
	if (anonymous != anonymous_pages())
		snprintf(error, size, "the records tell of %llu anonymous pages, their counter of %llu",
			 (unsigned long long)anonymous, (unsigned long long)anonymous_pages());
	return anonymous == anonymous_pages();
}

/* ---- the sum ---- */

static u64 range_sum(int slot, u64 first, u64 count)
{
	u64 sum = 0;
	for (u64 page = first; page < first + count; page++)
		sum += hash((u64)slot, page, entry_at(slot, page)->begun);
	return sum;
}

u64 part_sum(int part)
{
	u64 sum = 0;
	for (int slot = SLOT_SHARED; slot < SLOTS; slot++)
		sum += range_sum(slot, (u64)part * PART_PAGES, PART_PAGES);
	return sum;
}

u64 ledger_sum(void)
{
	u64 sum = 0;
	for (int slot = 0; slot < SLOT_SHARED; slot++)
		sum += range_sum(slot, 0, used[slot]);
	for (int part = 0; part <= CHILDREN; part++)
		if (ours[part])
			sum += part_sum(part);
	for (int slot = 0; slot < SLOTS; slot++)
		sum += hash_region(slot, region_at(slot)) + hash(3000, (u64)slot, newest[slot]);
	for (u64 file = 0; file <= FILE_SLOTS; file++)
		for (u64 page = 0; page < DIRECT_PAGES; page++)
			sum += hash(2000 + file, page, file_versions[file][page]);
	return sum;
}

void part_give(int part)
{
	reg_sum -= part_sum(part);
	ours[part] = false;
}

void part_take(int part)
{
	reg_sum += part_sum(part);
	ours[part] = true;
}

/* In a forked child: this region may have been in the middle of a change; it is not ours. */
void disown_region(int slot)
{
	struct region nothing = { 0 };
	put_region(slot, &nothing);
	for (int copy = 0; copy < 2; copy++)
		madvise(entries[copy][slot], SLOT_BYTES, MADV_DONTNEED);
	used[slot] = 0;
}

void ledger_adopt(void)
{
	u64 anonymous = 0; /* other threads were at what is disowned now: count anew */
	for (int slot = 0; slot < SLOTS; slot++)
		anonymous += region_at(slot)->kind == R_ANON ? region_at(slot)->pages : 0;
	atomic_store(&anon_pages, anonymous);
	memset(ours, false, sizeof ours);
	ours[role] = true;
	reg_sum = ledger_sum();
}
