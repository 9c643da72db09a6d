"""A jail's console: its log, a ring of two files, and those who watch or type.

The log is written at `RATE` bytes a second at most; what the guest writes faster waits in its own pty, so that no
guest fills the host's disk or keeps its supervisor busy.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from time import monotonic, strftime

from jailmgr.runtime.loop import READ, WRITE, Loop

LOG = "console.log"
OLD_LOG = "console.log.1"
LOG_MAX = 512 * 1024
RATE = 256 * 1024
BURST = 128 * 1024
PENDING_MAX = 256 * 1024


class Log:
    """LIB/console.log, moved to console.log.1 when it is `LOG_MAX` long."""

    def __init__(self, lib: str) -> None:
        self._lib = lib
        self._fd = -1
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append; a disk that is full loses the line, not the jail."""
        try:
            if self._fd < 0:
                self._open()
            if self._size + len(data) > LOG_MAX:
                os.close(self._fd)
                self._fd = -1
                os.rename(f"{self._lib}/{LOG}", f"{self._lib}/{OLD_LOG}")
                self._open()
            self._size += os.write(self._fd, data)
        except OSError:
            return

    def note(self, text: str) -> None:
        """A line of our own among the guest's."""
        self.write(f"\r\n[jailmgr {strftime('%Y-%m-%dT%H:%M:%S%z')}] {text}\r\n".encode())

    def mark(self) -> tuple[int, int]:
        """Inode and size now: where a reader of the file goes over to following."""
        if self._fd < 0:
            self._open()
        return os.fstat(self._fd).st_ino, self._size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(f"{self._lib}/{LOG}", flags, 0o600)
        self._size = os.fstat(self._fd).st_size


class Watcher:
    """Someone at the console: what it shows goes to `sock`; with `typed`, what comes from there is typed.

    Else nothing can be sent on it: a user might send fds, whose last close we would wait for.
    """

    def __init__(self, sock: socket.socket, typed: bool) -> None:
        self.sock = sock
        self.typed = typed
        self.pending = bytearray()
        if not typed:
            sock.shutdown(socket.SHUT_RD)

    @property
    def wanted(self) -> int:
        """What to wait for at `sock`; one that is shut looks readable for ever, but it tells of its end."""
        return (READ if self.typed else 0) | (WRITE if self.pending else 0)


class Console:
    """The master of a jail's console, in the supervisor's loop. Its log outlives it: a reboot brings a new console."""

    def __init__(self, loop: Loop, master: int, log: Log, gone: Callable[[Watcher], None]) -> None:
        self._loop = loop
        self.master = master
        self._log = log
        self._gone = gone
        self.watchers: list[Watcher] = []
        self.typed = bytearray()
        self._allowance = float(BURST)
        self._at = monotonic()
        self._paused = False
        os.set_blocking(master, False)
        self._listen()

    def add(self, watcher: Watcher) -> None:
        watcher.sock.setblocking(False)
        self.watchers.append(watcher)
        self._loop.watch(watcher.sock.fileno(), lambda events: self._watcher_ready(watcher, events), watcher.wanted)

    def type(self, data: bytes) -> None:
        """What doesn't fit is lost, as with a terminal."""
        if len(self.typed) < PENDING_MAX:
            self.typed += data
            if not self._paused:
                self._listen()

    def remove(self, watcher: Watcher) -> None:
        if watcher in self.watchers:
            self.watchers.remove(watcher)
            self._loop.forget(watcher.sock.fileno())
            watcher.sock.close()
            self._gone(watcher)

    def close(self) -> None:
        """Log what is left in the pty and let go of everyone."""
        if self.master < 0:
            return
        self._loop.forget(self.master)
        for _ in range(PENDING_MAX // 4096):
            if not self._read():
                break
        for watcher in list(self.watchers):
            self.remove(watcher)
        os.close(self.master)
        self.master = -1

    def _listen(self) -> None:
        events = (0 if self._paused else READ) | (WRITE if self.typed else 0)
        self._loop.watch(self.master, self._master_ready, events)

    def _master_ready(self, events: int) -> None:
        if events & WRITE and self.typed:
            try:
                del self.typed[: os.write(self.master, self.typed[:4096])]
            except BlockingIOError:
                pass
            except OSError:
                self.typed.clear()
            self._listen()
        if events & ~WRITE and not self._paused and not self._read():
            self._rest(1.0)

    def _read(self) -> bool:
        """Pass on one buffer of output. False where there is none: nobody has the slave open (EIO) or all is read."""
        try:
            data = os.read(self.master, 4096)
        except OSError:
            return False
        if not data:
            return False
        self._log.write(data)
        for watcher in list(self.watchers):
            if len(watcher.pending) < PENDING_MAX:
                watcher.pending += data
                self._watcher_ready(watcher, WRITE)
        now = monotonic()
        self._allowance = min(BURST, self._allowance + (now - self._at) * RATE) - len(data)
        self._at = now
        if self._allowance < 0:
            self._rest(-self._allowance / RATE + 0.05)
        return True

    def _rest(self, seconds: float) -> None:
        """Don't read for a while: the guest is too fast, or has closed its end (epoll would tell of that for ever)."""
        if self._paused or self.master < 0:
            return
        self._paused = True
        self._loop.forget(self.master)
        self._loop.after(seconds, self._resume)

    def _resume(self) -> None:
        self._paused = False
        if self.master >= 0:
            self._listen()

    def _watcher_ready(self, watcher: Watcher, events: int) -> None:
        try:
            if events & WRITE and watcher.pending:
                del watcher.pending[: watcher.sock.send(watcher.pending, socket.MSG_NOSIGNAL)]
            if events & ~WRITE:
                data = watcher.sock.recv(4096)
                if not data:
                    self.remove(watcher)
                    return
                self.type(data)
        except BlockingIOError:
            pass
        except OSError:
            self.remove(watcher)
            return
        self._loop.watch(watcher.sock.fileno(), lambda more: self._watcher_ready(watcher, more), watcher.wanted)
