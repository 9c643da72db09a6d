"""The supervisor's end of the socket on which a jail's init tells that it is up (sd_notify(3)).

The guest may send anything, as often as it likes: only READY=1 means something, once, and `RATE` datagrams a second
are read. An fd that comes along must not be the supervisor's to close: the last close of a TCP socket waits as long as
the guest has said in SO_LINGER (socket(7)).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from time import monotonic

from jailmgr.runtime.loop import Loop, Timer

SO_PASSRIGHTS = 83
"""asm-generic/socket.h, Linux 6.16: set to 0, whoever sends an fd gets EPERM."""
_MAX = 4096
_BURST = 256
_RATE = 256


def refuse_fds(sock: socket.socket) -> None:
    """No fds may be sent to `sock`, where the kernel can do that."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return


class Notify:
    """Calls `ready` once, when init says so; ends then, or at the first fd in a message."""

    def __init__(self, loop: Loop, fd: int, ready: Callable[[], None]) -> None:
        self._loop = loop
        self._sock: socket.socket | None = socket.socket(fileno=fd)
        self._ready = ready
        self._allowance = float(_BURST)
        self._at = monotonic()
        self._rest: Timer | None = None
        self._listen()

    @property
    def fd(self) -> int | None:
        """None once it has ended."""
        return None if self._sock is None else self._sock.fileno()

    def close(self) -> None:
        sock, self._sock = self._sock, None
        if sock is None:
            return
        if self._rest is not None:
            self._rest.cancel()
        self._loop.forget(sock.fileno())
        _let_go(sock)

    def _listen(self) -> None:
        self._rest = None
        if self._sock is not None:
            self._loop.watch(self._sock.fileno(), lambda _: self._told())

    def _told(self) -> None:
        if self._sock is None:
            return
        try:
            if self._sock.recvmsg(_MAX, 0, socket.MSG_PEEK)[2] & socket.MSG_CTRUNC:
                self.close()
                return
            words = self._sock.recv(_MAX).split(b"\n")
        except OSError:
            return
        if b"READY=1" in words:
            self.close()
            self._ready()
            return
        now = monotonic()
        self._allowance = min(_BURST, self._allowance + (now - self._at) * _RATE) - 1
        self._at = now
        if self._allowance < 0:
            self._loop.forget(self._sock.fileno())
            self._rest = self._loop.after(0.05, self._listen)


def _let_go(sock: socket.socket) -> None:
    """Close it; where fds may be waiting in it, by a child's exit, which lingers for nobody."""
    try:
        holds_none = sock.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS) == 0
    except OSError:
        holds_none = False
    if holds_none:
        sock.close()
        return
    ear, mouth = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(mouth)
        os.read(ear, 1)
        os._exit(0)
    # The child's is the last close: it ends once this end of the pipe is gone, after the socket.
    sock.close()
    os.close(mouth)
    os.close(ear)
    os.waitpid(pid, 0)
