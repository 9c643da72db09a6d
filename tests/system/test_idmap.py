"""`security.idmap.size`: how many ids a jail has, and that a distribution's own defaults for them work."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from jailmgr.keys import IDS
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until

SIZE = "security.idmap.size"
FAR = 1_000_000
"""As the ids of a directory service."""
USER = f"grep -q ^far: /etc/passwd || echo far:x:{FAR}:200000::/root:/bin/sh >>/etc/passwd"


@pytest.fixture
def jail(busybox_jail: MakeJail) -> str:
    return busybox_jail()


def maps_of(instance: Instance, name: str) -> set[tuple[int, int, int]]:
    """The maps of users and groups, as the host sees them; they are the same where there is one."""
    init = instance.info(name)["init_pid"]
    found = [Path(f"/proc/{init}/{kind}_map").read_text().split() for kind in ("uid", "gid")]
    return {(int(first), int(base), int(count)) for first, base, count in found}


def size_of(instance: Instance, name: str) -> int:
    ((first, base, count),) = maps_of(instance, name)
    assert instance.info(name)["idmap"] == f"{first} {base} {count}"
    return count


def test_users_of_a_directory_service(jm: Instance, jail: str, tmp_path: Path) -> None:
    """A user, a group and owners with ids above 65535; on disk they are what they are in the jail."""
    jm.sh(jail, USER)
    assert jm.sh(jail, "su far -c 'id -u; id -g; umask 022; echo mine >/tmp/of-far'").out == f"{FAR}\n200000\n"
    jm.sh(jail, f"cp /tmp/of-far /root/kept; chown {FAR}:200000 /root/kept")
    assert jm.sh(jail, "stat -c %u:%g /tmp/of-far /root/kept").out == f"{FAR}:200000\n" * 2
    on_disk = os.stat(f"{jm.root.volume('default', jail)}/upper/root/kept")
    assert (on_disk.st_uid, on_disk.st_gid) == (FAR, 200000)
    jm.sh(jail, f"chown {IDS - 1} /root/kept")
    jm.sh(jail, f"chown {IDS} /root/kept 2>/dev/null", status=1)
    owned = tmp_path / "owned"
    owned.write_text("x")
    os.chown(owned, 70_000, 200_000)
    jm("cp", str(owned), f"{jail}:/root/owned")
    assert jm.sh(jail, "stat -c %u:%g /root/owned").out == "70000:200000\n"
    jm("restart", "--force", jail)
    assert jm.sh(jail, "stat -c %u:%g /root/kept /root/owned").out == f"{IDS - 1}:200000\n70000:200000\n"


def test_subordinate_ids_of_the_jails_users(jm: Instance, jail: str) -> None:
    """newuidmap's work for a user with 65,536 ids from 100000 on, Debian's SUB_UID_MIN: rootless podman's map.

    chown is exec'd, since its capabilities in the namespace come with an exec after the map was written.
    """
    jm.sh(jail, "grep -q ^user: /etc/passwd || echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd")
    script = """
        rm -f /tmp/ready /tmp/mapped; mkfifo -m 666 /tmp/ready /tmp/mapped
        su user -c "unshare -U sh -c 'echo \\$\\$ >/tmp/ready; read x </tmp/mapped; touch /tmp/inside
            /bin/busybox chown 65535:65535 /tmp/inside && cat /proc/self/uid_map && stat -c %u /tmp/inside'" &
        read pid </tmp/ready
        for kind in uid gid; do printf '0 1000 1\\n1 100000 65536\\n' >/proc/$pid/${kind}_map || exit 9; done
        echo >/tmp/mapped; wait; stat -c %u:%g /tmp/inside
    """
    told = [line.split() for line in jm.sh(jail, script).out.splitlines()]
    assert told == [["0", "1000", "1"], ["1", "100000", "65536"], ["65535"], ["165534:165534"]]


def test_debians_useradd(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail(start=False)
    jm("start", name)
    jm.sh(name, "useradd one && useradd -m -u 200000 far && useradd two")
    assert jm.sh(name, "cat /etc/subuid").out == "one:100000:65536\ntwo:165536:65536\n"
    assert jm.sh(name, "su far -c 'id -u; touch ~/f; stat -c %u:%g ~/f'").out == "200000\n200000:1001\n"
    jm.sh(name, "chown 231071:231071 /root")


def test_the_key_holds_from_the_next_start_on(jm: Instance, busybox_jail: MakeJail) -> None:
    """A reboot from inside, for which no engine is asked, is none: config.json keeps the range that is claimed."""
    name = busybox_jail("-c", f"{SIZE}=65536")
    assert size_of(jm, name) == 65536
    before = maps_of(jm, name)
    jm.sh(name, "chown 65535 /root; chown 65536 /root 2>/dev/null", status=1)
    assert "restart" in jm("set", name, f"{SIZE}=200001", "user.more=1").err
    assert maps_of(jm, name) == before
    init = jm.info(name)["init_pid"]
    jm.sh(name, "reboot", status=None)
    until(lambda: jm.info(name)["init_pid"] not in (None, init), 20, "it reboots")
    assert maps_of(jm, name) == before
    jm("restart", "--force", name)
    assert size_of(jm, name) == 200001
    assert jm.sh(name, "stat -c %u /root").out == "65535\n"
    jm.sh(name, "chown 200000 /root && ! chown 200001 /root 2>/dev/null")
    jm("stop", "--force", name)
    jm("unset", name, SIZE)
    jm("start", name)
    assert size_of(jm, name) == IDS


def test_a_jail_of_an_older_release_moves_at_its_next_start(new_instance: Callable[[], Instance]) -> None:
    """0.1.0 kept the base alone, and a jail of its time runs on with 65,536 ids under the engine that comes after."""
    instance = new_instance()
    for name in ("old", "neighbour"):
        instance("launch", "busybox", name, "-c", f"{SIZE}=65536")
    instance.sh("old", "touch /root/kept; chown 1234:65534 /root/kept")
    for name in ("old", "neighbour"):
        instance("unset", name, SIZE)
    before = maps_of(instance, "old")
    instance("engine", "stop")
    with sqlite3.connect(instance.root.store) as store:
        assert store.execute("DELETE FROM facts WHERE name LIKE 'idmap/%'").rowcount == 2
    assert maps_of(instance, "old") == before
    instance("set", "old", "user.more=1")
    instance.exec("old", "true")
    assert size_of(instance, "old") == 65536
    init = instance.info("old")["init_pid"]
    instance.sh("old", "reboot", status=None)
    until(lambda: instance.info("old")["init_pid"] not in (None, init), 20, "it reboots")
    assert maps_of(instance, "old") == before
    instance("launch", "busybox", "new")
    instance("restart", "--force", "old")
    assert size_of(instance, "old") == IDS
    assert instance.sh("old", "stat -c %u:%g /root/kept").out == "1234:65534\n"
    assert size_of(instance, "neighbour") == 65536
    ranges = sorted((base, count) for name in ("old", "neighbour", "new") for _, base, count in maps_of(instance, name))
    for (base, count), (after, _) in pairwise(ranges):
        assert base + count <= after


def test_ids_of_the_host_above_2_31(new_instance: Callable[[], Instance]) -> None:
    """Where a host has many jails: all that a start does with the base, and `exec`, `cp`, console and limits."""
    instance = new_instance()
    instance("create", "busybox", "high", "-c", f"{SIZE}=65536", "--memory", "64MiB")
    instance("engine", "stop")
    base = 0xC000_0000 + os.getpid() % 0x3000 * 65536
    with sqlite3.connect(instance.root.store) as store:
        store.execute("UPDATE jails SET idmap_base = ?", (base,))
    instance("start", "high")
    assert maps_of(instance, "high") == {(0, base, 65536)}
    assert instance.exec("high", "cat", stdin=b"in and out").out == "in and out"
    instance.sh("high", "touch /root/f; chown 65534:5 /root/f; echo seen >/dev/console; test -c /dev/ptmx")
    assert instance.sh("high", "stat -c %u:%g /root/f").out == "65534:5\n"
    instance("cp", "-", "high:/root/note", stdin=b"kept")
    assert instance("cp", "high:/root/note", "-").out == "kept"
    assert "seen" in instance("logs", "high").out
    assert os.stat(f"/proc/{instance.info('high')['init_pid']}/root/root/f").st_uid == base + 65534
    kept = subprocess.run(["stat", "-c", "%u", f"/proc/{instance.info('high')['init_pid']}"], capture_output=True)
    assert int(kept.stdout) == base
    instance("restart", "--force", "high")
    assert maps_of(instance, "high") == {(0, base, 65536)}
