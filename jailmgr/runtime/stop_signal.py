"""The signal that asks a jail's init to stop, sent once init takes it.

The kernel drops a signal to the init of a pid namespace that has no handler for it (pid_namespaces(7), "The namespace
init process"), and reports no error. An init that has just been exec'd has none yet.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from jailmgr.runtime.loop import Loop, Timer
from jailmgr.runtime.plainfile import read_bytes

LOOK_SECONDS = 0.1
"""Between two looks for the handler: no event of the kernel reports that a process installs one."""
_UNBLOCKABLE = (signal.SIGKILL, signal.SIGSTOP)
_MASKS = (b"SigBlk", b"SigCgt")


def takes(pid: int, number: int) -> bool:
    """Return whether the kernel would keep the signal for this init: a handler is set, or the signal is blocked.

    True as well where that can't be found out. Source: proc_pid_status(5), SigCgt and SigBlk.
    """
    if number in _UNBLOCKABLE:
        return True
    try:
        lines = read_bytes(f"/proc/{pid}/status").splitlines()
        masks = {name: int(mask, 16) for name, _, mask in (line.partition(b":") for line in lines) if name in _MASKS}
        return any(masks[name] >> (number - 1) & 1 for name in _MASKS)
    except (OSError, ValueError, KeyError):
        return True


class Request:
    """A stop signal that init has not got yet. `cancel` it as soon as init has ended."""

    def __init__(self, loop: Loop, pid: int, number: int, send: Callable[[int], None]) -> None:
        """Send now if init takes the signal, otherwise look again every LOOK_SECONDS. Raises what `send` raises."""
        self.number = number
        self._loop, self._pid, self._send = loop, pid, send
        self._timer: Timer | None = None
        self._look()

    @property
    def pending(self) -> bool:
        return self._timer is not None

    def _look(self) -> None:
        self._timer = None
        if takes(self._pid, self.number):
            self._send(self.number)
        else:
            self._timer = self._loop.after(LOOK_SECONDS, self._look)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
