"""The block device under a pool, for limits on its I/O."""

from __future__ import annotations

import os

from jailmgr.storage import btrfs
from jailmgr.storage.pool import Pool


def block_device(pool: Pool) -> str:
    """`MAJOR:MINOR` of the disk that holds the pool, of its loop device where it lies in a file; empty where none does.

    A partition's is its disk's, since io.max takes no other. Raises OSError.
    """
    number = os.stat(pool.path).st_dev
    if os.major(number):
        at = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
        return _read(f"{at}/../dev" if os.path.exists(f"{at}/partition") else f"{at}/dev")
    with btrfs.directory(pool.path) as top:
        devices = os.listdir(f"/sys/fs/btrfs/{btrfs.file_system_uuid(top)}/devices")
    return _read(f"/sys/class/block/{devices[0]}/dev") if devices else ""


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()
