"""Names inside of a network: its jails', and the world's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.network import dns
from jailmgr.runtime.syscalls import CLONE_NEWNET, setns
from tests.system import lan as world
from tests.system.lan import OUTSIDE4, Lan, Netns

A, PTR, AAAA = 1, 12, 28
NOERROR, NXDOMAIN = 0, 3
WORLDS = "192.0.2.80"
"""What the outside's name server says to every question."""


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    # Not below pytest's own directory, which others may not enter: dnsmasq's user reads the file again when it changes.
    at = Path(tempfile.mkdtemp(prefix="jm-dns-", dir="/tmp"))
    at.chmod(0o755)
    resolv_conf = at / "resolv.conf"
    resolv_conf.write_text(f"nameserver {OUTSIDE4}\n")
    with pytest.MonkeyPatch.context() as patch, world.lan(at) as made, name_server(made.outside):
        patch.setattr(dns, "RESOLV_CONF", str(resolv_conf))
        yield made
    shutil.rmtree(at)


@contextmanager
def name_server(netns: Netns) -> Iterator[None]:
    """Says WORLDS to whoever asks for an IPv4 address (RFC 1035, 4)."""

    def serve() -> None:
        while True:
            asked, peer = listening.recvfrom(512)
            if not asked:
                return
            answer = b"\xc0\x0c" + struct.pack("!HHIH", A, 1, 60, 4) + socket.inet_aton(WORLDS)
            end = asked.index(b"\0", 12) + 5
            kind = struct.unpack_from("!H", asked, end - 4)[0]
            counts = struct.pack("!HHHHH", 0x8180, 1, kind == A, 0, 0)
            listening.sendto(asked[:2] + counts + asked[12:end] + (answer if kind == A else b""), peer)

    with netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind((OUTSIDE4, 53))
        listening.settimeout(None)
        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield
        finally:
            with netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
                ending.sendto(b"", (OUTSIDE4, 53))
            serving.join()


def resolve(netns: Netns, server: str, name: str, kind: int, protocol: str = "udp") -> tuple[int, list[str]]:
    """Response code and addresses (RFC 1035, 4). Raises OSError."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    question = struct.pack("!HHHHHH", 0x4A4D, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!HH", kind, 1)
    udp = protocol == "udp"
    with netns.socket(world.family_of(server), socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as asking:
        asking.settimeout(world.WAIT_S)
        asking.connect((server, 53))
        asking.sendall(question if udp else struct.pack("!H", len(question)) + question)
        answer = asking.recv(4096)
    answer = answer if udp else answer[2:]
    flags, _, answers = struct.unpack_from("!HHH", answer, 2)
    found, rest = [], answer[len(question) :]
    for _ in range(answers):
        # Each name is a pointer to the question's: two bytes.
        got, _, _, length = struct.unpack_from("!HHIH", rest, 2)
        if got in {A, AAAA}:
            found.append(socket.inet_ntop(socket.AF_INET if got == A else socket.AF_INET6, rest[12 : 12 + length]))
        rest = rest[12 + length :]
    return flags & 0xF, found


def names(lan: Lan, **more: tuple[str, str]) -> dict[str, tuple[str, str]]:
    return {"web": (lan.a.nic.ipv4, lan.a.nic.ipv6), "db": (lan.b.nic.ipv4, lan.b.nic.ipv6)} | more


def pid_of(lan: Lan) -> int:
    return int(Path(lan.root.run, "dns", str(lan.first.id), "pid").read_text())


@pytest.fixture
def running(lan: Lan) -> Iterator[tuple[str, str]]:
    """The first network's own addresses, with a name server there that knows `web` and `db`."""
    lan.host.run(dns.ensure_dns, lan.root, lan.first, names(lan))
    yield lan.first.ipv4.partition("/")[0], lan.first.ipv6.partition("/")[0]
    lan.host.run(dns.stop_dns, lan.root, lan.first.id)


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_jails_names(lan: Lan, running: tuple[str, str], protocol: str) -> None:
    for server in running:
        for name in ("web", f"web.{dns.DOMAIN}"):
            assert resolve(lan.b.netns, server, name, A, protocol) == (NOERROR, [lan.a.nic.ipv4])
            assert resolve(lan.b.netns, server, name, AAAA, protocol) == (NOERROR, [lan.a.nic.ipv6])


def test_the_worlds_names(lan: Lan, running: tuple[str, str]) -> None:
    assert resolve(lan.a.netns, running[0], "www.example.org", A) == (NOERROR, [WORLDS])


def test_names_that_are_none_stay_inside(lan: Lan, running: tuple[str, str]) -> None:
    """The outside's server would have said something."""
    assert resolve(lan.a.netns, running[0], f"nobody.{dns.DOMAIN}", A) == (NXDOMAIN, [])
    assert resolve(lan.a.netns, running[0], "nobody", A) == (NXDOMAIN, [])
    own = ".".join(reversed(lan.first.ipv4.partition("/")[0].split(".")[:3])) + ".in-addr.arpa"
    assert resolve(lan.a.netns, running[0], f"200.{own}", PTR) == (NXDOMAIN, [])


