#!/bin/sh
# A dump of the connection table filtered by an IPv6 address (ctnetlink, CTA_FILTER) returns all other addresses' entries.
#
# Guess:  IPCTNL_MSG_CT_GET with NLM_F_DUMP, CTA_FILTER and CTA_IP_V6_SRC in CTA_TUPLE_ORIG selects the entries with that
#         source, as it does for CTA_IP_V4_SRC.
# Seen:   Linux 6.18: for IPv4 the entries with the source, for IPv6 the entries without it. ctnetlink_filter_match_tuple
#         has `!ipv6_addr_cmp(...)` where it skips an entry, and ipv6_addr_cmp returns 0 for equal addresses; so since 5.8.
# Why it matters: who deletes what such a dump returns (conntrack -D takes another way) deletes everybody else's
#         connections and keeps those he meant. Filter IPv6 addresses in user space.
# Needs root, ip and nft: it works in a network namespace of its own.
# Output on Linux 6.18: "IPv4: ['127.0.0.1']", then "IPv6: ['::2']".
set -eu
exec unshare --net sh -eu <<'SHELL'
ip link set lo up
ip address add 127.0.0.2/8 dev lo
ip address add ::2/128 dev lo
nft 'add table inet t; add chain inet t c { type filter hook output priority 0; }; add rule inet t c ct state new accept'
python3 - <<'PYTHON'
import socket, struct

ORIG, IP, FILTER, ORIG_FLAGS, NESTED, BY_SOURCE = 1, 1, 25, 1, 0x8000, 1


def attribute(kind, value):
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(buffer):
    while len(buffer) >= 4:
        length, kind = struct.unpack_from("=HH", buffer)
        yield kind & 0x3FFF, buffer[4:length]
        buffer = buffer[(length + 3) & ~3 :]


def sources(family, kind, address):
    """Sources of the entries that the kernel selects by a source."""
    own = attribute(ORIG | NESTED, attribute(IP | NESTED, attribute(kind, socket.inet_pton(family, address))))
    body = own + attribute(FILTER | NESTED, attribute(ORIG_FLAGS, struct.pack("=I", BY_SOURCE)))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as here:  # NETLINK_NETFILTER
        nfgenmsg = struct.pack("!BBH", family, 0, 0)
        here.send(struct.pack("=IHHII", 20 + len(body), 1 << 8 | 1, 0x301, 1, 0) + nfgenmsg + body)
        found = []
        while True:
            buffer = here.recv(65536)
            while buffer:
                length, what = struct.unpack_from("=IH", buffer)
                if what == 3:  # NLMSG_DONE
                    return sorted(found)
                addresses = dict(attributes(dict(attributes(dict(attributes(buffer[20:length]))[ORIG]))[IP]))
                found.append(socket.inet_ntop(family, addresses[kind]))
                buffer = buffer[(length + 3) & ~3 :]


for family, pair in ((socket.AF_INET, ("127.0.0.1", "127.0.0.2")), (socket.AF_INET6, ("::1", "::2"))):
    for source in pair:
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.bind((source, 0))
            sender.sendto(b"x", (pair[0], 9))
ipv4, ipv6 = sources(socket.AF_INET, 1, "127.0.0.1"), sources(socket.AF_INET6, 3, "::1")
print(f"IPv4: {ipv4}")
print(f"IPv6: {ipv6}")
assert ipv4 == ["127.0.0.1"], "the behaviour has changed"
assert ipv6 == ["::2"], "the behaviour has changed"
PYTHON
echo PASS
SHELL
