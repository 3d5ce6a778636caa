/* SPDX-License-Identifier: MIT
 *
 * Copies pages of other processes: many runs by one call (process_vm_readv), and by /proc/PID/mem what may not be read.
 */
#define _GNU_SOURCE
#include "copy.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#define PIECES 1024u /* iovecs of one call: IOV_MAX */

/* Copy one run by the file that needs no read permission. */
int read_unreadable(int pid, uint64_t start, uint64_t bytes, uint8_t *into)
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
int read_runs(int pid, const struct run *runs, uint64_t count, uint32_t flag, uint8_t *into)
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

/* Running: copy pages one run after the other; `good[i]` tells of each page whether it could be read. Pages that
 * vanish meanwhile are no failure. Returns how many were read, or -errno if the process is gone. */
EXPORTED int64_t outlive_read(int pid, const struct run *runs, uint64_t count, uint8_t *into, uint8_t *good)
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
