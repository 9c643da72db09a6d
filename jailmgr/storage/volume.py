"""Volumes: a jail's own writable layer, counted and limited by the pool's kind; and builds, which images are made of.

Paths go by names we checked and directories only root can write; nothing below `upper` is ever looked at.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jailmgr.errors import JailmgrError, from_os
from jailmgr.storage import btrfs_volume, project_volume
from jailmgr.storage.kind import Pool, VolumeKind
from jailmgr.units import format_size

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\Z", re.ASCII)
_KINDS: dict[str, VolumeKind] = {"squota": btrfs_volume, "qgroup": btrfs_volume, "project": project_volume}


def kind_of(pool: Pool) -> VolumeKind:
    """What is done in this pool, in its kind's way."""
    return _KINDS[pool.mode]


def create_volume(
    pool: Pool, tenant: str, tenant_id: int, jail: str, jail_id: int, size: int | None, layers: Sequence[str] = ()
) -> str:
    """An empty volume, limited to `size` bytes together with all that is ever counted as the jail's; its path.

    `layers` are the root directories that the jail sees below it: no inode number of theirs is ever one of the volume.
    In it are `upper` (the root directory of the jail's layer: 0755, 0:0) and `work`, as mount(8) has them for overlay.
    Raises JailmgrError `exists`, `full`; nothing is left of one that failed.
    """
    path = _volume(pool, tenant, jail)
    what = f"volume of {tenant}/{jail}"
    if os.path.lexists(path):
        raise JailmgrError(what, "there is one already", "", "exists")
    with _told(what):
        kind_of(pool).create_volume(pool, path, tenant_id, jail_id, size, layers)
    return path


def keep_ready(pool: Pool, layers: Sequence[str]) -> None:
    """Make ahead what takes long of the next volumes over these layers. JailmgrError `full`."""
    with _told("volumes made ahead"):
        kind_of(pool).keep_ready(pool, layers)


def overlaps(pool: Pool, tenant: str, jail: str, layers: Sequence[str]) -> bool:
    """Report whether a volume may have inode numbers of the layers below it. JailmgrError `missing`."""
    with _told(f"volume of {tenant}/{jail}"):
        return kind_of(pool).overlaps(pool, _volume(pool, tenant, jail), layers)


def renumber(
    pool: Pool, tenant: str, jail: str, jail_id: int, layers: Sequence[str], in_use: Callable[[], bool]
) -> None:
    """Give new inode numbers to a volume that `overlaps`, all at once or not at all, whatever its limit.

    No process may have it mounted: `in_use` is asked once nothing can be written to it any more. Raises JailmgrError
    `conflict` if it is in use, `full` if the pool is.
    """
    with _told(f"inode numbers of {tenant}/{jail}"):
        kind_of(pool).renumber(pool, _volume(pool, tenant, jail), jail_id, layers, in_use)


def half_made(pool: Pool) -> list[str]:
    """Names of what was being made, ahead or with new inode numbers, as a crash came: for `discard_half_made`."""
    return [os.path.basename(path) for path in kind_of(pool).half_made(pool)]


def discard_half_made(pool: Pool) -> None:
    """Delete what was being made as a crash came. JailmgrError."""
    with _told("what was half made"):
        kind_of(pool).discard_half_made(pool)


def delete_volume(pool: Pool, tenant: str, jail: str, jail_id: int | None) -> None:
    """Delete a volume and give up what counted it (found by the volume where `jail_id` is None). Idempotent."""
    path = _volume(pool, tenant, jail)
    with _told(f"volume of {tenant}/{jail}"):
        kind_of(pool).delete_volume(pool, path, jail_id)


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
    with _told("size of the volume"):
        if size is not None:
            kind_of(pool).sync(pool)
            _check_room("size of the volume", volume_usage(pool, jail_id), size)
        kind_of(pool).limit_volume(pool, jail_id, size)


def nests(pool: Pool) -> bool:
    """Whether the kernel holds what all of a tenant's volumes take together, beside each by itself."""
    return pool.mode != "project"


def hold_tenant(pool: Pool, tenant_id: int, size: int | None) -> None:
    """`limit_tenant` to what was checked before: in a pool that may be another one, or that a crash kept from it."""
    with _told("size of the tenant's volumes"):
        kind_of(pool).limit_tenant(pool, tenant_id, size)


