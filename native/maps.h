/* SPDX-License-Identifier: MIT
 *
 * One reading of /proc/PID/maps for both sides of a fast capture, so that they can never disagree.
 *
 * In: the text of a maps file. Out: the mappings in order, each with what matters here. The shim hides the
 * pages of *owned* mappings from criu; the page reader captures exactly those. A mapping that one side called
 * owned and the other did not would be lost, therefore the rule stands here once.
 *
 * Owned: every private mapping but those that the kernel makes and criu treats in its own way ([vdso], [vvar],
 * [vvar_vclock], [vsyscall], [vectors], [uprobes]), and huge pages (/anon_hugepage), which criu restores only
 * from the newest image. Shared memory stays with criu.
 */
#ifndef OUTLIVE_MAPS_H
#define OUTLIVE_MAPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
	VMA_OWNED = 1,
	VMA_FILE = 2,     /* it maps a file: a page that is only SWAPPED there is a marker, not content */
	VMA_READABLE = 4, /* others cannot be read with process_vm_readv */
	VMA_EXECUTABLE = 8,
};

struct vma {
	uint64_t start, end;
	uint32_t flags;
	uint32_t early; /* the page reader's: all that is in it is told already */
};

static inline const char *maps_hex(const char *at, const char *end, uint64_t *value)
{
	*value = 0;
	for (; at < end; at++) {
		unsigned digit;
		if (*at >= '0' && *at <= '9')
			digit = (unsigned)(*at - '0');
		else if (*at >= 'a' && *at <= 'f')
			digit = (unsigned)(*at - 'a') + 10;
		else
			break;
		*value = *value << 4 | digit;
	}
	return at;
}

static inline bool maps_names(const char *name, size_t size, const char *wanted)
{
	return size == strlen(wanted) && !memcmp(name, wanted, size);
}

/* Read one line, "start-end rwxp offset major:minor inode   name"; false if it is not such a line. */
static inline bool maps_line(const char *line, const char *end, struct vma *vma)
{
	const char *at = maps_hex(line, end, &vma->start);

	if (at == line || at == end || *at++ != '-')
		return false;
	const char *second = at;
	at = maps_hex(at, end, &vma->end);
	if (at == second || end - at < 6 || *at++ != ' ' || vma->end <= vma->start)
		return false;
	const char *permissions = at;
	bool named = false;
	bool inode = false;
	at += 4;
	for (int field = 0; field < 3; field++) { /* offset, device, inode */
		if (at == end || *at++ != ' ')
			return false;
		inode = at < end && *at != '0';
		while (at < end && *at != ' ')
			at++;
	}
	while (at < end && *at == ' ')
		at++;
	const size_t size = (size_t)(end - at);
	if (size)
		named = maps_names(at, size, "[vdso]") || maps_names(at, size, "[vvar]") ||
			maps_names(at, size, "[vvar_vclock]") || maps_names(at, size, "[vsyscall]") ||
			maps_names(at, size, "[vectors]") || maps_names(at, size, "[uprobes]") ||
			(size >= 14 && !memcmp(at, "/anon_hugepage", 14));
	if (permissions[3] != 'p' && permissions[3] != 's')
		return false;
	vma->flags = (permissions[3] == 'p' && !named ? VMA_OWNED : 0) | (inode ? VMA_FILE : 0) |
		     (permissions[0] == 'r' ? VMA_READABLE : 0) | (permissions[2] == 'x' ? VMA_EXECUTABLE : 0);
	vma->early = 0;
	return true;
}

/* Parse a whole text into at most `room` mappings; -1 if it is no sound maps file, -2 if `room` is too small. */
static inline long maps_parse(const char *text, size_t size, struct vma *vmas, size_t room)
{
	const char *const end = text + size;
	size_t count = 0;

	while (text < end) {
		const char *stop = memchr(text, '\n', (size_t)(end - text));

		if (count == room)
			return -2;
		if (!stop || !maps_line(text, stop, &vmas[count]))
			return -1;
		if (count && vmas[count].start < vmas[count - 1].end)
			return -1;
		count++;
		text = stop + 1;
	}
	return (long)count;
}

#endif
