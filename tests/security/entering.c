/* Waits in a jail for processes that enter it (exec, cp) and tries to take hold of each before it is the guest's own:
   to trace it, to read its memory, environment, descriptors and root. Prints what it got of a process whose program is
   not in the jail; ends when its stdin does. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void look(int pid)
{
	char path[64], target[4096], maps[65536];
	snprintf(path, sizeof path, "/proc/%d/exe", pid);
	ssize_t length = readlink(path, target, sizeof target - 1);
	if (length > 0) {
		target[length] = 0;
		struct stat there;
		if (strstr(target, "python") || (stat(target, &there) && errno == ENOENT && !strstr(target, "(deleted)")))
			printf("%d: exe %s\n", pid, target);
		else
			return;
	}
	static const char *const files[] = {"maps", "environ", "mem", "auxv", "fdinfo/0", "stack", "syscall"};
	for (unsigned at = 0; at < sizeof files / sizeof *files; at++) {
		snprintf(path, sizeof path, "/proc/%d/%s", pid, files[at]);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		ssize_t count = read(fd, maps, sizeof maps - 1);
		maps[count > 0 ? count : 0] = 0;
		if (count > 0 && strstr(maps, "python"))
			printf("%d: %s\n", pid, files[at]);
		close(fd);
	}
	if (ptrace(PTRACE_SEIZE, pid, 0, 0) == 0) {
		snprintf(path, sizeof path, "/proc/%d/exe", pid);
		length = readlink(path, target, sizeof target - 1);
		target[length > 0 ? length : 0] = 0;
		if (strstr(target, "python"))
			printf("%d: traced %s\n", pid, target);
		ptrace(PTRACE_INTERRUPT, pid, 0, 0);
		waitpid(pid, NULL, __WALL);
		ptrace(PTRACE_DETACH, pid, 0, 0);
	}
}

int main(void)
{
	long seen = 0;
	int last = 0;
	struct pollfd stdin_ends = {0, POLLIN, 0};
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	while (poll(&stdin_ends, 1, 0) == 0) {
		DIR *proc = opendir("/proc");
		for (struct dirent *entry; proc && (entry = readdir(proc));) {
			int pid = atoi(entry->d_name);
			if (pid > 1 && pid != getpid()) {
				if (pid != last)
					seen++;
				last = pid;
				look(pid);
			}
		}
		if (proc)
			closedir(proc);
	}
	printf("seen %ld\n", seen);
	return 0;
}
