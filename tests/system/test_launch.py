"""From a source to a running jail, and through its life: launch, create, start, stop, pause, rename, delete."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.conftest import MakeJail
from tests.system.instance import Instance, alive, terminal, until
from tests.system.netns import run

LIST_FIELDS = {
    "name", "tenant", "status", "init_pid", "ipv4", "ipv6", "image", "created_at", "limits", "usage",
}  # fmt: skip
INFO_FIELDS = LIST_FIELDS | {"supervisor_pid", "netns", "cgroups", "rootfs", "log", "pool"}
USAGE_FIELDS = {"memory_bytes", "cpu_ns", "processes", "disk_bytes"}


def test_a_name_is_made_up_and_printed(jm: Instance) -> None:
    name = jm("launch", "busybox").out.strip()
    assert re.fullmatch(r"[a-z]+-[a-z]+(-\d+)?", name)
    assert jm.status(name) == "Running"
    jm("delete", "--force", name)


def test_list_and_info_have_the_fields_of_the_contract(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "64MiB", "--disk", "100MiB", "--processes", "50", "--cpus", "1.5")
    (row,) = [row for row in jm.json("list") if row["name"] == name]
    assert set(row) >= LIST_FIELDS
    assert (row["tenant"], row["status"]) == ("default", "Running")
    assert row["usage"].keys() >= USAGE_FIELDS
    assert row["usage"]["memory_bytes"] > 0
    assert row["usage"]["processes"] >= 1
    limits = row["limits"]
    assert (limits["memory_bytes"], limits["disk_bytes"], limits["processes"]) == (64 << 20, 100 << 20, 50)
    assert limits["cpu"] == pytest.approx(1.5)
    info = jm.info(name)
    assert set(info) >= INFO_FIELDS
    assert alive(info["init_pid"])
    assert alive(info["supervisor_pid"])
    assert os.path.samestat(os.stat(info["netns"]), os.stat(f"/proc/{info['init_pid']}/ns/net"))
    assert os.path.exists(f"{info['rootfs']}/bin/busybox")
    assert os.path.isdir(info["cgroups"]["memory"])


def test_namespaces_are_its_own(jm: Instance, busybox_jail: MakeJail) -> None:
    pid = jm.info(busybox_jail())["init_pid"]
    for kind in ("user", "mnt", "pid", "net", "uts", "ipc", "cgroup", "time"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind


def test_create_start_stop_start_delete(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail(start=False)
    assert jm.status(name) == "Stopped"
    assert jm.info(name)["init_pid"] is None
    jm("start", name)
    first = jm.info(name)["init_pid"]
    assert alive(first)
    assert name in jm.refused("start", name).err
    jm.sh(name, "echo kept > /root/note")
    jm("stop", name)
    assert jm.status(name) == "Stopped"
    assert not alive(first)
    jm.refused("stop", name)
    jm("start", name)
    assert jm.exec(name, "cat", "/root/note").out == "kept\n"
    jm("stop", "--force", name)
    jm("delete", name)
    assert jm.gone(name)
    assert name in jm.refused("info", name).err


def test_restart_gives_a_new_init(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    before = jm.info(name)
    jm("restart", name)
    after = jm.info(name)
    assert after["status"] == "Running"
    assert after["init_pid"] != before["init_pid"]
    assert (after["ipv4"], after["ipv6"]) == (before["ipv4"], before["ipv6"])


def test_pause_stops_the_clock_and_resume_lets_it_go_on(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.sh(name, "while :; do :; done </dev/null >/dev/null 2>&1 &")
    jm("pause", name)
    assert jm.status(name) == "Frozen"
    frozen = jm.info(name)["usage"]["cpu_ns"]
    assert jm.info(name)["usage"]["cpu_ns"] == pytest.approx(frozen, abs=5_000_000)
    jm("resume", name)
    assert jm.status(name) == "Running"
    until(lambda: jm.info(name)["usage"]["cpu_ns"] > frozen + 100_000_000, 10, "the loop goes on")


def test_a_frozen_jail_can_be_deleted(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm("pause", name)
    jm("delete", "--force", name, within=20)
    assert jm.gone(name)


def test_rename(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.sh(name, "echo kept > /root/note")
    jm.refused("rename", name, "renamed")
    jm("stop", "--force", name)
    jm("rename", name, "renamed")
    assert jm.gone(name)
    jm("start", "renamed")
    assert jm.exec("renamed", "cat", "/root/note").out == "kept\n"
    assert jm.exec("renamed", "hostname").out == "renamed\n"
    jm("delete", "--force", "renamed")


def test_delete_wants_force_for_what_runs(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.refused("delete", name)
    assert jm.status(name) == "Running"


def test_several_names_and_all(jm: Instance, busybox_jail: MakeJail) -> None:
    names = [busybox_jail(start=False) for _ in range(3)]
    jm("start", *names)
    assert [jm.status(name) for name in names] == ["Running"] * 3
    jm("stop", "--all")
    assert [jm.status(name) for name in names] == ["Stopped"] * 3
    failed = jm("start", names[0], "nowhere", names[1], status=1)
    assert "nowhere" in failed.err
    assert [jm.status(name) for name in names[:2]] == ["Running"] * 2, "one that fails doesn't hold up the others"


def test_environment_reaches_init_and_exec(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-e", "GREETING=good day")
    assert jm.sh(name, 'echo "$GREETING"').out == "good day\n"
    told = jm.sh(name, "tr '\\0' '\\n' < /proc/1/environ").out.splitlines()
    assert "GREETING=good day" in told
    assert "container=jailmgr" in told
    assert not [line for line in told if line.startswith("JAILMGR_")]


def test_uptime_starts_at_zero(jm: Instance, busybox_jail: MakeJail) -> None:
    uptime = float(jm.exec(busybox_jail(), "cat", "/proc/uptime").out.split()[0])
    assert uptime < 60


def test_a_launch_that_fails_leaves_no_jail(jm: Instance) -> None:
    jm.refused("launch", "busybox", "astray", "--ip", "192.0.2.77", status=2)
    assert jm.gone("astray")


def test_two_launches_at_once_build_once(new_instance: Callable[[], Instance]) -> None:
    instance = new_instance()
    both = [instance.popen("launch", "busybox", name, stderr=subprocess.PIPE) for name in ("one", "two")]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    (image,) = instance.json("image", "list")
    assert image["jails"] == 2
    assert sorted(row["name"] for row in instance.json("list")) == ["one", "two"]


def test_a_build_on_a_host_whose_mounts_are_shared(new_instance: Callable[[], Instance]) -> None:
    """As systemd makes them; pivot_root(2) takes no shared mount, and a build's root is a clone of one."""
    instance = new_instance()
    instance("launch", "busybox", "first")
    folder = Path(instance.root.etc, "templates", "steps")
    folder.mkdir(parents=True)
    step = '[[run]]\ncommand = ["/bin/sh", "-c", "mount -t tmpfs tmpfs /mnt"]\n'
    head = 'description = "x"\nmethod = "busybox"\nreleases = ["one"]\n\n[init]\ncommand = ["/bin/sh"]\n\n'
    (folder / "template.toml").write_text(head + step)
    run("mount", "--make-shared", instance.root.pool)
    instance("template", "build", "steps")


