/* flows ADDRESS FIRST COUNT [EACH]: send a datagram, or EACH, to COUNT ports of an address from FIRST on. */

#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int count, char **word)
{
	if (count < 4)
		return 2;
	struct in6_addr v6;
	int family = inet_pton(AF_INET6, word[1], &v6) == 1 ? AF_INET6 : AF_INET;
	int out = socket(family, SOCK_DGRAM, 0);
	if (out < 0) {
		perror("socket");
		return 1;
	}
	int first = atoi(word[2]), last = first + atoi(word[3]), each = count > 4 ? atoi(word[4]) : 1;
	for (int port = first; port < last; port++) {
		struct sockaddr_in6 to6 = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = v6};
		struct sockaddr_in to4 = {.sin_family = AF_INET, .sin_port = htons(port)};
		inet_pton(AF_INET, word[1], &to4.sin_addr);
		/* An error that an earlier one met (ICMP) is reported by a later one, which has not been sent then. */
		for (int n = 0; n < each; n++)
			if (family == AF_INET6)
				sendto(out, "x", 1, 0, (struct sockaddr *)&to6, sizeof to6);
			else
				sendto(out, "x", 1, 0, (struct sockaddr *)&to4, sizeof to4);
	}
	return 0;
}
