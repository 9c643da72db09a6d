"""Wall: what /dev/net/tun and /dev/fuse, which every jail has, give to guest root.

tun: the interface is of the jail's network namespace, and what it sends into the world goes by the jail's port.
FUSE: guest root is its own file server, and what waits for a FUSE server outlives SIGKILL. What holds: nothing of ours
but a child in the jail asks a file system of the guest's, and the supervisor aborts the jail's connections as it kills
it (runtime/fuse.py).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.runtime import attach, cgroups
from tests.security.guest import Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until
from tests.system.lan import udp4
from tests.system.traffic import NOTHING_WITHIN, bound, jail_netns

WITHIN = 10.0
OTHERS_WITHIN = 3.0
"""Seconds for what takes some 20 ms when nothing holds it up."""


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@contextmanager
def begun(guest: Guest, program: str, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the jail that has printed `ready`, and ends with its stdin or is killed."""
    words = ("exec", guest.jail, "--", guest.install(program), *argv)
    process = guest.jm.popen(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        assert line(process) == "ready"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def line(process: subprocess.Popen[bytes], within: float = WITHIN) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], within)[0], "nothing was printed"
    return process.stdout.readline().decode().strip()


@pytest.fixture
def guest(jm: Instance, busybox_jail: MakeJail, programs: Path) -> Guest:
    return Guest(jm, busybox_jail(), programs)


@contextmanager
def server(guest: Guest, *mode: str) -> Iterator[subprocess.Popen[bytes]]:
    """A FUSE server at /mnt/f in the jail; its file `slow` never answers (fuse.c)."""
    guest.sh("mkdir -p /mnt/f")
    with begun(guest, "fuse", "/mnt/f", *mode) as process:
        yield process


def test_a_guests_tun_works_and_pretends_no_more_than_eth0(jm: Instance, guest: Guest, busybox_jail: MakeJail) -> None:
    other = busybox_jail()
    ipv4 = {row["name"]: row["ipv4"] for row in jm.json("list")}
    with begun(guest, "tun") as tun, jail_netns(jm, guest.jail) as netns:
        guest.sh("ip addr add 10.99.0.1/24 dev tun0 && ip link set tun0 up")
        with bound(netns, socket.SOCK_DGRAM, 777, "10.99.0.1") as sock:
            sock.sendto(b"out", ("10.99.0.2", 7))
            ends = udp4("10.99.0.1", "10.99.0.2", b"", (777, 7))[12:24].hex()
            while not ((packet := line(tun)).startswith("45") and packet[24:48] == ends):
                pass  # the kernel's own packets: multicast of IPv6
            assert bytes.fromhex(packet[56:]) == b"out"
            give(tun, udp4("10.99.0.2", "10.99.0.1", b"back", (7, 777)))
            assert sock.recvfrom(16) == (b"back", ("10.99.0.2", 7))
        guest.sh(f"ping -c 1 -W 2 {ipv4[other]}; echo 1 > /proc/sys/net/ipv4/ip_forward")
        with jail_netns(jm, other) as there, bound(there, socket.SOCK_DGRAM, 777) as sock:
            sock.settimeout(NOTHING_WITHIN)
            before = sent_by_eth0(guest)
            for pretended in ("10.99.0.2", "192.0.2.1", ipv4[other].rpartition(".")[0] + ".77"):
                give(tun, udp4(pretended, ipv4[other], b"pretended", (7, 777)))
            until(lambda: sent_by_eth0(guest) >= before + 2, WITHIN, "what tun0 received is forwarded by eth0")
            with pytest.raises(TimeoutError):
                sock.recv(16)


def give(tun: subprocess.Popen[bytes], packet: bytes) -> None:
    assert tun.stdin is not None
    tun.stdin.write(packet.hex().encode() + b"\n")


def sent_by_eth0(guest: Guest) -> int:
    return int(guest.sh("cat /sys/class/net/eth0/statistics/tx_packets"))


@pytest.mark.parametrize("how", ["stop --force", "stop --timeout 1", "delete --force"])
def test_a_server_that_waits_for_itself_ends_with_its_jail(
    jm: Instance, guest: Guest, busybox_jail: MakeJail, how: str
) -> None:
    """Mechanism: the supervisor writes to the `abort` of each connection that an id of the jail's has made.

    A connection of another jail's is none of them.
    """
    other = Guest(jm, busybox_jail(), guest.programs)
    with server(other), server(guest, "knot") as knot:
        assert line(knot) == "kept"
        begin = time.monotonic()
        jm(*how.split(), guest.jail, within=30)
        assert time.monotonic() - begin < WITHIN
        assert other.sh("ls /mnt/f/none 2>&1 | grep -c 'No such file'") == "1\n"
    if how.startswith("delete"):
        jm("launch", "busybox", guest.jail)


