/* SPDX-License-Identifier: MIT
 *
 * The file oracle: a workload that changes the files below one directory in every way that could fool who replicates
 * them, and can tell at any time whether all of them are what they must be. Freeze it at any instant, take its memory
 * and its files, bring both back anywhere, and ask it: `check` is the verdict. What it hunts: a file that is older or
 * newer than the memory beside it, a name or an attribute that was lost, a link that became a copy.
 *
 *   files --directory DIR --seed N [--port N] [--bind ADDRESS] [--status FILE] [--rate STEPS_PER_S] [--steps N]
 *         [--most-files N] [--most-mib N] [--sparse-mib N] [--only PATHS] [--without PATHS]
 *   files --judge MODEL --directory DIR [--dead]
 *
 * The directory must be empty; it works nowhere else. In: lines on a TCP port. `check`, `counters`, `pause`, `resume`,
 * `stop`. Out: one line of JSON for each. `--status` names a file (not below DIR) that gets the port, our PID, and the
 * descriptor of the model. `--steps`: pause after so many.
 *
 * Three processes change files, the first one with two threads; a fourth one, their parent, has the port and changes
 * nothing. All that they expect is the model (files.h), memory that they share, and there is no other state.
 *
 * How a freeze is judged, whenever it comes. Before a worker does something to the files it writes down what it will
 * change, and how that will be (`struct intent`). So at any instant a worker is in one of three states:
 *   I_NONE   it is at nothing: the files are as the model says;
 *   I_BEGUN  the call may have been made or not: all that the intent names is as the model says, or all of it as the
 *            intent says. Stores through a mapping and copies by the kernel are `torn`: as the intent says up to some
 *            byte, and from there on as the model says. What nobody can foretell (the time of a write) is not judged for
 *            those files, and then read back.
 *   I_DONE   the call was made, and the model is being brought up to date, so that it may be half of the one and half
 *            of the other: the files are as the intent says, and the rest is as the model says.
 * Nothing that one worker is at concerns what another one is at, because all of it is locked; so each is judged by
 * itself, and nothing else is excused. Freezers stop a task outside of calls or where it sleeps in one that can be
 * interrupted; so a write, rename or truncation is whole or was not made. What fallocate(2) and copy_file_range(2) give
 * up because of a signal is done again.
 *
 * Two ways to be asked:
 * - `check`: all stop after their present step. Then nothing is under way, the names are compared by the parent, and
 *   each process looks at what only it has: descriptors with their offsets and flags, mappings, files without a name.
 *   The locks are asked for by the parent, whom they would keep out.
 * - `--judge`, from outside: of processes that are stopped, frozen, or only exist as an image (`--dead`: locks are not
 *   looked at), with MODEL, a file that has the bytes of the model (/proc/PID/fd/N is one). A line on standard input
 *   asks for each verdict.
 *
 * A restored process must not change what it was restored with before someone has looked. Each worker asks before each
 * step whether it has been restored (the inode numbers of two pipes change), and then stays where it is until a check
 * was good. So between the image and the check only the calls that were under way are finished.
 *
 * What CRIU itself changes is not held against anyone: it puts files that have no name into their last directory for an
 * instant, so the mtime of such directories is not judged until they change again; an unnamed file that it has brought
 * back can get no name any more (`orphaned_tmpfiles`); of files without a name the mtime and the attributes are lost.
 * What it cannot bring back is not done: a file of more than 1 MiB, or whose name has more than 235 bytes or so, that is
 * open when it loses its last name; a POSIX lock on a file that the same process has mapped.
 *
 * Not covered: those; POSIX and OFD locks that wait or overlap, leases; FIFOs and sockets that are open; descriptors of
 * directories; names that are removed in a directory that is removed too while they are open; quotas, project ids and
 * inode flags; atime, ctime and birth time; the order of readdir(3); how much of a file is allocated, and where its
 * holes are; several file systems; the mtime of a file that was last written through a mapping without a descriptor.
 *
 * Ends with 0 when stopped, 2 for wrong options, 99 when a signal tells of corruption before a check does.
 */
#include "files.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SPARE_NODES = WORKERS * HANDLES + 16 /* for files without a name, and those being made */ };

bool path_off[PATH_COUNT];
static struct {
	const char *directory, *status, *bind, *judge;
	u64 seed, steps, most_files, most_mib, sparse_mib;
	double rate;
	int port;
	bool dead;
} options = { .seed = 1, .most_files = 300, .most_mib = 32, .sparse_mib = 8192, .rate = 4000, .bind = "0.0.0.0" };

void refuse(const char *what)
{
	dprintf(2, "files: %s\n", what);
	_exit(2);
}

/* ---- options ---- */

static void for_paths(char *list, bool off)
{
	for (char *name = strtok(list, ","); name != NULL; name = strtok(NULL, ",")) {
		u32 path = 0;
		while (path < P_IDLE && strcmp(path_names[path], name) != 0)
			path++;
		if (path == P_IDLE)
			refuse("no such path; `counters` names them all");
		path_off[path] = off;
	}
}

