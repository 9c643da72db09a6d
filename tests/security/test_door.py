"""The door for users who are not root: what they send holds up nobody but themselves, and it outlives what it can."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from jailmgr.runtime import protocol
from jailmgr.runtime.notify import SO_PASSRIGHTS
from jailmgr.runtime.syscalls import libc
from tests.system.instance import Instance, alive, kill, terminal, until
from tests.system.leftovers import processes
from tests.system.users import ALICE, BOB, alices_tenant, as_user, become, connected, run_as, session

PIDFD_GETFD = 438
LINGER_SECONDS = 20
AT_ONCE = 3.0
"""Seconds, of a busy machine, for what takes some tenths."""
MUCH = 10 << 20


@pytest.fixture
def tenant(jm: Instance) -> Iterator[str]:
    with alices_tenant(jm) as name:
        yield name


def of_door(jm: Instance, name: str) -> list[int]:
    """The instance's processes of that name: jailmgr-door, jailmgr-relay."""
    found = []
    for pid, _ in processes(jm.root):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", encoding="ascii") as file:
            if file.read().strip() == name:
                found.append(pid)
    return found


def doorkeeper_of(jm: Instance) -> int:
    return int(until(lambda: of_door(jm, "jailmgr-door"), 10, "a doorkeeper")[0])


