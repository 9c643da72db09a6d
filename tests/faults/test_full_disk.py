"""A pool, or a disk of the host, without space: others go on, and all is as before once there is space.

tests/system/test_bad_input.py has the disk that runs full while writers run, tests/unit/test_store_full_disk.py the
store alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.truth import Reported, marker_of, settled
from tests.system.instance import Instance, alive, until
from tests.system.leftovers import leftovers, running
from tests.system.netns import run

WEB, OFF = ("default", "web"), ("default", "off")


def prepare(instance: Instance, pool: str) -> Reported:
    """A running and a stopped jail with a marker each, in a pool of that size."""
    os.makedirs(instance.root.etc, exist_ok=True)
    Path(instance.root.etc, "config.toml").write_text(f'[pool]\nsize = "{pool}"\n')
    for tenant, name in (WEB, OFF):
        instance("launch", "busybox", name)
        instance("cp", "-", f"{tenant}/{name}:/root/marker", stdin=name.encode())
    instance("stop", "--force", "off")
    return settled(instance)


def kept(instance: Instance, before: Reported) -> None:
    after = settled(instance)
    assert after.inits == before.inits
    for key in (WEB, OFF):
        assert after.status(key) == before.status(key)
        assert marker_of(instance, key) == key[1]


def test_a_jail_fills_the_pool(new_instance: Callable[[], Instance]) -> None:
    """One jail without a limit takes all of it: others run on, `create` is refused, `delete` gives the space back."""
    instance = new_instance()
    before = prepare(instance, "512MiB")
    instance("launch", "busybox", "greedy")
    filled = instance.sh("greedy", "dd if=/dev/zero of=/root/big bs=1M 2>&1; sync", status=None)
    assert "No space left" in filled.out
    for key in (WEB, OFF):
        assert marker_of(instance, key) == key[1]
    assert instance.exec("web", "cat", "/root/marker").out == "web"
    pid, _ = before.inits[WEB]
    assert alive(pid)
    refused = instance.refused("create", "busybox", "another")
    assert "space" in refused.err.lower() or "full" in refused.err.lower(), refused.told()
    assert "Hint: " in refused.err
    assert instance.gone("another")
    instance("delete", "--force", "greedy")
    kept(instance, before)
    # btrfs gives the blocks of deleted files back by and by.
    until(lambda: instance("create", "busybox", "another", status=None).status == 0, 60, "the space is given back")
    instance("start", "off")
    assert instance.exec("off", "cat", "/root/marker").out == "off"


@pytest.fixture
def small_disk(new_instance: Callable[[], Instance]) -> Iterator[Instance]:
    """An instance whose root is on a file system of its own."""
    instance = new_instance()
    at, disk = instance.root.at, f"{instance.root.at}.ext4"
    run("truncate", "--size=3584M", disk)
    run("mkfs.ext4", "-q", disk)
    run("mount", "-o", "loop", disk, at)
    try:
        yield instance
        for row in instance.json("list"):
            instance("delete", "--force", row["name"])
        instance("engine", "stop")
        until(lambda: running(leftovers(instance.root)) <= {f"mount {at}"}, 15, "nothing is left")
    finally:
        run("umount", "--lazy", at)
        os.unlink(disk)


def test_the_hosts_disk_is_full_as_an_engine_begins(small_disk: Instance) -> None:
    """Not a byte is left for the store: commands are refused with what to do, and no jail loses its init."""
    instance = small_disk
    before = prepare(instance, "1GiB")
    pid, _ = before.inits[WEB]
    instance("engine", "stop")
    filler = Path(instance.root.at, "filler")
    fill(filler)
    for argv in (("list",), ("create", "busybox", "another"), ("start", "off"), ("delete", "--force", "web")):
        refused = instance.refused(*argv)
        assert "Hint: " in refused.err, refused.told()
        assert "space" in refused.err or "full" in refused.err, refused.told()
        assert ".good" not in refused.err, "the store is whole"
    assert alive(pid)
    assert instance.exec("web", "cat", "/root/marker").out == "web"
    filler.unlink()
    kept(instance, before)
    instance("start", "off")


def fill(path: Path) -> None:
    """Write until the file system has no block left."""
    with path.open("wb", buffering=0) as file:
        space = os.fstatvfs(file.fileno())
        os.posix_fallocate(file.fileno(), 0, max(1, space.f_bfree * space.f_frsize - (64 << 20)))
        file.seek(0, os.SEEK_END)
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(1 << 20))
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(512))
