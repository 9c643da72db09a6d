"""Mounts of a jail: procfs and sysfs in namespaces of the guest's own, and what services see of later mounts.

All that is compared is content: what fails to arrive reports no error.
"""

from __future__ import annotations

import json
from pathlib import Path

from jailmgr.runtime.bundle import UNCOVERED
from jailmgr.runtime.state import supervisor_process
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, kill, until

NEW_PROC = "unshare -Urpf --mount-proc cat /proc/1/cmdline"
NEW_SYS = "unshare -Urmn sh -c 'mount -t sysfs {} sys /mnt && ls /mnt/class/net'"
PLACES = ("/mnt", "/run/late", "/dev/late", "/dev/shm/late", "/usr/late")
"""Below the root, and below each tmpfs of a jail."""


def run_as(jm: Instance, name: str, script: str, user: str = "1000:1000", status: int | None = 0) -> str:
    """Stdout of a script that a user of the jail runs."""
    return jm("exec", name, "-u", user, "--", "sh", "-c", script, status=status).out


def begin_service(jm: Instance, name: str, options: str = "-m --propagation slave") -> str:
    """Start a process with a mount namespace of its own, as services with PrivateTmp= have one; its pid."""
    script = f"unshare {options} sh -c 'echo $$ >/run/pid; exec sleep 1000' </dev/null >/dev/null 2>&1 &"
    jm.sh(name, f"rm -f /run/pid; {script}")
    return str(until(lambda: jm.sh(name, "cat /run/pid", status=None).out.strip()))


def check_late_mounts(jm: Instance, name: str) -> None:
    """A mount that is made after a service has started shows its files there, at each of PLACES, and so its end."""
    pid = begin_service(jm, name)
    script = f"""
        for place in {" ".join(PLACES)}; do
            mkdir -p $place; mount -t tmpfs late $place; echo content >$place/file
            echo $place $(nsenter -t {pid} -m cat $place/file)
            umount $place
            echo $(nsenter -t {pid} -m ls $place)
        done; kill {pid}"""
    assert jm.sh(name, script).out == "".join(f"{place} content\n\n" for place in PLACES)


def test_a_user_mounts_proc_and_sysfs_in_namespaces_of_his_own(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "64MiB")
    for user in ("1000:1000", "root"):
        assert run_as(jm, name, NEW_PROC, user) == "cat\0/proc/1/cmdline\0"
        for options in ("", "-o ro,nosuid,nodev,noexec"):
            assert run_as(jm, name, NEW_SYS.format(options), user) == "lo\n"


def test_proc_is_mounted_inside_again_and_again(jm: Instance, busybox_jail: MakeJail) -> None:
    """In a namespace within one, as a container's own containers do."""
    name = busybox_jail()
    inner = "unshare -Urpf --mount-proc cat /proc/1/cmdline"
    assert run_as(jm, name, f"unshare -Urpf --mount-proc {inner}") == "cat\0/proc/1/cmdline\0"


