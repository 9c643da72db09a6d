"""Volumes: a jail's own writable layer, a subvolume in the jail's quota group below its tenant's.

Group 1/JAIL holds the volume (and what will be made of it: snapshots, restores), 2/TENANT holds the jails' groups. A
limit lies on the group, never on the subvolume, since a limit on a subvolume is left behind when it is restored.
Paths go by names we checked and directories only root can write; nothing below `upper` is ever looked at.
"""

from __future__ import annotations

import errno
import os
import random
import re
import stat
from contextlib import ExitStack

from jailmgr.errors import JailmgrError, from_os
from jailmgr.storage import btrfs
from jailmgr.storage.pool import Pool
from jailmgr.units import format_size

JAIL_LEVEL, TENANT_LEVEL = 1, 2
REAP_AT_ONCE = 8
"""Groups looked at by one call of `reap`: the cost of a deletion doesn't grow with how many went before."""

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\Z", re.ASCII)
_MARK = re.compile(r"(\d{1,5})-(\d{1,15})\Z", re.ASCII)


def create_volume(pool: Pool, tenant: str, tenant_id: int, jail: str, jail_id: int, size: int | None) -> str:
    """An empty volume, limited to `size` bytes together with all that is ever in the jail's group; its path.

    In it are `upper` (the root directory of the jail's layer: 0755, 0:0) and `work`, as mount(8) has them for overlay.
    Raises JailmgrError `exists`, `full`; nothing is left of one that failed.
    """
    path = _volume(pool, tenant, jail)
    what = f"volume of {tenant}/{jail}"
    jail_group, tenant_group = btrfs.group(JAIL_LEVEL, jail_id), btrfs.group(TENANT_LEVEL, tenant_id)
    if os.path.lexists(path):
        raise JailmgrError(what, "there is one already", "", "exists")
    with ExitStack() as undo:
        undo.callback(delete_volume, pool, tenant, jail, jail_id)
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            with btrfs.directory(os.path.dirname(path)) as parent:
                btrfs.create_group(parent, tenant_group)
                btrfs.create_group(parent, jail_group)
                btrfs.assign_group(parent, jail_group, tenant_group)
                btrfs.limit_group(parent, jail_group, size)
                btrfs.create_subvolume(parent, jail, [jail_group])
            _make_directory(f"{path}/upper", 0o755)
            _make_directory(f"{path}/work", 0o700)
        except OSError as error:
            raise explained(what, error) from error
        undo.pop_all()
    return path


def delete_volume(pool: Pool, tenant: str, jail: str, jail_id: int | None) -> None:
    """Delete a volume and give up its quota group (found by the volume where `jail_id` is None). Idempotent.

    The group goes once the kernel has freed the space, in this or a later call of `reap`.
    """
    path = _volume(pool, tenant, jail)
    try:
        with btrfs.directory(pool.path) as top:
            subvolume = _subvolume(path)
            given_up = set() if jail_id is None else {btrfs.group(JAIL_LEVEL, jail_id)}
            if subvolume is not None:
                given_up.update(btrfs.parents(top, subvolume))
            later = [group for group in given_up if not _mark_if_room(pool, group)]
            if subvolume is not None:
                btrfs.destroy_subvolume(top, subvolume)
        for group in later:
            _mark_if_room(pool, group)
        reap(pool)
    except OSError as error:
        raise explained(f"volume of {tenant}/{jail}", error) from error


def rename_volume(pool: Pool, tenant: str, old: str, new: str) -> None:
    """Give a volume another name within its tenant; fine where that is done. JailmgrError `exists`, `missing`."""
    source, target = _volume(pool, tenant, old), _volume(pool, tenant, new)
    if os.path.lexists(target):
        if not os.path.lexists(source):
            return
        raise JailmgrError(f"volume of {tenant}/{new}", "there is one already", "", "exists")
    try:
        os.rename(source, target)
    except FileNotFoundError:
        raise JailmgrError(f"volume of {tenant}/{old}", "it is gone", "", "missing") from None


def resize_volume(pool: Pool, jail_id: int, size: int | None) -> None:
    """Change a volume's limit, live; None takes it away. JailmgrError `full` where more than `size` is used."""
    _limit(pool, btrfs.group(JAIL_LEVEL, jail_id), size, "volume")


def limit_tenant(pool: Pool, tenant_id: int, size: int | None) -> None:
    """Limit what all of a tenant's volumes may hold together; None takes it away. JailmgrError `full` as above."""
    group = btrfs.group(TENANT_LEVEL, tenant_id)
    with btrfs.directory(pool.path) as top:
        btrfs.create_group(top, group)
    _limit(pool, group, size, "tenant's volumes")


def forget_tenant(pool: Pool, tenant: str, tenant_id: int) -> None:
    """Give up a tenant's directory and quota group, once its volumes are deleted. Idempotent."""
    try:
        os.rmdir(f"{pool.path}/volumes/{_checked(tenant)}")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise from_os(f"tenant {tenant}", error) from error
    _mark(pool, btrfs.group(TENANT_LEVEL, tenant_id))
    reap(pool)


def volume_usage(pool: Pool, jail_id: int) -> int | None:
    """Bytes a jail's volume takes; None where it has none. What was deleted counts until the next commit (30 s)."""
    return btrfs.group_usage(pool.uuid, btrfs.group(JAIL_LEVEL, jail_id))