def test_a_file_that_never_answers_holds_up_nobody(jm: Instance, guest: Guest, busybox_jail: MakeJail) -> None:
    """`cp` of it can be interrupted; supervisor, engine and the tenant's other jails go on; the jail can be stopped."""
    other = busybox_jail()
    with server(guest) as fuse:
        for source in (f"{guest.jail}:/mnt/f/slow1", f"{guest.jail}:/mnt/f"):
            copying = jm.popen("cp", source, str(guest.programs / "out"), stderr=subprocess.DEVNULL)
            assert line(fuse) == "kept"
            served(jm, guest, other)
            copying.send_signal(signal.SIGINT)
            assert copying.wait(OTHERS_WITHIN) != 0
        looking = jm.popen("exec", guest.jail, "--", "stat", "/mnt/f/slow2", stdout=subprocess.DEVNULL)
        assert line(fuse) == "kept"
        served(jm, guest, other)
        looking.kill()
        looking.wait()
        served(jm, guest, other)
        begin = time.monotonic()
        jm("stop", "--force", guest.jail)
        assert time.monotonic() - begin < WITHIN
    assert jm("cp", f"{guest.jail}:/etc/passwd", "-").out


def served(jm: Instance, guest: Guest, other: str) -> None:
    begin = time.monotonic()
    for jail in (guest.jail, other):
        assert jm.exec(jail, "echo", "here", within=OTHERS_WITHIN).out == "here\n"
        assert jm.info(jail)["usage"]["disk_bytes"] is not None
    assert time.monotonic() - begin < 2 * OTHERS_WITHIN


def test_a_server_on_proc_holds_up_the_supervisor_for_seconds_only(jm: Instance, guest: Guest) -> None:
    """As it puts another lxcfs' files into jails, the supervisor's child asks what /proc is (runtime/lxcfs.py)."""
    with begun(guest, "fuse", "/proc") as fuse, attach.connect(jm.root, "default") as supervisor:
        begin = time.monotonic()
        assert supervisor.ask("renew_lxcfs", mounted="/nonexistent", within=WITHIN).body == {"failed": [guest.jail]}
        assert line(fuse) == "kept"
        assert time.monotonic() - begin < OTHERS_WITHIN
        jm("stop", "--force", guest.jail)


def test_what_writes_is_held_though_another_waits_for_a_server(jm: Instance, guest: Guest) -> None:
    """The freezer can't stop who waits for a FUSE server; the disk's guard has all others stay stopped."""
    hierarchies = cgroups.discover()
    cgroup = f"{jm.root.cgroup}/default/{guest.jail}"
    with server(guest) as fuse:
        guest.sh("cat /mnt/f/slow >/dev/null 2>&1 & while :; do :; done >/dev/null 2>&1 &")
        assert line(fuse) == "kept"
        try:
            with pytest.raises(JailmgrError):
                cgroups.freeze(hierarchies, cgroup, 0.5, keep=True)
            used = cgroups.usage(hierarchies, cgroup)[1]
            select.select([], [], [], 0.3)
            assert cgroups.usage(hierarchies, cgroup)[1] == used
        finally:
            cgroups.thaw(hierarchies, cgroup)
        until(lambda: cgroups.usage(hierarchies, cgroup)[1] != used, WITHIN, "it runs on")
        jm("stop", "--force", guest.jail)


def test_the_nodes_are_the_jails_own(jm: Instance, guest: Guest, busybox_jail: MakeJail) -> None:
    """Guest root may change those of his jail: not the host's, nor another jail's. None can be multiplied."""
    other = busybox_jail()
    nodes = ("/dev/net/tun", "/dev/fuse")
    before = [(at.st_mode, at.st_uid, at.st_rdev) for at in map(os.stat, nodes)]
    guest.sh("chmod 0600 /dev/fuse; chown 7:7 /dev/net/tun; ln /dev/fuse /dev/fuse2 2>/dev/null; mv /dev/fuse /x", None)
    assert guest.sh("stat -c '%F %a %u:%g %t:%T' /dev/net/tun /dev/fuse") == (
        "character special file 666 7:7 a:c8\ncharacter special file 600 0:0 a:e5\n"
    )
    assert [(at.st_mode, at.st_uid, at.st_rdev) for at in map(os.stat, nodes)] == before
    assert jm.sh(other, "stat -c '%a %u:%g' /dev/net/tun /dev/fuse").out == "666 0:0\n666 0:0\n"
    assert guest.ask(("mknodat", -100, "/dev/net/tap", 0o020666, os.makedev(10, 200)))[0] in ("EPERM", "EACCES")
