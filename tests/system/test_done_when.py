"""What a first user does with a Debian jail, from its launch to its end, in one go."""

from __future__ import annotations

from tests.system.conftest import MakeJail
from tests.system.instance import Instance, alive, kill, until

LIST_FIELDS = ("name", "tenant", "status", "init_pid", "ipv4", "ipv6", "image", "created_at", "limits", "usage")


def test_a_debian_jail_from_launch_to_delete(jm: Instance, debian: str, debian_jail: MakeJail) -> None:
    name = debian_jail("--disk", "100MiB")
    assert jm.exec(name, "systemctl", "is-system-running").out == "running\n"
    (row,) = [row for row in jm.json("list") if row["name"] == name]
    assert all(field in row for field in LIST_FIELDS)
    assert (row["tenant"], row["status"]) == ("default", "Running")
    failed = jm.sh(name, "dd if=/dev/zero of=/root/big bs=1M count=200", status=1)
    assert "Disk quota exceeded" in failed.err
    jm.exec(name, "rm", "/root/big")
    assert jm.exec(name, "systemctl", "is-system-running").out == "running\n"


def test_a_memory_hog_is_killed_and_the_jail_lives(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail("--memory", "64MiB", "-c", "limits.memory.swap=false")
    init = jm.info(name)["init_pid"]
    jm.sh(name, "tail /dev/zero & wait $!", status=137)
    assert jm.info(name)["init_pid"] == init
    jm.exec(name, "systemctl", "list-units", "--no-pager")


def test_a_fork_bomb_is_held(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail("--processes", "50")
    jm.sh(name, "bomb() { bomb | bomb & }; bomb </dev/null >/dev/null 2>&1 & sleep 2", status=None)
    info = jm.info(name)
    assert info["status"] == "Running"
    assert info["usage"]["processes"] <= 50


def test_engine_and_supervisor_may_die(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail()
    before = jm.info(name)
    kill(jm.engine_pid())
    assert [row["init_pid"] for row in jm.json("list") if row["name"] == name] == [before["init_pid"]]
    kill(before["supervisor_pid"])
    assert jm.exec(name, "systemctl", "is-system-running").out == "running\n"
    assert jm.info(name)["init_pid"] == before["init_pid"]


def test_poweroff_and_reboot_inside(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail()
    before = jm.info(name)["init_pid"]
    jm.exec(name, "systemctl", "reboot", status=None)
    until(lambda: jm.info(name)["init_pid"] not in (None, before), 60, "it is back")
    running = ("exec", name, "--", "systemctl", "is-system-running", "--wait")
    until(lambda: jm(*running, status=None).out == "running\n", 60, "it is up")
    assert jm.info(name)["last_ended"]["kind"] == "reboot"
    init = jm.info(name)["init_pid"]
    jm.exec(name, "systemctl", "poweroff", status=None)
    until(lambda: jm.status(name) == "Stopped", 60, "it is off")
    assert not alive(init)
    ended = jm.info(name)["last_ended"]
    assert (ended["kind"], ended["by"]) == ("poweroff", "guest")


def test_stop_is_orderly(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail()
    jm("stop", name, within=60)
    assert jm.info(name)["last_ended"]["by"] == "admin"
    jm("start", "--wait", name)
    assert jm.exec(name, "systemctl", "is-system-running").out == "running\n"
    journal = jm.exec(name, "journalctl", "--no-pager", "-b", "-1", status=None).out
    assert "Failed to start" not in journal
    assert "Failed with result" not in journal


def test_five_boot_at_once(jm: Instance, debian: str, debian_jail: MakeJail) -> None:
    names = [debian_jail(start=False) for _ in range(5)]
    jm("start", "--wait", *names, within=180)
    for name in names:
        assert jm.exec(name, "systemctl", "is-system-running").out == "running\n"
