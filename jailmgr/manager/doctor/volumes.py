"""Volumes of earlier releases, and programs that can't read the pool."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.manager.doctor.check import SBIN, Check, check
from jailmgr.storage.pool import Pool, is_open, open_pool
from jailmgr.storage.volume import overlaps
from jailmgr.store import Store

PROGS = (6, 14)
"""The oldest btrfs-progs that were tried and check a file system with simple quotas. Debian 12's 6.2 refuse it."""
_SHOWN = 8


def volume_checks(root: Root) -> list[Check]:
    """Checks of a pool that is mounted; none of another. Raises JailmgrError, OSError."""
    if not is_open(root):
        return []
    pool = open_pool(root)
    return [*_numbers(root, pool), *_progs(pool)]


def _numbers(root: Root, pool: Pool) -> list[Check]:
    if not os.path.exists(root.store):
        return []
    store = Store(root.store)
    store.open_to_read()
    try:
        jails = store.jails()
    finally:
        store.close()
    old = []
    for jail in jails:
        try:
            if overlaps(pool, jail.tenant, jail.name, [f"{root.image(jail.image)}/rootfs"]):
                old.append(jail.full_name)
        except JailmgrError:
            continue  # a volume or an image is missing, which is not for this check to report
    names = ", ".join(old[:_SHOWN]) + (", …" if len(old) > _SHOWN else "")
    detail = f"an earlier release made the volumes of {names}: two files in such a jail can have one inode number"
    remedy = "Stop and start them: each start renews the volume. What keeps it from that is in the engine's log."
    return [check("inode numbers", not old, detail if old else "no file of a jail has another's", remedy, "warning")]


def _progs(pool: Pool) -> list[Check]:
    program = shutil.which("btrfs", path=SBIN)
    if pool.mode != "squota" or program is None:
        return []
    said = subprocess.run([program, "version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    found = re.search(r"v(\d+)\.(\d+)", said.stdout)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    shown = f"btrfs-progs {version[0]}.{version[1]}"
    if version >= PROGS:
        return [Check("btrfs check", True, "warning", f"{shown} can check and repair the pool")]
    detail = (
        f"{shown} may refuse a pool with simple quotas (6.2 does); for a repair take {PROGS[0]}.{PROGS[1]} or newer"
    )
    return [Check("btrfs check", True, "warning", detail)]
