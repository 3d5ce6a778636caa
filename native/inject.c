/* SPDX-License-Identifier: MIT
 *
 * outlive-inject: takes one userfaultfd out of a running process. See primary/injection.py for its caller.
 *
 * In: a PID in argv[1]; a unix socket (seqpacket or datagram) on descriptor 3. Out: one packet, `struct
 * answer`, with the descriptor beside it (SCM_RIGHTS) if that worked, and an exit code that is the answer's
 * status. It serves one request and ends. UFFDIO_API and what follows are the caller's.
 *
 * Why it exists: a userfaultfd belongs to the address space of whoever made the system call, so the target
 * must make it. One thread of it is stopped with ptrace, runs `userfaultfd` and `close` on borrowed
 * registers, and goes on where it was; in between, pidfd_getfd takes the descriptor. It is a process of its
 * own because whoever holds a task on borrowed registers must neither wait nor be killed for other reasons.
 *
 * Invariants, each kept by the function named:
 *  1. What the target's thread gets back is what was read from it, all of it, orig_rax included (only a
 *     restartable sequence starts again, as after any stop, see `leave_sequence`), and it gets it in a
 *     stop inside the kernel's get_signal(), where the thread also was when it was read (`leave`). Only
 *     there does the kernel itself still decide whether an interrupted system call starts again or ends
 *     with EINTR. (Whoever sets rip back by hand, as CRIU does, makes pause() sleep on although a
 *     handler ran.) A call that ends with EINTR at any stop, as epoll_wait and sigtimedwait do, ends so
 *     here too.
 *  2. No memory of the target is written but a *slot*: unused bytes behind the end of the vDSO's ELF file, up
 *     to the end of its last page. No stack is touched: goroutines have no room below their stack pointer.
 *  3. At no moment does the target depend on this program's living (x86_64). The borrowed registers point at
 *     code in the slot that needs no stack, changes no flags, and by itself closes the descriptor, puts the
 *     signal mask and the registers back and jumps to where the thread was. If we die, the kernel resumes the
 *     thread and it heals. Each write that could strand it is ordered for that: registers before the mask
 *     when borrowing, the mask before the registers when giving back.
 *  4. A slot that a thread may have entered is cleared only after that thread left it (`free_slot`). After a
 *     death it stays as it is for ever, for a signal handler may be about to return into it.
 *  5. No signal is lost or handled on borrowed registers: all are blocked meanwhile. SIGSTOP cannot be; it is
 *     let through, and the target is stopped after the detach. PTRACE_O_EXITKILL is never set.
 *
 * Where there is no slot (aarch64, whose jumps need a register; a vDSO without room; memory that may not be
 * written), it works the plain way: registers point at a system call instruction of the vDSO. If we die
 * then, the thread runs on behind that instruction. So that this means death and never wrong data, its stack
 * pointer is zero meanwhile and the next access or return faults.
 *
 * What is left behind: that page of the vDSO is the target's own from then on, 4 KiB more of memory. CRIU dumps
 * and restores it as before.
 *
 * What is not guaranteed:
 *  - A fork by *another* thread while the descriptor is open in the target (some 50 us) hands it to the child.
 *  - If we die between the two system calls that begin `userfaultfd` in a target with a seccomp filter,
 *    the filter is in force again and judges that call; it also judges the healing code's close and
 *    rt_sigprocmask.
 *  - Two of us must not work on one address space at the same time through different threads of it (one PID at
 *    a time is enough: a second tracer of the same thread is refused).
 *  - aarch64: the kernel sets pc back before the stop and forgets why, so an interrupted *relative* sleep
 *    starts over, and a handler that runs right after does not end pause(). Never run on such a machine.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#define PIDFD_THREAD_FLAG O_EXCL     /* since 6.9; says EINVAL before */
#define SUSPEND_SECCOMP (1 << 21)    /* PTRACE_O_SUSPEND_SECCOMP */
#define GET_RSEQ_CONFIGURATION 0x420f /* since 5.13 */
#define GET_SYSCALL_DISPATCH 0x4211  /* PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, since 6.4 */
#define SIGSET_BYTES 8               /* the kernel's sigset_t */
#define USER_MODE_ONLY 1             /* UFFD_USER_MODE_ONLY, since 5.11 */

#define ANSWER_FD 3
#define STOP_WITHIN_NS 200000000LL    /* for the first stop: until then nothing was changed */
#define BORROWED_WITHIN_NS 500000000LL /* for all between: 3000 times what it takes; then it is given back */
#define SETTLE_WITHIN_NS 100000000LL

