"""Queues that hold a tenant, and each of its jails, to their rates: an ifb with an htb for each direction.

    1:1 the tenant (rate = ceil = its total) ─┬─ 1:2      what names no class
                                              ├─ 1:JAIL   (ceil = the jail's own rate)
                                              └─ …

A leaf's own rate is next to nothing: it borrows all it sends from the tenant. So the total holds however many jails
there are, and those that want more than there is get alike. runtime/shaping.py leads packets here.

Numbers are those of linux/pkt_sched.h and linux/rtnetlink.h.
"""

from __future__ import annotations

import errno
import struct
from contextlib import suppress

import msgspec

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.model import Jail, Tenant
from jailmgr.runtime import netlink
from jailmgr.runtime.netlink import NLA_F_NESTED, NLM_F_CREATE, NLM_F_EXCL, TCA_OPTIONS, attribute, message, tcmsg
from jailmgr.runtime.shaping import DIRECTIONS
from jailmgr.units import BITS_MAX, parse_bit_rate

NLM_F_REPLACE = 0x100
RTM_NEWTCLASS, RTM_DELTCLASS = 40, 41
TC_H_ROOT, MAJOR, TENANT, REST = 0xFFFFFFFF, 0x10000, 1, 2
TCA_HTB_PARMS, TCA_HTB_INIT, TCA_HTB_RATE64, TCA_HTB_CEIL64, HTB_VERSION, TC_LINKLAYER_ETHERNET = 1, 2, 6, 7, 3, 1
TCA_FQ_CODEL_LIMIT, TCA_FQ_CODEL_MEMORY_LIMIT = 2, 9
TICK_NS, TICKS_MAX = 64, 2**32 - 1
"""A tick of the packet scheduler (net/pkt_sched.h, PSCHED_SHIFT)."""

UNLIMITED = BITS_MAX // 8
LEAF_RATE = 125
"""Bytes a second that each leaf has without borrowing; htb takes no 0."""
BURST_NS, BURST_MIN = 4_000_000, 3200
QUANTUM_MIN, QUANTUM_MAX = 3200, 65536
QUEUE_MIN, QUEUE_MAX = 128 << 10, 1 << 20
"""Bytes. The least takes two of the largest packets there are (64 KiB, cut up into frames later)."""
CODEL_PACKETS, CODEL_MEMORY = 1024, 4 << 20


class HtbClass(msgspec.Struct, frozen=True):
    """Rates in bytes a second, sizes in bytes. `queue`: how much a leaf may hold back; None where it is no leaf."""

    minor: int
    parent: int
    rate: int
    ceil: int
    quantum: int
    queue: int | None = None


Rates = dict[str, int]
"""By direction, bytes a second; a direction without a limit isn't in it."""


