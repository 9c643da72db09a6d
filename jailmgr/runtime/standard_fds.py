"""File descriptors 0 to 2 of a process of ours: open, whatever its caller has closed.

The kernel gives out the lowest free number. With 0, 1 or 2 free, the next file, socket or pipe that is opened becomes
stdin, stdout or stderr: of this process, of its children, and of what `exec` starts.
"""

from __future__ import annotations

import os
import sys


def open_closed() -> None:
    """Open /dev/null on each of fds 0 to 2 that was closed when the interpreter began.

    Call it before anything else is opened. The interpreter has found the closed ones: their stream in `sys` is None.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)
        if null == fd:
            os.set_inheritable(fd, True)
        else:
            os.dup2(null, fd)
            os.close(null)
        setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - it lives as long as we do
