"""What a guest finds of its container manager: docs/container-interface.md has a table of all clauses."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from tests.system.conftest import MakeJail
from tests.system.instance import Instance, Terminal, terminal, until

INITTAB = """\
::sysinit:/bin/hostname -F /etc/hostname
console::respawn:/sbin/getty 38400 console
"""
"""As Alpine's for a container: a login on the console (busybox init, openrc)."""


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
