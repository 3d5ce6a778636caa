/* SPDX-License-Identifier: MIT
 *
 * Targets for tests of the injector: `victim MODE FILE` counts in a page that it shares with the test, and checks
 * itself. The page's words: 0 ticks, 1 checks that failed, 2 calls that ended with EINTR, 3 restartable sequences
 * that had to start again, 4 signals handled, 5 what ends `vfork`'s child, 6 which call `forever` makes,
 * 7 the descriptor to write to for it, 8 and 9 what that call returned and its errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/rseq.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t *page;
#define ticks page[0]
#define wrong page[1]
#define interrupted page[2]

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Every register but rsp, the carry flag, the red zone and all of xmm keep their values for a while? */
static int computes(void)
{
	static uint64_t in[16] __attribute__((aligned(64))), out[16] __attribute__((aligned(64)));
	static unsigned char vin[512] __attribute__((aligned(64))), vout[512] __attribute__((aligned(64)));
	static uint64_t red_in, red_out, carry, keep_rsp, keep_rbp, keep_rbx;
	for (int i = 0; i < 16; i++)
		in[i] = 0x0101010101010101ull * (i + 17) ^ ticks;
	for (int i = 0; i < 512; i++)
		vin[i] = (unsigned char)(i * 7 + ticks);
	red_in = ticks * 3 + 1;
	carry = 0;
	__asm__ volatile(
		"mov %%rsp, %[keep_rsp]; mov %%rbp, %[keep_rbp]; mov %%rbx, %[keep_rbx]\n"
		"sub $1024, %%rsp\n"
		"mov %[red_in], %%rax; mov %%rax, -128(%%rsp); mov %%rax, -8(%%rsp)\n"
		"movdqa 0+%[vin], %%xmm0; movdqa 16+%[vin], %%xmm1; movdqa 32+%[vin], %%xmm2\n"
		"movdqa 48+%[vin], %%xmm3; movdqa 64+%[vin], %%xmm8; movdqa 80+%[vin], %%xmm15\n"
		"mov 0+%[in], %%rax; mov 8+%[in], %%rbx; mov 16+%[in], %%rdx; mov 24+%[in], %%rsi\n"
		"mov 32+%[in], %%rdi; mov 40+%[in], %%rbp; mov 48+%[in], %%r8; mov 56+%[in], %%r9\n"
		"mov 64+%[in], %%r10; mov 72+%[in], %%r11; mov 80+%[in], %%r12; mov 88+%[in], %%r13\n"
		"mov 96+%[in], %%r14; mov 104+%[in], %%r15\n"
		"mov $200000, %%ecx\n"
		"stc\n"
		"1: lea -1(%%rcx), %%rcx; jrcxz 2f; jmp 1b\n"
		"2: jnc 3f; movq $1, %[carry]\n"
		"3: mov %%rax, 0+%[out]; mov %%rbx, 8+%[out]; mov %%rdx, 16+%[out]; mov %%rsi, 24+%[out]\n"
		"mov %%rdi, 32+%[out]; mov %%rbp, 40+%[out]; mov %%r8, 48+%[out]; mov %%r9, 56+%[out]\n"
		"mov %%r10, 64+%[out]; mov %%r11, 72+%[out]; mov %%r12, 80+%[out]; mov %%r13, 88+%[out]\n"
		"mov %%r14, 96+%[out]; mov %%r15, 104+%[out]\n"
		"movdqa %%xmm0, 0+%[vout]; movdqa %%xmm1, 16+%[vout]; movdqa %%xmm2, 32+%[vout]\n"
		"movdqa %%xmm3, 48+%[vout]; movdqa %%xmm8, 64+%[vout]; movdqa %%xmm15, 80+%[vout]\n"
		"mov -128(%%rsp), %%rax; xor -8(%%rsp), %%rax; add -8(%%rsp), %%rax; mov %%rax, %[red_out]\n"
		"add $1024, %%rsp\n"
		"cmp %%rsp, %[keep_rsp]; je 4f; movq $0, %[carry]\n"
		"4: mov %[keep_rbp], %%rbp; mov %[keep_rbx], %%rbx\n"
		: [out] "=m"(out), [vout] "=m"(vout), [red_out] "=m"(red_out), [carry] "+m"(carry),
		  [keep_rsp] "+m"(keep_rsp), [keep_rbp] "+m"(keep_rbp), [keep_rbx] "+m"(keep_rbx)
		: [in] "m"(in), [vin] "m"(vin), [red_in] "m"(red_in)
		: "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc",
		  "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm8", "xmm15");
	return carry == 1 && red_out == red_in && !memcmp(in, out, 14 * 8) && !memcmp(vin, vout, 96);
}

/* A restartable sequence that is nearly always being executed: what interrupts it must restart it. */
static void sequence(void)
{
	volatile struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	__asm__ volatile(
		".pushsection .data.rel, \"aw\"; .balign 32\n"
		"7: .long 0, 0; .quad 1f, 2f - 1f, 4f\n"
		".popsection\n"
		"lea 7b(%%rip), %%rax; mov %%rax, %[current]\n"
		"1: mov $200000, %%ecx\n"
		"5: lea -1(%%rcx), %%rcx; jrcxz 2f; jmp 5b\n"
		"2: jmp 6f\n"
		".byte 0x0f, 0xb9, 0x3d; .long 0x53053053\n"
		"4: lock incq %[aborts]\n"
		"6:\n"
		: [current] "+m"(area->rseq_cs), [aborts] "+m"(page[3])
		:: "rax", "rcx", "cc", "memory");
}

