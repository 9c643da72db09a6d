/* A FUSE server whose directory has the file "slow" (linux/fuse.h). What is asked about that file, and others whose
   names begin so, is never answered, nor what statfs(2) asks.

   fuse PATH        mounts itself at PATH, prints "ready", and a line for each request that it has read and keeps
   fuse PATH knot   asks for its own file as well, in a thread: a process that waits for itself

   Only getattr, lookup and the names of a directory are served. */
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

static char slow[4200];

static void *ask(void *nothing)
{
	struct stat status;
	stat(slow, &status);
	return nothing;
}

static void answer(int fd, unsigned long long unique, int error, const void *body, size_t size)
{
	char reply[8192];
	struct fuse_out_header head = {.len = sizeof head + size, .error = -error, .unique = unique};
	memcpy(reply, &head, sizeof head);
	if (size)
		memcpy(reply + sizeof head, body, size);
	if (write(fd, reply, head.len) < 0 && errno != ENOENT)
		perror("write");
}

static void serve(int fd, const struct fuse_in_header *in, const char *body)
{
	struct fuse_attr_out attributes = {.attr = {.ino = 1, .mode = S_IFDIR | 0755, .nlink = 2}};
	struct fuse_init_out init = {
		.major = 7, .minor = 31, .max_write = 4096, .max_background = 16, .flags = FUSE_PARALLEL_DIROPS};
	struct fuse_open_out opened = {.fh = 1};
	char entry[64] = {0};
	struct fuse_dirent *name = (struct fuse_dirent *)entry;
	switch (in->opcode) {
	case FUSE_INIT:
		answer(fd, in->unique, 0, &init, sizeof init);
		break;
	case FUSE_GETATTR:
		answer(fd, in->unique, 0, &attributes, sizeof attributes);
		break;
	case FUSE_LOOKUP:
		if (!strncmp(body, "slow", 4)) {
			dprintf(1, "kept\n");
			break;
		}
		answer(fd, in->unique, ENOENT, NULL, 0);
		break;
	case FUSE_STATFS:
		dprintf(1, "kept\n");
		break;
	case FUSE_OPENDIR:
		answer(fd, in->unique, 0, &opened, sizeof opened);
		break;
	case FUSE_READDIR:
		name->ino = 2, name->off = 1, name->namelen = 4, name->type = S_IFREG >> 12;
		memcpy(name->name, "slow", 4);
		answer(fd, in->unique, 0, entry,
		       ((const struct fuse_read_in *)body)->offset ? 0 : FUSE_DIRENT_SIZE(name));
		break;
	case FUSE_INTERRUPT:
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
		break;
	case FUSE_RELEASEDIR:
		answer(fd, in->unique, 0, NULL, 0);
		break;
	default:
		answer(fd, in->unique, ENOSYS, NULL, 0);
	}
}

int main(int argc, char **argv)
{
	char options[128], request[FUSE_MIN_READ_BUFFER + 4096];
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	pthread_t asking;
	snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd);
	snprintf(slow, sizeof slow, "%s/slow", argv[1]);
	if (fd < 0 || mount("fuse", argv[1], "fuse", MS_NOSUID | MS_NODEV, options) < 0) {
		perror(argv[1]);
		return 1;
	}
	dprintf(1, "ready\n");
	if (argc > 2)
		pthread_create(&asking, NULL, ask, NULL);
	for (;;) {
		ssize_t size = read(fd, request, sizeof request - 1);
		if (size < 0)
			return errno != ENODEV;
		request[size] = 0;
		serve(fd, (struct fuse_in_header *)request, request + sizeof(struct fuse_in_header));
	}
}
