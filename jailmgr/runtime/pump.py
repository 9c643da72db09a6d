"""`exec` without a terminal: stdin, stdout and stderr, and what is copied between them and the jail's pipes.

Only anonymous pipes and /dev/null of the caller's go into a jail themselves. For everything else the jail gets a pipe:
nobody inside can then seek in, truncate or reopen a file of the host, and /dev/stdin and /dev/stderr can be opened
there, since a pipe is given to the jail's root (runtime/session.py).

A user's pipes are made by the supervisor, which must not close a file of his (runtime/doorkeeper.py): see `users`.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import termios

from jailmgr.errors import from_os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from jailmgr.runtime.attach import Supervisor

NULL = os.makedev(1, 3)
PIPE_SIZE = 256 * 1024
"""Bytes a pipe of ours holds (F_SETPIPE_SZ), and of one read: with the kernel's 64 KiB a large file takes longer."""
_EINVAL = 22
_NAMES = ("stdin", "stdout", "stderr")


class Flow:
    """A copy from one fd to another, of which `pipe` is the jail's and never blocks. No read or write waits.

    `error`: what keeps a file on the host from being written.
    """

    def __init__(self, source: int, target: int, pipe: int) -> None:
        self.source = source
        self.target = target
        self.pipe = pipe
        self.data = memoryview(b"")
        self.left = -1
        """Bytes still to be read; less than 0: until the end."""
        self.error: OSError | None = None
        self.count = 0
        """Bytes read so far."""
        is_file = stat.S_ISREG(os.fstat(source if self.inward else target).st_mode)
        self._to_file = is_file and not self.inward
        self._splices = is_file
        """Whether the kernel copies: not where the file is opened to append to, and not all of /proc (splice(2))."""
        # poll(2) reports room for PIPE_BUF bytes in a pipe of the caller's, which may block (pipe(7)).
        self._write_max = PIPE_SIZE if self._to_file or self.inward else select.PIPE_BUF

    @property
    def inward(self) -> bool:
        """Whether it is stdin's."""
        return self.pipe == self.target

    @property
    def waits_for(self) -> tuple[int, int]:
        if self._splices:  # a file is always ready
            return (self.pipe, select.POLLOUT if self.inward else select.POLLIN)
        return (self.target, select.POLLOUT) if self.data else (self.source, select.POLLIN)

    def step(self) -> bool:
        """Read or write once; False when it has ended."""
        try:
            if self._splices:
                size = PIPE_SIZE if self.left < 0 else min(PIPE_SIZE, self.left)
                moved = os.splice(self.source, self.target, size, flags=os.SPLICE_F_NONBLOCK)
                self.left -= moved if self.left > 0 else 0
                self.count += moved
                return moved > 0 and self.left != 0
            if self.data:
                self.data = self.data[os.write(self.target, self.data[: self._write_max]) :]
            else:
                data = os.read(self.source, PIPE_SIZE if self.left < 0 else min(PIPE_SIZE, self.left))
                self.left -= len(data) if self.left > 0 else 0
                self.count += len(data)
                self.data = memoryview(data)
                return bool(data)
        except BlockingIOError:
            return True
        except OSError as error:
            if self._splices and error.errno == _EINVAL:
                self._splices = False
                return True
            if self._to_file:
                self.error = error
            return False
        return bool(self.data) or self.left != 0

    def finish(self) -> bool:
        """The command has ended: what it has written is there. Others may go on writing, and are not waited for."""
        if self.left < 0:
            self.left = _available(self.source)
        return bool(self.data) or self.left > 0


def _position(fd: int) -> int:
    """The file's offset; -1 where it has none."""
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return -1


def _available(pipe: int) -> int:
    """Bytes in a pipe, asked at either end (FIONREAD)."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4), "little")


class _Unread:
    """What the command leaves unread of a file on stdin. `pipe`: the read end of the jail's pipe, kept for this."""

    def __init__(self, flow: Flow, pipe: int) -> None:
        self.pipe = pipe
        self._flow = flow
        self._begin = _position(flow.source)

    def give_back(self) -> None:
        """Move the file's offset to what comes next, as if the command had read from the file itself.

        `while read host; do jailmgr exec web -- ping -c 1 $host; done < hosts` depends on it.
        """
        unread = len(self._flow.data) + _available(self.pipe)
        if unread and self._begin >= 0 and _position(self._flow.source) == self._begin + self._flow.count:
            os.lseek(self._flow.source, -unread, os.SEEK_CUR)


