"""The relay between a user and what serves him: all bytes, in order, and none of his files."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import msgspec
import pytest

from jailmgr.engine.answers import error_content
from jailmgr.runtime import door_relay, protocol

MUCH = 3 << 20


@contextmanager
def relayed(kind: socket.SocketKind) -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """The user's end, the other's, and the pidfd of a relay between them."""
    user, outer = socket.socketpair(socket.AF_UNIX, kind)
    inner, other = socket.socketpair(socket.AF_UNIX, kind)
    with _in_a_child(lambda: door_relay.relay(outer, inner, kind == socket.SOCK_SEQPACKET), user, other) as pidfd:
        outer.close()
        inner.close()
        with user, other:
            user.settimeout(20)
            other.settimeout(20)
            yield user, other, pidfd


@contextmanager
def _in_a_child(work: Any, *not_its: socket.socket) -> Iterator[int]:
    pid = os.fork()
    if pid == 0:
        try:
            for sock in not_its:
                sock.close()
            with suppress(OSError):
                work()
        finally:
            os._exit(0)
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
        assert select.select([pidfd], [], [], 20)[0], "it outlives the user"
    finally:
        os.close(pidfd)
        os.waitpid(pid, 0)


def ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 20)[0])


def read_all(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(65536)
        assert part, "it ended early"
        parts += part
    return bytes(parts)


def test_a_stream_goes_both_ways_at_once() -> None:
    """With nobody reading until all is said: neither way waits for the other."""
    there, back = os.urandom(MUCH), os.urandom(MUCH)
    with relayed(socket.SOCK_STREAM) as (user, other, _):
        senders = [
            threading.Thread(target=user.sendall, args=(there,)),
            threading.Thread(target=other.sendall, args=(back,)),
        ]
        for sender in senders:
            sender.start()
        assert read_all(other, MUCH) == there
        assert read_all(user, MUCH) == back
        for sender in senders:
            sender.join()


def test_what_was_said_before_the_end_arrives() -> None:
    with relayed(socket.SOCK_STREAM) as (user, other, pidfd):
        other.sendall(b"last words")
        other.close()
        assert ended(pidfd)
        assert user.recv(100) == b"last words"
        assert user.recv(100) == b""


def test_messages_stay_whole() -> None:
    with relayed(socket.SOCK_SEQPACKET) as (user, other, _):
        for size in (1, 1000, protocol.MESSAGE_MAX):
            user.send(b"x" * size)
            assert len(other.recv(protocol.MESSAGE_MAX + 1)) == size
            other.send(b"y" * size)
            assert len(user.recv(protocol.MESSAGE_MAX + 1)) == size


def test_files_of_the_other_side_arrive() -> None:
    with relayed(socket.SOCK_SEQPACKET) as (user, other, _):
        ear, mouth = os.pipe()
        protocol.send(other, {"pipes": 1}, [mouth])
        os.close(mouth)
        message = protocol.receive(user)
        assert message is not None
        assert message.body == {"pipes": 1}
        os.write(message.fds[0], b"through")
        protocol.close_all(message.fds)
        assert os.read(ear, 100) == b"through"
        assert os.read(ear, 100) == b"", "the relay keeps none"
        os.close(ear)


@pytest.mark.parametrize(
    ("kind", "flags"), [(socket.SOCK_STREAM, 0), (socket.SOCK_STREAM, socket.MSG_OOB), (socket.SOCK_SEQPACKET, 0)]
)
def test_files_of_a_user_end_it(kind: socket.SocketKind, flags: int) -> None:
    with relayed(kind) as (user, other, pidfd), open(os.devnull, "rb") as file:
        user.send(b"before")
        assert other.recv(100) == b"before"
        socket.send_fds(user, [b"!"], [file.fileno()], flags)
        assert ended(pidfd)
        with suppress(ConnectionResetError):
            assert other.recv(100) == b""


def test_a_message_without_end_ends_it() -> None:
    with relayed(socket.SOCK_SEQPACKET) as (user, _, pidfd):
        user.send(bytes(protocol.MESSAGE_MAX + 1))
        assert ended(pidfd)


def test_one_too_many_is_told_as_the_engine_tells_errors() -> None:
    with ExitStack() as held:
        user, outer = socket.socketpair()
        held.enter_context(user)
        held.enter_context(_in_a_child(lambda: door_relay.refuse(outer, True), user))
        outer.close()
        user.settimeout(20)
        user.sendall(b"GET / HTTP/1.1\r\nHost: ")
        user.sendall(b"x\r\n\r\n")
        head, _, body = user.recv(65536).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body) == msgspec.to_builtins(error_content(door_relay.CROWDED))