def limit_tenant(pool: Pool, tenant: str, tenant_id: int, size: int | None) -> None:
    """Limit what all of a tenant's volumes may hold together; None takes it away.

    JailmgrError `full` as above, `unavailable` in a pool that counts jails only.
    """
    what = "size of the tenant's volumes"
    with _told(what):
        if size is not None:
            kind_of(pool).sync(pool)
            _check_room(what, tenant_usage(pool, tenant, tenant_id), size)
        kind_of(pool).limit_tenant(pool, tenant_id, size)


def forget_tenant(pool: Pool, tenant: str, tenant_id: int) -> None:
    """Give up a tenant's directory and what counted its volumes, once they are deleted. Idempotent."""
    try:
        os.rmdir(_tenant(pool, tenant))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise from_os(f"tenant {tenant}", error) from error
    kind_of(pool).forget_tenant(pool, tenant_id)


def volume_usage(pool: Pool, jail_id: int) -> int | None:
    """Bytes a jail's volume takes; None where it has none. On btrfs what was deleted counts for up to 30 s more."""
    return kind_of(pool).volume_usage(pool, jail_id)


def committed_usage(pool: Pool) -> dict[int, int]:
    """Bytes of each jail's volume by jail id, in one go: on btrfs exact for jails that have not run for 30 s."""
    return kind_of(pool).committed_usage(pool)


def tenant_usage(pool: Pool, tenant: str, tenant_id: int) -> int | None:
    """Bytes all of a tenant's volumes take together; None where it never had one."""
    return kind_of(pool).tenant_usage(pool, _tenant(pool, tenant), tenant_id)


def sync_pool(pool: Pool) -> None:
    """Have all that was written on disk: a power cut undoes nothing from before, and usage is exact."""
    kind_of(pool).sync(pool)


def create_build(pool: Pool, name: str, size: int | None = None) -> str:
    """A scratch directory, and in it an empty root file system to build an image in, whose path is returned.

    `size` in bytes limits it. Raises JailmgrError `exists`, `full`.
    """
    path = build_path(pool, name)
    if os.path.lexists(path):
        raise JailmgrError(f"build {name}", "there is one already", "", "exists")
    with _told(f"build {name}"):
        kind_of(pool).create_build(pool, path, size)
    return f"{path}/rootfs"


def delete_build(pool: Pool, name: str) -> None:
    """Delete a build with all that was made in it. Idempotent."""
    path = build_path(pool, name)
    with _told(f"build {name}"):
        kind_of(pool).delete_tree(pool, path)


def list_volumes(pool: Pool) -> list[tuple[str, str]]:
    """Tenant and jail of each volume there is, half-made ones too, but not of one that gets new inode numbers."""
    at = f"{pool.path}/volumes"
    found = [(tenant, jail) for tenant in sorted(os.listdir(at)) for jail in sorted(os.listdir(f"{at}/{tenant}"))]
    return [(tenant, jail) for tenant, jail in found if not jail.startswith(".")]


def list_builds(pool: Pool) -> list[str]:
    """Names of the builds there are."""
    return sorted(os.listdir(f"{pool.path}/builds"))


def reap(pool: Pool) -> None:
    """Go on with what was deleted and isn't gone yet. JailmgrError."""
    with _told("what was deleted"):
        kind_of(pool).reap(pool)


def half_deleted(pool: Pool) -> list[str]:
    """Names of what a crash kept from being deleted, of which `reap` frees the space."""
    return kind_of(pool).half_deleted(pool)


def build_path(pool: Pool, name: str) -> str:
    """A build's directory; its root file system is `rootfs` in it. JailmgrError `invalid`."""
    return f"{pool.path}/builds/{_checked(name)}"


def explained(what: str, error: OSError) -> JailmgrError:
    """An OSError met on the pool, with code `full` where space was what it lacked."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Delete jails or images, or give the pool more space."
        return JailmgrError(
            what, "no space is left in the pool" if error.errno == errno.ENOSPC else "the quota is full", hint, "full"
        )
    return from_os(what, error)


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explained(what, error) from error


def _check_room(what: str, used: int | None, size: int) -> None:
    if used is not None and used > size:
        why = f"{format_size(used)} is used, more than {format_size(size)}"
        raise JailmgrError(what, why, "Delete something in it first.", "full")


def _tenant(pool: Pool, tenant: str) -> str:
    return f"{pool.path}/volumes/{_checked(tenant)}"


def _volume(pool: Pool, tenant: str, jail: str) -> str:
    return f"{_tenant(pool, tenant)}/{_checked(jail)}"


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise JailmgrError(f"name {name!r}", "not a DNS label (RFC 1123)", "", "invalid")
    return name