/* These numbers are a promise to primary/injection.py. A status is also the exit code. */
enum status {
	OK = 0,
	BAD_USAGE = 2,
	GONE = 20,         /* no such process, or it ended under us, or executed another program */
	TRACED = 21,       /* somebody else traces it */
	REFUSED = 22,      /* the kernel does not let us */
	COMPAT = 23,       /* in 32-bit code */
	NO_CODE = 24,      /* no system call instruction found in it */
	SECCOMP_KEPT = 25, /* has a seccomp filter that we may not suspend */
	DISPATCHED = 26,   /* its system calls are redirected (syscall user dispatch) */
	NOT_STOPPED = 27,  /* did not stop in time; was left alone */
	CALL_FAILED = 28,  /* its userfaultfd() failed; it runs on unharmed */
	NOT_TAKEN = 29,    /* pidfd_getfd failed; the descriptor is closed in it */
	LEFT_OPEN = 30,    /* a descriptor is left in it: no dump of it can succeed until it ends */
	STUCK = 31,        /* did not go on as it must; given back, or left to heal */
	NOT_RETURNED = 32, /* its registers could not be put back */
	BROKEN = 33,       /* a system call of our own failed before anything was touched */
};

enum stage {
	LOOKING = 1,
	SEIZED,
	STOPPED,
	PREPARED, /* the slot is written */
	BORROWED, /* from here on borrowed registers... */
	MASKED,
	ENTERED, /* at the entry of the first call */
	AIMED,   /* ...which is userfaultfd now */
	OPENED,  /* the descriptor exists in the target */
	TAKEN,
	CLOSING, /* at the entry of close */
	CLOSED,
	UNMASKED,
	RETURNED, /* ...to here */
	CLEARED,
	DETACHED,
};

#define ANSWER_MAGIC 0x314a4e49u /* "INJ1" */
#define HEALING 1u               /* flags: the target would have healed by itself */
#define WAS_USER_MODE_ONLY 2u
struct answer {
	uint32_t magic;
	int32_t status;
	int32_t error; /* errno, or 0 */
	int32_t stage; /* the last one reached */
	uint32_t flags;
	int32_t thread;       /* whose registers were borrowed */
	uint64_t stopped_ns;  /* from asking it to stop until it was let go */
	uint64_t borrowed_ns; /* of which on borrowed registers */
};
_Static_assert(sizeof(struct answer) == 40, "primary/injection.py unpacks 40 bytes");

/* ---- what differs between machines ---- */

#if defined(__x86_64__)
typedef struct user_regs_struct registers;
static const unsigned char CALL_INSTRUCTION[] = {0x0f, 0x05}; /* syscall */
#define CALL_ALIGNMENT 1

static uint64_t *counter_of(registers *r) { return (uint64_t *)&r->rip; }

static long result_of(const registers *r) { return (long)r->rax; }

/* Point registers at a system call instruction. orig_rax -1: nothing of its own is to be started again. */
static void point_at_call(registers *r, uint64_t instruction, long number, long first)
{
	r->rip = instruction;
	r->orig_rax = (unsigned long)-1;
	r->rax = (unsigned long)number;
	r->rdi = (unsigned long)first;
	r->rsp = 0;
}

static bool at_entry_of(const registers *r, long number)
{
	return r->orig_rax == (unsigned long)number && (long)r->rax == -ENOSYS;
}

#define HAVE_HEALING 1
/* What the slot holds. All of it is position independent. mov and lea change no flags; `syscall` keeps them.
 * The first call is a close of nothing: only a tracer that lives makes userfaultfd of it, at its entry. */
__asm__(".pushsection .rodata\n"
	".balign 16\n"
	"heal_code:\n"
	"	mov $-1, %edi\n"
	"	mov $3, %eax\n"
	"	syscall\n"
	"	mov %eax, %edi\n" /* the descriptor; or an error, and then this closes nothing */
	"	mov $3, %eax\n"
	"	syscall\n"
	"	mov $2, %edi\n" /* SIG_SETMASK */
	"	lea heal_mask(%rip), %rsi\n"
	"	mov $0, %edx\n"
	"	mov $8, %r10d\n"
	"	mov $14, %eax\n" /* rt_sigprocmask */
	"	syscall\n"
	"	mov heal_rax(%rip), %rax\n"
	"	mov heal_rdi(%rip), %rdi\n"
	"	mov heal_rsi(%rip), %rsi\n"
	"	mov heal_rdx(%rip), %rdx\n"
	"	mov heal_r10(%rip), %r10\n"
	"	mov heal_r11(%rip), %r11\n"
	"	mov heal_rcx(%rip), %rcx\n"
	"	jmp *heal_rip(%rip)\n"
	".balign 8, 0\n"
	"heal_data:\n"
	"heal_rax: .quad 0\n"
	"heal_rdi: .quad 0\n"
	"heal_rsi: .quad 0\n"
	"heal_rdx: .quad 0\n"
	"heal_r10: .quad 0\n"
	"heal_r11: .quad 0\n"
	"heal_rcx: .quad 0\n"
	"heal_rip: .quad 0\n"
	"heal_mask: .quad 0\n"
	"heal_end:\n"
	".popsection\n");
extern const unsigned char heal_code[], heal_data[], heal_end[];

struct heal_data {
	uint64_t rax, rdi, rsi, rdx, r10, r11, rcx, rip, mask;
};

/* What the code in the slot is to give back. An interrupted call is started again by hand here, since a dead
 * tracer cannot leave it to the kernel. */
