"""AppArmor: everything in a jail is under the profile, and that forbids what ids and capabilities allow.

What is refused to the guest's root is then done by the same root in the same namespaces, but unconfined: by nsenter.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jailmgr.manager import apparmor as loading
from jailmgr.runtime import apparmor
from jailmgr.runtime.bundle import MASKED, READONLY, UNCOVERED
from tests.system.instance import Instance
from tests.system.netns import run

MakeJail = Callable[..., str]
ENFORCED = "jailmgr (enforce)"


@pytest.fixture
def disabled(host: Instance) -> Iterator[None]:
    """As aa-disable(8) leaves it."""
    place = Path(loading.ETC, "disable", apparmor.PROFILE)
    place.symlink_to(loading.profile_file())
    yield
    place.unlink()


def unconfined(pid: int, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script as the jail's root, without the profile."""
    return subprocess.run(
        ["nsenter", "--target", str(pid), "--all", "--", "sh", "-c", script], capture_output=True, text=True, timeout=60
    )


def only_the_profile_forbids(host: Instance, name: str, script: str, prepare: str = "true") -> None:
    host.sh(name, prepare)
    refused = host.sh(name, script, status=None)
    assert refused.status != 0, refused
    assert "ermission denied" in refused.err, refused
    done = unconfined(host.info(name)["init_pid"], script)
    assert done.returncode == 0, done


def test_init_and_what_is_execed(host: Instance, jail: MakeJail) -> None:
    name = jail()
    info = host.info(name)
    assert info["apparmor"] == ENFORCED
    assert Path(f"/proc/{info['init_pid']}/attr/current").read_text().strip() == ENFORCED
    assert host.exec(name, "cat", "/proc/self/attr/current").out.strip() == ENFORCED
    assert host.exec(name, "cat", "/proc/1/attr/current").out.strip() == ENFORCED
    assert apparmor.loaded()


def test_the_engine_and_supervisor_are_not(host: Instance, jail: MakeJail) -> None:
    info = host.info(jail())
    assert apparmor.label_of(info["supervisor_pid"]) == "unconfined"


def test_masks_stay(host: Instance, jail: MakeJail) -> None:
    name = jail()
    pid = host.info(name)["init_pid"]
    mounted = {line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()}
    masks = sorted(mounted.intersection([*MASKED, *READONLY]))
    assert {"/proc/keys", "/proc/timer_list", "/sys/firmware"} <= set(masks)
    host.sh(name, "mkdir -p /root/m && touch /root/f")
    for path in masks:
        only_the_profile_forbids(host, name, f"umount {path}")
    only_the_profile_forbids(host, jail(), "umount -l /sys/firmware")
    for script, before in (
        ("mount -o move /proc/timer_list /root/f", "touch /root/f"),
        ("mount -o move /proc /root/m", "mkdir /root/m"),
        (f"mount -o move {UNCOVERED}/proc /root/m", "mkdir /root/m"),
    ):
        only_the_profile_forbids(host, jail(), script, f"mount --make-rprivate / && {before}")


def test_proc_and_sys_are_not_shown_without_masks(host: Instance, jail: MakeJail) -> None:
    name = jail()
    # Private: what is mounted on a copy of a shared mount shows on the mount itself, too.
    host.sh(name, "mount --make-rprivate / && mkdir -p /root/m /root/c /root/n/proc")
    only_the_profile_forbids(host, name, "mount -t proc proc /root/m")
    only_the_profile_forbids(host, name, "mount -t proc proc /root/c")
    only_the_profile_forbids(host, name, "mount -t sysfs sysfs /root/m")
    only_the_profile_forbids(host, name, "mount -o bind /proc /root/m")
    only_the_profile_forbids(host, name, "mount -o rbind /proc /root/m")
    only_the_profile_forbids(host, name, f"mount -o rbind {UNCOVERED}/proc /root/m")
    only_the_profile_forbids(host, name, f"mount -o bind {UNCOVERED}/sys /root/m")
    host.sh(name, "mount -t proc proc /root/n/proc && cat /root/n/proc/meminfo")
    host.sh(name, f"mkdir /root/o && mount -o rbind {UNCOVERED} /root/o")
    for proc in ("/root/n/proc", f"{UNCOVERED}/proc", "/root/o/proc"):
        only_the_profile_forbids(host, name, f"cat {proc}/keys")
        only_the_profile_forbids(host, name, f"cat {proc}/kallsyms >/dev/null")
    for sys in (f"{UNCOVERED}/sys", "/root/o/sys"):
        only_the_profile_forbids(host, name, f"ls {sys}/block")


