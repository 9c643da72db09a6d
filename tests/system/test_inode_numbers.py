"""No two files of a jail have one inode number, whether they are the image's or the volume's; who pays for a copy."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jailmgr.manager.doctor.check import Check
from jailmgr.manager.doctor.volumes import volume_checks
from jailmgr.manager.leftovers import find_leftovers
from jailmgr.storage import btrfs, btrfs_seeds
from jailmgr.storage.pool import open_pool
from jailmgr.storage.volume import overlaps
from tests.system.conftest import MakeJail
from tests.system.instance import COMMAND, Instance, until

MIB = 1 << 20
WRITE = "mkdir -p /root/many && cd /root/many && seq 20000 | xargs touch"
TOUCH = "find /bin /etc /lib /sbin /usr -xdev 2>/dev/null | xargs touch -h -c"


@pytest.fixture
def btrfs_pool(jm: Instance) -> None:
    if open_pool(jm.root).mode == "project":
        pytest.skip("the host's disk has project quotas: image and volume are in one file system")


def shared_numbers(jm: Instance, jail: str) -> dict[tuple[int, int], list[str]]:
    """Names of the jail's tree, as its processes see it, whose number isn't of one file with so many names."""
    root = f"/proc/{jm.info(jail)['init_pid']}/root"
    names: dict[tuple[int, int], list[tuple[str, os.stat_result]]] = defaultdict(list)
    for path, status in _walk(root, os.stat(root).st_dev):
        names[status.st_dev, status.st_ino].append((path, status))
    return {
        key: [path for path, _ in found]
        for key, found in names.items()
        if len(found) > 1 and any(status.st_nlink != len(found) for _, status in found)
    }


def _walk(top: str, device: int) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(top) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if status.st_dev == device:
                yield entry.path, status
                if stat.S_ISDIR(status.st_mode):
                    yield from _walk(entry.path, device)


def make_old(jm: Instance, jail: str) -> str:
    """Give a stopped jail a volume as earlier releases made them, with what was in its own; the `upper` of it."""
    path = jm.root.volume("default", jail)
    with btrfs.directory(os.path.dirname(path)) as parent:
        with btrfs.directory(path) as volume:
            subvolume = btrfs.subvolume_id(volume)
            groups = btrfs.parents(parent, subvolume)
        shutil.move(f"{path}/upper", f"{path}.kept")
        btrfs.destroy_subvolume(parent, subvolume)
        btrfs.create_subvolume(parent, jail, groups)
    with btrfs.directory(path) as volume:
        btrfs_seeds.make_directories(volume)
    subprocess.run(["cp", "-a", "--reflink=never", f"{path}.kept/.", f"{path}/upper"], check=True)
    shutil.rmtree(f"{path}.kept")
    return f"{path}/upper"


def test_many_files_copies_and_a_restart(jm: Instance, busybox_jail: MakeJail, btrfs_pool: None) -> None:
    jail = busybox_jail()
    jm.sh(jail, f"{WRITE} && mkdir /root/a && echo x > /root/a/one && ln /root/a/one /root/two")
    assert shared_numbers(jm, jail) == {}
    number = jm.exec(jail, "stat", "-c", "%i %h", "/bin/busybox").out
    jm.sh(jail, f"{TOUCH}; mkdir /etc/new; chmod 700 /bin; rm -r /root/many; {WRITE}")
    assert shared_numbers(jm, jail) == {}
    jm("restart", "--force", jail)
    jm.sh(jail, f"rm -r /root/many; {WRITE}; {TOUCH}")
    assert shared_numbers(jm, jail) == {}
    assert jm.exec(jail, "stat", "-c", "%i %h", "/bin/busybox").out == number, "a file of the image keeps its number"
    assert jm.sh(jail, "[ /root/a/one -ef /root/two ] && cat /root/two").out == "x\n"


def test_a_volume_of_an_earlier_release(jm: Instance, busybox_jail: MakeJail, btrfs_pool: None) -> None:
    """`doctor` names it, the next start renews it, and nothing of it is lost."""
    jail = busybox_jail(start=False)
    upper = make_old(jm, jail)
    os.mkdir(f"{upper}/root", 0o700)
    for number in range(400):
        Path(upper, "root", str(number)).write_text(f"{number}\n")
    os.link(f"{upper}/root/7", f"{upper}/seven")
    image = f"{jm.root.image(jm.info(jail)['image'])}/rootfs"
    ours = {os.lstat(f"{folder}/{name}").st_ino for folder, dirs, files in os.walk(upper) for name in [*dirs, *files]}
    assert ours & {status.st_ino for _, status in _walk(image, os.stat(image).st_dev)}
    assert not _numbers(jm).ok
    assert f"default/{jail}" in _numbers(jm).detail
    jm("start", jail)
    jm.sh(jail, WRITE)
    assert shared_numbers(jm, jail) == {}
    assert (
        jm.sh(jail, "[ /seven -ef /root/7 ] && cat /seven && cat /root/? /root/?? /root/??? | wc -l").out == "7\n400\n"
    )
    assert _numbers(jm).ok
    made = os.stat(upper).st_ino
    jm("restart", "--force", jail)
    assert os.stat(upper).st_ino == made, "once"


def test_a_volume_that_cannot_be_renewed(jm: Instance, busybox_jail: MakeJail, btrfs_pool: None) -> None:
    """The jail starts as it did; the engine's log says why, and `doctor` goes on naming it."""
    jail = busybox_jail(start=False)
    upper = make_old(jm, jail)
    with btrfs.directory(os.path.dirname(upper)) as volume:
        (group,) = btrfs.parents(volume, btrfs.subvolume_id(volume))
    os.mkdir(in_the_way := f"{jm.root.pool}/seeds/renumber-{group}")
    try:
        jm("start", jail)
    finally:
        os.rmdir(in_the_way)
    assert os.stat(upper).st_ino == 257
    assert f"inode numbers of default/{jail}" in Path(jm.root.run, "engine.log").read_text()
    assert not _numbers(jm).ok
    jm("restart", "--force", jail)
    assert os.stat(upper).st_ino > 257