def test_only_the_jails_root_enters_what_is_not_covered(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    assert jm.sh(name, f"stat -c '%a %u:%g' {UNCOVERED}; ls {UNCOVERED}").out.split() == ["700", "0:0", "proc", "sys"]
    assert jm.sh(name, f"ls {UNCOVERED}/proc/1/root/bin").out, "root sees its own processes there"
    for path in ("", "/proc", "/proc/keys", "/sys", "/sys/class/block"):
        assert run_as(jm, name, f"ls {UNCOVERED}{path}", status=1) == ""


def test_a_jail_without_the_place_starts(jm: Instance, busybox_jail: MakeJail) -> None:
    """A config.json of an earlier release has none."""
    name = busybox_jail()
    config = Path(jm.root.jail_lib("default", name), "config.json")
    text = config.read_text()
    assert UNCOVERED in text
    mounts = [entry for entry in json.loads(text)["mounts"] if UNCOVERED not in entry["destination"]]
    config.write_text(json.dumps({**json.loads(text), "mounts": mounts}))
    jm.sh(name, "reboot -f", status=None)
    until(lambda: jm.status(name) == "Running" and jm.info(name)["restarts"] == 1)
    assert jm.sh(name, f"test -e {UNCOVERED} || echo none").out == "none\n"


def test_a_later_mount_shows_in_services(jm: Instance, busybox_jail: MakeJail) -> None:
    """Also after a reboot of the jail, and when another supervisor has taken it over."""
    name = busybox_jail()
    check_late_mounts(jm, name)
    jm.sh(name, "reboot -f", status=None)
    until(lambda: jm.status(name) == "Running" and jm.info(name)["restarts"] == 1)
    check_late_mounts(jm, name)
    supervisor = supervisor_process(jm.root, "default")
    assert supervisor is not None
    kill(supervisor.pid)
    until(lambda: (jm.info(name)["supervisor_pid"] or supervisor.pid) != supervisor.pid)
    check_late_mounts(jm, name)


def test_a_mount_made_by_a_process_that_shares_the_tree_comes_back(jm: Instance, busybox_jail: MakeJail) -> None:
    """As systemd mounts extensions and homes: in a process with a mount namespace of its own."""
    name = busybox_jail()
    made = "mkdir -p /run/made && mount -t tmpfs made /run/made && echo content >/run/made/file"
    jm.sh(name, f"unshare -m --propagation shared sh -c '{made}'")
    assert jm.sh(name, "cat /run/made/file").out == "content\n"
    jm.sh(name, "umount /run/made; unshare -m --propagation slave sh -c 'mount -t tmpfs made /mnt; echo a >/mnt/a'")
    assert jm.sh(name, "ls /mnt").out == "", "a slave keeps its mounts"


def test_systemd_gives_services_what_they_are_promised(jm: Instance, debian_jail: MakeJail) -> None:
    """Credentials of a service, a system extension, and a mount that is made after a service with PrivateTmp=."""
    name = debian_jail()
    show = "cat $CREDENTIALS_DIRECTORY/set $CREDENTIALS_DIRECTORY/loaded"
    credentials = "-p SetCredential=set:one -p LoadCredential=loaded:/root/secret"
    jm.sh(name, "printf two >/root/secret")
    run = f"systemd-run -q --pipe --wait {{}} {credentials} sh -c '{show}'"
    assert jm.sh(name, run.format("")).out == "onetwo"
    assert jm.sh(name, run.format("-p DynamicUser=yes -p PrivateMounts=yes")).out == "onetwo"
    jm.sh(name, "systemd-run -q -u late -p PrivateTmp=yes sh -c 'until cat /mnt/file >/run/seen; do sleep 0.05; done'")
    jm.sh(name, "mount -t tmpfs late /mnt && echo content >/mnt/file")
    until(lambda: jm.sh(name, "cat /run/seen", status=None).out == "content\n", 10, "the service sees the mount")
    extension = "/var/lib/extensions/more"
    jm.sh(
        name,
        f"umount /mnt; mkdir -p {extension}/usr/lib/extension-release.d {extension}/usr/share/more;"
        f"echo ID=_any >{extension}/usr/lib/extension-release.d/extension-release.more;"
        f"echo extended >{extension}/usr/share/more/file; systemd-sysext merge",
    )
    assert jm.sh(name, "cat /usr/share/more/file").out == "extended\n"
    jm.sh(name, "systemd-sysext unmerge")
    assert jm.sh(name, "systemctl is-system-running").out == "running\n"


def test_bubblewrap_runs_for_a_user(jm: Instance, debian_jail: MakeJail) -> None:
    """As flatpak and browsers call it. The program is the host's: jail and host have the same release."""
    name = debian_jail()
    jm("cp", "/usr/bin/bwrap", f"{name}:/usr/bin/bwrap")
    script = "bwrap --unshare-all --ro-bind / / --proc /proc --dev /dev sh -c 'cat /proc/1/comm; echo x >/dev/null'"
    assert run_as(jm, name, script) == "bwrap\n"
    assert jm.sh(name, script).out == "bwrap\n"
