"""Volumes, builds and images in a pool of kind `project`: directories, each in a project of its own.

Of the pool's range, the lower half are jails' by their ids, the upper half builds'; an image keeps its build's, for
owners of links and the like can't be changed. Limits are on builds and on jails that have one.

What is deleted is renamed into `trash` first, out of everyone's way, and removed by rm(1): trees that a guest made may
be of any depth and have names of any bytes. The next start goes on with what is left there.
"""

from __future__ import annotations

import os
import random
import secrets
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from jailmgr.errors import JailmgrError
from jailmgr.runtime.volume_format import UPPER, WORK
from jailmgr.storage import project_quota as quota
from jailmgr.storage.btrfs import directory
from jailmgr.storage.kind import Pool
from jailmgr.storage.project_pool import PROJECTS

JAILS = PROJECTS // 2
"""How many of a pool's project ids are for jails; what is above is for builds."""
BYTES_PER_INODE = 4096
"""Where the file system makes inodes as they are needed."""
MIN_INODES = 16384

_TRIES = 64


def create_volume(pool: Pool, path: str, tenant_id: int, jail_id: int, size: int | None, layers: Sequence[str]) -> None:
    """As VolumeKind. JailmgrError `conflict` where another's files are in the jail's project, `full` past the last.

    Layers and volume are directories of one file system, which gives no number twice.
    """
    what = f"volume {path}"
    if not 0 < jail_id < JAILS:
        raise JailmgrError(what, f"there are {JAILS - 1} project ids for jails, and all were used", "", "full")
    project = pool.first_project + jail_id
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    os.mkdir(path, 0o700)
    with ExitStack() as undo, directory(path) as fd:
        undo.callback(delete_tree, pool, path)
        if quota.claim(fd, [project], inherit=True) is None:
            hint = "`jailmgr doctor` names volumes of jails that there are not."
            raise JailmgrError(what, f"something else is in its project {project}", hint, "conflict")
        _limit(fd, project, size)
        for name, mode in ((UPPER, 0o755), (WORK, 0o700)):
            os.mkdir(name, mode, dir_fd=fd)
            os.chmod(name, mode, dir_fd=fd)
        undo.pop_all()


def overlaps(pool: Pool, path: str, layers: Sequence[str]) -> bool:
    """As VolumeKind: never, in one file system."""
    return False


def renumber(pool: Pool, path: str, jail_id: int, layers: Sequence[str], in_use: Callable[[], bool]) -> None:
    """As VolumeKind: nothing has to be."""


def keep_ready(pool: Pool, layers: Sequence[str]) -> None:
    """As VolumeKind: nothing takes long."""


def drop_unneeded(pool: Pool, layers: Sequence[str]) -> None:
    """As VolumeKind: nothing was made."""


def half_made(pool: Pool) -> list[str]:
    """As VolumeKind: there is nothing of the kind."""
    return []


def discard_half_made(pool: Pool) -> None:
    """As VolumeKind: there is nothing of the kind."""


def delete_volume(pool: Pool, path: str, jail_id: int | None) -> None:
    """As VolumeKind. The limit goes first, so that none is left when the project is."""
    if jail_id is not None and jail_id < JAILS:
        with directory(pool.path) as top:
            if not quota.use(top, pool.first_project + jail_id).inodes:
                quota.limit(top, pool.first_project + jail_id, None, None)
    delete_tree(pool, path)


def limit_volume(pool: Pool, jail_id: int, size: int | None) -> None:
    """As VolumeKind."""
    with directory(pool.path) as top:
        _limit(top, pool.first_project + jail_id, size)


def limit_tenant(pool: Pool, tenant_id: int, size: int | None) -> None:
    """As VolumeKind: projects hold no projects."""
    why = "a pool of kind project counts each jail by itself, never a tenant's together"
    raise JailmgrError("size of the tenant's volumes", why, 'It takes [pool] kind = "btrfs".', "unavailable")


def forget_tenant(pool: Pool, tenant_id: int) -> None:
    """As VolumeKind: nothing counted it."""


def volume_usage(pool: Pool, jail_id: int) -> int | None:
    """As VolumeKind."""
    with directory(pool.path) as top:
        found = quota.use(top, pool.first_project + jail_id)
    return found.size if found.inodes else None


