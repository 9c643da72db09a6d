"""`exec` without a terminal for who isn't root: stdin, stdout and stderr go through pipes that the supervisor has made.

Root's own fds are passed into the jail. A user's are not: the supervisor would have to close them, and a close takes as
long as he likes (runtime/doorkeeper.py). So stdin is read ahead of the command.
"""

from __future__ import annotations

import fcntl
import os
import select
import termios

from jailmgr.runtime.attach import Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_CHUNK = 64 * 1024


class _Flow:
    """From one fd to another, of which `pipe` is the jail's. No read or write waits."""

    def __init__(self, source: int, target: int, pipe: int) -> None:
        self.source = source
        self.target = target
        self.pipe = pipe
        self.data = memoryview(b"")
        self.left = -1
        """Bytes still to be read; less than 0: until the end."""

    @property
    def waits_for(self) -> tuple[int, int]:
        return (self.target, select.POLLOUT) if self.data else (self.source, select.POLLIN)

    def step(self) -> bool:
        """Read or write once; False when it has ended."""
        try:
            if self.data:
                # Whoever is told that a pipe has room has that for PIPE_BUF bytes (pipe(7)), whether it blocks or not.
                self.data = self.data[os.write(self.target, self.data[: select.PIPE_BUF]) :]
            else:
                data = os.read(self.source, _CHUNK if self.left < 0 else min(_CHUNK, self.left))
                self.left -= len(data) if self.left > 0 else 0
                self.data = memoryview(data)
                return bool(data)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(self.data) or self.left != 0

    def finish(self) -> bool:
        """The command has ended: what it has written is there. Others may go on writing, and are not waited for."""
        if self.left < 0:
            self.left = int.from_bytes(fcntl.ioctl(self.source, termios.FIONREAD, b"\0" * 4), "little")
        return bool(self.data) or self.left > 0


def run(supervisor: Supervisor, pipes: list[int], woken: int, signalled: Callable[[bytes], None]) -> dict[str, Any]:
    """Until the command has ended and all that it wrote has been written: the supervisor's last word.

    `signalled` gets what comes on `woken`. Raises JailmgrError where the supervisor goes.
    """
    control, done = supervisor.sock.fileno(), None
    flows = {
        _Flow(0, pipes[0], pipes[0]),
        *(_Flow(pipe, target, pipe) for target, pipe in enumerate(pipes) if target > 0),
    }
    for pipe in pipes:
        os.set_blocking(pipe, False)
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
                ended |= {flow for flow in flows - ended if flow.source == 0 or not flow.finish()}
        for flow in ended:
            # Whoever reads no more of ours has the command get EPIPE, and the end of stdin is its.
            os.close(flow.pipe)
        flows -= ended
    return done