def test_two_instances_never_meet(jm: Instance, new_instance: Callable[[], Instance], busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    other = new_instance()
    other("launch", "busybox", name)
    ours, theirs = jm.info(name), other.info(name)
    for key in ("init_pid", "supervisor_pid", "ipv4", "ipv6", "idmap", "netns"):
        assert ours[key] != theirs[key], key
    assert not set(ours["cgroups"].values()) & set(theirs["cgroups"].values())
    other("delete", "--force", name)
    assert jm.status(name) == "Running"


def test_images_and_templates(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    (image,) = [row for row in jm.json("image", "list") if row["template"].startswith("busybox")]
    assert image.keys() >= {"fingerprint", "aliases", "template", "size_bytes", "created_at", "jails"}
    assert re.fullmatch(r"[0-9a-f]{64}", image["fingerprint"])
    assert image["jails"] >= 1
    shown = jm.json("image", "show", image["fingerprint"][:12])
    assert shown["fingerprint"] == image["fingerprint"]
    jm.refused("image", "delete", image["fingerprint"])
    assert jm.status(name) == "Running"
    assert {row["name"] for row in jm.json("template", "list")} >= {"busybox", "debian"}
    second = f"{name}b"
    jm("launch", image["fingerprint"][:12], second)
    jm("delete", "--force", second)


def test_systemd_comes_up_whole(jm: Instance, debian_jail: MakeJail) -> None:
    name, other = debian_jail(), debian_jail()
    assert jm.exec(name, "systemctl", "is-system-running").out == "running\n"
    assert jm.exec(name, "systemctl", "--failed", "--no-legend").out == ""
    assert jm.exec(name, "hostname").out == f"{name}\n"
    ids = {jm.exec(jail, "cat", "/etc/machine-id").out for jail in (name, other)}
    assert len(ids) == 2
    assert ids == {jm.info(jail)["uuid"].replace("-", "") + "\n" for jail in (name, other)}
    for tool in ("ip", "ping", "less", "ps", "nano"):
        jm.sh(name, f"command -v {tool}")


def test_debian_image_has_a_manifest(jm: Instance, debian: str) -> None:
    (image,) = [row for row in jm.json("image", "list") if row["template"].startswith(debian)]
    shown = jm.json("image", "show", image["fingerprint"])
    assert "systemd" in shown["packages"]
    assert re.match(r"\d", shown["packages"]["systemd"])
    assert image["size_bytes"] > 50 << 20


def test_apt_works_in_a_jail(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail()
    jm("exec", name, "--", "apt-get", "update", "-q", within=200)
    assert "Installed-Size" in jm.exec(name, "apt-cache", "show", "hello").out
    _a_login_is_a_session(jm, name)


def _a_login_is_a_session(jm: Instance, name: str) -> None:
    """A login shell is moved to a session of the guest's logind, where that has its PAM module."""
    install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", "libpam-systemd"]
    jm("exec", name, "-e", "DEBIAN_FRONTEND=noninteractive", "--", *install, within=200)
    with terminal(jm, "shell", name) as term:
        term.prompt()
        term.write(b"echo at $XDG_RUNTIME_DIR; cat /proc/self/cgroup; echo end$((1))\n")
        said = term.expect(b"end1").decode()
        term.write(b"exit 7\n")
        assert term.wait() == 7
    assert "/run/user/0" in said
    assert re.search(r"0::/user\.slice/user-0\.slice/session-\w+\.scope", said), said
