"""One user's connection, passed on by a process that serves nothing else: bytes only, whatever he sends beside them.

Of a message with files in it no one gets anything: it is peeked at, and the process exits with it, since an exit
lingers for nobody (socket(7), SO_LINGER). Should it come to wait all the same, SIGALRM ends it.
"""

from __future__ import annotations

import _socket
import select
import struct

from jailmgr.errors import JailmgrError
from jailmgr.runtime import compact_json
from jailmgr.runtime.protocol import FDS_MAX, MESSAGE_MAX, close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal

STREAM_CHUNK = 64 * 1024
STUCK_SECONDS = 60
"""No round of ours takes so long, unless it is made to, or the host is out of its depth."""
REFUSE_SECONDS = 5
"""For a user's request to come, before he is told that it is one too many."""
HEAD_MAX = 64 * 1024
CROWDED = JailmgrError("engine", "you have too many connections to it", "Close some of them.", "unavailable")


class _Way:
    """From one socket to the other: what waits to be sent on, with its fds."""

    __slots__ = ("data", "fds", "source", "target")

    def __init__(self, source: _socket.socket, target: _socket.socket) -> None:
        self.source = source
        self.target = target
        self.data = b""
        self.fds: list[int] = []

    def send(self) -> None:
        """Pass on what fits. OSError where nobody takes it."""
        beside = []
        if self.fds:
            fds = struct.pack(f"{len(self.fds)}i", *self.fds)
            beside = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)]
        try:
            sent = self.target.sendmsg([self.data], beside, _socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        self.data = self.data[sent:]
        close_all(self.fds)
        self.fds = []


def relay(user: _socket.socket, inner: _socket.socket, whole: bool) -> None:
    """Until either side is done, or the user sends what he may not; `whole`: messages, else a stream. OSError as well.

    Only `inner`'s fds are passed on.
    """
    inward, outward = _Way(user, inner), _Way(inner, user)
    for sock in (user, inner):
        sock.setblocking(False)
    _keep_in_line(user)
    poll = select.poll()
    while True:
        events = dict.fromkeys((user, inner), 0)
        for way in (inward, outward):
            if way.data:
                events[way.target] |= select.POLLOUT
            else:
                events[way.source] |= select.POLLIN
        for sock, wanted in events.items():
            # Who is waited for in no way would be told of for ever once he hangs up.
            poll.register(sock, wanted)
            if not wanted:
                poll.unregister(sock)
        _signal.alarm(0)
        ready = dict(poll.poll())
        _signal.alarm(STUCK_SECONDS)
        for way in (inward, outward):
            if not way.data and ready.get(way.source.fileno(), 0) & ~select.POLLOUT:
                try:
                    way.data, way.fds = (_said(user, whole), []) if way is inward else _told(inner, whole)
                except BlockingIOError:
                    continue
                if not way.data:
                    return
                way.send()
            elif way.data and way.target.fileno() in ready:
                way.send()


def refuse(user: _socket.socket, http: bool) -> None:
    """Wait for a request, and tell that it is one too many. OSError, or SIGALRM, where the user doesn't listen."""
    _signal.alarm(REFUSE_SECONDS)
    _keep_in_line(user)
    said = _said(user, not http)
    while http and said and b"\r\n\r\n" not in said and len(said) < HEAD_MAX:
        part = _said(user, False)
        said = said + part if part else b""
    if said:
        user.send(_crowded_http() if http else compact_json.dumps({"error": CROWDED.as_dict()}).encode())


def _crowded_http() -> bytes:
    content = {"type": "error", "error": str(CROWDED), "error_code": 503, "metadata": CROWDED.as_dict()}
    body = compact_json.dumps(content).encode()
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _said(user: _socket.socket, whole: bool) -> bytes:
    """What the user has said; nothing at the end, or where files come with it, or it is too long. They stay where they
    are then: until here nobody has them but the socket, and the last to close that is our exit."""
    seen, _, flags, _ = user.recvmsg(MESSAGE_MAX + 1 if whole else STREAM_CHUNK, 0, _socket.MSG_PEEK)
    if flags & (_socket.MSG_CTRUNC | _socket.MSG_TRUNC) or len(seen) > MESSAGE_MAX:
        return b""
    return user.recv(len(seen)) if seen else b""


def _told(inner: _socket.socket, whole: bool) -> tuple[bytes, list[int]]:
    """What is to be told to the user; nothing at the end."""
    if not whole:
        return inner.recv(STREAM_CHUNK), []
    room = _socket.CMSG_SPACE(FDS_MAX * struct.calcsize("i"))
    data, beside, _, _ = inner.recvmsg(MESSAGE_MAX + 1, room, _socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in beside:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds += struct.unpack_from(f"{len(content) // struct.calcsize('i')}i", content)
    return data, fds


def _keep_in_line(user: _socket.socket) -> None:
    """Urgent data are read in their turn: else they, and files with them, are dropped unseen."""
    user.setsockopt(_socket.SOL_SOCKET, _socket.SO_OOBINLINE, 1)