def test_proc_and_sys_of_nested_namespaces_hold_the_same(host: Instance, jail: MakeJail) -> None:
    """They have no masks: a user of the jail may mount them in a user namespace of his own."""
    name = jail()
    host.sh(name, "unshare -Urpf --mount-proc sh -c 'cat /proc/meminfo && test $$ = 1 && ! cat /proc/keys'")
    host.sh(name, "unshare -Urmn sh -c 'mount -t sysfs s /sys && ls /sys/class/net && ! ls /sys/block/*'")


def test_what_guests_mount_is_let_be(host: Instance, jail: MakeJail) -> None:
    """As systemd does for its services, and nested containers. A copy of / is made a slave: `umount -l` of one that
    shares its mounts takes away those of / as well, as on every host whose / is shared (mount_namespaces(7)).
    """
    host.sh(
        jail(),
        "set -e; mkdir -p /root/a/sub /root/b /root/l /root/u /root/w\n"
        "mount -t tmpfs -o nosuid t /root/a; mount -o remount,bind,ro /root/a; mount -o rbind / /root/b\n"
        "mount --make-rslave /root/b; mount -o remount,bind,ro /root/b\n"
        "mount -o rbind /proc/sys /proc/sys; umount -l /proc/sys\n"
        "mount -o bind /dev/null /proc/version; umount /proc/version; umount -l /root/b; umount /root/a\n"
        "unshare -Urm mount -t tmpfs t /root/a; unshare -mpf sh -c 'mount -t proc proc /proc && test -d /proc/1'",
    )


def test_the_profile_stays(host: Instance, jail: MakeJail) -> None:
    name = jail()
    change = "echo changeprofile unconfined > /proc/self/attr/current"
    at_exec = "echo exec unconfined > /proc/self/attr/exec && cat /proc/self/attr/current"
    for script in (change, at_exec, change.replace("self", "thread-self")):
        assert host.sh(name, script, status=None).status != 0
    assert unconfined(host.info(name)["init_pid"], at_exec).returncode == 0


def test_a_proc_of_the_guests_own_takes_nobody_in(host: Instance, jail: MakeJail) -> None:
    name = jail()
    faked = "mount -t tmpfs t /proc; for d in self thread-self; do mkdir -p /proc/$d/attr/apparmor; "
    faked += "touch /proc/$d/attr/exec /proc/$d/attr/apparmor/exec /proc/$d/attr/apparmor/current; done"
    host.sh(name, faked)
    assert host.sh(name, "umount /proc && cat /proc/self/attr/current").out.strip() == ENFORCED


def test_both_ends_of_cp(host: Instance, jail: MakeJail) -> None:
    name = jail()
    host.sh(name, "echo copied > /root/note")
    for stop in (False, True):
        if stop:
            host("stop", "--force", name)
        assert "copied" in host("cp", f"{name}:/root/note", "-").out
        refused = host("cp", f"{name}:/proc/kallsyms", "-", status=1)
        assert "ermission denied" in refused.err, refused


def test_what_is_unloaded_is_missed(host: Instance, jail: MakeJail) -> None:
    """Removing a profile takes it from who runs under it, and that is not undone; nobody joins them unsaid."""
    name = jail()
    profile = loading.profile_file()
    run(loading.find_parser(), "--remove", f"--Include={os.path.dirname(profile)}", profile)
    assert host.info(name)["apparmor"] == "unconfined"
    for command in (("exec", name, "--", "true"), ("cp", f"{name}:/etc/passwd", "-")):
        refused = host(*command, status=None)
        assert refused.status != 0, refused
        assert "AppArmor profile jailmgr: it is not loaded" in refused.err, refused
    host("restart", "--force", name)
    assert host.info(name)["apparmor"] == ENFORCED


def test_the_admin_may_disable_it(host: Instance, jail: MakeJail, disabled: None) -> None:
    name = jail()
    assert host.info(name)["apparmor"] == "unconfined"
    host.sh(name, "umount /proc/keys")


def test_what_can_not_be_loaded_stops_the_start(host: Instance, jail: MakeJail) -> None:
    name = jail()
    host("stop", "--force", name)
    own = Path(loading.ETC, apparmor.PROFILE)
    kept = own.read_bytes() if own.exists() else None
    own.write_text("profile jailmgr { no such rule }\n")
    try:
        refused = host("start", name, status=1)
        assert str(own) in refused.err, refused
        assert host.status(name) == "Stopped"
    finally:
        if kept is None:
            os.unlink(own)
        else:
            own.write_bytes(kept)
    host("start", name)
    assert host.info(name)["apparmor"] == ENFORCED
