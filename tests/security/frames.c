/* Send raw frames by eth0. stdin: on each line a frame in hexadecimal and how often it goes out. From the second time
 * on the last four bytes of its source address are a number that counts up. */

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char line[8192];

int main(void)
{
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex("eth0"), .sll_halen = 6};
	int out = socket(AF_PACKET, SOCK_RAW, 0);
	if (out < 0 || !to.sll_ifindex) {
		perror("socket");
		return 1;
	}
	while (fgets(line, sizeof line, stdin)) {
		unsigned char frame[2048];
		char *end = line;
		size_t length = 0;
		for (unsigned int byte; sscanf(end, "%2x", &byte) == 1 && *end != ' ' && length < sizeof frame; end += 2)
			frame[length++] = byte;
		unsigned long times = strtoul(end, NULL, 10);
		for (unsigned int n = 0; n < times; n++) {
			unsigned int low = htonl(n);
			if (n)
				memcpy(frame + 8, &low, 4);
			while (sendto(out, frame, length, 0, (struct sockaddr *)&to, sizeof to) < 0) {
				if (errno != ENOBUFS) {
					perror("sendto");
					return 1;
				}
				usleep(1000);
			}
		}
	}
	return 0;
}