static struct heal_data data_for(const registers *r, uint64_t mask)
{
	struct heal_data d = {r->rax, r->rdi, r->rsi, r->rdx, r->r10, r->r11, r->rcx, r->rip, mask};
	if ((long)r->orig_rax >= 0) {
		switch ((long)r->rax) {
		case -512: /* ERESTARTSYS */
		case -513: /* ERESTARTNOINTR */
		case -514: /* ERESTARTNOHAND */
			d.rax = r->orig_rax;
			d.rip -= 2;
			break;
		case -516:                                        /* ERESTART_RESTARTBLOCK */
			d.rax = 219 | (r->orig_rax & 0x40000000); /* restart_syscall; the bit is x32's */
			d.rip -= 2;
			break;
		}
	}
	return d;
}

static void point_at_slot(registers *r, uint64_t slot)
{
	r->rip = slot;
	r->orig_rax = (unsigned long)-1;
}

static void make_it(registers *r, long number, long first)
{
	r->orig_rax = (unsigned long)number;
	r->rdi = (unsigned long)first;
}

#elif defined(__aarch64__)
typedef struct user_regs_struct registers;
static const unsigned char CALL_INSTRUCTION[] = {0x01, 0x00, 0x00, 0xd4}; /* svc #0 */
#define CALL_ALIGNMENT 4
#define HAVE_HEALING 0

static uint64_t *counter_of(registers *r) { return (uint64_t *)&r->pc; }

static long result_of(const registers *r) { return (long)r->regs[0]; }

static void point_at_call(registers *r, uint64_t instruction, long number, long first)
{
	r->pc = instruction;
	r->regs[8] = (uint64_t)number;
	r->regs[0] = (uint64_t)first;
	r->regs[30] = 0; /* a `ret` faults */
	r->sp = 0;
	r->pstate &= ~(3ULL << 10); /* BTYPE: it may have stopped right after an indirect branch */
}

static bool at_entry_of(const registers *r, long number) { return r->regs[8] == (uint64_t)number; }

/* There is never a slot here. */
static void point_at_slot(registers *r, uint64_t slot) { (void)r, (void)slot; }
static void make_it(registers *r, long number, long first) { (void)r, (void)number, (void)first; }

#else
#error "outlive-inject knows x86_64 and aarch64 only"
#endif

/* ---- the target ---- */

struct target {
	pid_t pid, tid;
	int pidfd;      /* of the thread whose descriptors count */
	int mem;        /* /proc/PID/mem */
	uint64_t call;  /* address of a system call instruction */
	uint64_t slot;  /* address of the slot, or 0: the plain way */
	registers saved;
	uint64_t mask; /* saved */
	bool borrowed, masked;
	int64_t deadline_ns;
	int64_t asked_ns, borrowed_ns;
};

static struct answer answer = {.magic = ANSWER_MAGIC};
static sigset_t child_signal;

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

#ifdef OUTLIVE_INJECT_STAGES
/* For tests of what a death at each stage does: the stage is shown in a page shared on descriptor 4, and at
 * the one that its second word names we stop. */
static volatile int32_t *shown;

static void reach(enum stage stage)
{
	answer.stage = stage;
	if (!shown)
		shown = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, 4, 0);
	shown[0] = stage;
	if (shown[1] == (int32_t)stage)
		raise(SIGSTOP);
}
#else
static void reach(enum stage stage) { answer.stage = stage; }
#endif

static enum status fail(enum status status, int error)
{
	answer.error = error;
	return status;
}

/* A request on a stopped thread fails with ESRCH when it was killed meanwhile. */
static enum status lost(void) { return fail(errno == ESRCH ? GONE : NOT_RETURNED, errno); }

static bool get_registers(const struct target *t, registers *r)
{
	struct iovec into = {r, sizeof *r};
	errno = 0;
	return ptrace(PTRACE_GETREGSET, t->tid, (void *)NT_PRSTATUS, &into) == 0 && into.iov_len == sizeof *r;
}

static bool set_registers(const struct target *t, registers *r)
{
	struct iovec from = {r, sizeof *r};
	return ptrace(PTRACE_SETREGSET, t->tid, (void *)NT_PRSTATUS, &from) == 0;
}

static bool set_mask(const struct target *t, uint64_t mask)
{
	return ptrace(PTRACE_SETSIGMASK, t->tid, (void *)SIGSET_BYTES, &mask) == 0;
}

enum stop { AT_CALL, IN_GET_SIGNAL, AT_SIGNAL, ENDED, TOO_LATE };

/* Wait for the thread's next stop. A stop that happened is told even after the deadline. */
static enum stop next_stop(struct target *t, int *number)
{
	for (;;) {
		int status;
		pid_t got = waitpid(t->tid, &status, __WALL | WNOHANG);
		if (got < 0 || (got > 0 && !WIFSTOPPED(status)))
			return ENDED;
		if (got > 0) {
			*number = WSTOPSIG(status);
			if (status >> 16 == PTRACE_EVENT_STOP)
				return IN_GET_SIGNAL;
			return *number == (SIGTRAP | 0x80) ? AT_CALL : AT_SIGNAL;
		}
		int64_t left = t->deadline_ns - now_ns();
		if (left <= 0)
			return TOO_LATE;
		struct timespec wait = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
		sigtimedwait(&child_signal, NULL, &wait);
	}
}

