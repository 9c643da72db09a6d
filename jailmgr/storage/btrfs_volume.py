"""Volumes, builds and images in a btrfs: subvolumes, a jail's in the jail's quota group below its tenant's.

Group 1/JAIL holds the volume (and what will be made of it: snapshots, restores), 2/TENANT holds the jails' groups. A
limit lies on the group, never on the subvolume, since a limit on a subvolume is left behind when it is restored.
"""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from jailmgr.errors import JailmgrError
from jailmgr.storage import btrfs, btrfs_renumber, btrfs_seeds
from jailmgr.storage.kind import Pool

JAIL_LEVEL, TENANT_LEVEL = 1, 2
REAP_AT_ONCE = 8
"""Groups looked at by one call of `reap`: the cost of a deletion doesn't grow with how many went before."""

_MARK = re.compile(r"(\d{1,5})-(\d{1,15})\Z", re.ASCII)


def create_volume(pool: Pool, path: str, tenant_id: int, jail_id: int, size: int | None, layers: Sequence[str]) -> None:
    """As VolumeKind: a snapshot of a seed. JailmgrError `conflict` where another's files are in the jail's group.

    It is put in its place first and into the jail's group then: what a crash leaves in `seeds` is in no group.
    """
    jail_group, tenant_group = btrfs.group(JAIL_LEVEL, jail_id), btrfs.group(TENANT_LEVEL, tenant_id)
    if btrfs.group_usage(pool.uuid, jail_group):
        hint = "`jailmgr doctor` names volumes of jails that the store does not know."
        raise JailmgrError(f"volume {path}", f"quota group {btrfs.told(jail_group)} is in use", hint, "conflict")
    with ExitStack() as undo:
        undo.callback(delete_volume, pool, path, jail_id)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with btrfs.directory(os.path.dirname(path)) as parent:
            btrfs.create_group(parent, tenant_group)
            btrfs.create_group(parent, jail_group)
            btrfs.assign_group(parent, jail_group, tenant_group)
            btrfs.limit_group(parent, jail_group, size)
            btrfs_seeds.take(pool, btrfs_seeds.floor_above(layers), path)
            with btrfs.directory(path) as volume:
                btrfs.assign_group(parent, btrfs.group(0, btrfs.subvolume_id(volume)), jail_group)
        undo.pop_all()


def keep_ready(pool: Pool, layers: Sequence[str]) -> None:
    """As VolumeKind: snapshots of their seed."""
    btrfs_seeds.keep_ready(pool, btrfs_seeds.floor_above(layers))


def drop_unneeded(pool: Pool, layers: Sequence[str]) -> None:
    """As VolumeKind: seeds, and snapshots of them."""
    for path in btrfs_seeds.all_but(pool, [btrfs_seeds.floor_above([layer]) for layer in layers]):
        delete_tree(pool, path)


def overlaps(pool: Pool, path: str, layers: Sequence[str]) -> bool:
    """As VolumeKind."""
    return btrfs_renumber.overlaps(path, layers)


def renumber(pool: Pool, path: str, jail_id: int, layers: Sequence[str], in_use: Callable[[], bool]) -> None:
    """As VolumeKind: a snapshot with new numbers takes the volume's place."""
    btrfs_renumber.renumber(pool, path, btrfs.group(JAIL_LEVEL, jail_id), layers, in_use)


def half_made(pool: Pool) -> list[str]:
    """As VolumeKind: seeds, and volumes that were being renumbered."""
    return [*btrfs_seeds.half_made(pool), *btrfs_renumber.marks(pool)]


def discard_half_made(pool: Pool) -> None:
    """As VolumeKind."""
    for path in btrfs_seeds.half_made(pool):
        delete_tree(pool, path)
    for mark in btrfs_renumber.marks(pool):
        btrfs_renumber.give_up(pool, mark)


def delete_volume(pool: Pool, path: str, jail_id: int | None) -> None:
    """As VolumeKind. The group goes once the kernel has freed the space, in this or a later call of `reap`."""
    with btrfs.directory(pool.path) as top:
        subvolume = btrfs.subvolume_at(path)
        given_up = set() if jail_id is None else {btrfs.group(JAIL_LEVEL, jail_id)}
        if subvolume is not None:
            given_up.update(btrfs.parents(top, subvolume))
        later = [group for group in given_up if not _mark_if_room(pool, group)]
        if subvolume is not None:
            btrfs.destroy_subvolume(top, subvolume)
    for group in later:
        _mark_if_room(pool, group)
    reap(pool)


def limit_volume(pool: Pool, jail_id: int, size: int | None) -> None:
    """As VolumeKind."""
    with btrfs.directory(pool.path) as top:
        btrfs.limit_group(top, btrfs.group(JAIL_LEVEL, jail_id), size)


def limit_tenant(pool: Pool, tenant_id: int, size: int | None) -> None:
    """As VolumeKind."""
    group = btrfs.group(TENANT_LEVEL, tenant_id)
    with btrfs.directory(pool.path) as top:
        btrfs.create_group(top, group)
        btrfs.limit_group(top, group, size)


