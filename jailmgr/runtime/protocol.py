"""What goes over the supervisor's socket: one JSON object a message, with fds beside it where need be.

SOCK_SEQPACKET keeps messages whole (unix(7)); a message is at most `MESSAGE_MAX` bytes. Every request has `v` and
`op`; an answer has `error` (see errors.as_dict) or what the operation gives.
"""

from __future__ import annotations

import json
import os
import socket
from array import array
from typing import Any, NamedTuple

from jailmgr.errors import JailmgrError

VERSION = 1
MESSAGE_MAX = 192 * 1024
FDS_MAX = 8


class Message(NamedTuple):
    """A message and the fds that came with it; the receiver owns them."""

    body: dict[str, Any]
    fds: list[int]


def send(sock: socket.socket, body: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send one message; OSError when the other side has gone or doesn't read.

    Raises JailmgrError when it is longer than `MESSAGE_MAX`.
    """
    raw = json.dumps(body, separators=(",", ":")).encode()
    if len(raw) > MESSAGE_MAX:
        raise JailmgrError("request", f"{len(raw)} bytes of arguments, {MESSAGE_MAX} fit", "", "invalid")
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    sock.sendmsg([raw], beside, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> Message | None:
    """The next message; None at the end. Raises ValueError on what isn't one, with its fds closed."""
    size = array("i").itemsize
    raw, beside, flags, _ = sock.recvmsg(MESSAGE_MAX + 1, socket.CMSG_SPACE(FDS_MAX * size), socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, content in beside:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % size])
    if not raw and not fds:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("message too long")
        body = json.loads(raw)
        if not isinstance(body, dict):
            raise ValueError("not an object")
    except ValueError:
        close_all(fds.tolist())
        raise
    return Message(body, fds.tolist())


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def connect(directory: str, name: str) -> socket.socket:
    """Connect to a socket below `directory`, however long its path is (by way of /proc/self/fd)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        at = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            sock.connect(f"/proc/self/fd/{at}/{name}")
        finally:
            os.close(at)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(directory: str, name: str) -> socket.socket:
    """A listening socket of mode 0600 below `directory`, in place of an old one. The caller holds the lock."""
    at = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    old = os.umask(0o177)
    try:
        path = f"/proc/self/fd/{at}/{name}"
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        sock.bind(path)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(old)
        os.close(at)
    return sock


def peer_uid(sock: socket.socket) -> int:
    """The uid at the other end when it connected (SO_PEERCRED, unix(7))."""
    cred = array("I")
    cred.frombytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return cred[1]
