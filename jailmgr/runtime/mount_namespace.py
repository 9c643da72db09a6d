"""A mount namespace for a program that is not a jail: with what it needs of the host's mounts, and no more.

A copy of all mounts would keep every file system busy that the host lets go of meanwhile: another instance's pool, a
disk that is to be pulled out.
"""

from __future__ import annotations

import re

from jailmgr.runtime.syscalls import CLONE_NEWNS, MNT_DETACH, MS_PRIVATE, mount_propagation, umount, unshare


def enter_own(needed: list[str]) -> None:
    """Move the calling thread into a mount namespace of its own, and unmount there all but what `needed` paths lie on.

    There is no way back: the thread should end with what it does there. Raises OSError.
    """
    unshare(CLONE_NEWNS)
    mount_propagation(MS_PRIVATE)
    with open("/proc/thread-self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        # Spaces and the like are octal there (proc_pid_mountinfo(5)).
        points = [re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in file]
    for point in reversed(points):
        if point != "/" and not any(path == point or path.startswith(f"{point}/") for path in needed):
            try:
                umount(point, MNT_DETACH)
            except OSError:
                continue  # gone with the one it lay on, or the kernel's to keep
