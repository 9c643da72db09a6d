/* Opens for writing every file below the given folders, and prints those that let it: what a guest's root can reach.
   Folders of processes are left out, and so is what was mounted below. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int visit(const char *path, const struct stat *status, int kind, struct FTW *at)
{
	(void)at;
	if (kind == FTW_D || kind == FTW_DNR || kind == FTW_DP) {
		const char *name = strrchr(path, '/');
		if (!strncmp(path, "/proc/", 6) && name && strspn(name + 1, "0123456789") == strlen(name + 1))
			return FTW_SKIP_SUBTREE;
		return FTW_CONTINUE;
	}
	if (!S_ISREG(status->st_mode))
		return FTW_CONTINUE;
	int fd = open(path, O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
	if (fd >= 0) {
		puts(path);
		close(fd);
	}
	return FTW_CONTINUE;
}

int main(int argc, char **argv)
{
	alarm(60);
	for (int at = 1; at < argc; at++)
		nftw(argv[at], visit, 32, FTW_PHYS | FTW_MOUNT | FTW_ACTIONRETVAL);
	return 0;
}
