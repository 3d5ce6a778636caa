/* SPDX-License-Identifier: MIT
 *
 * The process that bench.freeze freezes and that bench.overhead lets run: so much memory, so many pages written
 * when told to or all the time, and a ticker that notices by itself for how long it stood still.
 *
 * In: options, below at `main`. It prints the address of `board`, which is the same in all its processes; the
 * benchmark reads and writes that through /proc/PID/mem. When `asked` grows, a process does what `command` says
 * and then sets `done`. The ticker, a thread of the first process, looks at the clock about every 100 us and
 * notes every gap of more than `GAP_NS` in `gaps`.
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
#define GAP_NS 500000
#define GAPS 1024
#define PROBE_PAGES 1024ul

enum command { WRITE_PAGES = 0, TOUCH_PROBE = 1 };

static struct {
	volatile uint64_t ready;     /* 1 once the memory is filled */
	volatile uint64_t asked, done;
	volatile uint64_t command;
	volatile uint64_t pages;     /* WRITE_PAGES: how many, scattered */
	volatile uint64_t result_ns; /* TOUCH_PROBE: for one write to each of PROBE_PAGES pages */
	volatile uint64_t progress;  /* with -r: pages written so far */
	volatile uint64_t gap_count;
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

static void *idle(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static uint64_t spin(uint64_t rounds, uint64_t state)
{
	while (rounds--)
		next(&state);
	return state;
}

/* How many rounds of `spin` fill so many ns of a CPU that nobody else uses: the fastest of some trials. */
static uint64_t rounds_for(uint64_t ns)
{
	const uint64_t trial = 1000000;
	uint64_t best = UINT64_MAX;
	volatile uint64_t sink = 1;

	for (int n = 0; n < 20; n++) {
		const uint64_t begun = now_ns();
		sink = spin(trial, sink);
		const uint64_t took = now_ns() - begun;
		best = took < best ? took : best;
	}
	return ns * trial / best;
}

static uint64_t *map_filled(uint64_t pages, int sharing)
{
	static uint64_t random = 88172645463325252u;
	uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		exit(1);
	madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
	random += (uint64_t)getpid();
	for (uint64_t page = 0; page < pages; page++)
		for (uint64_t word = 0; word < PAGE / 8; word += 8)
			memory[page * PAGE / 8 + word] = next(&random);
	return memory;
}

static void touch(uint64_t *probe)
{
	const uint64_t begun = now_ns();
	for (uint64_t page = 0; page < PROBE_PAGES; page++)
		*(volatile uint64_t *)(probe + page * PAGE / 8) = begun;
	board->result_ns = now_ns() - begun;
}

static void start(void *(*routine)(void *), const char *name)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, routine, NULL))
		exit(1);
	pthread_setname_np(thread, name);
}

/* -m MiB of private memory, -s MiB of shared memory, -p processes that the former is split among, -t threads of
 * each, besides the ticker, -r pages: write so many a second, as fast as a whole CPU would allow it (each page
 * comes with that much computation), for ever. */
int main(int argc, char **argv)
{
	uint64_t mib = 64, shared_mib = 0, processes = 1, threads = 1, rate = 0, random = 88172645463325253u;
	int first = 1;

	for (int option; (option = getopt(argc, argv, "m:s:p:t:r:")) != -1;) {
		const uint64_t value = optarg ? strtoul(optarg, NULL, 10) : 0;
		switch (option) {
		case 'm': mib = value; break;
		case 's': shared_mib = value; break;
		case 'p': processes = value; break;
		case 't': threads = value; break;
		case 'r': rate = value; break;
		default: return 2;
		}
	}
	board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (board == MAP_FAILED || !mib || !processes || !threads)
		return 1;
	memset(board, 0, sizeof(*board));
	printf("board %p\n", (void *)board);
	fflush(stdout);
	for (uint64_t n = 1; first && n < processes; n++) {
		const pid_t child = fork();
		if (child < 0)
			return 1;
		first = child != 0;
	}
	random += (uint64_t)getpid();

	const uint64_t pages = mib * 256 / processes;
	uint64_t *memory = map_filled(pages, MAP_PRIVATE);
	uint64_t *probe = first ? map_filled(PROBE_PAGES, MAP_PRIVATE) : NULL;
	if (first && shared_mib)
		map_filled(shared_mib * 256, MAP_SHARED);
	for (uint64_t n = 1; n < threads; n++)
		start(idle, "idle");
	if (first && !rate)
		start(tick, "ticker");
	const uint64_t rounds = rate ? rounds_for(1000000000u / rate) : 0;
	board->ready = 1;
	while (rate) {
		random = spin(rounds, random);
		memory[random % pages * PAGE / 8] = random;
		board->progress++;
	}
	for (;;) {
		const struct timespec pause = { 0, 200000 };
		nanosleep(&pause, NULL);
		if (board->asked == board->done)
			continue;
		if (board->command == TOUCH_PROBE && probe)
			touch(probe);
		else
			for (uint64_t n = 0; n < board->pages; n++)
				memory[next(&random) % pages * PAGE / 8] = random;
		board->done = board->asked;
	}
}
