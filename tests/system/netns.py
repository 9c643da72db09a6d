"""A network namespace for a test session, with a way out of its own and an outside world it made itself.

    jails - bridges of jailmgr - [this namespace] - up0 - the host, masqueraded - mirrors
                                                  - in0 - out0 [outside: 198.19.0.1, 2001:db8:1::1]

Nothing outside knows a way back to a jail: what is answered from there was masqueraded.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from jailmgr.runtime.syscalls import CLONE_NEWNET, setns, unshare

FORWARD = "/proc/sys/net/ipv4/ip_forward"
FORWARD_BEFORE = "/run/jailmgr-tests.ip_forward"
"""What `FORWARD` said before the first of the test sessions now running; its lock is held by each of them."""
LINKS = "198.18.0.0/16"
"""For links to the host: RFC 2544 sets 198.18.0.0/15 aside for tests."""
OUTSIDE = ("198.19.0.1", "2001:db8:1::1")
"""The outside world's addresses (RFC 2544, RFC 3849)."""
INSIDE = ("198.19.0.2", "2001:db8:1::2")
"""What it sees masqueraded traffic come from."""


class Netns(NamedTuple):
    """Namespaces by their fds: the test session's own, the host's, and the outside world's."""

    own: int
    host: int
    outside: int


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """Be in another network namespace (this thread only): sockets made here stay in it."""
    before = _here()
    try:
        setns(fd, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(before, CLONE_NEWNET)
    finally:
        os.close(before)


def _here() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _new_namespace() -> int:
    """Move this thread into a new network namespace, whose loopback is up; gives its fd."""
    unshare(CLONE_NEWNET)
    run("ip", "link", "set", "lo", "up")
    return _here()


def run(*argv: str, stdin: str | None = None) -> str:
    """A command's stdout; AssertionError with its stderr when it fails."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


@contextmanager
def session_namespace() -> Iterator[Netns]:
    """Move this thread into a new network namespace, and back at the end; the host is left as it was."""
    with ExitStack() as undo:
        host = _here()
        undo.callback(os.close, host)
        undo.callback(setns, host, CLONE_NEWNET)
        outside = _new_namespace()
        undo.callback(os.close, outside)
        own = _new_namespace()
        undo.callback(os.close, own)
        _veth("in0", "out0", outside)
        _addresses("in0", INSIDE)
        with inside(outside):
            _addresses("out0", OUTSIDE)
        undo.enter_context(_forwarding(host))
        undo.enter_context(_uplink(host))
        yield Netns(own, host, outside)


def _veth(name: str, peer: str, peer_netns: int) -> None:
    run(
        "ip", "link", "add", name, "type", "veth", "peer", "name", peer, "netns", f"/proc/{os.getpid()}/fd/{peer_netns}"
    )


def _addresses(link: str, addresses: tuple[str, str]) -> None:
    ipv4, ipv6 = addresses
    run("ip", "address", "add", f"{ipv4}/24", "dev", link)
    run("ip", "address", "add", f"{ipv6}/64", "dev", link, "nodad")
    run("ip", "link", "set", link, "up")


@contextmanager
def _forwarding(host: int) -> Iterator[None]:
    """The host forwards IPv4 while any test session runs; the last one to end puts back what was."""
    with inside(host):
        lock, first = _lock_note()
        if first:
            with open(FORWARD, encoding="ascii") as file:
                before = file.read().strip()
            if os.fstat(lock).st_size == 0:  # else a killed session left its note of what was
                os.write(lock, before.encode())
            _write(FORWARD, "1")
            fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        yield
    finally:
        with inside(host):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                _write(FORWARD, os.pread(lock, 8, 0).decode())
                os.unlink(FORWARD_BEFORE)
        os.close(lock)


def _lock_note() -> tuple[int, bool]:
    """The locked note that is there now (not one that its last holder has just unlinked); whether we are the first."""
    while True:
        lock = os.open(FORWARD_BEFORE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            first = True
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH)
            first = False
        try:
            if os.path.samestat(os.fstat(lock), os.stat(FORWARD_BEFORE)):
                return lock, first
        except FileNotFoundError:
            pass
        os.close(lock)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


@contextmanager
def _uplink(host: int) -> Iterator[None]:
    """A veth to the host and a default route over it, masqueraded by a table of our own; mirrors need it."""
    link = f"jmt{os.getpid()}"
    _veth("up0", link, host)
    try:
        with inside(host):
            with _alone():
                _sweep()
                at, gateway = _free_link()
                run("ip", "address", "add", f"{gateway}/30", "dev", link)
            run("ip", "link", "set", link, "up")
            chain = "type nat hook postrouting priority srcnat"
            rule = f'ip saddr {at} oifname != "{link}" masquerade'
            run("nft", "-f", "-", stdin=f"table ip {link} {{\nchain out {{\n{chain};\n{rule}\n}}\n}}\n")
        run("ip", "address", "add", f"{at}/30", "dev", "up0")
        run("ip", "link", "set", "up0", "up")
        run("ip", "route", "add", "default", "via", str(gateway))
        yield
    finally:
        run("ip", "link", "delete", "up0")
        with inside(host):
            run("nft", "-f", "-", stdin=f"add table ip {link}\ndelete table ip {link}")


def _free_link() -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
    """Our address and the host's on a /30 that no address of the host is in."""
    taken = [
        ipaddress.ip_address(address["local"])
        for link in json.loads(run("ip", "-json", "-4", "address", "show"))
        for address in link["addr_info"]
    ]
    for subnet in ipaddress.IPv4Network(LINKS).subnets(new_prefix=30):
        if not any(address in subnet for address in taken):
            return subnet[2], subnet[1]
    raise AssertionError(f"no free /30 in {LINKS}")


@contextmanager
def _alone() -> Iterator[None]:
    """No other test session of this host chooses its link meanwhile; a lock on a directory leaves no file."""
    run_directory = os.open("/run", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(run_directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(run_directory)


def _sweep() -> None:
    """Remove the tables of sessions that were killed; their links went with their namespaces."""
    for entry in json.loads(run("nft", "--json", "list", "tables"))["nftables"]:
        name = entry.get("table", {}).get("name", "")
        pid = name.removeprefix("jmt")
        if name.startswith("jmt") and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            run("nft", "delete", "table", "ip", name)