class Stdio:
    """What a command in a jail gets as fds 0 to 2, and the flows behind them."""

    def __init__(self, pipe: int) -> None:
        """`pipe`: any anonymous pipe. The kernel has one file system of them (pipefs)."""
        self.fds: list[int] = []
        self.flows: set[Flow] = set()
        self._own: list[int] = []
        self._unread: _Unread | None = None
        anonymous = os.fstat(pipe).st_dev
        for fd in (0, 1, 2):
            if _may_go_in(fd, anonymous):
                self.fds.append(fd)
            elif fd == 2 and self.fds[1] != 1 and is_joined():
                self.fds.append(self.fds[1])
            else:
                self._relay(fd)

    def _relay(self, fd: int) -> None:
        read_end, write_end = os.pipe()
        try:
            fcntl.fcntl(read_end, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            pass  # a user with many pipes has none of another size (pipe(7), pipe-user-pages-soft)
        theirs, ours = (read_end, write_end) if fd == 0 else (write_end, read_end)
        os.set_blocking(ours, False)
        self._own.append(theirs)
        self.fds.append(theirs)
        flow = Flow(fd, ours, ours) if fd == 0 else Flow(ours, fd, ours)
        self.flows.add(flow)
        if fd == 0 and stat.S_ISREG(os.fstat(fd).st_mode):
            self._unread = _Unread(flow, theirs)

    def close_passed(self) -> None:
        """Close what the jail has now, so that its end shows here."""
        kept = self._unread.pipe if self._unread is not None else -1
        for fd in self._own:
            if fd != kept:
                os.close(fd)
        self._own = [fd for fd in self._own if fd == kept]

    def close(self) -> None:
        """Give back what the command has not read, and close all that is left."""
        if self._unread is not None:
            self._unread.give_back()
        for fd in (*self._own, *(flow.pipe for flow in self.flows)):
            os.close(fd)
        self._own.clear()
        self.flows.clear()


def _may_go_in(fd: int, anonymous: int) -> bool:
    """Whether the jail may have the fd itself: an anonymous pipe, or /dev/null."""
    status = os.fstat(fd)
    if stat.S_ISFIFO(status.st_mode):
        return status.st_dev == anonymous
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == NULL


def is_joined() -> bool:
    """Whether stdout and stderr are one: the same file, socket, pipe or terminal, opened alike (`2>&1`).

    They get one pipe then, which keeps what is written to both in its order. Two that write to one file at different
    places are not: each goes on at its own.
    """
    out, err = os.fstat(1), os.fstat(2)
    if (out.st_dev, out.st_ino) != (err.st_dev, err.st_ino):
        return False
    if fcntl.fcntl(1, fcntl.F_GETFL) != fcntl.fcntl(2, fcntl.F_GETFL):
        return False
    # Another process may be writing by the same description between these.
    before, at, after = _position(1), _position(2), _position(1)
    return before <= at <= after


def users(pipes: list[int]) -> set[Flow]:
    """Flows of a user, by the far ends of the pipes that the supervisor has made: stdin's, stdout's, and stderr's.

    Without the last, stdout and stderr are one.
    """
    for pipe in pipes:
        os.set_blocking(pipe, False)
    outward = {Flow(pipe, target, pipe) for target, pipe in enumerate(pipes) if target > 0}
    return {Flow(0, pipes[0], pipes[0]), *outward}


def run(supervisor: Supervisor, flows: set[Flow], woken: int, signalled: Callable[[bytes], None]) -> dict[str, Any]:
    """Copy until the command has ended and all that it wrote has been written: the supervisor's last message.

    `signalled` gets what comes on `woken`. Closes the flows. Raises JailmgrError where the supervisor goes, and where
    a file on the host could not be written (no space left on device): then the command has got EPIPE.
    """
    control, done = supervisor.sock.fileno(), None
    failed: list[Flow] = []
    while done is None or flows:
        poll = select.poll()
        poll.register(woken, select.POLLIN)
        if done is None:
            poll.register(control, select.POLLIN)
        for flow in flows:
            poll.register(*flow.waits_for)
        ready = {fd for fd, _ in poll.poll()}
        ended = {flow for flow in flows if flow.waits_for[0] in ready and not flow.step()}
        if woken in ready:
            signalled(os.read(woken, 64))
        if control in ready and done is None:
            said = supervisor.hear_any().body
            if "exit" in said or "error" in said:
                done = said
                ended |= {flow for flow in flows - ended if flow.inward or not flow.finish()}
        for flow in ended:
            # Whoever writes to a closed pipe gets EPIPE, and whoever reads from it the end.
            failed += [flow] if flow.error is not None else []
            os.close(flow.pipe)
        flows -= ended
    for flow in failed:
        assert flow.error is not None
        raise from_os(f"writing to {_NAMES[flow.target]}", flow.error)
    return done
