/* Preloaded into a program that refuses to be root: it believes to be another user, and is root.
 *
 * Where root lacks CAP_SYS_RESOURCE, CRIU can dump no other user's processes (prlimit(2)): so what is to be
 * dumped there has to be root's. cc -shared -fPIC -DOTHER_USER=101 -o other_user.so other_user.c
 */
#include <unistd.h>

uid_t getuid(void)
{
	return OTHER_USER;
}

uid_t geteuid(void)
{
	return OTHER_USER;
}
