/* SPDX-License-Identifier: MIT
 *
 * The process that bench.freeze freezes: so much memory, so many pages written when told to, and a ticker that
 * notices by itself for how long it stood still.
 *
 * In: argv: MiB, pages to write at each command. It prints the address of `board`; the benchmark reads and
 * writes that through /proc/PID/mem. `asked` grows by one: write that many pages, scattered, then set `done`.
 * The ticker looks at the clock about every 100 us and notes every gap of more than `GAP_NS` in `gaps`.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define GAP_NS 1000000
#define GAPS 1024

static struct {
	volatile uint64_t asked, done, gap_count;
	volatile uint64_t gaps[GAPS][2]; /* monotonic ns at the end of the gap, its length */
} *board;

static uint64_t now_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void *tick(void *unused)
{
	(void)unused;
	for (uint64_t last = now_ns();;) {
		const struct timespec pause = { 0, 50000 };
		nanosleep(&pause, NULL);
		const uint64_t now = now_ns();
		if (now - last > GAP_NS) {
			board->gaps[board->gap_count % GAPS][0] = now;
			board->gaps[board->gap_count % GAPS][1] = now - last;
			board->gap_count++;
		}
		last = now;
	}
	return NULL;
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

int main(int argc, char **argv)
{
	const uint64_t pages = strtoul(argv[1], NULL, 10) * 256;
	const uint64_t dirty = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
	uint64_t random = 88172645463325252u;
	pthread_t ticker;

	board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *memory =
		mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (argc < 2 || board == MAP_FAILED || memory == MAP_FAILED)
		return 1;
	madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
	memset(board, 0, sizeof(*board));
	for (uint64_t page = 0; page < pages; page++)
		for (uint64_t word = 0; word < PAGE / 8; word += 8)
			memory[page * PAGE / 8 + word] = next(&random);
	if (pthread_create(&ticker, NULL, tick, NULL))
		return 1;
	printf("board %p\n", (void *)board);
	fflush(stdout);
	for (;;) {
		const struct timespec pause = { 0, 200000 };
		nanosleep(&pause, NULL);
		if (board->asked == board->done)
			continue;
		for (uint64_t page = 0; page < dirty; page++)
			memory[next(&random) % pages * PAGE / 8] = random;
		board->done = board->asked;
	}
}
