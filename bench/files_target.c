/* SPDX-License-Identifier: MIT
 *
 * The process whose files bench.files has captured: it makes them, and changes some when told to.
 *
 * In: what to make where, below at `main`, and the first words of the board of `freeze_target.c`, whose address
 * it prints; the benchmark reads and writes that through /proc/PID/mem. When `asked` grows, it does what `command`
 * says to `pages` things, and then sets `done`. All content is random, so that nobody's compression matters.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define BLOCK (256 * PAGE)
#define FILES_PER_DIRECTORY 1000ul

enum command { CHANGE = 0, PRETEND = 1 }; /* the latter touches as much of its own memory, and no file */

static struct {
	volatile uint64_t ready; /* 1 once the files are made */
	volatile uint64_t asked, done;
	volatile uint64_t command;
	volatile uint64_t pages; /* how many are changed */
	volatile uint64_t result_ns;
} *board;

static uint64_t random_state = 88172645463325252u;
static int pretends;

static uint64_t next(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static uint64_t block[BLOCK / 8];

static void fill(uint64_t size)
{
	for (uint64_t word = 0; word < size / 8; word++)
		block[word] = next();
}

static void need(int right)
{
	if (right)
		return;
	perror("files_target");
	exit(1);
}

static void put(int file, uint64_t size, uint64_t at)
{
	need(pretends || pwrite(file, block, size, (off_t)at) == (ssize_t)size);
}

static int open_small(const char *directory, uint64_t number, int flags)
{
	char path[512];
	snprintf(path, sizeof(path), "%s/%03lu/%06lu", directory, number / FILES_PER_DIRECTORY, number);
	const int file = open(path, flags | O_CLOEXEC, 0644);
	need(file >= 0);
	return file;
}

static void write_small(const char *directory, uint64_t number, int flags)
{
	const int file = pretends ? -1 : open_small(directory, number, flags);
	fill(PAGE);
	put(file, PAGE, 0);
	need(pretends || close(file) == 0);
}

static void make_small(const char *directory, uint64_t files)
{
	for (uint64_t number = 0; number < files; number++) {
		if (number % FILES_PER_DIRECTORY == 0) {
			char path[512];
			snprintf(path, sizeof(path), "%s/%03lu", directory, number / FILES_PER_DIRECTORY);
			need(mkdir(path, 0755) == 0);
		}
		write_small(directory, number, O_WRONLY | O_CREAT | O_EXCL);
	}
}

static int make_large(const char *directory, const char *name, uint64_t mib)
{
	char path[512];
	snprintf(path, sizeof(path), "%s/%s", directory, name);
	const int file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	need(file >= 0);
	for (uint64_t number = 0; number < mib * (1ul << 20) / BLOCK; number++) {
		fill(BLOCK);
		put(file, BLOCK, number * BLOCK);
	}
	return file;
}

/* Numbers below `of`, each once, in random order: what is changed is scattered, and nothing is changed twice. */
static uint64_t *in_disorder(uint64_t of)
{
	uint64_t *numbers = malloc((of + 1) * sizeof(*numbers));
	need(numbers != NULL);
	for (uint64_t n = 0; n < of; n++)
		numbers[n] = n;
	return numbers;
}

static uint64_t draw(uint64_t *numbers, uint64_t drawn, uint64_t of)
{
	const uint64_t other = drawn + next() % (of - drawn), number = numbers[other];
	numbers[other] = numbers[drawn];
	numbers[drawn] = number;
	return number;
}

/* DIRECTORY `small` FILES, or `large` MIB, or `log` MIB: what is there, and what is changed: so many files,
 * written over in place; so many blocks of one file; so many KiB that are appended to one. */
int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	const char *directory = argv[1], *kind = argv[2];
	const uint64_t size = strtoul(argv[3], NULL, 10), of = *kind == 's' ? size : size * (1ul << 20) / PAGE;
	int file = -1;
	uint64_t end = size << 20;

	board = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (board == MAP_FAILED || !size)
		return 1;
	memset((void *)board, 0, sizeof(*board));
	printf("board %p\n", (void *)board);
	fflush(stdout);
	if (*kind == 's')
		make_small(directory, size);
	else
		file = make_large(directory, kind, size);
	uint64_t *numbers = *kind == 'l' && kind[1] == 'o' ? NULL : in_disorder(of);
	board->ready = 1;
	for (;;) {
		const struct timespec pause = { 0, 200000 };
		nanosleep(&pause, NULL);
		if (board->asked == board->done)
			continue;
		pretends = board->command == PRETEND;
		for (uint64_t n = 0; n < board->pages; n++) {
			if (*kind == 's') {
				write_small(directory, draw(numbers, n, of), O_WRONLY);
			} else if (numbers) {
				fill(PAGE);
				put(file, PAGE, draw(numbers, n, of) * PAGE);
			} else {
				fill(1024);
				put(file, 1024, end);
				end += pretends ? 0 : 1024;
			}
		}
		board->done = board->asked;
	}
}
