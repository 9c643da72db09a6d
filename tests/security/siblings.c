/* siblings MODE: what a program begun by `exec` can do to the supervisor, whose child it is.
 *   make N    N siblings (CLONE_PARENT) that end at once, then itself
 *   live N    N siblings that live on
 *   flood     siblings without end
 *   traced    asks its parent to trace it, then waits for a signal
 *   stops     the same, and stops itself again and again
 *   (nothing) as process 1: ignores all signals, and asks its parent to trace it
 *   hold      traces each process that comes by, and never lets go of one that has ended
 *   last      traces process 1 up to its end, and is traced itself by a child
 *   cmdlines  prints the command line of each process that comes by, for three seconds
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int sibling(int live)
{
    long pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) {
        while (live)
            pause();
        _exit(0);
    }
    return pid > 0;
}

static void show(const char *pid)
{
    char path[300], text[4096];
    snprintf(path, sizeof path, "/proc/%s/cmdline", pid);
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        return;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    for (ssize_t at = 0; at < length; at++)
        if (!text[at])
            text[at] = ' ';
    if (length > 0) {
        text[length] = 0;
        printf("%s\n", text);
    }
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 && getpid() > 1 ? argv[1] : "";
    int count = argc > 2 ? atoi(argv[2]) : 0;
    if (!strcmp(mode, "make") || !strcmp(mode, "live")) {
        for (int made = 0; made < count; made++)
            if (!sibling(mode[0] == 'l'))
                return 3;
        puts("made");
    } else if (!strcmp(mode, "flood")) {
        puts("made");
        fflush(stdout);
        for (;;)
            sibling(0);
    } else if (!strcmp(mode, "traced") || !strcmp(mode, "stops")) {
        if (ptrace(PTRACE_TRACEME, 0, 0, 0))
            return 4;
        puts("made");
        fflush(stdout);
        for (;;) {
            if (mode[0] == 't') {
                pause();
            } else {
                ptrace(PTRACE_TRACEME, 0, 0, 0);
                raise(SIGUSR2);
            }
        }
    } else if (!strcmp(mode, "hold")) {
        puts("made");
        fflush(stdout);
        for (int seen[4096] = {0}, at = 0;;) {
            DIR *proc = opendir("/proc");
            for (struct dirent *entry; proc && (entry = readdir(proc));) {
                int pid = atoi(entry->d_name), known = pid < 1 || pid == getpid();
                for (int i = 0; i < at; i++)
                    known |= seen[i] == pid;
                if (!known && at < 4096 && ptrace(PTRACE_SEIZE, pid, 0, 0) == 0)
                    seen[at++] = pid;
            }
            if (proc)
                closedir(proc);
        }
    } else if (!strcmp(mode, "last")) {
        if (ptrace(PTRACE_SEIZE, 1, 0, PTRACE_O_TRACEEXIT))
            return 5;
        int traced[2];
        char byte;
        if (pipe(traced))
            return 6;
        if (fork() == 0) {
            if (ptrace(PTRACE_SEIZE, getppid(), 0, PTRACE_O_TRACEEXIT) == 0 && write(traced[1], "", 1) == 1)
                for (;;)
                    pause();
            _exit(1);
        }
        close(traced[1]);
        if (read(traced[0], &byte, 1) != 1)
            return 7;
        puts("made");
        fflush(stdout);
        for (;;)
            pause();
    } else if (!strcmp(mode, "cmdlines")) {
        for (time_t end = time(0) + 3; time(0) < end;) {
            DIR *proc = opendir("/proc");
            for (struct dirent *entry; proc && (entry = readdir(proc));)
                if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9')
                    show(entry->d_name);
            if (proc)
                closedir(proc);
        }
    } else {
        for (int number = 1; number < 65; number++)
            signal(number, SIG_IGN);
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        for (;;)
            pause();
    }
    fflush(stdout);
    return 0;
}
