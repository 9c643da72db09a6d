"""How a jail's init ended: its wait status, and what that means. Standard library only."""

from __future__ import annotations

import os
import signal
from time import time
from typing import Any


def ending(status: int | None, *, stopping: str, ours: bool, killed: bool, out_of_memory: bool) -> dict[str, Any]:
    """What a wait status means for process 1 of a pid namespace (reboot(2), "Behavior inside PID namespaces").

    As JSON has a model.Ending. `stopping`: who asked for the end; empty for nobody. `killed`: by us. `out_of_memory`:
    the kernel killed some process of the jail for want of memory.
    """
    ended: dict[str, Any] = {"at": time(), "by": stopping or "guest", "status": 0}
    if status is None:
        return ended | {"kind": "unknown", "by": stopping or "host"}
    if status == signal.SIGKILL and not stopping:
        if out_of_memory:
            return ended | {"kind": "oom", "by": "kernel", "status": status}
        if ours:
            return ended | {"kind": "signal", "by": "host", "status": status}
    if status in (0, signal.SIGKILL) and not ours and not killed:
        # The INT or HUP that reboot(2) leaves is told to init's parent only, which is not us.
        return ended | {"kind": "poweroff" if stopping else "unknown"}
    if status == 0 and stopping:
        # s6-svscan brings its services down on its stop signal, and exits: that is the end that was asked for.
        return ended | {"kind": "poweroff"}
    if os.WIFEXITED(status):
        return ended | {"kind": "exit", "status": os.WEXITSTATUS(status)}
    number = os.WTERMSIG(status)
    if number == signal.SIGINT:
        return ended | {"kind": "poweroff"}
    if number == signal.SIGHUP:
        # sysvinit and OpenRC reboot on SIGINT, which is then the stop signal: a stop was asked for, and is what it is.
        return ended | {"kind": "poweroff" if stopping else "reboot"}
    return ended | {"kind": "signal", "status": number}