def committed_usage(pool: Pool) -> dict[int, int]:
    """Bytes of each jail's volume by jail id, as of the last commit: exact for jails that have not run for 30 s."""
    with btrfs.directory(pool.path) as top:
        return {
            group & (1 << 48) - 1: size
            for group, size in btrfs.committed_usage(top).items()
            if group >> 48 == JAIL_LEVEL
        }


def tenant_usage(pool: Pool, tenant_id: int) -> int | None:
    """Bytes all of a tenant's volumes take together; None where it never had one."""
    return btrfs.group_usage(pool.uuid, btrfs.group(TENANT_LEVEL, tenant_id))


def sync_pool(pool: Pool) -> None:
    """Have all that was written on disk: a power cut undoes nothing from before, and usage is exact."""
    with btrfs.directory(pool.path) as top:
        btrfs.sync(top)


def create_build(pool: Pool, name: str, size: int | None = None) -> str:
    """A scratch subvolume, and in it an empty root file system to build an image in, whose path is returned.

    `size` in bytes limits it. Raises JailmgrError `exists`, `full`.
    """
    path = build_path(pool, name)
    try:
        with btrfs.directory(os.path.dirname(path)) as parent:
            btrfs.create_subvolume(parent, name)
        if size is not None:
            with btrfs.directory(path) as build:
                btrfs.limit_group(build, btrfs.group(0, btrfs.subvolume_id(build)), size)
        _make_directory(f"{path}/rootfs", 0o755)
    except FileExistsError:
        raise JailmgrError(f"build {name}", "there is one already", "", "exists") from None
    except OSError as error:
        delete_build(pool, name)
        raise explained(f"build {name}", error) from error
    return f"{path}/rootfs"


def delete_build(pool: Pool, name: str) -> None:
    """Delete a build's subvolume with all that was made in it, nested subvolumes too. Idempotent."""
    delete_subvolume(pool, build_path(pool, name), f"build {name}")


def delete_subvolume(pool: Pool, path: str, what: str) -> None:
    """Delete the subvolume at `path` and give up its own group. Idempotent."""
    try:
        subvolume = _subvolume(path)
        if subvolume is not None:
            _mark(pool, btrfs.group(0, subvolume))
            with btrfs.directory(pool.path) as top:
                btrfs.destroy_subvolume(top, subvolume)
        reap(pool)
    except OSError as error:
        raise explained(what, error) from error


def _mark_if_room(pool: Pool, group: int) -> bool:
    """Whether the group could be marked: in a pool that is full to the last byte, something must go first."""
    try:
        _mark(pool, group)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


def list_volumes(pool: Pool) -> list[tuple[str, str]]:
    """Tenant and jail of each volume there is, half-made ones too."""
    at = f"{pool.path}/volumes"
    return [(tenant, jail) for tenant in sorted(os.listdir(at)) for jail in sorted(os.listdir(f"{at}/{tenant}"))]


def list_builds(pool: Pool) -> list[str]:
    """Names of the builds there are."""
    return sorted(os.listdir(f"{pool.path}/builds"))


def reap(pool: Pool) -> None:
    """Remove quota groups that were given up and of which the kernel has freed everything.

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


def _limit(pool: Pool, group: int, size: int | None, what: str) -> None:
    with btrfs.directory(pool.path) as top:
        if size is not None:
            btrfs.sync(top)
            used = btrfs.group_usage(pool.uuid, group)
            if used is not None and used > size:
                raise JailmgrError(
                    f"size of the {what}",
                    f"{format_size(used)} is used, more than {format_size(size)}",
                    "Delete something in it first.",
                    "full",
                )
        try:
            btrfs.limit_group(top, group, size)
        except OSError as error:
            raise explained(f"size of the {what}", error) from error


def _subvolume(path: str) -> int | None:
    """The id of the subvolume at `path`; None where there is nothing."""
    try:
        with btrfs.directory(path) as fd:
            if os.fstat(fd).st_ino != btrfs.ROOT_INODE:
                raise OSError(errno.EINVAL, "not a subvolume", path)
            return btrfs.subvolume_id(fd)
    except FileNotFoundError:
        return None


def _make_directory(path: str, mode: int) -> None:
    os.mkdir(path, mode)
    os.chmod(path, stat.S_IMODE(mode))


def _volume(pool: Pool, tenant: str, jail: str) -> str:
    return f"{pool.path}/volumes/{_checked(tenant)}/{_checked(jail)}"


def build_path(pool: Pool, name: str) -> str:
    """A build's subvolume; its root file system is `rootfs` in it. JailmgrError `invalid`."""
    return f"{pool.path}/builds/{_checked(name)}"


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise JailmgrError(f"name {name!r}", "not a DNS label (RFC 1123)", "", "invalid")
    return name


def explained(what: str, error: OSError) -> JailmgrError:
    """An OSError met on the pool, with code `full` where space was what it lacked."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Delete jails or images, or give the pool more space."
        return JailmgrError(
            what, "no space is left in the pool" if error.errno == errno.ENOSPC else "the quota is full", hint, "full"
        )
    return from_os(what, error)
