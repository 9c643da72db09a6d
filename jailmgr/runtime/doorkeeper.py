"""The doorkeeper: whom users who are not root connect to in the engine's stead (engine/door.py), a process of its own.

    user ──▶ doorkeeper: accepts ── fork ─▶ relay ──▶ engine, or the supervisor that a session is handed on to

A user may send any file along with what he says (SCM_RIGHTS, unix(7)), and whoever drops the last reference to one
waits as its owner likes: a TCP socket as long as SO_LINGER says, others until the user's own file system answers. That
needs no receiver who wants files, and none who reads. So nothing of a user's is read or closed but by his connection's
relay (runtime/door_relay.py), and what goes on to others are bytes. The doorkeeper itself closes nothing last.

It gets its listeners from the engine over stdin, a SOCK_SEQPACKET, and tells it there of each connection: uint32s, the
kind, the uid and all gids, with the engine's end of the relay's socket beside them. When that breaks it ends, and
whoever serves next begins another. Relays of sessions go on. Standard library only, and little of it.
"""

from __future__ import annotations

import _socket
import gc
import os
import select
import struct
import sys

from jailmgr.runtime import door_relay
from jailmgr.runtime.standard_fds import open_closed

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import NoReturn
else:
    import _signal

HTTP, SESSION = 0, 1
KINDS = (_socket.SOCK_STREAM, _socket.SOCK_SEQPACKET)
EACH, ALL = (32, 64), (384, 512)
"""Connections of each kind that a uid may have, and all of them together: each is a process."""
REFUSED_EACH = 8
"""Those of a uid's that are being told that they are too many; for one more the oldest is killed."""
CHILDREN = sum(ALL) + 128
"""With so many, dying ones too, nobody is let in until one ends."""
GATHER = 16
"""Connections taken before the engine's word, and the ends of children, are looked at again."""
BACKLOG = 2048
SO_PEERGROUPS = 59
"""asm-generic/socket.h; the socket module has no name for it."""
NOBODY = 0xFFFFFFFF
SUBUID = "/etc/subuid"
_COMM = "/proc/self/comm"


class Child:
    """A process for one connection; `refused`: it only tells that it is one too many."""

    __slots__ = ("kind", "refused", "uid")

    def __init__(self, kind: int, uid: int, refused: bool) -> None:
        self.kind = kind
        self.uid = uid
        self.refused = refused


def main() -> NoReturn:
    """Serve until the engine hangs up."""
    open_closed()
    control = _socket.socket(fileno=0)
    listeners = _given(control)
    if listeners:
        with open(_COMM, "w", encoding="ascii") as name:
            name.write("jailmgr-door")
        gc.collect()
        gc.freeze()
        doorkeeper = Doorkeeper(control, listeners)
        try:
            control.send(b"listens")
            doorkeeper.run()
        except BaseException as error:  # noqa: BLE001 - the engine begins another, unless it is gone itself
            if not isinstance(error, BrokenPipeError | ConnectionResetError):
                sys.excepthook(*sys.exc_info())
            # In here: its frames hold a user's connection, and to close that can take as long as he likes.
            doorkeeper.end()
        doorkeeper.end()
    os._exit(0)


def _given(control: _socket.socket) -> list[_socket.socket]:
    """The listeners, HTTP's and the sessions', which nobody could connect to before; none where the engine is gone."""
    _, beside, _, _ = control.recvmsg(16, _socket.CMSG_SPACE(8), _socket.MSG_CMSG_CLOEXEC)
    listeners = [_socket.socket(fileno=fd) for _, _, fds in beside for fd in struct.unpack("2i", fds)]
    for listener in listeners:
        listener.setblocking(False)
        listener.listen(BACKLOG)
    return listeners


