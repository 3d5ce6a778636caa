/* SPDX-License-Identifier: MIT
 *
 * Looks at many small files at once: what each is, and what it holds. A library for primary/file_look.py, because within
 * a freeze Python takes ten times as long for it as the kernel.
 *
 * It reads, and changes nothing, no time stamp either. What is not an ordinary case it leaves to its caller: what is no
 * regular file, what has extended attributes, what is large.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
#define PAGE 4096u
#define HANDLE_BYTES 128 /* MAX_HANDLE_SZ */
#define MANY 64

/* Keep in step with `LOOK` of primary/file_look.py. */
enum {
	LOOK_READ = 1, /* a small regular file: all is here */
	LOOK_GONE = 2, /* there is no such entry */
	LOOK_LEFT = 3, /* to be looked at by other means */
};

struct look {
	int32_t directory; /* in: open; by handle: anything open on its file system */
	uint32_t name;	   /* in: where it begins, in `names` */
	uint32_t outcome;
	uint32_t handle_bytes; /* with the head of `struct file_handle`; 0: none was wanted */
	uint64_t content;      /* its first page in `buffer` */
	uint64_t dev, ino, nlink, size, rdev;
	int64_t mtime_ns, ctime_ns;
	uint32_t mode, uid, gid, unused;
	uint8_t handle[8 + HANDLE_BYTES]; /* in, if there are no names */
};

/* Keep in step with `DIRECTORY` of primary/file_look.py. */
struct directory {
	int32_t mount; /* in: anything open on its file system */
	int32_t fd;    /* out: -1 if it could not be opened */
	uint64_t dev, ino;
	int64_t mtime_ns;
	uint8_t handle[8 + HANDLE_BYTES]; /* in */
};