/* Let the stopped thread run to the entry of its next system call. It may have to stop on the way, for a
 * SIGSTOP or an earlier request of ours: it is in get_signal() then, on unchanged registers. All signals are
 * blocked: any other one is a fault of the code that it was sent into, and would end it. It is not let through.
 */
static enum status enter(struct target *t)
{
	int pass = 0;
	for (;;) {
		if (ptrace(PTRACE_SYSCALL, t->tid, NULL, (long)pass) != 0)
			return lost();
		int number;
		switch (next_stop(t, &number)) {
		case AT_CALL:
			return OK;
		case IN_GET_SIGNAL:
			pass = 0;
			break;
		case AT_SIGNAL: /* SIGSTOP, which cannot be blocked: this only stops its process, at our detach */
			if (number != SIGSTOP)
				return fail(STUCK, 0);
			pass = number;
			break;
		case ENDED:
			return fail(GONE, 0);
		case TOO_LATE:
			return fail(STUCK, 0);
		}
	}
}

/* Let the thread complete the system call that it is entering, up to a stop in get_signal(). It executes no
 * instruction after the call: the interrupt is asked for before it goes on. `aimed`, if any, are its
 * registers from now on: nothing else is between writing them and letting it go, see "not guaranteed" on
 * seccomp. */
static enum status leave(struct target *t, registers *aimed)
{
	int pass = 0;
	for (;;) {
		if (ptrace(PTRACE_INTERRUPT, t->tid, NULL, NULL) != 0)
			return lost();
		if (aimed) {
			if (!set_registers(t, aimed))
				return lost();
			reach(AIMED);
			aimed = NULL;
		}
		if (ptrace(PTRACE_CONT, t->tid, NULL, (long)pass) != 0)
			return lost();
		int number;
		switch (next_stop(t, &number)) {
		case IN_GET_SIGNAL:
			return OK;
		case AT_SIGNAL:
			pass = number == SIGSTOP ? number : 0;
			break;
		case AT_CALL:
			pass = 0;
			break;
		case ENDED:
			return fail(GONE, 0);
		case TOO_LATE:
			return fail(STUCK, 0);
		}
	}
}

/* From wherever it is, also running: bring the thread into get_signal() if that can be done soon. */
static enum status settle(struct target *t)
{
	t->deadline_ns = now_ns() + SETTLE_WITHIN_NS;
	if (ptrace(PTRACE_INTERRUPT, t->tid, NULL, NULL) != 0)
		return lost();
	/* Fails with ESRCH if it runs, and then the interrupt takes it out of that. */
	ptrace(PTRACE_CONT, t->tid, NULL, NULL);
	for (;;) {
		int number;
		switch (next_stop(t, &number)) {
		case IN_GET_SIGNAL:
			return OK;
		case AT_SIGNAL:
		case AT_CALL:
			return leave(t, NULL);
		case ENDED:
			return fail(GONE, 0);
		case TOO_LATE:
			return fail(STUCK, 0);
		}
	}
}

/* ---- before the stop: everything that can be looked up while the target runs ---- */

static bool read_text(const char *path, char *into, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t got = read(fd, into, size - 1);
	close(fd);
	into[got < 0 ? 0 : got] = 0;
	return got > 0;
}

static long status_field(const struct target *t, const char *name, int base)
{
	static char text[8192];
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/task/%d/status", t->pid, t->tid);
	const char *at = read_text(path, text, sizeof text) ? strstr(text, name) : NULL;
	return at ? (long)strtoul(at + strlen(name), NULL, base) : -1;
}

/* The thread's state letter; 0 if it is not there. */
static char state_of(pid_t pid, pid_t tid)
{
	static char text[2048];
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, tid);
	const char *at = read_text(path, text, sizeof text) ? strrchr(text, ')') : NULL;
	return at && strlen(at) > 2 ? at[2] : 0;
}

static bool usable(char state) { return state && !strchr("ZXxD", state); }

/* The main thread, unless it has exited or sits in an uninterruptible wait (a vfork) and another does not. */
static pid_t choose_thread(pid_t pid)
{
	char main_state = state_of(pid, pid);
	if (usable(main_state))
		return pid;
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *tasks = opendir(path);
	if (!tasks)
		return 0;
	pid_t chosen = main_state == 'D' ? pid : 0;
	for (struct dirent *each; (each = readdir(tasks));) {
		pid_t tid = isdigit((unsigned char)each->d_name[0]) ? atoi(each->d_name) : 0;
		if (tid && usable(state_of(pid, tid))) {
			chosen = tid;
			break;
		}
	}
	closedir(tasks);
	return chosen;
}

