/* Makes the interface tun0 and prints "ready"; then prints each packet that is sent by it, and has it receive each packet
 * that stdin gives, a line of hexadecimal each. Ends with stdin. */

#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static char line[8192];

int main(void)
{
	struct ifreq request = {.ifr_name = "tun0", .ifr_flags = IFF_TUN | IFF_NO_PI};
	int tun = open("/dev/net/tun", O_RDWR);
	if (tun < 0 || ioctl(tun, TUNSETIFF, &request) < 0) {
		perror("tun");
		return 1;
	}
	dprintf(1, "ready\n");
	setvbuf(stdin, NULL, _IONBF, 0);
	for (;;) {
		struct pollfd ready[2] = {{.fd = 0, .events = POLLIN}, {.fd = tun, .events = POLLIN}};
		unsigned char packet[4096];
		poll(ready, 2, -1);
		if (ready[1].revents & POLLIN) {
			ssize_t size = read(tun, packet, sizeof packet);
			for (ssize_t at = 0; at < size; at++)
				sprintf(line + 2 * at, "%02x", packet[at]);
			dprintf(1, "%s\n", line);
		}
		if (ready[0].revents) {
			size_t size = 0;
			if (!fgets(line, sizeof line, stdin))
				return 0;
			for (unsigned int byte; sscanf(line + 2 * size, "%2x", &byte) == 1; size++)
				packet[size] = byte;
			if (write(tun, packet, size) < 0)
				perror("write");
		}
	}
}
