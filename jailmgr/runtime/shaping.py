"""A jail's packets led through its tenant's queues: a tc-bpf(8) filter on the host's end of its veth pair.

The filter puts the packet's class into `skb->priority` and hands the packet to the ifb that has the classes
(tc-mirred(8)). A priority that names a class of the qdisc needs no filter there (tc-htb(8), CLASSIFICATION): what a
jail sends is charged by the port it comes in by, whatever is in it. BPF, since not every kernel has skbedit and
matchall.

What the jail sends also gets a mark, without which its bridge lets nothing in (network/rules.py). Guest root can have a
packet skip the host's filters: an ifb of its own sets `skb->tc_skip_classify`, which outlives the way over the veth
pair. A mark doesn't.

Numbers are those of linux/pkt_cls.h, linux/tc_act/tc_mirred.h and linux/bpf.h. Standard library only.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
from collections.abc import Iterable, Mapping

from jailmgr.errors import JailmgrError
from jailmgr.runtime import bpf
from jailmgr.runtime.netlink import (
    CLSACT_INGRESS,
    NLA_F_NESTED,
    NLM_F_CREATE,
    RTM_NEWTFILTER,
    TCA_OPTIONS,
    RouteSocket,
    attribute,
    index_of,
    message,
    tcmsg,
)  # fmt: skip

MARK = 0x6A61696C
"""`jail`. The bridge takes it off again, and the priority, before anybody else sees the packet."""
DIRECTIONS = ("ingress", "egress")
"""Of the jail: what it receives, what it sends."""

RTM_DELTFILTER, CLSACT_EGRESS, ETH_P_ALL = 45, 0xFFFFFFF3, 0x0003
TCA_BPF_ACT, TCA_BPF_FD, TCA_BPF_NAME = 1, 6, 7
TCA_ACT_KIND, TCA_ACT_OPTIONS, TCA_MIRRED_PARMS, TCA_EGRESS_REDIR, TC_ACT_STOLEN = 1, 2, 2, 1, 4
PROG_TYPE_SCHED_CLS, SKB_MARK, SKB_PRIORITY = 3, 8, 32
"""The last two: offsets in struct __sk_buff."""
PREFERENCE, HANDLE = 2, 1
"""Behind the filter that netlink.guard_loopback puts there: what is redirected passes no further one."""

_HOOKS = {"ingress": CLSACT_EGRESS, "egress": CLSACT_INGRESS}
_RESULT, _CONTEXT, _VALUE = 0, 1, 2


def program(classid: int, mark: int = 0) -> bytes:
    """BPF instructions that set a packet's priority, and its mark where there is one, and match every packet."""
    code = [
        bpf.instruction(bpf.MOV_IMM, _VALUE, immediate=classid),
        bpf.instruction(bpf.STX_W, _CONTEXT, _VALUE, SKB_PRIORITY),
    ]
    if mark:
        code += [
            bpf.instruction(bpf.MOV_IMM, _VALUE, immediate=mark),
            bpf.instruction(bpf.STX_W, _CONTEXT, _VALUE, SKB_MARK),
        ]
    return b"".join([*code, bpf.instruction(bpf.MOV_IMM, _RESULT, immediate=-1), bpf.instruction(bpf.EXIT)])


def attach(veth: str, shape: Mapping[str, tuple[str, int]]) -> None:
    """Leads a jail's packets through queues. `shape`: by direction, an ifb and the class on it. Idempotent.

    Fine where there is no such veth. An ifb there is not is passed over: who makes them, the manager, attaches again
    when it hears of the jail's start. Raises JailmgrError.
    """
    try:
        with RouteSocket() as here:
            port = index_of(veth)
            for direction, (ifb, classid) in shape.items():
                queues = index_of(ifb)
                if port and queues:
                    _attach(here, port, direction, queues, classid)
    except OSError as error:
        why, hint = error.strerror or str(error), "`jailmgr doctor` tells what is missing."
        raise JailmgrError(f"rates of {veth}", why, hint) from error


def detach(veth: str, directions: Iterable[str]) -> None:
    """Takes filters off again; fine where there are none. Raises JailmgrError."""
    try:
        with RouteSocket() as here:
            port = index_of(veth)
            for direction in directions:
                if port:
                    _detach(here, port, direction)
    except OSError as error:
        raise JailmgrError(f"rates of {veth}", error.strerror or str(error)) from error


def _attach(here: RouteSocket, port: int, direction: str, queues: int, classid: int) -> None:
    loaded = bpf.load(PROG_TYPE_SCHED_CLS, program(classid, MARK if direction == "egress" else 0), "jailmgr_shape")
    try:
        # struct tc_mirred: index, capab, action, refcnt, bindcnt; eaction, ifindex.
        mirred = struct.pack("=IIiiiiI", 0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, queues)
        redirect = attribute(TCA_MIRRED_PARMS, mirred)
        action = attribute(TCA_ACT_KIND, b"mirred\0") + attribute(TCA_ACT_OPTIONS | NLA_F_NESTED, redirect)
        options = attribute(TCA_BPF_FD, struct.pack("=I", loaded)) + attribute(TCA_BPF_NAME, b"jailmgr\0")
        options += attribute(TCA_BPF_ACT | NLA_F_NESTED, attribute(1 | NLA_F_NESTED, action))
        body = _filter(port, direction) + attribute(TCA_OPTIONS | NLA_F_NESTED, options)
        here.ask(message(RTM_NEWTFILTER, NLM_F_CREATE, body))
    finally:
        os.close(loaded)


def _detach(here: RouteSocket, port: int, direction: str) -> None:
    try:
        here.ask(message(RTM_DELTFILTER, 0, _filter(port, direction)))
    except OSError as error:
        # ENODEV: the veth has gone with its jail. EINVAL: it has no filters at all.
        if error.errno not in {errno.ENOENT, errno.ENODEV, errno.EINVAL}:
            raise


def _filter(port: int, direction: str) -> bytes:
    return tcmsg(port, HANDLE, _HOOKS[direction], PREFERENCE << 16 | _socket.htons(ETH_P_ALL), b"bpf")
