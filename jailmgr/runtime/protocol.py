"""What goes over the supervisor's socket: one JSON object a message, with fds beside it where need be.

SOCK_SEQPACKET keeps messages whole (unix(7)); a message is at most `MESSAGE_MAX` bytes. Every request has `v` and
`op`; an answer has `error` (see errors.as_dict) or what the operation gives. On the way of `exec`: `_socket`, for
`socket` and its enums cost more than a request.
"""

from __future__ import annotations

import _socket
import os
import struct

from jailmgr.errors import JailmgrError
from jailmgr.runtime import compact_json
from jailmgr.runtime.plainfile import read_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

VERSION = 1
SNAPSHOT = 2
"""Of what a supervisor leaves to the release that goes on in its process (runtime/reexec.py)."""
SNAPSHOTS = (1, 2)
"""Those that can be read."""
MESSAGE_MAX = 192 * 1024
FDS_MAX = 8
SOCKET = "supervisor.sock"
SESSIONS = "session.sock"
"""Beside the engine's socket for users who are not root: who may enter a jail is handed on to its supervisor."""


class Message:
    """A message and the fds that came with it; the receiver owns them."""

    __slots__ = ("body", "fds")

    def __init__(self, body: dict[str, Any], fds: list[int]) -> None:
        self.body = body
        self.fds = fds


def send(sock: _socket.socket, body: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send one message; OSError when the other side has gone or doesn't read.

    Raises JailmgrError when it is longer than `MESSAGE_MAX`.
    """
    raw = compact_json.dumps(body).encode()
    if len(raw) > MESSAGE_MAX:
        raise JailmgrError("request", f"{len(raw)} bytes of arguments, {MESSAGE_MAX} fit", "", "invalid")
    beside = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    sock.sendmsg([raw], beside, _socket.MSG_NOSIGNAL)


def receive(sock: _socket.socket, fds_max: int = FDS_MAX) -> Message | None:
    """The next message; None at the end. Raises ValueError on what isn't one or has more fds, with those closed."""
    room = _socket.CMSG_SPACE(fds_max * struct.calcsize("i")) if fds_max else 0
    raw, beside, flags, _ = sock.recvmsg(MESSAGE_MAX + 1, room, _socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in beside:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds += struct.unpack_from(f"{len(content) // struct.calcsize('i')}i", content)
    if not raw and not fds:
        return None
    try:
        if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
            raise ValueError("message too long")
        body = compact_json.loads(raw)
        if not isinstance(body, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        close_all(fds)
        raise ValueError(str(error)) from error
    return Message(body, fds)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def connect(directory: str, name: str, within: float = 0) -> _socket.socket:
    """Connect to a socket below `directory`, however long its path is (by way of /proc/self/fd).

    `within`: seconds for room in its backlog, BlockingIOError then. 0: it is waited for.
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        at = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            if within:
                sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, struct.pack("ll", int(within), 0))
            sock.connect(f"/proc/self/fd/{at}/{name}")
            if within:
                sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, bytes(struct.calcsize("ll")))
        finally:
            os.close(at)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(directory: str, name: str) -> socket.socket:
    """A listening socket of mode 0600 below `directory`, in place of an old one. The caller holds the lock."""
    import socket

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


def listener_lives(sock: _socket.socket) -> bool:
    """Whether the process that began to listen at the other end is alive: its socket may outlive it in a child."""
    pid, _, _ = struct.unpack("iII", sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
    if pid == 0:
        return True  # it is of another pid namespace
    try:
        return read_bytes(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def peer_uid(sock: _socket.socket) -> int:
    """The uid at the other end when it connected (SO_PEERCRED, unix(7))."""
    _, uid, _ = struct.unpack("iII", sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
    return int(uid)