def committed_usage(pool: Pool) -> dict[int, int]:
    """As VolumeKind."""
    first = pool.first_project
    with directory(pool.path) as top:
        return {found.project - first: found.size for found in quota.uses(top, first + 1, first + JAILS)}


def tenant_usage(pool: Pool, path: str, tenant_id: int) -> int | None:
    """As VolumeKind."""
    try:
        jails = os.listdir(path)
    except FileNotFoundError:
        return None
    with directory(pool.path) as top:
        return sum(quota.use(top, project).size for jail in jails if (project := _project(pool, f"{path}/{jail}")))


def sync(pool: Pool) -> None:
    """As VolumeKind."""
    with directory(pool.path) as top:
        quota.sync(top)


def create_build(pool: Pool, path: str, size: int | None) -> None:
    """As VolumeKind."""
    os.mkdir(path, 0o700)
    with ExitStack() as undo, directory(path) as fd:
        undo.callback(delete_tree, pool, path)
        candidates = (pool.first_project + random.randrange(JAILS, PROJECTS) for _ in range(_TRIES))
        project = quota.claim(fd, candidates, inherit=True)
        if project is None:
            raise JailmgrError(f"build {path}", "no project id was found for it", "Delete images.", "full")
        _limit(fd, project, size)
        os.mkdir("rootfs", 0o755, dir_fd=fd)
        os.chmod("rootfs", 0o755, dir_fd=fd)
        undo.pop_all()


def take_build(pool: Pool, build: str, image: str) -> None:
    """As VolumeKind: the build loses its `rootfs`, since a copy would take as long as its files are many."""
    rootfs = f"{build}/rootfs"
    if project := _project(pool, rootfs):
        with directory(pool.path) as top:
            quota.limit(top, project, None, None)
    os.mkdir(image, 0o700)
    os.rename(rootfs, f"{image}/rootfs")


def settle_image(pool: Pool, image: str) -> None:
    """As VolumeKind: nobody but root of the host's can write to it, and jails have it mounted read-only."""
    with directory(image) as fd:
        quota.sync(fd)


def delete_tree(pool: Pool, path: str) -> None:
    """As VolumeKind."""
    if project := _project(pool, path):
        with directory(pool.path) as top:
            quota.limit(top, project, None, None)
    _remove(pool, path)


def reap(pool: Pool) -> None:
    """As VolumeKind."""
    for name in half_deleted(pool):
        _rm(f"{pool.path}/trash/{name}")


def half_deleted(pool: Pool) -> list[str]:
    """As VolumeKind."""
    return os.listdir(f"{pool.path}/trash")


def inodes_for(size: int, total_size: int, total_inodes: int, dynamic: bool) -> int:
    """How many files `size` bytes may be, at what the file system itself reckons for each: a fixed stock of inodes,
    as ext4's, would else be used up by empty ones.
    """
    each = BYTES_PER_INODE if dynamic or not total_inodes else max(1, total_size // total_inodes)
    return max(MIN_INODES, size // each)


def _limit(fd: int, project: int, size: int | None) -> None:
    if size is None:
        quota.limit(fd, project, None, None)
        return
    host = os.fstatvfs(fd)
    dynamic = quota.file_system(fd) == "xfs"
    quota.limit(fd, project, size, inodes_for(size, host.f_blocks * host.f_frsize, host.f_files, dynamic))


def _project(pool: Pool, path: str) -> int:
    """The project of a directory, where it is one of the pool's own; else 0, and where there is no directory."""
    try:
        with directory(path) as fd:
            project = quota.project_of(fd)
    except FileNotFoundError:
        return 0
    return project if pool.first_project < project < pool.first_project + PROJECTS else 0


def _remove(pool: Pool, path: str) -> None:
    trash = f"{pool.path}/trash/{secrets.token_hex(8)}"
    try:
        os.rename(path, trash)
    except FileNotFoundError:
        return
    _rm(trash)


def _rm(path: str) -> None:
    argv = ["rm", "--recursive", "--force", "--one-file-system", "--", path]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0 and os.path.lexists(path):
        why = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"rm ended with {done.returncode}"
        raise JailmgrError(f"deletion of {path}", why, "The next start of the engine tries again.", "failed")