def forget_tenant(pool: Pool, tenant_id: int) -> None:
    """As VolumeKind."""
    _mark(pool, btrfs.group(TENANT_LEVEL, tenant_id))
    reap(pool)


def volume_usage(pool: Pool, jail_id: int) -> int | None:
    """As VolumeKind. What was deleted counts until the next commit (30 s)."""
    return btrfs.group_usage(pool.uuid, btrfs.group(JAIL_LEVEL, jail_id))


def committed_usage(pool: Pool) -> dict[int, int]:
    """As VolumeKind, as of the last commit: exact for jails that have not run for 30 s."""
    with btrfs.directory(pool.path) as top:
        return {
            group & (1 << 48) - 1: size
            for group, size in btrfs.committed_usage(top).items()
            if group >> 48 == JAIL_LEVEL
        }


def tenant_usage(pool: Pool, path: str, tenant_id: int) -> int | None:
    """As VolumeKind."""
    return btrfs.group_usage(pool.uuid, btrfs.group(TENANT_LEVEL, tenant_id))


def sync(pool: Pool) -> None:
    """As VolumeKind; usage is exact after it."""
    with btrfs.directory(pool.path) as top:
        btrfs.sync(top)


def create_build(pool: Pool, path: str, size: int | None) -> None:
    """As VolumeKind."""
    with btrfs.directory(os.path.dirname(path)) as parent:
        btrfs.create_subvolume(parent, os.path.basename(path))
    with ExitStack() as undo:
        undo.callback(delete_tree, pool, path)
        if size is not None:
            with btrfs.directory(path) as build:
                btrfs.limit_group(build, btrfs.group(0, btrfs.subvolume_id(build)), size)
        _make_directory(f"{path}/rootfs", 0o755)
        undo.pop_all()


def take_build(pool: Pool, build: str, image: str) -> None:
    """As VolumeKind: a snapshot. JailmgrError `invalid` where there are subvolumes in it, which no snapshot has."""
    with btrfs.directory(build) as source, btrfs.directory(os.path.dirname(image)) as images:
        if nested := btrfs.nested_subvolumes(source, btrfs.subvolume_id(source)):
            why = f"the build made {len(nested)} btrfs subvolumes, which an image can't hold"
            raise JailmgrError("image", why, "Have it make plain directories.", "invalid")
        btrfs.snapshot(source, images, os.path.basename(image))


def settle_image(pool: Pool, image: str) -> None:
    """As VolumeKind."""
    with btrfs.directory(image) as made:
        btrfs.set_read_only(made, True)
        btrfs.sync(made)


def delete_tree(pool: Pool, path: str) -> None:
    """As VolumeKind: the subvolume at `path` and those nested in it, with their own groups."""
    subvolume = btrfs.subvolume_at(path)
    if subvolume is not None:
        with btrfs.directory(pool.path) as top:
            # Older kernels (6.1) leave a classic group behind where its subvolume goes.
            for each in btrfs.subvolumes_from(top, subvolume):
                _mark(pool, btrfs.group(0, each))
            btrfs.destroy_subvolume(top, subvolume)
    reap(pool)


def half_deleted(pool: Pool) -> list[str]:
    """As VolumeKind: what is deleted is the kernel's to go on with."""
    return []


def reap(pool: Pool) -> None:
    """As VolumeKind: remove quota groups that were given up and of which the kernel has freed everything.

    A group with members, or whose use isn't 0, is left for another time; so is one of which some bytes live on in an
    image or a snapshot.
    """
    at = f"{pool.path}/reap"
    marks = os.listdir(at)
    if len(marks) > REAP_AT_ONCE:
        marks = random.sample(marks, REAP_AT_ONCE)
    with btrfs.directory(pool.path) as top:
        for mark in marks:
            match = _MARK.match(mark)
            if match is None or _reap(pool, top, btrfs.group(int(match[1]), int(match[2]))):
                _unlink(f"{at}/{mark}")


def _reap(pool: Pool, top: int, group: int) -> bool:
    usage = btrfs.group_usage(pool.uuid, group)
    if usage is None:
        return True
    if usage > 0:
        return False
    if group >> 48 == JAIL_LEVEL:
        for member in btrfs.members(top, group):
            btrfs.remove_group(top, member)
    return btrfs.remove_group(top, group)


def _mark(pool: Pool, group: int) -> None:
    """Note that a group is given up; it is looked for by `reap` until it is gone, whatever happens meanwhile."""
    name = btrfs.told(group).replace("/", "-")
    os.close(os.open(f"{pool.path}/reap/{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _mark_if_room(pool: Pool, group: int) -> bool:
    """Whether the group could be marked: in a pool that is full to the last byte, something must go first."""
    try:
        _mark(pool, group)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


def _make_directory(path: str, mode: int) -> None:
    os.mkdir(path, mode)
    os.chmod(path, mode)
