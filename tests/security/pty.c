/* Open terminals of a devpts until the kernel gives no more: print how many, and the errno's name.
 *
 * usage: pty MOST [PTMX...]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

int main(int argc, char **argv)
{
    struct rlimit files;
    int most = atoi(argv[1]);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    for (int each = 2; each < argc; each++) {
        int opened = 0, why = 0;
        for (; opened < most; opened++)
            if (open(argv[each], O_RDWR | O_NOCTTY | O_CLOEXEC) < 0) {
                why = errno;
                break;
            }
        printf("%d %s\n", opened, why ? strerrorname_np(why) : "-");
    }
    return 0;
}
