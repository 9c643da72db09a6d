/* Make groups below the jail's own and put a pressure trigger into each, as long as the kernel lets us.
 *
 * psi.c's threads live as long as the triggers' descriptors: print "groups N triggers N", then wait for the end of
 * stdin. The window of 1 s is one that only a writer with CAP_SYS_RESOURCE may have, by a thread of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static const char trigger[] = "some 500000 1000000";

static int put(const char *path)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    return fd >= 0 && write(fd, trigger, sizeof trigger) == (ssize_t)sizeof trigger;
}

int main(int argc, char **argv)
{
    int most = argc > 1 ? atoi(argv[1]) : 0, groups = 0, triggers = 0, why = 0;
    char path[128], rest;
    struct rlimit files = {4096, 4096};
    setrlimit(RLIMIT_NOFILE, &files);
    for (; groups < most; groups++) {
        snprintf(path, sizeof path, "/sys/fs/cgroup/psi%d", groups);
        if (mkdir(path, 0755) < 0) {
            why = errno;
            break;
        }
        strcat(path, "/cpu.pressure");
        triggers += put(path);
    }
    printf("groups %d triggers %d why %s root %d host %d\n", groups, triggers, why ? strerrorname_np(why) : "-",
           put("/sys/fs/cgroup/cpu.pressure"), put("/proc/pressure/cpu"));
    fflush(stdout);
    while (read(0, &rest, 1) > 0)
        ;
    while (groups-- > 0) {
        snprintf(path, sizeof path, "/sys/fs/cgroup/psi%d", groups);
        rmdir(path);
    }
    return 0;
}
