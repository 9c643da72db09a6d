"""Volumes made by earlier releases get new inode numbers: nothing else of them changes, whatever a guest put there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.storage import btrfs, btrfs_inodes, btrfs_renumber, btrfs_seeds, volume
from jailmgr.storage.pool import Pool
from tests.system.instance import until
from tests.system.test_storage import BTRFS, MIB, fill, nothing_counted, pool, refused
from tests.unit.crash import killed_at

__all__ = ["nothing_counted", "pool"]

pytestmark = [pytest.mark.xdist_group("debian"), BTRFS]

SIZE = 64 * MIB
GETFLAGS, SETFLAGS, NOCOW = 0x80086601, 0x40086602, 0x800000
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
"""cap_net_raw+ep, revision 2 (capabilities(7))."""
NOBODY = 0xFFFFFFFF
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, mode, ident)
    for tag, mode, ident in ((1, 7, NOBODY), (2, 6, 70000), (4, 5, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY))
)
"""rwx for the owner, rw for user 70000 (linux/posix_acl_xattr.h)."""


def old_volume(pool: Pool, jail: str, number: int, size: int | None = SIZE) -> str:
    """A volume as earlier releases made it: a new subvolume, which counts from 257."""
    path = f"{pool.path}/volumes/acme/{jail}"
    group, tenant = btrfs.group(1, number), btrfs.group(2, 7)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with btrfs.directory(os.path.dirname(path)) as parent:
        btrfs.create_group(parent, tenant)
        btrfs.create_group(parent, group)
        btrfs.assign_group(parent, group, tenant)
        btrfs.limit_group(parent, group, size)
        btrfs.create_subvolume(parent, jail, [group])
    with btrfs.directory(path) as made:
        btrfs_seeds.make_directories(made)
    assert os.stat(f"{path}/upper").st_ino == 257
    return path


@pytest.fixture
def layer(pool: Pool) -> Any:
    """A layer with some 1500 files, as an image has them."""
    rootfs = volume.create_build(pool, "layer")
    for number in range(1500):
        Path(rootfs, str(number)).touch()
    yield rootfs
    volume.delete_volume(pool, "acme", "a", 1)
    volume.delete_build(pool, "layer")


def populate(upper: str) -> None:
    """One of everything that the upper layer of a jail can hold, with directories inside of each other."""
    at = Path(upper)
    for folder in ("etc", "etc/deep", "etc/deep/deeper", "var/spool", "many"):
        (at / folder).mkdir(parents=True)
    (at / "etc/small").write_bytes(b"inline")
    (at / "etc/deep/large").write_bytes(os.urandom(MIB + 77))
    with open(at / "etc/deep/holes", "wb") as file:
        file.truncate(8 * MIB)
        file.seek(4 * MIB)
        file.write(b"x" * 5000)
    (at / "empty").touch()
    for number in range(300):
        os.link(at / "etc/small", at / f"many/a-rather-long-name-of-a-link-{number:04}")
    os.link(at / "etc/deep/large", at / "var/second-name")
    os.symlink("../nowhere", at / "etc/link")
    os.mkfifo(at / "var/fifo", 0o622)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(at / "var/socket"))
    os.mknod(at / "etc/whiteout", stat.S_IFCHR, 0)
    os.link(at / "etc/whiteout", at / "var/whiteout")
    (at / "var/tool").write_bytes(b"#!/bin/sh\n")
    os.chown(at / "var/tool", 70000, 70001)
    os.chmod(at / "var/tool", 0o6755)
    os.setxattr(at / "var/tool", "security.capability", CAPABILITY)
    os.setxattr(at / "var/tool", "user.mine", b"\0\xff")
    os.setxattr(at / "etc/link", "trusted.on-a-link", b"1", follow_symlinks=False)
    os.setxattr(at / "etc", "user.overlay.opaque", b"y")
    os.setxattr(at / "etc/deep", "trusted.overlay.redirect", b"/etc/before")
    os.setxattr(at / "etc/small", "system.posix_acl_access", ACL)
    os.setxattr(at / "var", "system.posix_acl_default", ACL)
    with open(at / "var/database", "wb") as file:
        fcntl.ioctl(file, SETFLAGS, struct.pack("i4x", NOCOW))
        file.write(b"y" * 9000)
    name = os.fsencode(upper) + b"/var/\xff\n"
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600))
    os.chown(at / "var", 33, 33)
    os.chmod(at / "var/spool", 0o3777)
    for number, (folder, _, files) in enumerate(os.walk(upper, topdown=False)):
        for other, entry in enumerate(files):
            os.utime(f"{folder}/{entry}", ns=(10**18 + other, 10**18 + number), follow_symlinks=False)
        os.utime(folder, ns=(10**18 + 3, 10**18 + number))


def shown(path: str) -> dict[str, Any]:
    """All that is to stay of a tree, by path; files with several names by the first of them."""
    found: dict[str, Any] = {}
    names = defaultdict(list)
    for folder, folders, files in os.walk(path):
        for entry in (folder, *(f"{folder}/{name}" for name in files), *(f"{folder}/{name}" for name in folders)):
            at = os.path.relpath(entry, path)
            status = os.lstat(entry)
            content: Any = None
            if stat.S_ISREG(status.st_mode):
                with open(entry, "rb") as file:
                    flags = struct.unpack("i4x", fcntl.ioctl(file, GETFLAGS, bytes(8)))[0]
                    content = (file.read(), flags & NOCOW, status.st_blocks)
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(entry)
            keys = sorted(os.listxattr(entry, follow_symlinks=False))
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            found[at] = (
                status.st_mode, status.st_uid, status.st_gid, size, status.st_rdev, status.st_nlink,
                status.st_mtime_ns, content, [(key, os.getxattr(entry, key, follow_symlinks=False)) for key in keys],
            )  # fmt: skip
            if not stat.S_ISDIR(status.st_mode):
                names[status.st_ino].append(at)
    found["links"] = sorted(sorted(group) for group in names.values() if len(group) > 1)
    return found


def numbers(path: str) -> set[int]:
    return {os.lstat(f"{folder}/{name}").st_ino for folder, dirs, files in os.walk(path) for name in (*dirs, *files)}


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    found["rest"] = found["rest"][:6], found["rest"][7][:2]
    return found


def settle(pool: Pool) -> None:
    def counted_again() -> bool:
        volume.sync_pool(pool)
        state = Path(f"/sys/fs/btrfs/{pool.uuid}/qgroups/inconsistent")
        return not state.exists() or state.read_text().strip() == "0"

    until(counted_again, 20, "the groups are counted again")


def test_only_the_numbers_change(pool: Pool, layer: str) -> None:
    path = old_volume(pool, "a", 1)
    populate(f"{path}/upper")
    before, used = shown(f"{path}/upper"), volume.volume_usage(pool, 1)
    assert numbers(path) & numbers(layer)
    assert volume.overlaps(pool, "acme", "a", [layer])
    volume.renumber(pool, "acme", "a", 1, [layer], lambda: False)
    assert shown(f"{path}/upper") == before
    assert not numbers(path) & numbers(layer)
    assert not volume.overlaps(pool, "acme", "a", [layer])
    assert volume.half_made(pool) == []
    settle(pool)
    assert abs((volume.volume_usage(pool, 1) or 0) - (used or 0)) < MIB, "the extents stay the jail's"
    Path(path, "upper/new").touch()
    assert os.stat(f"{path}/upper/new").st_ino > max(numbers(layer))


def test_numbers_above_the_floor_are_not_touched(pool: Pool, layer: str) -> None:
    """Only what has a number of the image's is copied: a large volume costs no more than a small one."""
    path = old_volume(pool, "a", 1)
    Path(path, "upper/first").mkdir()
    Path(path, "upper/low").touch()
    with btrfs.directory(f"{path}/upper") as upper:
        btrfs_seeds.raise_counter(upper, 5000)
    Path(path, "upper/first/high").write_text("x")
    Path(path, "upper/highest").mkdir()
    os.link(f"{path}/upper/low", f"{path}/upper/highest/low")
    before, kept = shown(f"{path}/upper"), os.stat(f"{path}/upper/first/high").st_ino
    volume.renumber(pool, "acme", "a", 1, [layer], lambda: False)
    assert shown(f"{path}/upper") == before
    assert os.stat(f"{path}/upper/first/high").st_ino == kept >= 5000
    assert os.stat(f"{path}/upper/first").st_ino > kept