class Doorkeeper:
    """The listeners, and a child for each connection."""

    def __init__(self, control: _socket.socket, listeners: list[_socket.socket]) -> None:
        self._control = control
        self._listeners = listeners
        self._children: dict[int, Child] = {}
        self._gate: tuple[int, ...] = ()
        """A pipe: the next child does nothing until it is shut."""
        self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self) -> None:
        """Until the control socket breaks, which may show as OSError."""
        poll, opened = select.poll(), True
        poll.register(self._control, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        for listener in self._listeners:
            poll.register(listener, select.POLLIN)
        pause = None
        while True:
            ready = {fd for fd, _ in poll.poll(pause)}
            pause = None
            if self._control.fileno() in ready:
                return
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            for kind, listener in enumerate(self._listeners):
                if listener.fileno() in ready and not self._accept_some(kind, listener):
                    pause = 1000
            wanted = pause is None and len(self._children) < CHILDREN
            if wanted is not opened:
                opened = wanted
                for listener in self._listeners:
                    poll.modify(listener, select.POLLIN if opened else 0)

    def end(self) -> NoReturn:
        """At once, closing nothing: an exit lingers for nobody. Those who are only refused go along."""
        for pid, child in self._children.items():
            if child.refused:
                os.kill(pid, _signal.SIGKILL)
        os._exit(0)

    def _accept_some(self, kind: int, listener: _socket.socket) -> bool:
        """Take who waits; False where there is no descriptor or no memory for another."""
        for _ in range(GATHER):
            if len(self._children) >= CHILDREN:
                break
            try:
                # Before it is accepted: nothing of his may have to be closed here for want of a descriptor.
                self._gate = os.pipe()
                fd, _ = listener._accept()  # type: ignore[attr-defined]
            except OSError as error:
                self._shut_gate()
                return isinstance(error, BlockingIOError | ConnectionAbortedError)
            self._let_in(kind, _socket.socket(fileno=fd))
        return True

    def _shut_gate(self) -> None:
        for fd in self._gate:
            os.close(fd)
        self._gate = ()

    def _let_in(self, kind: int, user: _socket.socket) -> None:
        try:
            uid, gids = peer(user)
        except OSError:
            uid, gids = NOBODY, []
        first = first_of_range(uid)
        if first is not None or uid == NOBODY or self._crowded(kind, uid):
            # All of an account's subordinate uids count as one, and none of them is anybody whom a tenant names.
            uid, inner = uid if first is None else first, None
        else:
            inner = self._announce(kind, uid, gids)
        if inner is None:
            self._make_room(uid)
            self._begin(user, None, Child(kind, uid, True), lambda: door_relay.refuse(user, kind == HTTP))
            return
        self._begin(user, inner, Child(kind, uid, False), lambda: door_relay.relay(user, inner, kind == SESSION))
        inner.close()

    def _crowded(self, kind: int, uid: int) -> bool:
        served = [child.uid for child in self._children.values() if child.kind == kind and not child.refused]
        return len(served) >= ALL[kind] or served.count(uid) >= EACH[kind]

    def _make_room(self, uid: int) -> None:
        refused = [pid for pid, child in self._children.items() if child.refused and child.uid == uid]
        for pid in refused[: 1 - REFUSED_EACH] if len(refused) >= REFUSED_EACH else ():
            os.kill(pid, _signal.SIGKILL)

    def _announce(self, kind: int, uid: int, gids: list[int]) -> _socket.socket | None:
        """The relay's end of a socket whose other end the engine gets. None where that can't be told.

        BrokenPipeError and its like where the engine is gone.
        """
        try:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, KINDS[kind])
            said = struct.pack(f"{2 + len(gids)}I", kind, uid, *gids)
            fds = struct.pack("i", theirs.fileno())
            self._control.sendmsg([said], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)], _socket.MSG_NOSIGNAL)
            theirs.close()
        except (BrokenPipeError, ConnectionResetError):
            raise
        except OSError:
            return None
        return ours

    def _begin(
        self, user: _socket.socket, inner: _socket.socket | None, child: Child, work: Callable[[], object]
    ) -> None:
        """Have a child do that, and close the connection here, where that isn't the last to."""
        pid = self._fork()
        if pid == 0:
            try:
                gc.disable()
                _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
                ear, mouth = self._gate
                os.close(mouth)
                os.read(ear, 1)
                _keep_only(user, inner)
                work()
            finally:
                os._exit(0)
        self._children[pid] = child
        user.close()
        self._shut_gate()

    def _fork(self) -> int:
        """As soon as there may be another process: until then the connection can't be closed either."""
        while True:
            try:
                return os.fork()
            except OSError:
                if select.select([self._control], [], [], 1.0)[0]:
                    os._exit(0)
                self._reap()

    def _reap(self) -> None:
        while self._children:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.pop(pid, None)


def peer(user: _socket.socket) -> tuple[int, list[int]]:
    """Its uid and groups when it connected (SO_PEERCRED, SO_PEERGROUPS). Raises OSError.

    Who is in more groups than Python lets us ask for, 256, is taken to be in his primary one alone.
    """
    _, uid, gid = struct.unpack("3I", user.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
    try:
        raw = user.getsockopt(_socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:
        raw = b""
    return uid, [gid, *struct.unpack(f"{len(raw) // 4}I", raw)]


def first_of_range(uid: int, path: str = SUBUID) -> int | None:
    """Where the subordinate uids begin that it is one of (subuid(5)); None for an account's own.

    Whoever has such a range may act as each of them, with the groups of his own (user_namespaces(7)).
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            ranges = [line.strip().split(":") for line in file]
    except OSError:
        return None
    for fields in ranges:
        if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
            first = int(fields[1])
            if first <= uid < first + int(fields[2]):
                return first
    return None


def _keep_only(*socks: _socket.socket | None) -> None:
    """Neither listener nor control socket, nor the engine's stderr: a relay may outlive them."""
    with open(_COMM, "w", encoding="ascii") as name:
        name.write("jailmgr-relay")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    first = 3
    for fd in sorted(sock.fileno() for sock in socks if sock is not None):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))
