/* Makes the system calls that stdin lists, one a line, in one process; prints "RESULT ERRNO" for each.

   A line is a number and up to six arguments: a decimal number, s:TEXT, x:HEX for bytes, b:SIZE for an empty buffer,
   @N for the result of line N (from 0). The option -3 makes x86's 32-bit calls by int $0x80. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int old;
static long results[4096];

/* In the lowest 2 GiB where the calls have 32-bit pointers. */
static char *room(size_t size)
{
	static char *low;
#ifdef MAP_32BIT
	if (!old)
		return calloc(1, size);
	if (!low)
		low = mmap(NULL, 1 << 24, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	low += (size + 15) / 16 * 16;
	return low - (size + 15) / 16 * 16;
#else
	(void)low;
	return calloc(1, size);
#endif
}

static long argument(const char *word)
{
	if (!strncmp(word, "s:", 2))
		return (long)strcpy(room(strlen(word)), word + 2);
	if (!strncmp(word, "b:", 2))
		return (long)room(strtoul(word + 2, NULL, 10) + 1);
	if (!strncmp(word, "x:", 2)) {
		size_t count = strlen(word + 2) / 2;
		unsigned char *bytes = (unsigned char *)room(count + 1);
		for (size_t at = 0; at < count; at++)
			sscanf(word + 2 + 2 * at, "%2hhx", &bytes[at]);
		return (long)bytes;
	}
	if (word[0] == '@')
		return results[atoi(word + 1)];
	return strtol(word, NULL, 10);
}

static long call32(const long *word)
{
#ifdef __x86_64__
	long result;
	__asm__ volatile("int $0x80" : "=a"(result)
			 : "a"(word[0]), "b"(word[1]), "c"(word[2]), "d"(word[3]), "S"(word[4]), "D"(word[5])
			 : "memory", "r8", "r9", "r10", "r11");
	if ((int)result < 0 && (int)result > -4096) {
		errno = -(int)result;
		return -1;
	}
	return result;
#else
	(void)word;
	errno = ENOSYS;
	return -1;
#endif
}

int main(int argc, char **argv)
{
	old = argc > 1 && !strcmp(argv[1], "-3");
	char line[16384];
	alarm(30);
	for (int number = 0; number < 4096 && fgets(line, sizeof line, stdin); number++) {
		long word[7] = {0};
		int count = 0;
		for (char *part = strtok(line, " \n"); part && count < 7; part = strtok(NULL, " \n"))
			word[count++] = argument(part);
		errno = 0;
		results[number] = old ? call32(word)
				      : syscall(word[0], word[1], word[2], word[3], word[4], word[5], word[6]);
		int error = results[number] == -1 ? errno : 0;
		dprintf(1, "%ld %d\n", results[number], error);
	}
	return 0;
}
