"""What btrfs volumes are made from: snapshots of seeds, so that no inode number of a volume is one of its image's.

Image and volume are subvolumes, each counts its inodes from 257, and overlayfs shows the numbers of both as of one
file system. Two files with one number are taken for one: tar(1), rsync(1) and cp(1) lose the content of the second.
So a volume counts from a **floor** that no number of its layers reaches.

A subvolume counts on from the highest number in its tree (fs/btrfs/disk-io.c, btrfs_init_root_free_objectid). A seed
is a subvolume in which files without a name were made until the counter passed the floor, with `upper` and `work` made
after them; a snapshot of it counts on from there, after a mount as well. Floors are powers of two, so that images have
seeds in common. A snapshot takes a commit of the transaction, so some are made ahead.

In `seeds` of the pool lie `seed-FLOOR` (read-only), its snapshots `ready-FLOOR-X` and, while one is made,
`new-FLOOR-X`. None is in a jail's quota group. Who makes a seed holds a lock (flock(2)) on the directory.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from jailmgr.runtime.syscalls import RENAME_NOREPLACE, renameat2
from jailmgr.runtime.volume_format import UPPER, WORK
from jailmgr.storage import btrfs, btrfs_inodes
from jailmgr.storage.kind import Pool

SEEDS = "seeds"
READY = 16
"""Snapshots kept of a seed that is in use."""

_LOWEST, _HIGHEST = 1 << 10, 1 << 40
_AT_ONCE = 256
"""Files without a name that are open together: some of the cost of one is in its end."""


def floor_above(layers: Sequence[str]) -> int:
    """Return a number that no inode reaches in the subvolumes that these directories lie in. Raises OSError."""
    floor = _LOWEST
    for layer in layers:
        with btrfs.directory(layer) as fd:
            subvolume = btrfs.subvolume_id(fd)
            while floor < _HIGHEST and btrfs_inodes.has_from(fd, subvolume, floor):
                floor *= 2
    return floor


def raise_counter(fd: int, floor: int) -> None:
    """Make and drop files in the directory until the next inode of its subvolume has a number of `floor` or more.

    Takes 20 µs a number. The counter stays there only if an inode is made next, and kept.
    """
    made: list[int] = []
    try:
        while True:
            made.append(os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=fd))
            if os.fstat(made[-1]).st_ino >= floor - 1:
                return
            if len(made) == _AT_ONCE:
                _close(made)
    finally:
        _close(made)


def take(pool: Pool, floor: int, path: str) -> None:
    """Put a snapshot of the seed at `path`, in no quota group. Raises OSError: FileExistsError for a path in use."""
    while True:
        for name in _ready(pool, floor):
            try:
                return renameat2(f"{_at(pool)}/{name}", path, RENAME_NOREPLACE)
            except FileNotFoundError:
                continue  # another thread was first
        _make_ready(pool, floor)


def keep_ready(pool: Pool, floor: int) -> None:
    """Have READY snapshots lie ready, and the seed that they are made from. Raises OSError."""
    while len(_ready(pool, floor)) < READY:
        _make_ready(pool, floor)


def all_but(pool: Pool, floors: Iterable[int]) -> list[str]:
    """Return the paths of seeds with other floors, and of their snapshots. Raises OSError."""
    kept = {str(floor) for floor in floors}
    found = [name for name in os.listdir(_at(pool)) if name.startswith(("seed-", "ready-"))]
    return [f"{_at(pool)}/{name}" for name in found if name.split("-")[1] not in kept]


def half_made(pool: Pool) -> list[str]:
    """Return the paths of seeds that were not made to the end. While one is being made, there are none."""
    try:
        with _locked(pool, fcntl.LOCK_NB) as seeds:
            return [f"{_at(pool)}/{name}" for name in os.listdir(seeds) if name.startswith("new-")]
    except BlockingIOError:
        return []


def _make_ready(pool: Pool, floor: int) -> None:
    seed = f"{_at(pool)}/seed-{floor}"
    if not os.path.isdir(seed):
        _make_seed(pool, floor)
    with btrfs.directory(seed) as source, btrfs.directory(_at(pool)) as seeds:
        btrfs.snapshot(source, seeds, f"ready-{floor}-{secrets.token_hex(6)}")


def _make_seed(pool: Pool, floor: int) -> None:
    with _locked(pool) as seeds:
        if os.path.isdir(f"{_at(pool)}/seed-{floor}"):
            return
        new = f"new-{floor}-{secrets.token_hex(6)}"
        btrfs.create_subvolume(seeds, new)
        with btrfs.directory(f"{_at(pool)}/{new}") as made:
            raise_counter(made, floor)
            make_directories(made)
            btrfs.set_read_only(made, True)
        os.rename(new, f"seed-{floor}", src_dir_fd=seeds, dst_dir_fd=seeds)


def make_directories(volume: int) -> None:
    """Make the two directories of a volume that overlayfs takes: `upper` (0755) and `workdir` (0700)."""
    for name, mode in ((UPPER, 0o755), (WORK, 0o700)):
        os.mkdir(name, mode, dir_fd=volume)
        os.chmod(name, mode, dir_fd=volume)


def _ready(pool: Pool, floor: int) -> list[str]:
    return [name for name in os.listdir(_at(pool)) if name.startswith(f"ready-{floor}-")]


def _at(pool: Pool) -> str:
    return f"{pool.path}/{SEEDS}"


@contextmanager
def _locked(pool: Pool, flags: int = 0) -> Iterator[int]:
    with btrfs.directory(_at(pool)) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
        yield fd


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