def kernel_forbids() -> bool:
    """Whether the kernel knows SO_PASSRIGHTS."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return False
    return True


def as_of_an_older_kernel(jm: Instance) -> None:
    """Users may send fds to the door, as where the kernel can't forbid it (before 6.16)."""
    if not kernel_forbids():
        return
    pidfd = os.pidfd_open(doorkeeper_of(jm))
    try:
        for number in range(1, 64):
            fd = libc.syscall(ctypes.c_long(PIDFD_GETFD), pidfd, number, 0)
            if fd < 0:
                continue
            try:
                with socket.socket(fileno=fd) as sock:
                    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 1)
            except OSError:
                os.close(fd)
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def lingering() -> Iterator[socket.socket]:
    """A TCP socket whose last close takes LINGER_SECONDS: who is at its other end reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        deaf, _ = listener.accept()
        with deaf:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(1 << 20))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_SECONDS))
            yield sock


def seconds_of(jm: Instance, tenant: str) -> float:
    """How long root and Alice are waiting for a list."""
    began = time.monotonic()
    jm("list")
    run_as(jm, ALICE, "--tenant", tenant, "list")
    return time.monotonic() - began


def at_once(jm: Instance, tenant: str) -> float:
    """AT_ONCE, but on an emulated processor: that takes seconds with nobody in the way."""
    return max(AT_ONCE, 3 * seconds_of(jm, tenant))


def test_files_that_come_along_hold_up_nobody(jm: Instance, tenant: str) -> None:
    """Some of them where they are read, some only in what is closed."""
    as_of_an_older_kernel(jm)
    limit = at_once(jm, tenant)
    with contextlib.ExitStack() as held:
        kinds = [(socket.SOCK_STREAM, "engine.sock"), (socket.SOCK_SEQPACKET, protocol.SESSIONS)] * 3
        for count, (kind, name) in enumerate(kinds):
            tcp = held.enter_context(lingering())
            with socket.socket(socket.AF_UNIX, kind) as sock:
                with as_user(BOB):
                    sock.connect(f"{jm.root.users}/{name}")
                said = [b"{}"] if name == protocol.SESSIONS else [b"GET / HT", b"TP/1.1\r\nHost: x\r\n\r\n"]
                for part in said[:count]:
                    sock.send(part)
                socket.send_fds(sock, [b"\n"], [tcp.fileno()])
            tcp.close()
        assert seconds_of(jm, tenant) < limit
        until(lambda: not of_door(jm, "jailmgr-relay"), limit, "his relays end")


def test_files_that_come_along_with_a_session_end_it(jm: Instance, tenant: str) -> None:
    """They never come to the tenant's supervisor, on none of the ways to it."""
    as_of_an_older_kernel(jm)
    limit = at_once(jm, tenant)
    with lingering() as tcp:
        sock, answer = session(jm, ALICE, tenant, "web")
        assert "error" not in answer
        fds = struct.pack("i", tcp.fileno())
        sock.sendmsg([b'{"v": 1, "op": "hello"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        tcp.close()
        with contextlib.closing(sock), contextlib.suppress(ConnectionResetError):
            assert protocol.receive(sock) is None
        began = time.monotonic()
        assert jm.exec(f"{tenant}/web", "echo", "here").out == "here\n"
        assert time.monotonic() - began < limit
    sock, _ = session(jm, ALICE, tenant, "web")
    with contextlib.closing(sock):
        protocol.send(sock, {"v": protocol.VERSION, "op": "console", "jail": "web", "typed": True})
        console = protocol.receive(sock)
        assert console is not None
        with socket.socket(fileno=console.fds[0]) as stream, pytest.raises(BrokenPipeError):
            stream.send(b"typed")


def test_the_kernel_takes_no_files_where_it_can(jm: Instance, tenant: str) -> None:
    with socket.socket() as probe, contextlib.closing(connected(jm, BOB)) as sock:
        if not kernel_forbids():
            pytest.skip("before Linux 6.16")
        assert sock.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS) == 1, "his own end takes them"
        with pytest.raises(PermissionError):
            socket.send_fds(sock, [b"x"], [probe.fileno()])


def test_connections_without_end(jm: Instance, tenant: str) -> None:
    """Idle ones, of either kind: the engine has few of them, and none for good."""
    engine, limit = jm.engine_pid(), at_once(jm, tenant)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with contextlib.ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(600):
            held.enter_context(contextlib.closing(connected(jm, BOB)))
        for _ in range(100):
            with as_user(BOB):
                held.enter_context(contextlib.closing(protocol.connect(jm.root.users, protocol.SESSIONS)))
        assert seconds_of(jm, tenant) < limit
        assert len(os.listdir(f"/proc/{engine}/fd")) < 200
        assert len(of_door(jm, "jailmgr-relay")) < 150
        refused = run_as(jm, BOB, "tenant", "list", status=1)
        assert "too many connections" in refused.err
    until(lambda: not of_door(jm, "jailmgr-relay"), 10, "no relay is left")
    # The engine reads the end of each connection after its relay has gone.
    until(lambda: len(os.listdir(f"/proc/{engine}/fd")) < 60, 10, "the engine has closed its ends")


def test_exec_by_pipes(jm: Instance, tenant: str) -> None:
    web = f"{tenant}/web"
    much = os.urandom(MUCH // 2).hex().encode()
    echoed = run_as(jm, ALICE, "exec", web, "--", "cat", stdin=much)
    assert echoed.out.encode() == much
    both = run_as(jm, ALICE, "exec", web, "--", "sh", "-c", "tee /dev/stderr; exit 7", stdin=much, status=7)
    assert (both.out.encode(), both.err.encode()) == (much, much)
    left = run_as(jm, ALICE, "exec", web, "--", "sh", "-c", "echo begun; sleep 1000 & exit 3", status=3)
    assert left.out == "begun\n"
    assert run_as(jm, ALICE, "exec", web, "--", "no-such-program", status=127).out == ""
    assert run_as(jm, ALICE, "exec", web, "--", "true", stdin=much).out == ""
    run_as(jm, ALICE, "cp", "-", f"{web}:/root/much", stdin=much)
    assert run_as(jm, ALICE, "cp", f"{web}:/root/much", "-").out.encode() == much
    jm.exec(web, "killall", "sleep")


def test_exec_takes_signals_and_ends_with_its_reader(jm: Instance, tenant: str) -> None:
    script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done"
    with executing(jm, tenant, "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.wait(20) == 9
    with executing(jm, tenant, "yes") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(20) != 0


@contextlib.contextmanager
def executing(jm: Instance, tenant: str, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """Alice's `exec`, with pipes."""
    process = subprocess.Popen(
        [*become(ALICE), "exec", f"{tenant}/web", "--", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=jm.environment(),
        bufsize=0,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_a_terminal_and_the_console(jm: Instance, tenant: str) -> None:
    with terminal(jm, "exec", f"{tenant}/web", "--", "sh", command=become(ALICE)) as term:
        term.prompt()
        term.write(b"tty; exit 4\n")
        term.expect(b"/dev/pts/")
        assert term.wait() == 4
    with terminal(jm, "console", f"{tenant}/web", command=become(ALICE)) as term:
        term.expect(b"leaves it")
        term.prompt()
        term.write(b"echo se''en\n")
        term.expect(b"seen")
        term.write(b"\x1d\x1d\x1d")
        assert term.wait() == 0


def test_what_is_open_outlives_the_engine(jm: Instance, tenant: str) -> None:
    with executing(jm, tenant, "cat") as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def echoes(text: bytes) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(text)
            assert process.stdout.readline() == text

        echoes(b"before\n")
        door = doorkeeper_of(jm)
        kill(jm.engine_pid())
        until(lambda: not alive(door), 10, "the doorkeeper ends with its engine")
        echoes(b"no engine\n")
        assert run_as(jm, ALICE, "--tenant", tenant, "list", status=1).out == ""
        jm("list")
        assert run_as(jm, ALICE, "exec", f"{tenant}/web", "--", "echo", "again").out == "again\n"
        jm("engine", "stop")
        assert not of_door(jm, "jailmgr-door")
        assert not os.path.exists(jm.root.users)
        echoes(b"stopped\n")
        assert len(of_door(jm, "jailmgr-relay")) == 1
        process.stdin.close()
        assert process.wait(20) == 0
    until(lambda: not of_door(jm, "jailmgr-relay"), 10, "the relay ends with it")
    jm("list")


def test_a_doorkeeper_that_is_killed(jm: Instance, tenant: str) -> None:
    """Another one is there in a moment; a session goes on."""
    with executing(jm, tenant, "cat") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"before\n")
        assert process.stdout.readline() == b"before\n"
        for _ in range(2):
            door = doorkeeper_of(jm)
            kill(door)
            until(lambda door=door: of_door(jm, "jailmgr-door") not in ([], [door]), 10, "another one")  # type: ignore[misc]
            until(lambda: run_as(jm, ALICE, "--tenant", tenant, "list", status=None).status == 0, 10, "the door works")
        process.stdin.write(b"through\n")
        assert process.stdout.readline() == b"through\n"
        process.stdin.close()
        assert process.wait(20) == 0


def test_an_engine_begins_beside_a_supervisor_that_hangs(jm: Instance, tenant: str) -> None:
    supervisor = jm.info(f"{tenant}/web")["supervisor_pid"]
    os.kill(supervisor, signal.SIGSTOP)
    waker = threading.Timer(100, os.kill, (supervisor, signal.SIGCONT))
    waker.start()
    try:
        kill(jm.engine_pid())
        began = time.monotonic()
        jm("list")
        assert time.monotonic() - began < 60
        assert f"supervisor of {tenant}: does not answer" in jm.exec(f"{tenant}/web", "true", status=125).err
    finally:
        waker.cancel()
        os.kill(supervisor, signal.SIGCONT)
    assert jm.exec(f"{tenant}/web", "echo", "here").out == "here\n"