static void *allocate(void *unused)
{
	unsigned seed = (unsigned)(uintptr_t)&unused;
	for (;;) {
		size_t size = 1 + rand_r(&seed) % 5000;
		unsigned char *some = malloc(size);
		memset(some, (int)(size & 255), size);
		if (some[size / 2] != (size & 255))
			wrong++;
		free(some);
	}
	return NULL;
}

static void *count_on(void *unused)
{
	(void)unused;
	for (;;) {
		ticks++;
		usleep(1000);
	}
	return NULL;
}

static void count_signal(int number)
{
	(void)number;
	__atomic_add_fetch(&page[4], 1, __ATOMIC_RELAXED);
}

static void refuse_userfaultfd(void)
{
	struct sock_filter rules[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = {4, rules};
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
		_exit(3);
}

int main(int count, char **words)
{
	const char *mode = words[1];
	int file = open(words[2], O_RDWR);
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	close(file);
	if (page == MAP_FAILED || count != 3)
		return 2;
	struct sigaction action = {.sa_handler = count_signal};
	sigaction(SIGUSR1, &action, NULL);
	struct timespec short_s = {0, 3000000};
	int32_t word = 1;

	if (!strcmp(mode, "seccomp"))
		refuse_userfaultfd();
	if (!strcmp(mode, "threads"))
		for (int i = 0; i < 3; i++) {
			pthread_t thread;
			pthread_create(&thread, NULL, allocate, NULL);
		}
	if (!strcmp(mode, "leaderless")) { /* the main thread ends, another goes on */
		pthread_t thread;
		pthread_create(&thread, NULL, count_on, NULL);
		pthread_exit(NULL);
	}
	if (!strcmp(mode, "vfork")) { /* the main thread waits uninterruptibly for its child, until that ends */
		ticks = 1;
		if (vfork() == 0) {
			for (;;) {
				ticks++;
				struct timespec pause_s = {0, 1000000};
				syscall(SYS_nanosleep, &pause_s, NULL);
				if (page[5])
					_exit(0);
			}
		}
	}
	if (!strcmp(mode, "dispatch")) { /* as wine does it; the selector lets everything through */
		static char selector;
		if (prctl(59, 1, 0, 0, &selector))
			return 2;
	}
	if (!strcmp(mode, "limited")) {
		struct rlimit none = {3, 3};
		setrlimit(RLIMIT_NOFILE, &none);
	}
	if (!strcmp(mode, "forever")) { /* blocks without end in what page[6] names, then tells how that ended */
		int pair[2], result = -1;
		char byte;
		struct pollfd waits = {.events = POLLIN};
		if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
			return 2;
		waits.fd = pair[0];
		ticks = 1;
		page[7] = (uint64_t)pair[1];
		errno = 0;
		switch (page[6]) {
		case 0: result = (int)read(pair[0], &byte, 1); break;
		case 1: result = poll(&waits, 1, -1); break;
		case 2: result = ppoll(&waits, 1, NULL, NULL); break;
		case 3: result = pause(); break;
		case 4: {
			sigset_t blocked, open;
			sigemptyset(&blocked);
			sigaddset(&blocked, SIGUSR1);
			sigprocmask(SIG_BLOCK, &blocked, NULL);
			sigfillset(&open);
			sigdelset(&open, SIGUSR1);
			result = sigsuspend(&open);
			break;
		}
		case 5: result = (int)syscall(SYS_futex, &word, FUTEX_WAIT, 1, NULL, NULL, 0); break;
		case 6: {
			struct sockaddr_un name = {.sun_family = AF_UNIX};
			int listener = socket(AF_UNIX, SOCK_STREAM, 0);
			snprintf(name.sun_path + 1, 100, "outlive-victim-%d", getpid());
			bind(listener, (struct sockaddr *)&name,
			     (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name.sun_path + 1)));
			listen(listener, 1);
			result = accept(listener, NULL, NULL) < 0 ? -1 : 1;
			break;
		}
		}
		page[8] = (uint64_t)(int64_t)result;
		page[9] = (uint64_t)errno;
		ticks = 2;
		for (;;)
			pause();
	}

	int timer = timerfd_create(CLOCK_MONOTONIC, 0), nothing = epoll_create1(0);
	struct itimerspec every = {short_s, short_s};
	timerfd_settime(timer, 0, &every, NULL);
	for (;;) {
		int64_t began = now(), least = 3000000;
		int result = 0;
		errno = 0;
		if (!strcmp(mode, "sleep") || !strcmp(mode, "seccomp") || !strcmp(mode, "vfork") ||
		    !strcmp(mode, "limited") || !strcmp(mode, "dispatch")) {
			result = nanosleep(&short_s, NULL);
		} else if (!strcmp(mode, "epoll")) {
			struct epoll_event event;
			result = epoll_wait(nothing, &event, 1, 3);
			if (result < 0 && errno == EINTR) {
				interrupted++;
				result = 0, least = 0;
			}
		} else if (!strcmp(mode, "poll")) {
			result = poll(NULL, 0, 3);
		} else if (!strcmp(mode, "futex")) {
			result = (int)syscall(SYS_futex, &word, FUTEX_WAIT, 1, &short_s, NULL, 0);
			result = !(result < 0 && errno == ETIMEDOUT);
		} else if (!strcmp(mode, "read")) {
			uint64_t expirations;
			result = read(timer, &expirations, 8) != 8;
			least = 0;
		} else if (!strcmp(mode, "sequence")) {
			sequence();
			least = 0;
		} else {
			result = !computes();
			least = 0;
		}
		if (result || now() - began < least)
			wrong++;
		ticks++;
	}
}
