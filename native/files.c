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
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
#define PAGE 4096u
#define HANDLE_BYTES 128 /* MAX_HANDLE_SZ */

/* Keep in step with `LOOK` of primary/file_look.py. */
enum {
	LOOK_READ = 1, /* a small regular file: all is here */
	LOOK_GONE = 2, /* there is no such entry */
	LOOK_LEFT = 3, /* to be looked at by other means */
};

struct look {
	int32_t directory; /* in: open */
	uint32_t name;	   /* in: where it begins, in `names` */
	uint32_t outcome;
	uint32_t handle_bytes; /* with the head of `struct file_handle`; 0: none was wanted */
	uint64_t content;      /* its first page in `buffer` */
	uint64_t dev, ino, nlink, size, rdev;
	int64_t mtime_ns, ctime_ns;
	uint32_t mode, uid, gid, unused;
	uint8_t handle[8 + HANDLE_BYTES];
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

/* Look at `count` entries. The content of those that are read goes into `buffer`, which has room for so many pages, one
 * after the other, each from a page on and filled up with zeros. Files of more than `most` bytes are left. Returns how
 * many pages were used. */
EXPORTED uint64_t outlive_files_look(struct look *looks, uint64_t count, const char *names, uint8_t *buffer,
				     uint64_t room, uint64_t most, int handles)
{
	uint64_t used = 0;

	for (uint64_t at = 0; at < count; at++) {
		struct look *const look = &looks[at];
		const char *const name = names + look->name;
		const uint64_t left = (room - used) * PAGE;
		struct stat status;

		look->outcome = LOOK_LEFT;
		if (fstatat(look->directory, name, &status, AT_SYMLINK_NOFOLLOW)) {
			if (errno == ENOENT)
				look->outcome = LOOK_GONE;
			continue;
		}
		if (!S_ISREG(status.st_mode)) /* to open a FIFO or a device would be noticed */
			continue;
		const int fd = openat(look->directory, name,
				      O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOATIME);
		if (fd < 0)
			continue;
		if (!look_at(fd, look, buffer + used * PAGE, most < left ? most : left, handles)) {
			look->outcome = LOOK_READ;
			look->content = used;
			used += (look->size + PAGE - 1) / PAGE;
		}
		close(fd);
	}
	return used;
}
