"""What a guest finds of its container manager: docs/container-interface.md has a table of all clauses."""

from __future__ import annotations

import platform
import re
import stat
import subprocess
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest

from jailmgr.runtime import capabilities, cgroups
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, Terminal, terminal, until

INITTAB = """\
::sysinit:/bin/hostname -F /etc/hostname
console::respawn:/sbin/getty 38400 console
"""
"""As Alpine's for a container: a login on the console (busybox init, openrc)."""


DROPPED = {"CAP_AUDIT_READ", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_TIME"}
KEPT = {"CAP_MKNOD", "CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_BOOT"}
NODES = "null zero full random urandom tty ptmx console"


def mounts(jm: Instance, name: str) -> dict[str, tuple[str, set[str]]]:
    """Kind and options of what is mounted in a jail, by place (proc_pid_mounts(5)); of what lies over another, it."""
    lines = [line.split() for line in jm.exec(name, "cat", "/proc/mounts").out.splitlines()]
    return {line[1]: (line[2], set(line[3].split(","))) for line in lines}


def test_execution_environment(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    assert jm.exec(name, "hostname").out == f"{name}\n"
    found = mounts(jm, name)
    assert {place: found[place][0] for place in ("/proc", "/sys", "/dev", "/dev/pts", "/sys/fs/cgroup")} == {
        "/proc": "proc", "/sys": "sysfs", "/dev": "tmpfs", "/dev/pts": "devpts", "/sys/fs/cgroup": "cgroup2",
    }  # fmt: skip
    assert "ro" in found["/sys"][1]
    assert "rw" in found["/sys/fs/cgroup"][1]
    jm.sh(name, "echo 1 >/proc/sys/net/ipv4/ip_forward")
    assert jm.sh(name, f"cd /dev; for node in {NODES}; do [ -c $node ] || echo no $node; done").out == ""
    assert (
        jm.sh(name, "stat -f -c %T /dev/console; ls /dev/kmsg /dev/tty[0-9]* /dev/vcs*", status=None).out == "devpts\n"
    )
    assert jm.sh(name, "mknod /dev/x b 7 0; mknod /tmp/x c 1 1", status=1).err.count("not permitted") == 2


def test_own_cgroups_are_the_whole_tree(jm: Instance, busybox_jail: MakeJail) -> None:
    """What /proc/PID/cgroup says is a path below /sys/fs/cgroup, and process 1 may make groups there."""
    name = busybox_jail()
    if not cgroups.discover().unified:
        pytest.skip("a guest makes no groups on a host without cgroup v2")
    script = "[ $(sed -n s/^0:://p /proc/1/cgroup) = / ] && cd /sys/fs/cgroup && mkdir sub && ls -d cgroup.procs sub"
    assert jm.sh(name, script).out.split() == ["cgroup.procs", "sub"]
    assert jm.sh(name, "grep -qx $$ /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/cgroup.procs && echo is").out


def test_capabilities(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    said = jm.sh(name, "sed -n 's/^CapBnd:\t//p' /proc/1/status").out
    has = {each for number, each in enumerate(capabilities.NAMES) if int(said, 16) >> number & 1}
    assert has >= KEPT
    assert not has & DROPPED


def test_network_interface_is_configured_and_stable(jm: Instance, busybox_jail: MakeJail) -> None:
    """Before process 1 runs: a guest needs no DHCP client, and finds the same MAC after each start."""
    name = busybox_jail()
    before = jm.sh(name, "cat /sys/class/net/eth0/address; ip -4 -o address show eth0").out
    assert jm.info(name)["ipv4"] in before
    jm("restart", "--force", name)
    assert jm.sh(name, "cat /sys/class/net/eth0/address; ip -4 -o address show eth0").out == before


def boot_busybox_init(jm: Instance, name: str) -> None:
    """Give the jail busybox' own init in place of the template's script, and a root without a password."""
    jm("cp", "-", f"{name}:/etc/inittab", stdin=INITTAB.encode())
    jm.sh(name, "rm /sbin/init && ln -s /bin/busybox /sbin/init && sed -i s/^root:x:/root::/ /etc/passwd")
    jm("restart", "--force", name)


def runs(jm: Instance, name: str, argument: str) -> bool:
    return jm.sh(name, f"ps -o args | grep -qx 'sleep {argument}'", status=None).status == 0


def use_job_control(jm: Instance, name: str, term: Terminal) -> None:
    """Interrupt, stop and continue what runs on the console, whose shell has just shown its prompt."""
    term.write(b"sleep 1000; echo st''atus $?\n")
    until(lambda: runs(jm, name, "1000"))  # what is typed before goes to the shell that starts it
    term.write(b"\x03")
    term.prompt()
    term.write(b"sleep 2000\n")
    until(lambda: runs(jm, name, "2000"))
    term.write(b"\x1a")
    term.expect(b"Stopped")
    term.write(b"bg && kill %1; wait %1; echo le''ft $?\n")
    term.expect(b"left 143")


def test_template_console_has_job_control(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    with terminal(jm, "console", name) as term:
        term.expect(b"leaves it")
        term.prompt()
        use_job_control(jm, name, term)


def test_console_login_of_busybox_init(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    boot_busybox_init(jm, name)
    with terminal(jm, "console", name) as term:
        term.expect(b"leaves it")
        until(lambda: "login:" in jm("logs", name).out, 10, "a login on the console")
        term.write(b"root\n")
        term.prompt()
        use_job_control(jm, name, term)
        term.write(b"sleep 3000\n")
        until(lambda: runs(jm, name, "3000"))
        jm.sh(name, "kill -KILL $(ps -o ppid,args | sed -n 's/ *sleep 3000$//p')")
        term.expect(b"login:")
        until(lambda: not runs(jm, name, "3000"), 5, "the terminal's session has ended: what it ran is hung up")


def environment_of_init(jm: Instance, name: str) -> dict[str, str]:
    said = jm.sh(name, "tr '\\0' '\\n' </proc/1/environ").out
    return dict(line.split("=", 1) for line in said.splitlines())


def host_ids() -> dict[str, str]:
    known = platform.freedesktop_os_release()
    ids = {f"container_host_{name.lower()}": known.get(name) for name in ("ID", "VERSION_ID", "BUILD_ID", "VARIANT_ID")}
    return {name: value for name, value in ids.items() if value}


def test_run_host_names_manager_jail_and_host(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    uuid = jm.info(name)["uuid"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", uuid)
    assert jm.exec(name, "cat", "/run/host/container-manager", "/run/host/container-uuid").out == f"jailmgr\n{uuid}\n"
    assert jm.exec(name, "cat", "/run/host/os-release").out == Path("/etc/os-release").read_text()
    found = environment_of_init(jm, name)
    assert (found["container"], found["container_uuid"]) == ("jailmgr", uuid)
    assert {key: value for key, value in found.items() if key.startswith("container_host_")} == host_ids() != {}


def test_run_host_is_read_only(jm: Instance, busybox_jail: MakeJail) -> None:
    """Even to the guest's root, who may change the flags of the mount: the file system is the host's."""
    name = busybox_jail()
    jm.sh(name, "mount -o remount,bind,rw /run/host")
    script = "cd /run/host; echo x >container-uuid; touch new; mkdir new; rm os-release; chmod 777 ."
    tried = jm.sh(name, f"{script}; mount -o remount,rw /run/host", status=None)
    assert tried.status != 0
    assert tried.err.count("Read-only file system") == 5, tried.err
    assert "new" not in jm.exec(name, "ls", "/run/host").out


def test_a_uuid_is_one_jails(jm: Instance, busybox_jail: MakeJail) -> None:
    """It stays through restart and rename, and no other jail gets it: not one of the same name either."""
    name, other = busybox_jail(), busybox_jail()
    uuid = jm.info(name)["uuid"]
    assert jm.info(other)["uuid"] != uuid
    jm("restart", "--force", name)
    assert jm.exec(name, "cat", "/run/host/container-uuid").out == f"{uuid}\n"
    jm("stop", "--force", name)
    jm("rename", name, f"{name}r")
    assert jm.info(f"{name}r")["uuid"] == uuid
    jm("delete", f"{name}r")
    busybox_jail(name=name)
    assert jm.info(name)["uuid"] != uuid


def test_credentials_are_in_a_directory_of_init(jm: Instance, busybox_jail: MakeJail) -> None:
    """Modes as systemd-creds(1) wants them, on a file system that is never swapped out; for the guest's root alone."""
    secret, other = "s3cret one\n", bytes(range(256))
    name, stranger = busybox_jail(), busybox_jail()
    jm("set", name, "systemd.credential.db.password=-", stdin=secret.encode())
    said = jm.json("set", name, f"systemd.credential-binary.key={b64encode(other).decode()}")
    assert said["restart_needed"] == ["systemd.credential-binary.key"]
    jm("restart", "--force", name)
    place = environment_of_init(jm, name)["CREDENTIALS_DIRECTORY"]
    assert jm.exec(name, "cat", f"{place}/db.password").out == secret
    assert jm.sh(name, f"sha256sum <{place}/key").out.split()[0] == sha256(other).hexdigest()
    assert jm.sh(name, f"stat -c '%a %u:%g' {place} {place}/*").out.splitlines() == ["500 0:0", *["400 0:0"] * 2]
    assert jm.sh(name, f"stat -f -c %T {place}").out == "ramfs\n"
    assert "Permission denied" in jm("exec", "-u", "nobody", name, "--", "cat", f"{place}/key", status=1).err
    assert (
        "Read-only file system" in jm.sh(name, f"mount -o remount,bind,rw /run/host; echo >{place}/key", status=1).err
    )
    assert "CREDENTIALS_DIRECTORY" not in environment_of_init(jm, stranger)
    assert "CREDENTIALS_DIRECTORY" not in jm.exec(name, "env").out
    jm("unset", name, "systemd.credential.db.password", "systemd.credential-binary.key")
    jm("restart", "--force", name)
    assert jm.sh(name, "ls /run/host").out.split() == ["container-manager", "container-uuid", "os-release"]


def test_credentials_are_kept_from_others(jm: Instance, busybox_jail: MakeJail) -> None:
    """Only a directory of the host's root has them: no error does, and no log."""
    name = busybox_jail(start=False)
    for key, value, why in (
        ("systemd.credential-binary.a", "s3cret%", "the value is not base64"),
        ("systemd.credential.a", "s3cret\0", "NUL byte"),
    ):
        answer = jm.api("PATCH", f"/1.0/instances/{name}", {"config": {key: value}, "devices": {}})
        assert why in answer["error"]
        assert "s3cret" not in str(answer)
    jm("set", name, "systemd.credential.a=s3cret")
    assert "is set too" in jm.refused("set", name, "systemd.credential-binary.a=czNjcmV0", status=2).err
    jm("start", name)
    grep = ["grep", "-rls", "--exclude-dir=pool", "--exclude-dir=lxcfs", "s3cret", jm.root.at]
    found = subprocess.run(grep, capture_output=True, text=True, check=True, timeout=30).stdout
    holders = [Path(line) for line in found.splitlines()]
    assert "config.json" in {path.name for path in holders}
    assert all(path.is_relative_to(jm.root.lib) for path in holders)
    assert stat.S_IMODE(Path(jm.root.lib).stat().st_mode) == 0o700
    assert not [path for path in holders if path.suffix == ".log"]


def test_debian_takes_what_the_interface_offers(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail("-c", "systemd.credential.greeting=hello")
    uuid = jm.info(name)["uuid"]
    assert jm.exec(name, "cat", "/etc/machine-id").out == uuid.replace("-", "") + "\n"
    found = environment_of_init(jm, name)
    assert (found["container_uuid"], found["NOTIFY_SOCKET"]) == (uuid, "/run/host/notify")
    assert jm.exec(name, "systemd-detect-virt", "--container", status=None).out == "container-other\n"
    assert jm.exec(name, "systemctl", "is-active", "systemd-udevd", "console-getty", status=None).out == (
        "inactive\nactive\n"
    )
    assert jm.exec(name, "systemd-creds", "--system", "cat", "greeting").out == "hello"
    listed = jm.exec(name, "systemd-creds", "--system", "--no-legend", "list").out.split()
    assert listed == ["greeting", "secure", "5B", "/run/credentials/@system/greeting"]
    run = ("systemd-run", "--quiet", "--wait", "--pipe", "--property=LoadCredential=greeting", "sh", "-c")
    assert jm.exec(name, *run, "cat $CREDENTIALS_DIRECTORY/greeting").out == "hello"
    scope = ("systemd-run", "--quiet", "--scope", "--unit=mine", "sed", "-n", "s/^0:://p", "/proc/self/cgroup")
    assert jm.exec(name, *scope).out == "/system.slice/mine.scope\n"