static void read_options(int count, char **words)
{
	enum { DIRECTORY, SEED, PORT, BIND, STATUS, RATE, STEPS, FILES, MIB, SPARSE, ONLY, WITHOUT, JUDGE, DEAD };
	static const struct option known[] = {
		{ "directory", 1, 0, DIRECTORY }, { "seed", 1, 0, SEED },	 { "port", 1, 0, PORT },
		{ "bind", 1, 0, BIND },		  { "status", 1, 0, STATUS },	 { "rate", 1, 0, RATE },
		{ "steps", 1, 0, STEPS },	  { "most-files", 1, 0, FILES }, { "most-mib", 1, 0, MIB },
		{ "sparse-mib", 1, 0, SPARSE },	  { "only", 1, 0, ONLY },	 { "without", 1, 0, WITHOUT },
		{ "judge", 1, 0, JUDGE },	  { "dead", 0, 0, DEAD },	 { 0 }
	};
	for (int got; (got = getopt_long(count, words, "", known, NULL)) != -1;)
		switch (got) {
		case DIRECTORY:
			options.directory = optarg;
			break;
		case SEED:
			options.seed = strtoull(optarg, NULL, 0);
			break;
		case PORT:
			options.port = atoi(optarg);
			break;
		case BIND:
			options.bind = optarg;
			break;
		case STATUS:
			options.status = optarg;
			break;
		case RATE:
			options.rate = atof(optarg);
			break;
		case STEPS:
			options.steps = strtoull(optarg, NULL, 0);
			break;
		case FILES:
			options.most_files = strtoull(optarg, NULL, 0);
			break;
		case MIB:
			options.most_mib = strtoull(optarg, NULL, 0);
			break;
		case SPARSE:
			options.sparse_mib = strtoull(optarg, NULL, 0);
			break;
		case ONLY:
			memset(path_off, true, sizeof path_off);
			for_paths(optarg, false);
			break;
		case WITHOUT:
			for_paths(optarg, true);
			break;
		case JUDGE:
			options.judge = optarg;
			break;
		case DEAD:
			options.dead = true;
			break;
		default:
			refuse("see the head of files.c for the options");
		}
	if (options.directory == NULL || optind != count)
		refuse("--directory names where it works; see the head of files.c for the options");
	if (options.most_files < 20 || options.most_files > NODES - SPARE_NODES || options.most_mib < 1 ||
	    options.rate <= 0 || options.sparse_mib < 1 || options.sparse_mib > 65536)
		refuse("20 to 448 files, at least 1 MiB, sparse ones of 1 to 65536 MiB, a positive rate");
}

/* ---- main ---- */

/* Returns its descriptor: all processes keep it, for whoever looks from outside. */
static int make_model(void)
{
	int model_fd = memfd_create("files-model", 0);
	if (model_fd < 0 || ftruncate(model_fd, sizeof *model))
		refuse("no memfd");
	model = mmap(NULL, sizeof *model, PROT_READ | PROT_WRITE, MAP_SHARED, model_fd, 0);
	if (model == MAP_FAILED)
		refuse("cannot map the model");
	model->magic = MODEL_MAGIC;
	model->bytes = sizeof *model;
	model->seed = mix64(options.seed);
	model->most_blocks = options.most_mib << 20 >> 12;
	model->most_nodes = options.most_files;
	model->slots = options.most_files + SPARE_NODES;
	model->sparse_blocks = options.sparse_mib << 20 >> 12;
	atomic_store(&model->last_step, options.steps);
	for (u32 i = 0; i < WORKERS; i++) {
		struct worker *w = &model->worker[i];
		w->number = i;
		w->process = i < 2 ? 0 : i - 1;
		w->rng = mix64(options.seed + 1000003 * i);
		w->period_ns = (u64)(WORKERS * 1e9 / options.rate);
	}
	for (int i = 0; i < 2; i++) {
		int ends[2];
		if (pipe(ends))
			refuse("no pipe for the canary");
		close(ends[1]);
		model->canary_fd[i] = ends[0];
	}
	atomic_store(&model->canary, canary());
	return model_fd;
}

/* The directory itself is a node like others, but that it has no name. */
static void take_root(void)
{
	struct node *n = change_node(&model->worker[0], ROOT, W_MTIME | W_MODE | W_OWNER | W_ACL | W_DEFAULT);
	n->type = T_DIR;
	read_back(&model->worker[0], ROOT, -1, ".");
	settle(&model->worker[0]);
}

static bool keeps_nanoseconds(void)
{
	struct stat status;
	const struct timespec times[2] = { { .tv_nsec = UTIME_OMIT },
					   { .tv_sec = 1000000000, .tv_nsec = 123456789 } };
	return utimensat(AT_FDCWD, ".", times, 0) == 0 && stat(".", &status) == 0 &&
	       status.st_mtim.tv_nsec == 123456789;
}

static void __attribute__((noreturn)) run(void)
{
	static struct verdict verdict;
	umask(0);
	int model_fd = make_model();
	if (!keeps_nanoseconds())
		refuse("the file system keeps no nanoseconds");
	take_root();
	judge(model, true, true, &verdict);
	if (verdict.count) {
		dprintf(2, "files: %s\n", verdict.error[0]);
		refuse("the directory must be empty");
	}
	if (!open_shared(&model->worker[0]))
		refuse("cannot make the first two files");
	int port = listen_on_port(options.bind, options.port);
	catch_signals();
	start_workers();
	if (options.status)
		write_status(options.status, port, model_fd);
	serve();
}

int main(int count, char **words)
{
	read_options(count, words);
	if (options.judge) {
		int fd = open(options.judge, O_RDONLY | O_CLOEXEC);
		model = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *model, PROT_READ, MAP_SHARED, fd, 0);
		if (model == MAP_FAILED)
			refuse("the model cannot be read");
	}
	if (chdir(options.directory))
		refuse("that directory cannot be entered");
	if (!options.judge)
		run();
	if (model->magic != MODEL_MAGIC || model->bytes != sizeof *model)
		refuse("that is no model of this version");
	judge_on_demand(!options.dead);
}