def test_the_hosts_own_names_are_not_told(lan: Lan, running: tuple[str, str]) -> None:
    assert resolve(lan.a.netns, running[0], socket.gethostname().partition(".")[0], A) == (NXDOMAIN, [])


def test_another_networks_server_does_not_answer(lan: Lan, running: tuple[str, str]) -> None:
    for server in running:
        with pytest.raises(OSError):  # noqa: PT011  (refused or unreachable, as the family has it)
            resolve(lan.c.netns, server, "web", A)


def test_the_outside_gets_no_answer(lan: Lan, running: tuple[str, str]) -> None:
    lan.outside.ip(f"route add {running[0]} via {world.HOST4}")
    try:
        with lan.outside.socket(socket.AF_INET) as asking:
            asking.settimeout(world.REFUSED_S)
            with pytest.raises(OSError):  # noqa: PT011
                asking.connect((world.HOST4, 53))
    finally:
        lan.outside.ip(f"route del {running[0]}")


def test_names_come_and_go(lan: Lan, running: tuple[str, str]) -> None:
    before = pid_of(lan)
    lan.host.run(dns.ensure_dns, lan.root, lan.first, {"mail": ("10.1.1.1", "fd00::25")})
    # The signal is taken before the next packet is: dnsmasq blocks in one poll(2) for both.
    until_resolved(lan, running[0], "mail", ["10.1.1.1"])
    assert resolve(lan.a.netns, running[0], "web", A) == (NXDOMAIN, [])
    assert pid_of(lan) == before


def until_resolved(lan: Lan, server: str, name: str, wanted: list[str]) -> None:
    for _ in range(100):
        if resolve(lan.a.netns, server, name, A)[1] == wanted:
            return
    pytest.fail(f"{name} did not become {wanted}")


def test_one_that_was_killed_is_started_again(lan: Lan, running: tuple[str, str]) -> None:
    before = pid_of(lan)
    pidfd = os.pidfd_open(before)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert dns._ready(pidfd, 5)
    os.close(pidfd)
    lan.host.run(dns.ensure_dns, lan.root, lan.first, names(lan))
    assert pid_of(lan) != before
    assert resolve(lan.a.netns, running[0], "web", A) == (NOERROR, [lan.a.nic.ipv4])


def test_one_of_another_version_is_replaced(lan: Lan, running: tuple[str, str]) -> None:
    before = pid_of(lan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dns, "DOMAIN", "other")
        lan.host.run(dns.ensure_dns, lan.root, lan.first, names(lan))
        assert pid_of(lan) != before
        assert resolve(lan.a.netns, running[0], "web.other", A) == (NOERROR, [lan.a.nic.ipv4])


def test_a_strangers_pid_in_the_file_is_left_alone(lan: Lan, running: tuple[str, str]) -> None:
    lan.host.run(dns.stop_dns, lan.root, lan.first.id)
    place = Path(lan.root.run, "dns", str(lan.first.id))
    place.mkdir(parents=True)
    (place / "pid").write_text(f"{os.getpid()}\n")
    lan.host.run(dns.ensure_dns, lan.root, lan.first, names(lan))
    assert pid_of(lan) != os.getpid()


def test_it_is_found_again_and_is_nobodys_child(lan: Lan, running: tuple[str, str]) -> None:
    before = pid_of(lan)
    lan.host.run(dns.ensure_dns, lan.root, lan.first, names(lan))
    assert pid_of(lan) == before
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{before}/status").read_text().splitlines())
    assert int(status["PPid"]) != os.getpid()
    assert status["Uid"].split()[0] != "0"
    assert dns.list_dns(lan.root) == [lan.first.id]


def test_it_is_not_root_and_reads_names_behind_a_closed_door(lan: Lan, running: tuple[str, str]) -> None:
    assert Path(lan.root.run).stat().st_mode & 0o777 == 0o700
    lan.host.run(dns.ensure_dns, lan.root, lan.first, names(lan, late=("10.2.2.2", "fd00::22")))
    until_resolved(lan, running[0], "late", ["10.2.2.2"])


def test_a_port_that_is_taken_is_told(lan: Lan) -> None:
    own = lan.first.ipv4.partition("/")[0]
    with world.server(lan.host, own, 53), pytest.raises(JailmgrError, match="Address already in use"):
        lan.host.run(dns.ensure_dns, lan.root, lan.first, names(lan))
    lan.host.run(dns.stop_dns, lan.root, lan.first.id)


def test_threads_start_one(lan: Lan) -> None:
    failed: list[BaseException] = []

    def ensure() -> None:
        try:
            setns(lan.host.fd, CLONE_NEWNET)
            dns.ensure_dns(lan.root, lan.first, names(lan))
        except BaseException as error:  # noqa: BLE001  (a thread's, for the test to tell)
            failed.append(error)

    threads = [threading.Thread(target=ensure) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert resolve(lan.a.netns, lan.first.ipv4.partition("/")[0], "web", A) == (NOERROR, [lan.a.nic.ipv4])
    lan.host.run(dns.stop_dns, lan.root, lan.first.id)
    assert not Path(lan.root.run, "dns").exists()
    lan.host.run(dns.stop_dns, lan.root, lan.first.id)