static int64_t nanoseconds(struct timespec time)
{
	return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int read_all(int fd, uint8_t *into, uint64_t size)
{
	for (uint64_t done = 0; done < size;) {
		const ssize_t got = pread(fd, into + done, size - done, (off_t)done);

		if (got < 0)
			return -1;
		if (!got) { /* it has become shorter: whoever does that is not frozen */
			memset(into + done, 0, size - done);
			return 0;
		}
		done += (uint64_t)got;
	}
	return 0;
}

static int take_handle(int fd, struct look *look)
{
	struct file_handle *const handle = (struct file_handle *)look->handle;
	int mount;

	handle->handle_bytes = HANDLE_BYTES;
	if (name_to_handle_at(fd, "", handle, &mount, AT_EMPTY_PATH))
		return -1;
	look->handle_bytes = 8 + handle->handle_bytes;
	return 0;
}

/* What is open: 0 if all of it is in `look` and `into` now. */
static int look_at(int fd, struct look *look, uint8_t *into, uint64_t most, int handles)
{
	struct stat status;

	if (fstat(fd, &status) || !S_ISREG(status.st_mode) || (uint64_t)status.st_size > most)
		return -1;
	if (flistxattr(fd, NULL, 0) > 0)
		return -1;
	if (handles && take_handle(fd, look))
		return -1;
	if (read_all(fd, into, (uint64_t)status.st_size))
		return -1;
	memset(into + status.st_size, 0, -(uint64_t)status.st_size % PAGE);
	look->dev = status.st_dev;
	look->ino = status.st_ino;
	look->nlink = status.st_nlink;
	look->size = (uint64_t)status.st_size;
	look->rdev = status.st_rdev;
	look->mtime_ns = nanoseconds(status.st_mtim);
	look->ctime_ns = nanoseconds(status.st_ctim);
	look->mode = status.st_mode;
	look->uid = status.st_uid;
	look->gid = status.st_gid;
	return 0;
}

/* Have two threads do two shares of something: one processor would wait for nothing. */
static void do_both(void *(*work)(void *), void *first, void *second)
{
	pthread_t thread;
	const int alone = pthread_create(&thread, NULL, work, second);

	work(first);
	if (alone)
		work(second);
	else
		pthread_join(thread, NULL);
}

struct directories {
	struct directory *each;
	uint64_t count;
};

static void *open_share(void *argument)
{
	const struct directories *const share = argument;

	for (uint64_t at = 0; at < share->count; at++) {
		struct directory *const directory = &share->each[at];
		struct stat status;

		directory->fd = open_by_handle_at(directory->mount, (struct file_handle *)directory->handle,
						  O_RDONLY | O_DIRECTORY | O_NOATIME | O_CLOEXEC);
		if (directory->fd < 0)
			continue;
		if (fstat(directory->fd, &status)) {
			close(directory->fd);
			directory->fd = -1;
			continue;
		}
		directory->dev = status.st_dev;
		directory->ino = status.st_ino;
		directory->mtime_ns = nanoseconds(status.st_mtim);
	}
	return NULL;
}

/* Open directories by their handles. */
EXPORTED void outlive_files_open(struct directory *directories, uint64_t count)
{
	struct directories first = {directories, count}, second = {directories, 0};

	if (count < MANY) {
		open_share(&first);
		return;
	}
	second.count = count / 2;
	first.count -= second.count;
	second.each += first.count;
	do_both(open_share, &first, &second);
}

/* Close those that were opened. */
EXPORTED void outlive_files_close(const struct directory *directories, uint64_t count)
{
	for (uint64_t at = 0; at < count; at++)
		if (directories[at].fd >= 0)
			close(directories[at].fd);
}

/* Some of the entries, and where their content goes: from page `first` of `buffer` on, up to `room` pages. */
struct share {
	struct look *looks;
	const char *names;
	uint8_t *buffer;
	uint64_t count, first, room, used, most;
	int handles;
};

static int open_entry(const struct look *look, const char *name)
{
	struct stat status;

	if (fstatat(look->directory, name, &status, AT_SYMLINK_NOFOLLOW))
		return -1;
	if (!S_ISREG(status.st_mode)) { /* to open a FIFO or a device would be noticed */
		errno = ENOTSUP;
		return -1;
	}
	return openat(look->directory, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOATIME);
}

static int open_handle(struct look *look)
{
	return open_by_handle_at(look->directory, (struct file_handle *)look->handle,
				 O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOATIME);
}

static void *look_at_share(void *argument)
{
	struct share *const share = argument;

	for (uint64_t at = 0; at < share->count; at++) {
		struct look *const look = &share->looks[at];
		const uint64_t first = share->first + share->used, left = (share->room - share->used) * PAGE;
		const int fd = share->names ? open_entry(look, share->names + look->name) : open_handle(look);

		look->outcome = LOOK_LEFT;
		if (fd < 0) {
			if (errno == ENOENT || errno == ESTALE)
				look->outcome = LOOK_GONE;
			continue;
		}
		if (!look_at(fd, look, share->buffer + first * PAGE, share->most < left ? share->most : left,
			     share->handles && share->names)) {
			look->outcome = LOOK_READ;
			look->content = first;
			share->used += (look->size + PAGE - 1) / PAGE;
		}
		close(fd);
	}
	return NULL;
}

/* Look at `count` entries; without `names`, at files by their handles, which must be of regular files. The content of those that are read goes into `buffer`, which has room for so many pages, each
 * from a page on and filled up with zeros. Files of more than `most` bytes are left. Returns behind which page of the
 * buffer nothing was used.
 *
 * If they are many, two threads share them, each with half of the room. */
EXPORTED uint64_t outlive_files_look(struct look *looks, uint64_t count, const char *names, uint8_t *buffer,
				     uint64_t room, uint64_t most, int handles)
{
	struct share first = {
		.looks = looks,
		.names = names,
		.buffer = buffer,
		.count = count,
		.room = room,
		.most = most,
		.handles = handles,
	};
	struct share second = first;

	if (count < MANY) {
		look_at_share(&first);
		return first.used;
	}
	second.count = count / 2;
	first.count -= second.count;
	second.looks += first.count;
	first.room = second.first = room / 2;
	second.room -= first.room;
	do_both(look_at_share, &first, &second);
	return second.used ? second.first + second.used : first.used;
}