def rates_of(keys: dict[str, str]) -> Rates:
    """Of a tenant's configuration or a NIC's keys, which have been checked."""
    both = keys.get("limits.max")
    told = {direction: keys.get(f"limits.{direction}", both) for direction in DIRECTIONS}
    return {direction: parse_bit_rate(text) // 8 for direction, text in told.items() if text}


def rates_of_jail(jail: Jail) -> Rates:
    return rates_of(jail.devices.get("eth0", {}))


def shape_of(root: Root, tenant: Tenant, jail: Jail) -> dict[str, tuple[str, int]]:
    """As runtime/shaping.py takes it: directions in which the jail or its tenant has a rate, and their queues."""
    limited = rates_of(tenant.config).keys() | rates_of_jail(jail).keys()
    return {
        direction: (ifb_name(root, tenant.id, direction), MAJOR | _minor(jail))
        for direction in DIRECTIONS
        if direction in limited
    }


def ifb_name(root: Root, tenant_id: int, direction: str) -> str:
    """`i` and `e`, as bridges have `b` and veths `v`."""
    return f"{root.link_prefix}{direction[0]}{tenant_id:x}"


def _minor(jail: Jail) -> int:
    """Which id range of the host's the jail has: no two jails have the same, and 16 bits hold it."""
    return jail.idmap_base >> 16


def tenant_classes(total: int | None) -> list[HtbClass]:
    """Its own, and the leaf for what names no class, so that nothing passes by the total."""
    ceil = total or UNLIMITED
    return [HtbClass(TENANT, 0, ceil, ceil, _quantum(ceil)), _leaf(REST, ceil, ceil)]


def jail_class(jail: Jail, own: int | None, total: int | None) -> HtbClass:
    """A jail's leaf below its tenant's class; `own` and `total` are in bytes a second, None where there is no limit."""
    return _leaf(_minor(jail), min(own or UNLIMITED, total or UNLIMITED), total or UNLIMITED)


def _leaf(minor: int, ceil: int, total: int) -> HtbClass:
    """A tenth of a second's worth of packets wait at most; more would only come late."""
    return HtbClass(minor, TENANT, LEAF_RATE, ceil, _quantum(total), max(QUEUE_MIN, min(QUEUE_MAX, ceil // 10)))


def _quantum(total: int) -> int:
    """What a leaf sends before it is the next one's turn: five milliseconds of the total, in whole packets' sizes."""
    return max(QUANTUM_MIN, min(QUANTUM_MAX, total // 200))


def set_tenant(root: Root, tenant: Tenant, direction: str) -> None:
    """The ifb of a tenant, made where it isn't there, and its total as it is now. Idempotent. Raises JailmgrError."""
    name = ifb_name(root, tenant.id, direction)
    try:
        with netlink.RouteSocket() as here:
            index = _make(here, name)
            for wanted in tenant_classes(rates_of(tenant.config).get(direction)):
                _set(here, index, wanted)
    except OSError as error:
        raise _failed(tenant, error) from error


def set_jail(root: Root, tenant: Tenant, jail: Jail, direction: str) -> None:
    """A jail's class on its tenant's ifb, as its rate is now. Idempotent. Raises JailmgrError."""
    wanted = jail_class(jail, rates_of_jail(jail).get(direction), rates_of(tenant.config).get(direction))
    try:
        with netlink.RouteSocket() as here:
            _set(here, netlink.index_of(ifb_name(root, tenant.id, direction)), wanted)
    except OSError as error:
        raise _failed(tenant, error) from error


def remove_jail(root: Root, tenant: Tenant, jail: Jail, direction: str) -> None:
    """Takes a jail's class away; fine where there is none. Packets that name it yet are held to the tenant's total."""
    index = netlink.index_of(ifb_name(root, tenant.id, direction))
    if not index or not jail.idmap_base:
        return
    try:
        with netlink.RouteSocket() as here:
            here.ask(message(RTM_DELTCLASS, 0, tcmsg(index, MAJOR | _minor(jail), MAJOR | TENANT, 0, b"htb")))
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENODEV, errno.EINVAL}:
            raise _failed(tenant, error) from error


def is_made(root: Root, tenant: Tenant, direction: str) -> bool:
    return netlink.index_of(ifb_name(root, tenant.id, direction)) > 0


def remove(root: Root, name: str) -> None:
    """Deletes an ifb that `bridge.list_ifbs` told, with its classes; fine where it is gone. Raises JailmgrError."""
    if not name.startswith((f"{root.link_prefix}i", f"{root.link_prefix}e")):
        raise JailmgrError(f"ifb {name}", "not one of this instance", code="invalid")
    netlink.detach(name)


def _make(here: netlink.RouteSocket, name: str) -> int:
    """Up, with an htb for its root; gives its index. What was cut off in between is gone on with."""
    index = netlink.index_of(name)
    if not index:
        kind = attribute(netlink.IFLA_LINKINFO | NLA_F_NESTED, attribute(netlink.IFLA_INFO_KIND, b"ifb"))
        one = struct.pack("=I", 1)
        queues = attribute(netlink.IFLA_NUM_TX_QUEUES, one) + attribute(netlink.IFLA_NUM_RX_QUEUES, one)
        link = netlink.ifinfomsg() + attribute(netlink.IFLA_IFNAME, name.encode() + b"\0") + queues + kind
        here.ask(message(netlink.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, link))
        index = netlink.index_of(name)
    # Before it goes up, lest it get an IPv6 address and speak.
    mode = attribute(netlink.IFLA_INET6_ADDR_GEN_MODE, bytes([netlink.IN6_ADDR_GEN_MODE_NONE]))
    family = attribute(netlink.AF_INET6 | NLA_F_NESTED, mode)
    quiet = netlink.ifinfomsg(index) + attribute(netlink.IFLA_AF_SPEC | NLA_F_NESTED, family)
    here.ask(
        message(netlink.RTM_SETLINK, 0, quiet),
        message(netlink.RTM_SETLINK, 0, netlink.ifinfomsg(index, netlink.IFF_UP)),
    )
    # struct tc_htb_glob: version, rate2quantum, defcls, debug, direct_pkts.
    options = attribute(TCA_HTB_INIT, struct.pack("=5I", HTB_VERSION, 10, REST, 0, 0))
    qdisc = tcmsg(index, MAJOR, TC_H_ROOT, 0, b"htb") + attribute(TCA_OPTIONS | NLA_F_NESTED, options)
    with suppress(FileExistsError):
        here.ask(message(netlink.RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, qdisc))
    return index


def _set(here: netlink.RouteSocket, index: int, wanted: HtbClass) -> None:
    """Make a class, or change it: packets that wait in it stay."""
    own, parent = MAJOR | wanted.minor, MAJOR | wanted.parent
    parms = _ratespec(wanted.rate) + _ratespec(wanted.ceil)
    parms += struct.pack("=5I", _burst(wanted.rate), _burst(wanted.ceil), wanted.quantum, 0, 0)
    options = attribute(TCA_HTB_PARMS, parms)
    options += attribute(TCA_HTB_RATE64, struct.pack("=Q", wanted.rate))
    options += attribute(TCA_HTB_CEIL64, struct.pack("=Q", wanted.ceil))
    body = tcmsg(index, own, parent, 0, b"htb") + attribute(TCA_OPTIONS | NLA_F_NESTED, options)
    here.ask(message(RTM_NEWTCLASS, NLM_F_CREATE, body))
    if wanted.queue is None:
        return
    codel = attribute(TCA_FQ_CODEL_LIMIT, struct.pack("=I", CODEL_PACKETS))
    codel += attribute(TCA_FQ_CODEL_MEMORY_LIMIT, struct.pack("=I", CODEL_MEMORY))
    fifo = attribute(TCA_OPTIONS, struct.pack("=I", wanted.queue))
    for kind, options in ((b"fq_codel", attribute(TCA_OPTIONS | NLA_F_NESTED, codel)), (b"bfifo", fifo)):
        try:
            body = tcmsg(index, 0, own, 0, kind) + options
            here.ask(message(netlink.RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body))
        except FileNotFoundError:
            continue
        return


def _ratespec(rate: int) -> bytes:
    """struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate. No tables, since the layer is told."""
    return struct.pack("=BBHhHI", 0, TC_LINKLAYER_ETHERNET, 0, 0, 0, min(rate, 2**32 - 1))


def _burst(rate: int) -> int:
    """Ticks at that rate that may be sent at once: four milliseconds, two frames at least."""
    return min(TICKS_MAX, max(BURST_NS, BURST_MIN * 10**9 // rate) // TICK_NS)


def _failed(tenant: Tenant, error: OSError) -> JailmgrError:
    if error.errno in {errno.ENOENT, errno.EOPNOTSUPP}:
        why = f"the kernel has not all of ifb, sch_htb, cls_bpf and act_mirred ({error.strerror})"
        return JailmgrError(
            f"rates of tenant {tenant.name}", why, "Unset limits.ingress and limits.egress.", "unavailable"
        )
    return from_os(f"rates of tenant {tenant.name}", error)