/* Read target memory; short where it ends. */
static size_t read_memory(const struct target *t, uint64_t from, void *into, size_t size)
{
	size_t done = 0;
	while (done < size) {
		ssize_t got = pread(t->mem, (char *)into + done, size - done, (off_t)(from + done));
		if (got <= 0)
			break;
		done += (size_t)got;
	}
	return done;
}

/* Whether the thread has those bytes in the memory that it executes now: `mem` is of what it executed once. */
static bool has_now(const struct target *t, uint64_t at, const unsigned char *what, size_t size)
{
	unsigned char found[64];
	struct iovec here = {found, size}, there = {(void *)at, size};
	return size <= sizeof found && process_vm_readv(t->tid, &here, 1, &there, 1, 0) == (ssize_t)size &&
	       memcmp(found, what, size) == 0;
}

static uint64_t find_call(const unsigned char *bytes, size_t size, uint64_t from)
{
	for (size_t at = 0; at + sizeof CALL_INSTRUCTION <= size; at += CALL_ALIGNMENT)
		if (memcmp(bytes + at, CALL_INSTRUCTION, sizeof CALL_INSTRUCTION) == 0)
			return from + at;
	return 0;
}

#if HAVE_HEALING
#ifdef OUTLIVE_INJECT_PLAIN /* for tests of the plain way, which is all that other machines have */
#define USE_SLOTS false
#else
#define USE_SLOTS true
#endif
#define CODE_BYTES ((size_t)(heal_data - heal_code))
#define SLOT_BYTES 192

/* Where the ELF file in the vDSO ends; 0 if it is none that we understand. */
static size_t elf_end(const unsigned char *bytes, size_t size)
{
	Elf64_Ehdr head;
	if (size < sizeof head)
		return 0;
	memcpy(&head, bytes, sizeof head);
	if (memcmp(head.e_ident, ELFMAG, SELFMAG) != 0 || head.e_ident[EI_CLASS] != ELFCLASS64 ||
	    head.e_phentsize != sizeof(Elf64_Phdr) || head.e_phoff > size ||
	    head.e_phnum > (size - head.e_phoff) / sizeof(Elf64_Phdr) || head.e_shoff > size)
		return 0;
	size_t end = head.e_shoff + (size_t)head.e_shnum * head.e_shentsize;
	for (int i = 0; i < head.e_phnum; i++) {
		Elf64_Phdr segment;
		memcpy(&segment, bytes + head.e_phoff + (size_t)i * sizeof segment, sizeof segment);
		if (segment.p_offset > size || segment.p_filesz > size - segment.p_offset)
			return 0;
		if (segment.p_offset + segment.p_filesz > end)
			end = segment.p_offset + segment.p_filesz;
		if (segment.p_type == PT_LOAD && segment.p_offset + segment.p_memsz > end)
			end = segment.p_offset + segment.p_memsz;
	}
	return end <= size ? end : 0;
}

/* A slot that no thread can have entered: all zero, or with the code but not yet its data (data are written
 * before registers are, and the return address among them is never zero). 0 if there is none. */
static uint64_t find_slot(const unsigned char *vdso, size_t size, uint64_t start)
{
	size_t end = elf_end(vdso, size);
	if (!USE_SLOTS || end == 0 || (size_t)(heal_end - heal_code) > SLOT_BYTES)
		return 0;
	for (size_t at = (end + 63) / 64 * 64; at + SLOT_BYTES <= size; at += SLOT_BYTES) {
		static const unsigned char zero[SLOT_BYTES];
		bool unused = memcmp(vdso + at, zero, SLOT_BYTES) == 0 ||
			      (memcmp(vdso + at, heal_code, CODE_BYTES) == 0 &&
			       memcmp(vdso + at + CODE_BYTES, zero, SLOT_BYTES - CODE_BYTES) == 0);
		if (unused)
			return start + at;
	}
	return 0;
}

/* Write the code, which does nothing yet, and read it back. Without success it is the plain way. */
static void write_slot(struct target *t)
{
	unsigned char back[SLOT_BYTES];
	if (t->slot && (pwrite(t->mem, heal_code, CODE_BYTES, (off_t)t->slot) != (ssize_t)CODE_BYTES ||
			read_memory(t, t->slot, back, CODE_BYTES) != CODE_BYTES ||
			memcmp(back, heal_code, CODE_BYTES) != 0))
		t->slot = 0;
}

/* Whether the code is where the thread, stopped, would be sent. */
static bool has_slot(const struct target *t)
{
	return !t->slot || has_now(t, t->slot, heal_code, CODE_BYTES < 64 ? CODE_BYTES : 64);
}

static void arm_slot(struct target *t)
{
	struct heal_data data = data_for(&t->saved, t->mask);
	if (t->slot &&
	    pwrite(t->mem, &data, sizeof data, (off_t)(t->slot + CODE_BYTES)) != (ssize_t)sizeof data)
		t->slot = 0;
}

