/* SPDX-License-Identifier: MIT
 *
 * What files contain. In: ranges that are written, cut off, moved or copied. Out: the bytes.
 *
 * A file's content is a list of blocks, each of which says which step wrote it, or what parts of it; all others are
 * zeros. There are two such lists for each file: while one is what there is, the other one becomes what there will be.
 */
#include "files.h"

#include <string.h>

/* ---- what bytes are ---- */

static u64 unmix64(u64 x)
{
	x ^= x >> 31 ^ x >> 62;
	x *= 0x319642b2d24d8ec3u;
	x ^= x >> 27 ^ x >> 54;
	x *= 0x96de1b173f119089u;
	return x ^ x >> 30 ^ x >> 60;
}

u64 key_of(u64 version, u64 block)
{
	return version << 24 | (block & 0xffffff);
}

u64 word_of(u64 key, u64 index)
{
	return mix64(mix64(key ^ model->seed) + (index + 1) * 0x9e3779b97f4a7c15u);
}

/* Of which key is a word that was found? Only those make sense that are of a version that there was. */
u64 key_in(u64 word, u64 index)
{
	return unmix64(unmix64(word) - (index + 1) * 0x9e3779b97f4a7c15u) ^ model->seed;
}

/* Bytes of a key's pattern, from one place in its page on. */
void pattern(u64 key, u64 from, size_t bytes, void *out)
{
	char *to = out;
	if (key == 0) {
		memset(out, 0, bytes);
		return;
	}
	while (bytes > 0) {
		u64 word = word_of(key, from / 8), part = smaller(8 - from % 8, bytes);
		memcpy(to, (char *)&word + from % 8, part);
		to += part;
		from += part;
		bytes -= part;
	}
}

const struct block *blocks_of(const struct model *m, u32 id, const struct node *n)
{
	return m->content[id][n->which];
}

/* The first block with at least this index. */
static u32 place_of(const struct block *blocks, u32 count, u64 index)
{
	u32 low = 0, high = count;
	while (low < high) {
		u32 middle = (low + high) / 2;
		if (blocks[middle].index < index)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static void render_block(const struct block *b, u64 from, u64 to, char *out)
{
	pattern(b->base, from, to - from, out);
	for (int i = 0; i < PATCHES; i++) {
		u64 first = b->from[i] > from ? b->from[i] : from, last = smaller(b->to[i], to);
		if (first < last)
			pattern(b->patch[i], first, last - first, out + (first - from));
	}
}

/* Bytes of a content. */
void render(const struct block *blocks, u32 count, u64 offset, u64 bytes, void *out)
{
	u64 end = offset + bytes;
	memset(out, 0, bytes);
	for (u32 at = place_of(blocks, count, offset / PAGE); at < count && blocks[at].index * PAGE < end; at++) {
		u64 start = blocks[at].index * PAGE, from = start < offset ? offset - start : 0;
		render_block(&blocks[at], from, smaller(PAGE, end - start), (char *)out + (start + from - offset));
	}
}

/* ---- contents that change: the one that is not in use becomes that of afterwards ---- */

/* Begin with what there is. */
void start_content(struct worker *w, u32 id)
{
	struct node *after = change_node(w, id, 0);
	const struct node *now = &model->node[id];
	after->which = !now->which;
	after->blocks = now->blocks;
	after->size = now->size;
	memcpy(model->content[id][after->which], model->content[id][now->which], now->blocks * sizeof(struct block));
}

static void drop_patch(struct block *b, int which)
{
	for (int i = which; i < PATCHES - 1; i++) {
		b->patch[i] = b->patch[i + 1];
		b->from[i] = b->from[i + 1];
		b->to[i] = b->to[i + 1];
	}
	b->from[PATCHES - 1] = b->to[PATCHES - 1] = 0;
}

static bool patch_block(struct block *b, u64 from, u64 to, u64 key)
{
	if (from == 0 && to == PAGE) {
		*b = (struct block){ .index = b->index, .base = key };
		return true;
	}
	for (int i = PATCHES - 1; i >= 0; i--)
		if (b->to[i] > b->from[i] && b->from[i] >= from && b->to[i] <= to)
			drop_patch(b, i);
	while (b->base == 0 && b->to[0] > b->from[0] && b->patch[0] == 0)
		drop_patch(b, 0);
	for (int i = 0; i < PATCHES; i++)
		if (b->to[i] == b->from[i]) {
			b->patch[i] = key;
			b->from[i] = (u16)from;
			b->to[i] = (u16)to;
			return true;
		}
	return false;
}

static bool is_zeros(const struct block *b)
{
	u64 any = b->base;
	for (int i = 0; i < PATCHES; i++)
		any |= b->to[i] > b->from[i] ? b->patch[i] : 0;
	return any == 0;
}

/* Write a range (version 0: zeros) into the content of afterwards; false: it has too many parts already. */
bool put_range(struct worker *w, u32 id, u64 offset, u64 bytes, u64 version)
{
	struct node *after = change_node(w, id, 0);
	struct block *blocks = model->content[id][after->which];
	u64 end = offset + bytes;
	u32 at = place_of(blocks, after->blocks, offset / PAGE);
	for (u64 index = offset / PAGE; index * PAGE < end; index++) {
		u64 start = index * PAGE, from = start < offset ? offset - start : 0, to = smaller(PAGE, end - start);
		if (version == 0) { /* only what is there can become zeros */
			if (at == after->blocks || blocks[at].index * PAGE >= end)
				return true;
			if (blocks[at].index > index) {
				index = blocks[at].index - 1;
				continue;
			}
		} else if (at == after->blocks || blocks[at].index != index) {
			if (after->blocks == BLOCKS)
				return false;
			memmove(&blocks[at + 1], &blocks[at], (after->blocks - at) * sizeof *blocks);
			blocks[at] = (struct block){ .index = index };
			after->blocks++;
		}
		if (!patch_block(&blocks[at], from, to, version ? key_of(version, index) : 0))
			return false;
		if (is_zeros(&blocks[at])) {
			memmove(&blocks[at], &blocks[at + 1], (after->blocks - at - 1) * sizeof *blocks);
			after->blocks--;
		} else {
			at++;
		}
	}
	return true;
}

/* Take whole blocks away, so that those behind them move up, or make room for new ones. */
bool shift_blocks(struct worker *w, u32 id, u64 from, u64 count, bool away)
{
	struct node *after = change_node(w, id, 0);
	struct block *blocks = model->content[id][after->which];
	if (away && !put_range(w, id, from * PAGE, count * PAGE, 0))
		return false;
	for (u32 at = place_of(blocks, after->blocks, from); at < after->blocks; at++)
		blocks[at].index += away ? -count : count;
	return true;
}

/* Whole blocks of another file; there is room for them. */
void copy_blocks(struct worker *w, u32 id, u32 source, u64 to, u64 from, u64 count)
{
	struct node *after = change_node(w, id, 0);
	const struct node *other = &model->node[source];
	const struct block *theirs = blocks_of(model, source, other);
	struct block *ours = model->content[id][after->which];
	put_range(w, id, to * PAGE, count * PAGE, 0);
	for (u32 at = place_of(theirs, other->blocks, from); at < other->blocks && theirs[at].index < from + count;
	     at++) {
		u64 index = theirs[at].index - from + to;
		u32 place = place_of(ours, after->blocks, index);
		memmove(&ours[place + 1], &ours[place], (after->blocks - place) * sizeof *ours);
		ours[place] = theirs[at];
		ours[place].index = index;
		after->blocks++;
	}
}
