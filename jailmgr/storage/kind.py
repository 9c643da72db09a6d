"""What every kind of pool does, each in a module of its own for pools and one for what lies in them.

| `mode` | module | a pool is | a volume is | counted by |
| --- | --- | --- | --- | --- |
| `squota` | btrfs_* | a btrfs in a loop file | a subvolume | simple quotas: jail, tenant |
| `qgroup` | btrfs_* | the same | the same | classic quota groups: jail, tenant |
| `project` | project_* | a directory of the host's ext4 or xfs | a directory | a project quota: jail |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from jailmgr.config import Root

DIRECTORIES = ("images", "volumes", "builds")
"""What every pool holds; each kind adds where it keeps what is deleted but not yet gone."""


class Pool(msgspec.Struct, frozen=True):
    """A pool in its place. `mode` says how it counts, as in the table above; `uuid` is a btrfs's only."""

    path: str
    mode: str
    uuid: str = ""
    first_project: int = 0


class PoolKind(Protocol):
    """How a pool is made and mounted. Whoever makes, mounts or unmounts it holds the lock of storage/pool.py.

    Each raises OSError, and JailmgrError for what it finds itself.
    """

    def is_made(self, root: Root) -> bool:
        """Whether there is a pool of this kind."""

    def opened(self, root: Root) -> Pool | None:
        """The pool where it is mounted and counts, with no lock taken. JailmgrError `conflict`, `unavailable`."""

    def make(self, root: Root, size: int | None, lock: int) -> None:
        """Make an empty pool, whole or not at all. `lock` is the fd of the lock, for a child to hold it as well."""

    def mount(self, root: Root) -> None:
        """Mount it where it isn't, and have it count."""

    def unmount(self, root: Root) -> None:
        """Unmount it; fine where it isn't mounted. JailmgrError `conflict` where something else is."""

    def headroom(self, root: Root) -> int:
        """Bytes the host's disk would have left were the pool filled up; negative where it would be full before."""

    def writable(self, root: Root, reserve: int) -> int | None:
        """Bytes the pool may take before less than `reserve` is left on the host's disk; None where that can't be."""


class VolumeKind(Protocol):
    """What can be done with what lies in a pool. Paths are checked and within it; each raises OSError, JailmgrError."""

    def create_volume(
        self, pool: Pool, path: str, tenant_id: int, jail_id: int, size: int | None, layers: Sequence[str]
    ) -> None:
        """A volume with an empty `upper` and `work`; nothing is left of one that failed.

        No inode in it ever has the number of one in `layers`, the directories that it will lie over.
        """

    def overlaps(self, pool: Pool, path: str, layers: Sequence[str]) -> bool:
        """Whether an inode of a volume may have the number of one in `layers`: those of earlier releases have such."""

    def renumber(self, pool: Pool, path: str, jail_id: int, layers: Sequence[str], in_use: Callable[[], bool]) -> None:
        """Give new numbers to such a volume. JailmgrError `conflict` where it is in use."""

    def keep_ready(self, pool: Pool, layers: Sequence[str]) -> None:
        """Make ahead what the next volumes over these layers are made from."""

    def drop_unneeded(self, pool: Pool, layers: Sequence[str]) -> None:
        """Delete what was made ahead, but for volumes over one of these layers."""

    def half_made(self, pool: Pool) -> list[str]:
        """Paths of what a crash kept from being made, beside volumes, builds and images."""

    def discard_half_made(self, pool: Pool) -> None:
        """Delete that."""

    def delete_volume(self, pool: Pool, path: str, jail_id: int | None) -> None:
        """Idempotent; what counted it is found by the volume where `jail_id` is None."""

    def limit_volume(self, pool: Pool, jail_id: int, size: int | None) -> None:
        """Limit it in bytes, live; None takes the limit away."""

    def limit_tenant(self, pool: Pool, tenant_id: int, size: int | None) -> None:
        """Limit all of a tenant's volumes together. JailmgrError `unavailable` where the kind can't."""

    def forget_tenant(self, pool: Pool, tenant_id: int) -> None:
        """Give up what counted a tenant's volumes, once they are deleted."""

    def volume_usage(self, pool: Pool, jail_id: int) -> int | None:
        """Bytes; None without a volume."""

    def committed_usage(self, pool: Pool) -> dict[int, int]:
        """Bytes of each jail's volume by jail id, in one go."""

    def tenant_usage(self, pool: Pool, path: str, tenant_id: int) -> int | None:
        """Bytes of all of a tenant's volumes, which lie in `path`; None where it never had one."""

    def sync(self, pool: Pool) -> None:
        """Have all that was written on disk."""

    def create_build(self, pool: Pool, path: str, size: int | None) -> None:
        """A directory to build in, limited to `size` bytes, with an empty `rootfs`."""

    def take_build(self, pool: Pool, build: str, image: str) -> None:
        """Make `image` out of a build, still writable: its `rootfs`, and maybe more. The build may lose its own."""

    def settle_image(self, pool: Pool, image: str) -> None:
        """What `take_build` made is on disk, and read-only where the kind has that."""

    def delete_tree(self, pool: Pool, path: str) -> None:
        """Delete a build or an image. Idempotent."""

    def reap(self, pool: Pool) -> None:
        """Go on with what was deleted and isn't gone yet."""

    def half_deleted(self, pool: Pool) -> list[str]:
        """Names of what a crash kept from being deleted, of which `reap` frees the space."""