/* Only for a thread that has its own registers back, or never lost them. */
static void free_slot(struct target *t)
{
	static const unsigned char zero[SLOT_BYTES];
	/* If this fails, the slot is never used again, and that is all. */
	if (t->slot && pwrite(t->mem, zero, SLOT_BYTES, (off_t)t->slot) != SLOT_BYTES)
		t->slot = 0;
}
#else
static uint64_t find_slot(const unsigned char *vdso, size_t size, uint64_t start)
{
	(void)vdso, (void)size, (void)start;
	return 0;
}
static void write_slot(struct target *t) { t->slot = 0; }
static void arm_slot(struct target *t) { t->slot = 0; }
static void free_slot(struct target *t) { (void)t; }
static bool has_slot(const struct target *t) { return !t->slot; }
#endif

/* Find a system call instruction and a slot: in the vDSO; without one, an instruction in any code. */
static enum status find_code(struct target *t)
{
	static unsigned char bytes[1 << 16];
	char path[64], line[PATH_MAX + 128];
	snprintf(path, sizeof path, "/proc/%d/task/%d/maps", t->pid, t->tid);
	FILE *maps = fopen(path, "re");
	if (!maps)
		return fail(errno == ENOENT || errno == ESRCH ? GONE : REFUSED, errno);
	uint64_t start, end, code_start = 0, code_end = 0, vdso_start = 0, vdso_end = 0;
	size_t any = 0;
	while (fgets(line, sizeof line, maps)) {
		char flags[5];
		if (sscanf(line, "%lx-%lx %4s", &start, &end, flags) != 3 || flags[2] != 'x')
			continue;
		if (strstr(line, "[vdso]\n"))
			vdso_start = start, vdso_end = end;
		else if (flags[0] == 'r' && end - start > code_end - code_start && !strstr(line, "[vsyscall]"))
			code_start = start, code_end = end;
	}
	fclose(maps);
	if (vdso_end - vdso_start > 0 && vdso_end - vdso_start <= sizeof bytes) {
		size_t size = read_memory(t, vdso_start, bytes, vdso_end - vdso_start);
		any += size;
		t->call = find_call(bytes, size, vdso_start);
		t->slot = size == vdso_end - vdso_start ? find_slot(bytes, size, vdso_start) : 0;
	}
	for (uint64_t at = code_start; !t->call && at < code_end; at += sizeof bytes) {
		size_t size = sizeof bytes < code_end - at ? sizeof bytes : code_end - at;
		size = read_memory(t, at, bytes, size);
		any += size;
		t->call = find_call(bytes, size, at);
	}
	/* Where nothing can be read, `mem` and `maps` are not of the same program: it executes another one. */
	return t->call ? OK : any ? fail(NO_CODE, 0) : fail(GONE, ENOEXEC);
}

/* ---- the stop ---- */

/* A thread inside a restartable sequence has to start it again after any stop. The kernel does that when the
 * thread returns to user mode *after* our stop, by the address that it would return to. It would find the
 * borrowed one there, outside of the sequence, and forget about it; and then ours, put back into the middle of
 * the sequence, would run on with what another thread may have changed. So what we give back is what the kernel
 * would have made of it: the sequence's abort address. */
static bool leave_sequence(struct target *t)
{
	struct {
		uint64_t abi;
		uint32_t size, signature, flags, pad;
	} has = {0};
	if (ptrace(GET_RSEQ_CONFIGURATION, t->tid, (void *)sizeof has, &has) < 0)
		return errno == EIO || errno == EINVAL; /* a kernel that has none, or does not tell */
	uint64_t at = 0;
	struct {
		uint32_t version, flags;
		uint64_t start, length, abort;
	} sequence;
	if (!has.abi)
		return true;
	if (read_memory(t, has.abi + 8, &at, sizeof at) != sizeof at) /* rseq.rseq_cs */
		return false;
	if (!at)
		return true;
	if (read_memory(t, at, &sequence, sizeof sequence) != sizeof sequence)
		return false;
	uint64_t *counter = counter_of(&t->saved);
	if (*counter - sequence.start < sequence.length)
		*counter = sequence.abort;
	return true;
}

static enum status seize(struct target *t)
{
	unsigned long options = PTRACE_O_TRACESYSGOOD;
	if (ptrace(PTRACE_SEIZE, t->tid, NULL, options | SUSPEND_SECCOMP) == 0)
		return OK;
	if (errno == EPERM || errno == EINVAL || errno == EIO) {
		if (ptrace(PTRACE_SEIZE, t->tid, NULL, options) == 0) {
			if (status_field(t, "\nSeccomp:", 10) > 0)
				return fail(SECCOMP_KEPT, EPERM);
			return OK;
		}
	}
	if (errno == ESRCH)
		return fail(GONE, errno);
	int error = errno;
	return fail(status_field(t, "\nTracerPid:", 10) > 0 ? TRACED : REFUSED, error);
}

