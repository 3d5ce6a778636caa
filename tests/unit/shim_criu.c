/* Stands in for criu in test_shim_channel.py: asks the kernel as it does, and speaks native/shim_protocol.h.
 *
 *   criu                                 print the layout of the shared memory as JSON
 *   criu answer DESCRIPTOR [PID FLAGS]   print the plans, and report
 *   criu dump PID                        print the smaps; to stderr, the ranges that criu would dump, and
 *                                        whether a child would inherit the shim
 *   criu own PID                         the same with a scan that criu never makes
 *   criu read PID                        the same by reading the pagemap, as criu does on older kernels
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "pagemap_scan.h"
#include "shim_protocol.h"

#define TELL(type, member) printf("\"%s.%s\": %zu, ", #type, #member, offsetof(struct type, member))
#define SIZE(type) printf("\"%s\": %zu, ", #type, sizeof(struct type))

static int layout(void)
{
	printf("{");
	SIZE(shim_plan), SIZE(shim_report), SIZE(shim_shared);
	TELL(shim_plan, pid), TELL(shim_plan, maps_offset), TELL(shim_plan, maps_bytes);
	TELL(shim_plan, smaps_offset), TELL(shim_plan, smaps_bytes);
	TELL(shim_report, pid), TELL(shim_report, flags), TELL(shim_report, scans);
	TELL(shim_shared, magic), TELL(shim_shared, bytes), TELL(shim_shared, plans);
	TELL(shim_shared, reports), TELL(shim_shared, loaded), TELL(shim_shared, plan), TELL(shim_shared, report);
	printf("\"magic\": %llu, \"room\": %d, ", SHIM_MAGIC, SHIM_ROOM);
	printf("\"flags\": [%d, %d, %d, %d]}\n",
	       SHIM_SMAPS_SERVED, SHIM_SMAPS_REAL, SHIM_UNKNOWN_SCAN, SHIM_FAILED);
	return 0;
}

/* Print the plans' texts, and fill in reports: pairs of PID and flags. */
static int answer(int fd, int count, char **words)
{
	struct shim_shared *shared =
		mmap(NULL, (size_t)lseek(fd, 0, SEEK_END), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shared == MAP_FAILED || shared->magic != SHIM_MAGIC)
		return 1;
	for (uint32_t at = 0; at < shared->plans; at++) {
		const struct shim_plan *plan = &shared->plan[at];
		const char *maps = (char *)shared + plan->maps_offset, *smaps = (char *)shared + plan->smaps_offset;
		const int maps_bytes = (int)plan->maps_bytes, smaps_bytes = (int)plan->smaps_bytes;
		printf("%u <%.*s> <%.*s>\n", plan->pid, maps_bytes, maps, smaps_bytes, smaps);
	}
	shared->loaded = 1;
	for (int at = 0; at + 1 < count; at += 2) {
		shared->report[shared->reports].pid = (uint32_t)atoi(words[at]);
		shared->report[shared->reports++].flags = (uint32_t)atoi(words[at + 1]);
	}
	return 0;
}

/* Print the present pages of each private mapping that are not a file's, as criu finds them without the ioctl. */
static void tell_by_reading(const char *pid, int pagemap)
{
	char line[4096];
	snprintf(line, sizeof(line), "/proc/%s/maps", pid);
	FILE *maps = fopen(line, "r");
	for (unsigned long start, end; fgets(line, sizeof(line), maps);) {
		char permissions[5];
		if (sscanf(line, "%lx-%lx %4s", &start, &end, permissions) != 3 || permissions[3] != 'p' || start >> 63)
			continue;
		const size_t size = (end - start) / 4096 * sizeof(uint64_t);
		uint64_t *entries = malloc(size);
		if (pread(pagemap, entries, size, (off_t)(start / 4096 * sizeof(uint64_t))) != (ssize_t)size)
			fprintf(stderr, "failed");
		for (; start < end; start += 4096)
			if (*entries++ >> 61 == 4) /* present, neither swapped nor a file's */
				fprintf(stderr, "%lx ", start);
	}
	fprintf(stderr, "\n\n");
}

/* As criu does: the process's smaps, printed, then its pages, counted; `own` asks for what criu never does. */
static int dump(const char *pid, bool own, bool by_reading)
{
	char text[4096];
	snprintf(text, sizeof(text), "/proc/%s", pid);
	const int process = open(text, O_RDONLY | O_DIRECTORY);
	const int smaps = openat(process, "smaps", O_RDONLY);
	for (ssize_t got; (got = read(smaps, text, sizeof(text))) > 0;)
		fwrite(text, 1, (size_t)got, stdout);
	close(smaps);
	const int pagemap = openat(process, "pagemap", O_RDONLY);
	if (by_reading) {
		tell_by_reading(pid, pagemap);
		return 0;
	}
	struct page_region regions[1000];
	struct pm_scan_arg ask = {
		.size = sizeof(ask),
		.end = 0x7ffffffff000,
		.vec = (uint64_t)(uintptr_t)regions,
		.vec_len = 1000,
		.category_inverted = own ? 0 : PAGE_IS_PFNZERO | PAGE_IS_FILE,
		.category_mask = own ? PAGE_IS_PRESENT : PAGE_IS_PFNZERO | PAGE_IS_FILE,
		.category_anyof_mask = own ? 0 : PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
	};
	const long found = ioctl(pagemap, PAGEMAP_SCAN, &ask);
	for (long at = 0; at < found; at++)
		fprintf(stderr, "%lx-%lx ", (long)regions[at].start, (long)regions[at].end);
	if (found < 0 || ask.walk_end != ask.end)
		fprintf(stderr, "failed");
	fprintf(stderr, "\n");
	char inherited[16] = "";
	if (getenv("LD_PRELOAD") || getenv("OUTLIVE_SHIM_FD"))
		strcpy(inherited, "inherited");
	fprintf(stderr, "%s\n", inherited);
	return 0;
}

int main(int count, char **words)
{
	if (count == 1)
		return layout();
	if (!strcmp(words[1], "answer"))
		return answer(atoi(words[2]), count - 3, words + 3);
	return dump(words[2], !strcmp(words[1], "own"), !strcmp(words[1], "read"));
}