def test_a_tree_of_any_depth(pool: Pool, layer: str) -> None:
    """Deeper than a path can say (PATH_MAX)."""
    path = old_volume(pool, "a", 1)
    here = os.open(f"{path}/upper", os.O_RDONLY)
    for _ in range(700):
        os.mkdir("d" * 20, dir_fd=here)
        below = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("end", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    volume.renumber(pool, "acme", "a", 1, [layer], lambda: False)
    with btrfs.directory(path) as top:
        left = [*btrfs_inodes.inodes_below(top, btrfs.subvolume_id(top), 1 << 20)]
    assert len(left) == 703
    assert min(inode.number for inode in left) >= btrfs_seeds.floor_above([layer])


def test_at_a_full_quota(pool: Pool, layer: str) -> None:
    """The limit stops nothing, and holds afterwards to the block."""
    path = old_volume(pool, "a", 1, 16 * MIB)
    for number in range(900):
        Path(path, "upper", str(number)).write_bytes(b"z" * 3000)
    assert fill(f"{path}/upper/rest", 32 * MIB)[1] == errno.EDQUOT
    # The kernel could not write down when `rest` was last written, for that takes room in the tree too.
    before = without_times(shown(f"{path}/upper"))
    volume.renumber(pool, "acme", "a", 1, [layer], lambda: False)
    assert without_times(shown(f"{path}/upper")) == before
    settle(pool)
    until(lambda: _used(pool) <= 16 * MIB, 20, "the old volume's metadata is freed")
    assert _used(pool) >= 15 * MIB
    os.unlink(f"{path}/upper/rest")
    until(lambda: _used(pool) < 8 * MIB, 20, "what was deleted is freed, though the old volume had written it")
    assert fill(f"{path}/upper/more", 32 * MIB)[1] == errno.EDQUOT
    assert 15 * MIB <= _used(pool) <= 16 * MIB


def _used(pool: Pool) -> int:
    volume.sync_pool(pool)
    return volume.volume_usage(pool, 1) or 0


def test_in_use(pool: Pool, layer: str) -> None:
    """Nothing can be written to it once `in_use` is asked; if it is in use it stays as it was."""
    path = old_volume(pool, "a", 1)

    def in_use() -> bool:
        with pytest.raises(OSError, match="Read-only"):
            Path(path, "upper/file").touch()
        return True

    assert refused(lambda: volume.renumber(pool, "acme", "a", 1, [layer], in_use)).code == "conflict"
    Path(path, "upper/file").touch()
    assert os.stat(f"{path}/upper").st_ino == 257
    assert volume.half_made(pool) == []


def test_with_a_subvolume_in_it(pool: Pool, layer: str) -> None:
    """Made by the host's root, since no guest can: a snapshot would not have it."""
    path = old_volume(pool, "a", 1)
    with btrfs.directory(f"{path}/upper") as upper:
        btrfs.create_subvolume(upper, "inside")
    Path(path, "upper/inside/file").write_text("kept")
    assert refused(lambda: volume.renumber(pool, "acme", "a", 1, [layer], lambda: False)).code == "invalid"
    assert Path(path, "upper/inside/file").read_text() == "kept"
    assert volume.half_made(pool) == []


def test_what_fails_leaves_it_as_it_was(pool: Pool, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_volume(pool, "a", 1)
    populate(f"{path}/upper")
    before = shown(f"{path}/upper")

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(btrfs_renumber, "_copy_flags", fails)
        with pytest.raises(JailmgrError) as raised:
            volume.renumber(pool, "acme", "a", 1, [layer], lambda: False)
    assert raised.value.code == "full"
    assert shown(f"{path}/upper") == before
    assert volume.half_made(pool) == []
    volume.renumber(pool, "acme", "a", 1, [layer], lambda: False)
    assert shown(f"{path}/upper") == before


def test_kill_at_any_line(pool: Pool, layer: str) -> None:
    """What a crash leaves is the old volume or the new one, whole and writable, and one opening of the pool later
    nothing else."""
    path = old_volume(pool, "a", 1)
    Path(path, "upper/etc").mkdir()
    for name in ("one", "etc/two"):
        Path(path, "upper", name).write_text(name)
    os.link(f"{path}/upper/one", f"{path}/upper/etc/three")
    before, line, done = shown(f"{path}/upper"), 1, False
    while not done:
        done = not killed_at(
            line,
            ("btrfs_renumber.py",),
            lambda: volume.renumber(pool, "acme", "a", 1, [layer], lambda: False),
        )
        volume.discard_half_made(pool)
        assert volume.half_made(pool) == []
        assert shown(f"{path}/upper") == before
        Path(path, "upper/written").touch()
        os.unlink(f"{path}/upper/written")
        Path(path, "upper").touch()
        before = shown(f"{path}/upper")
        if not done and not volume.overlaps(pool, "acme", "a", [layer]):
            return
        line += 11
    raise AssertionError("no kill was late enough for the new volume to be in its place")