def _numbers(jm: Instance) -> Check:
    """What `doctor` says of the volumes' inode numbers."""
    return next(check for check in volume_checks(jm.root) if check.check == "inode numbers")


def test_seeds_go_with_their_image(new_instance: Callable[[], Instance]) -> None:
    """What lies ready is in no tenant's group, is no leftover, and is taken by the next jail."""
    jm = new_instance()
    jm("launch", "busybox", "one", within=300)
    pool = open_pool(jm.root)
    if pool.mode == "project":
        pytest.skip("the host's disk has project quotas: no seeds")
    seeds = f"{pool.path}/seeds"
    until(lambda: len(_ready(seeds)) == btrfs_seeds.READY, 20, "volumes are made ahead")
    with btrfs.directory(pool.path) as top:
        for name in os.listdir(seeds):
            with btrfs.directory(f"{seeds}/{name}") as seed:
                assert btrfs.parents(top, btrfs.subvolume_id(seed)) == []
    before = {os.stat(f"{seeds}/{name}").st_dev for name in _ready(seeds)}
    jm("create", "busybox", "two")
    assert os.stat(jm.root.volume("default", "two")).st_dev in before
    assert not overlaps(pool, "default", "two", [f"{jm.root.image(jm.info('two')['image'])}/rootfs"])
    jm("delete", "--force", "one", "two")
    jm("engine", "stop")
    assert find_leftovers(jm.root) == []
    jm("image", "delete", "busybox")
    assert os.listdir(seeds) == []


def _ready(seeds: str) -> list[str]:
    return [name for name in os.listdir(seeds) if name.startswith("ready-")]


def test_a_copy_is_its_receivers(
    jm: Instance, busybox_jail: MakeJail, other_tenant: str, btrfs_pool: None, tmp_path: Path
) -> None:
    """An extent is charged to whoever wrote it first, and a clone to nobody: our copies are never clones."""
    source = busybox_jail()
    jm.sh(source, "dd if=/dev/urandom of=/root/large bs=1M count=16 2>/dev/null && sync")
    inside = f"{jm.root.volume('default', source)}/upper/root/large"
    jm("--tenant", other_tenant, "launch", "busybox", "receiver")
    target = f"{other_tenant}/receiver"

    def charged() -> int:
        open_and_sync(jm)
        return int(jm.info(target)["usage"]["disk_bytes"])

    before = charged()
    jm("cp", f"{source}:/root/large", str(tmp_path / "large"))
    jm("cp", str(tmp_path / "large"), f"{target}:/root/by-a-file")
    assert charged() >= before + 16 * MIB
    pipe = subprocess.run(
        ["sh", "-c", f'"$0" cp {source}:/root/large - | "$0" cp - {target}:/root/by-a-pipe', COMMAND],
        env=jm.environment(),
        check=False,
    )
    assert pipe.returncode == 0
    assert charged() >= before + 32 * MIB
    jm("cp", inside, f"{target}:/root/from-the-pool-itself")
    assert charged() >= before + 48 * MIB
    jm("exec", target, "--", "rm", "/root/by-a-file", "/root/by-a-pipe", "/root/from-the-pool-itself")
    clone = f"{jm.root.volume(other_tenant, 'receiver')}/upper/root/clone"
    subprocess.run(["cp", "--reflink=always", inside, clone], check=True)
    until(lambda: charged() < before + MIB, 20, "a clone, for comparison, is charged to the source")


def open_and_sync(jm: Instance) -> None:
    with btrfs.directory(open_pool(jm.root).path) as top:
        btrfs.sync(top)