/* Stop it in get_signal(). A signal that is just being delivered takes its way first, on its own registers. */
static enum status stop(struct target *t)
{
	t->asked_ns = now_ns();
	t->deadline_ns = t->asked_ns + STOP_WITHIN_NS;
	if (ptrace(PTRACE_INTERRUPT, t->tid, NULL, NULL) != 0)
		return fail(GONE, errno);
	for (;;) {
		int number;
		switch (next_stop(t, &number)) {
		case IN_GET_SIGNAL:
			return OK;
		case AT_SIGNAL:
			if (now_ns() > t->deadline_ns) {
				ptrace(PTRACE_DETACH, t->tid, NULL, (long)number);
				return fail(NOT_STOPPED, 0);
			}
			if (ptrace(PTRACE_INTERRUPT, t->tid, NULL, NULL) != 0 ||
			    ptrace(PTRACE_CONT, t->tid, NULL, (long)number) != 0)
				return fail(GONE, errno);
			break;
		case AT_CALL:
		case ENDED:
			return fail(GONE, 0);
		case TOO_LATE: /* our end is its detach: the kernel forgets the interrupt with it */
			return fail(NOT_STOPPED, 0);
		}
	}
}

/* Have the thread make one system call; `fresh` if it is to start at the beginning of the slot. */
static enum status call(struct target *t, long number, long first, bool fresh, long *result)
{
	registers r = t->saved;
	enum status status;
	if (t->slot && fresh)
		point_at_slot(&r, t->slot);
	else if (!t->slot)
		point_at_call(&r, t->call, number, first);
	if ((fresh || !t->slot) && !set_registers(t, &r))
		return lost();
	if (!t->borrowed) {
		t->borrowed = true;
		t->borrowed_ns = now_ns();
		reach(BORROWED);
		if (!set_mask(t, UINT64_MAX))
			return lost();
		t->masked = true;
		reach(MASKED);
	}
	if ((status = enter(t)) != OK)
		return status;
	reach(number == SYS_close ? CLOSING : ENTERED);
	bool aim = t->slot && fresh;
	if (!get_registers(t, &r))
		return lost();
	if (!at_entry_of(&r, aim ? SYS_close : number))
		return fail(STUCK, 0);
	if (aim)
		make_it(&r, number, first);
	if ((status = leave(t, aim ? &r : NULL)) != OK)
		return status;
	if (!get_registers(t, &r))
		return lost();
	*result = result_of(&r);
	return OK;
}

/* Put the thread back, mask first (invariant 3), and let it go. */
static enum status give_back(struct target *t)
{
	if (t->masked && !set_mask(t, t->mask))
		return lost();
	t->masked = false;
	reach(UNMASKED);
	if (!set_registers(t, &t->saved))
		return lost();
	if (t->borrowed)
		answer.borrowed_ns = (uint64_t)(now_ns() - t->borrowed_ns);
	t->borrowed = false;
	reach(RETURNED);
	free_slot(t);
	reach(CLEARED);
	if (ptrace(PTRACE_DETACH, t->tid, NULL, NULL) != 0)
		return lost();
	reach(DETACHED);
	return OK;
}

/* All that happens on borrowed registers; `taken` is the descriptor, ours, or -1. */
static enum status borrow(struct target *t, int *taken)
{
	long result = -1, closed = -1;
	enum status status = call(t, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY, true, &result);
	if (status == OK && result == -EINVAL) /* a kernel before 5.11 */
		status = call(t, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, true, &result);
	else
		answer.flags |= WAS_USER_MODE_ONLY;
	if (status != OK)
		return status;
	reach(OPENED);
	if (result < 0)
		return fail(CALL_FAILED, (int)-result);
	*taken = (int)syscall(SYS_pidfd_getfd, t->pidfd, (int)result, 0);
	int error = *taken < 0 ? errno : 0;
	reach(TAKEN);
	status = call(t, SYS_close, result, false, &closed);
	if (status != OK)
		return status;
	if (closed != 0)
		return fail(LEFT_OPEN, (int)-closed);
	reach(CLOSED);
	return *taken < 0 ? fail(NOT_TAKEN, error) : OK;
}

/* The thread did not come where it must (a frozen cgroup does that). Bring it to where it can be given back. */
static enum status unstick(struct target *t)
{
	registers r;
	enum status settled = settle(t);
	if (t->slot) /* once it is let go, it closes what is open, if it did not get that far, and heals */
		return settled == GONE ? GONE : STUCK;
	if (settled != OK)
		return settled == GONE ? GONE : NOT_RETURNED;
	if (!get_registers(t, &r))
		return lost();
	bool after = *counter_of(&r) == t->call + sizeof CALL_INSTRUCTION;
	bool open = answer.stage < OPENED ? after && result_of(&r) >= 0 : !(after && result_of(&r) == 0);
	return open ? LEFT_OPEN : STUCK;
}

/* Beside a busy target and at its priority, our turn after each stop can be milliseconds away. The lowest
 * real-time priority is enough, and harmless: from here on every wait of ours sleeps. */
static void run_first(void)
{
	struct sched_param lowest = {.sched_priority = 1};
	if (sched_setscheduler(0, SCHED_FIFO, &lowest) != 0)
		setpriority(PRIO_PROCESS, 0, -10);
}

