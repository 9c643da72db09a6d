"""Disk limits of jails, by project quotas on the VM's ext4 and by the classic quota groups of its kernel's btrfs; and
what only a pool that is a directory has to show."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jailmgr.config import find_root
from jailmgr.errors import JailmgrError
from jailmgr.image import store
from jailmgr.model import Image, Recipe
from jailmgr.runtime import capabilities
from jailmgr.runtime.syscalls import CLONE_NEWNS, CLONE_NEWUSER, setns
from jailmgr.storage import btrfs, project_pool, project_quota, volume
from jailmgr.storage.device import block_device
from jailmgr.storage.pool import Pool, close_pool, is_open, open_pool
from tests.system.instance import Instance, alive, instance_at, kill, until
from tests.system.netns import run
from tests.system.test_storage import killed_after

MIB = 1 << 20
FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820
GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
INHERIT = 0x20000000
"""FS_PROJINHERIT_FL, as chattr(1) sets it."""
DEEP = 3000
"""Directories within each other: past Python's recursion and PATH_MAX."""


OPEN = """
import sys
from jailmgr.config import find_root
from jailmgr.storage.pool import open_pool
print("ready", flush=True)
open_pool(find_root(sys.argv[1]))
print("open", flush=True)
"""


@pytest.fixture(scope="module", params=["project", "qgroup"])
def instance(
    request: pytest.FixtureRequest, host: Instance, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """The host's own instance, which takes project quotas by itself; another, which is told to have a btrfs."""
    if request.param == "project":
        yield host
        return
    other = instance_at(str(tmp_path_factory.mktemp("loop")))
    os.makedirs(other.root.etc, exist_ok=True)
    Path(other.root.etc, "config.toml").write_text('[pool]\nkind = "btrfs"\n')
    yield other
    other("engine", "stop")


@pytest.fixture
def small(instance: Instance) -> Iterator[str]:
    """A jail with 20 MiB of disk."""
    instance("launch", "busybox", "small", "--disk", "20MiB", within=300)
    yield "small"
    if not instance.gone("small"):
        instance("delete", "--force", "small")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """A pool of kind project with no jails."""
    root = find_root(str(tmp_path / "root"))
    made = open_pool(root)
    assert made.mode == "project"
    yield made
    close_pool(root)
    assert not is_open(root)


def write(instance: Instance, jail: str, name: str, size: int, status: int = 0) -> str:
    return instance.sh(jail, f"dd if=/dev/zero of=/root/{name} bs=1M count={size} && sync", status=status).err


def disk_bytes(instance: Instance, jail: str) -> int:
    """As `list` has it."""
    (row,) = [row for row in instance.json("list") if row["name"] == jail]
    return int(row["usage"]["disk_bytes"])


def as_a_jail_writes(act: Callable[[], Any]) -> Any:
    """Without CAP_SYS_RESOURCE: by it the host's root is held to no limit."""

    def apart() -> Any:
        capabilities.drop([name for name in capabilities.NAMES if name != "CAP_SYS_RESOURCE"])
        return act()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(apart).result()


def records(pool: Pool) -> dict[int, int]:
    """Files in each of the pool's projects but its first, of those that have any."""
    with btrfs.directory(pool.path) as top:
        found = project_quota.uses(top, pool.first_project + 1, pool.first_project + project_pool.PROJECTS)
        return {use.project - pool.first_project: use.inodes for use in found}


def limits(pool: Pool) -> set[int]:
    """The pool's projects, its first left out, that have a limit of size, as repquota(8) tells them."""
    mount = f"{pool.path}.tree"
    while not os.path.ismount(mount):
        mount = os.path.dirname(mount)
    told = run("repquota", "--project", "--raw-grace", "--no-names", mount).splitlines()
    rows = [line.split() for line in told if line.startswith("#")]
    found = {int(row[0][1:]) - pool.first_project for row in rows if row[4] != "0"}
    return {number for number in found if 0 < number < project_pool.PROJECTS}


def test_the_host_has_project_quotas(host: Instance) -> None:
    pool = open_pool(host.root)
    assert pool.mode == "project"
    assert not os.path.exists(host.root.pool_file)


def test_a_btrfs_counts_by_classic_groups_here(tmp_path: Path) -> None:
    root = find_root(str(tmp_path))
    try:
        assert open_pool(root, 512 * MIB).mode == "qgroup"
    finally:
        close_pool(root)


def test_a_jail_is_held_to_its_limit(instance: Instance, small: str) -> None:
    assert "Disk quota exceeded" in write(instance, small, "big", 40, status=1)
    assert 19 * MIB <= disk_bytes(instance, small) <= 20 * MIB
    assert disk_bytes(instance, small) == instance.info(small)["usage"]["disk_bytes"]
    instance.sh(small, "rm /root/big && sync")
    until(lambda: disk_bytes(instance, small) < MIB, 60, "the space is given back")
    write(instance, small, "less", 15)
    assert instance.status(small) == "Running"


def test_the_limit_is_changed_live(instance: Instance, small: str) -> None:
    write(instance, small, "big", 40, status=1)
    instance("set", small, "limits.disk=50MiB")
    write(instance, small, "big", 40)
    assert "is used" in instance.refused("set", small, "limits.disk=30MiB").err
    write(instance, small, "more", 5)
    instance("unset", small, "limits.disk")
    write(instance, small, "more", 40)


def test_a_stopped_jail_is_counted_and_keeps_its_limit(instance: Instance, small: str) -> None:
    write(instance, small, "some", 10)
    instance("stop", "--force", small)
    until(lambda: 10 * MIB <= disk_bytes(instance, small) < 12 * MIB, 40, "what it has is told")
    instance("start", small)
    assert "Disk quota exceeded" in write(instance, small, "big", 40, status=1)


def test_deletion_leaves_nothing(instance: Instance, small: str) -> None:
    write(instance, small, "big", 15)
    pool = open_pool(instance.root)
    before = volume.committed_usage(pool)
    instance("delete", "--force", small)
    assert ("default", small) not in volume.list_volumes(pool)
    assert volume.half_deleted(pool) == []

    def gone() -> bool:
        volume.sync_pool(pool)
        volume.reap(pool)
        return len(volume.committed_usage(pool)) < len(before)

    until(gone, 60, "nothing is counted of it")


def test_root_of_a_jail_stays_in_its_project(host: Instance) -> None:
    host("launch", "busybox", "bound", "--disk", "20MiB", within=300)
    try:
        host.sh("bound", "mkdir -p /root/made/in && echo text > /root/made/file && ln /root/made/file /root/linked")
        pid = host.info("bound")["init_pid"]
        told = _inside(pid, ["/root/made/file", "/root/made", "/etc", "/"])
        assert told == dict.fromkeys(told, errno.EINVAL)
        at = f"{host.root.volume('default', 'bound')}/upper"
        projects = {_project(f"{at}/{name}") for name in ("", "root", "root/made", "root/made/in", "root/made/file")}
        pool = open_pool(host.root)
        assert projects == {pool.first_project + number for number in volume.committed_usage(pool)}
    finally:
        host("delete", "--force", "bound")


def _project(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return project_quota.project_of(fd)
    finally:
        os.close(fd)


def _inside(pid: int, paths: list[str]) -> dict[str, int]:
    """As root of a jail, the error numbers of moving files to another project, and out of what is inherited."""
    spaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            setns(spaces[0], CLONE_NEWUSER)
            setns(spaces[1], CLONE_NEWNS)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            for path in paths:
                for what, act in (("project", _move), ("inherit", _disinherit)):
                    os.write(writer, f"{path} {what} {_errno(act, path)}\n".encode())
        finally:
            os._exit(0)
    for fd in (*spaces, writer):
        os.close(fd)
    with open(reader, encoding="ascii") as file:
        lines = file.read().splitlines()
    os.waitpid(child, 0)
    assert len(lines) == 2 * len(paths), lines
    return {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in lines}


def _errno(act: Callable[[int], None], path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY)
        act(fd)
    except OSError as error:
        return error.errno or -1
    return 0


def _move(fd: int) -> None:
    words = list(struct.unpack("=IIIII8x", fcntl.ioctl(fd, FSGETXATTR, bytes(28))))
    words[3] ^= 1
    fcntl.ioctl(fd, FSSETXATTR, struct.pack("=IIIII8x", *words))


def _disinherit(fd: int) -> None:
    (flags,) = struct.unpack_from("=i", fcntl.ioctl(fd, GETFLAGS, bytes(8)))
    fcntl.ioctl(fd, SETFLAGS, struct.pack("=q", flags ^ INHERIT))


def test_empty_files_are_limited_too(pool: Pool) -> None:
    """Inodes of an ext4 are a fixed stock, that empty files would use up."""
    upper = f"{volume.create_volume(pool, 't', 1, 'a', 1, 64 * MIB)}/upper"

    def make() -> None:
        for number in range(20_000):
            os.close(os.open(f"{upper}/{number:x}", os.O_CREAT | os.O_WRONLY))

    with pytest.raises(OSError, match="quota") as raised:
        as_a_jail_writes(make)
    assert raised.value.errno == errno.EDQUOT
    assert 16_000 < len(os.listdir(upper)) < 16_384
    volume.resize_volume(pool, 1, None)
    Path(upper, "more").touch()
    volume.delete_volume(pool, "t", "a", 1)
    assert records(pool) == {}


def test_a_guests_tree_of_any_shape_is_deleted(pool: Pool) -> None:
    upper = f"{volume.create_volume(pool, 't', 1, 'a', 1, 64 * MIB)}/upper"
    for name in (b"\xff\xfe\n", b"-rf", b"*", b"a b", b"\x01" * 255):
        Path(os.fsdecode(os.fsencode(upper) + b"/" + name)).write_text("x")
    os.symlink("/etc/passwd", f"{upper}/link")
    os.mkfifo(f"{upper}/fifo")
    fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(DEEP):
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    volume.delete_volume(pool, "t", "a", 1)
    assert (os.listdir(f"{pool.path}/volumes/t"), volume.half_deleted(pool), records(pool)) == ([], [], {})
    assert os.path.exists("/etc/passwd")


def test_a_limit_goes_with_its_jail(pool: Pool) -> None:
    volume.create_volume(pool, "t", 1, "a", 1, 64 * MIB)
    volume.create_build(pool, "b", 64 * MIB)
    assert limits(pool) == set(records(pool))
    assert len(limits(pool)) == 2
    volume.delete_volume(pool, "t", "a", 1)
    volume.delete_build(pool, "b")
    assert limits(pool) == set()


def test_what_is_anothers_is_not_touched(pool: Pool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with btrfs.directory(str(other)) as fd:
        project_quota.set_project(fd, pool.first_project + 5, True)
        project_quota.limit(fd, pool.first_project + 5, MIB, 100)
    with pytest.raises(JailmgrError, match="something else") as raised:
        volume.create_volume(pool, "t", 1, "a", 5, 64 * MIB)
    assert raised.value.code == "conflict"
    assert volume.list_volumes(pool) == []
    volume.delete_volume(pool, "t", "a", 5)
    assert limits(pool) == {5}
    with btrfs.directory(str(other)) as fd:
        project_quota.limit(fd, pool.first_project + 5, None, None)
        project_quota.set_project(fd, 0, False)


def test_pools_of_one_file_system_share_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when they are made at the same time; nor do they take what is named in /etc/projects."""
    projects = tmp_path / "projects"
    named = [project_pool.FIRST_PROJECT + number * project_pool.PROJECTS + 9 for number in range(40)]
    projects.write_text("".join(f"{project}:/srv/{project}\n" for project in named))
    monkeypatch.setattr(project_quota, "PROJECTS", str(projects))
    roots = [find_root(str(tmp_path / f"r{number}")) for number in range(8)]
    try:
        with ThreadPoolExecutor(8) as threads:
            firsts = [made.first_project for made in threads.map(open_pool, roots)]
        assert len(set(firsts)) == 8
        assert not [first for first in firsts if any(first <= p < first + project_pool.PROJECTS for p in named)]
    finally:
        for root in roots:
            close_pool(root)


@pytest.mark.parametrize("after_ms", range(0, 60, 6))
def test_kill_while_the_pool_is_made(tmp_path: Path, after_ms: int) -> None:
    root = find_root(str(tmp_path / "root"))
    killed_after(OPEN, after_ms / 1000, root.at)
    pool = open_pool(root)
    try:
        assert sorted(os.listdir(os.path.dirname(root.pool))) == ["default", "default.tree"]
        with btrfs.directory(pool.path) as fd:
            assert project_quota.use(fd, pool.first_project).inodes == 1
        volume.create_volume(pool, "t", 1, "a", 1, MIB)
        volume.delete_volume(pool, "t", "a", 1)
    finally:
        close_pool(root)


def test_what_a_killed_maker_left_is_taken_away(tmp_path: Path) -> None:
    root = find_root(str(tmp_path / "root"))
    os.makedirs(f"{root.pool_tree}.new/images")
    assert open_pool(root).mode == "project"
    assert not os.path.exists(f"{root.pool_tree}.new")
    close_pool(root)


def test_an_image_is_its_builds_files(pool: Pool) -> None:
    rootfs = volume.create_build(pool, "b", 8 * MIB)
    Path(rootfs, "file").write_bytes(b"x" * MIB)
    os.symlink("file", f"{rootfs}/link")
    (project,) = records(pool)
    image = store.seal(pool, "b", Image("", "test/one", [], 0, 1.0, "x86_64", Recipe()))
    volume.delete_build(pool, "b")
    assert records(pool) == {project: 3}
    assert limits(pool) == set()
    store.remove_image(pool, image.fingerprint)
    assert records(pool) == {}


def test_kill_in_the_middle_of_a_deletion(host: Instance) -> None:
    """Of the engine and of its rm, while many files are being removed: the next start goes on."""
    host("launch", "busybox", "many", within=300)
    pool = open_pool(host.root)
    script = "cd /root && i=0; while [ $i -lt 300 ]; do mkdir $i; (cd $i; touch $(seq 100)); i=$((i+1)); done"
    host.sh("many", script)
    engine, trash = host.engine_pid(), f"{pool.path}/trash"
    process = host.popen("delete", "--force", "many", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    removing = until(lambda: _children(engine, "rm"), 120, "it is being removed")
    for pid in removing:
        os.kill(pid, signal.SIGSTOP)
    kill(engine)
    for pid in removing:
        kill(pid)
    process.wait(60)
    assert os.listdir(trash), "the kill came too late to try anything"
    until(lambda: host.gone("many"), 60, "the next engine goes on")
    assert (os.listdir(trash), volume.list_volumes(pool)) == ([], [])
    assert volume.committed_usage(pool) == {}
    assert limits(pool) == set()


def _children(parent: int, name: str) -> list[int]:
    """Pids of a process's children of that name."""
    found = subprocess.run(["pgrep", "--parent", str(parent), "--exact", name], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if alive(int(pid))]


def test_limits_on_io_have_their_disk(host: Instance) -> None:
    disk = run("findmnt", "--noheadings", "--output", "MAJ:MIN", "--target", host.root.lib).strip()
    assert block_device(open_pool(host.root)) == disk


def test_a_host_disk_that_runs_full(host: Instance, tmp_path: Path) -> None:
    """A jail without a limit is held still before the disk is full under all else, and goes on when there is space."""
    at, disk = str(tmp_path / "full"), str(tmp_path / "full.ext4")
    run("truncate", "--size=1536M", disk)
    run("mke2fs", "-q", "-t", "ext4", "-O", "quota,project", "-E", "quotatype=prjquota", disk)
    os.makedirs(at)
    run("mount", "-o", "loop,prjquota", disk, at)
    instance = instance_at(at)
    try:
        instance("launch", "busybox", "writer", within=300)
        assert open_pool(instance.root).mode == "project"
        host_disk = os.statvfs(at)
        with open(f"{at}/filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, host_disk.f_bavail * host_disk.f_frsize - (500 << 20))
        script = "i=0; while [ $i -lt 400 ]; do head -c 1048576 /dev/zero >/root/$i || exit; i=$((i+1)); done"
        with instance.popen("exec", "writer", "--", "/bin/sh", "-c", script, stdout=subprocess.DEVNULL) as writing:
            until(lambda: instance.status("writer") == "Frozen", 120, "the writer is held still")
            left = os.statvfs(at)
            assert left.f_bavail * left.f_frsize > 100 << 20
            assert "nearly full" in instance.refused("launch", "busybox", "another").err
            os.unlink(f"{at}/filler")
            until(lambda: instance.status("writer") == "Running", 60, "it goes on")
            assert writing.wait(240) == 0
        assert disk_bytes(instance, "writer") >= 400 * MIB
        instance("delete", "--force", "writer")
        instance("engine", "stop")
    finally:
        run("umount", "--lazy", at)
        os.unlink(disk)