static enum status inject(struct target *t, int *taken)
{
	char path[64];
	reach(LOOKING);
	if ((t->tid = choose_thread(t->pid)) == 0)
		return fail(GONE, ESRCH);
	answer.thread = t->tid;
	t->pidfd = (int)syscall(SYS_pidfd_open, t->tid, PIDFD_THREAD_FLAG);
	if (t->pidfd < 0 && errno == EINVAL && t->tid == t->pid)
		t->pidfd = (int)syscall(SYS_pidfd_open, t->pid, 0);
	if (t->pidfd < 0)
		return fail(errno == ESRCH ? GONE : BROKEN, errno);
	snprintf(path, sizeof path, "/proc/%d/task/%d/mem", t->pid, t->tid);
	t->mem = open(path, O_RDWR | O_CLOEXEC);
	if (t->mem < 0)
		return fail(errno == ENOENT || errno == ESRCH ? GONE : REFUSED, errno);
	enum status status = find_code(t);
	if (status != OK || (status = seize(t)) != OK)
		return status;
	reach(SEIZED);
	write_slot(t);
	run_first();
	if ((status = stop(t)) != OK)
		return status;
	reach(STOPPED);
	t->deadline_ns = now_ns() + BORROWED_WITHIN_NS;
	/* All that was looked up may be of another program: it can have executed one before it was stopped. From
	 * here on it cannot, and another thread that does ends this one. What was written is not cleared: of a
	 * vfork it is in its parent, where it does nothing. */
	if (!has_now(t, t->call, CALL_INSTRUCTION, sizeof CALL_INSTRUCTION) || !has_slot(t)) {
		ptrace(PTRACE_DETACH, t->tid, NULL, NULL);
		return fail(GONE, ENOEXEC);
	}
	struct {
		uint64_t mode, selector, offset, length;
	} dispatch = {0};
	if (!get_registers(t, &t->saved))
		status = fail(errno == ESRCH ? GONE : COMPAT, 0);
	else if (ptrace(GET_SYSCALL_DISPATCH, t->tid, (void *)sizeof dispatch, &dispatch) == 0 && dispatch.mode)
		status = fail(DISPATCHED, 0);
	else if (ptrace(PTRACE_GETSIGMASK, t->tid, (void *)SIGSET_BYTES, &t->mask) != 0 || !leave_sequence(t))
		status = fail(BROKEN, errno);
	if (status != OK) {
		free_slot(t);
		ptrace(PTRACE_DETACH, t->tid, NULL, NULL);
		return status;
	}
	arm_slot(t);
	answer.flags |= t->slot ? HEALING : 0;
	reach(PREPARED);

	status = borrow(t, taken);
	if (status == GONE || status == NOT_RETURNED)
		return status;
	if (status == STUCK && (status = unstick(t)) == GONE)
		return status;
	if (status == NOT_RETURNED || (status == STUCK && t->slot && answer.stage >= AIMED))
		return status; /* our end lets it go */
	int error = answer.error, reached = answer.stage;
	enum status returned = give_back(t);
	if (returned != OK)
		return returned;
	if (status != OK) {
		answer.error = error;
		answer.stage = reached;
	}
	return status;
}

static bool tell(int descriptor)
{
	struct iovec what = {&answer, sizeof answer};
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int))];
	} beside = {0};
	struct msghdr packet = {.msg_iov = &what, .msg_iovlen = 1};
	if (descriptor >= 0) {
		packet.msg_control = &beside;
		packet.msg_controllen = sizeof beside.space;
		struct cmsghdr *head = CMSG_FIRSTHDR(&packet);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN(sizeof descriptor);
		memcpy(CMSG_DATA(head), &descriptor, sizeof descriptor);
	}
	return sendmsg(ANSWER_FD, &packet, MSG_NOSIGNAL) == (ssize_t)sizeof answer;
}

/* Nothing may stand between us and the end of the job; each of these is good to have, and none is needed. */
static void be_hard_to_disturb(void)
{
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigemptyset(&child_signal);
	sigaddset(&child_signal, SIGCHLD);
	mlockall(MCL_CURRENT | MCL_FUTURE);
	int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (score >= 0) {
		if (write(score, "-1000", 5) < 0)
			errno = 0;
		close(score);
	}
}

int main(int count, char **words)
{
	struct target target = {.pidfd = -1, .mem = -1};
	int taken = -1;
	char *end = NULL;
	long pid = count == 2 ? strtol(words[1], &end, 10) : 0;
	if (pid <= 0 || pid > INT_MAX || *end) {
		fprintf(stderr, "usage: outlive-inject PID, with a unix socket on descriptor 3\n");
		return BAD_USAGE;
	}
	be_hard_to_disturb();
	target.pid = (pid_t)pid;
	answer.status = (int32_t)inject(&target, &taken);
	if (target.asked_ns)
		answer.stopped_ns = (uint64_t)(now_ns() - target.asked_ns);
	if (!tell(answer.status == OK ? taken : -1) && answer.status == OK)
		return BROKEN;
	return answer.status;
}
