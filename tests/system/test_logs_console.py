"""What a jail's console shows, live and kept, and that it can't fill the host's disk."""

from __future__ import annotations

import os
import subprocess

from tests.system.conftest import MakeJail
from tests.system.instance import Instance, terminal, until

DETACH = b"\x1d\x1d\x1d"
KEPT_MAX = 16 << 20
"""Bytes of one jail's console on the host's disk, generously."""


def test_logs(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.sh(name, "for n in 1 2 3; do echo line-$n > /dev/console; done")
    until(lambda: "line-3" in jm("logs", name).out)
    last = jm("logs", "-n", "2", name).out.splitlines()
    assert len(last) == 2
    assert jm("logs", "-n", "0", name).out == ""
    jm("stop", "--force", name)
    assert "line-1" in jm("logs", name).out
    jm.refused("logs", "nowhere")


def test_logs_of_a_first_life_are_kept(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.sh(name, "echo first-life > /dev/console")
    until(lambda: "first-life" in jm("logs", name).out)
    jm("restart", "--force", name)
    assert "first-life" in jm("logs", name).out


def test_follow(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    process = jm.popen("logs", "-f", name, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        jm.sh(name, "echo told-live > /dev/console")
        for line in process.stdout:
            if b"told-live" in line:
                break
        else:
            raise AssertionError("the log ended")
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_a_guest_cannot_fill_the_hosts_disk(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.sh(name, "timeout 5 sh -c 'yes 0123456789012345678901234567890123456789 > /dev/console'", status=None)
    log = jm.info(name)["log"]
    directory = os.path.dirname(log)
    kept = sum(entry.stat().st_size for entry in os.scandir(directory) if entry.name.startswith(os.path.basename(log)))
    assert 0 < kept < KEPT_MAX
    assert len(jm("logs", name).out) < KEPT_MAX
    jm.exec(name, "true")
    assert jm.status(name) == "Running"


def test_console(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    with terminal(jm, "console", name) as term:
        term.expect(b"leaves it")
        term.prompt()
        term.write(b"echo $((6 * 7))\n")
        term.expect(b"42")
        term.write(DETACH)
        assert term.wait() == 0
    assert jm.status(name) == "Running"
    assert "42" in jm("logs", name).out


def test_console_of_a_jail_that_ends(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    with terminal(jm, "console", name) as term:
        term.expect(b"leaves it")
        term.prompt()
        term.write(b"echo here\n")
        term.expect(b"here")
        jm("stop", "--force", name)
        term.wait()
    with terminal(jm, "console", name) as term:
        term.expect(b"Error: ")
        assert term.wait() == 1


def test_debian_console_has_a_login(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail()
    with terminal(jm, "console", name) as term:
        term.expect(b"leaves it")
        term.prompt()
        term.write(b"hostname -f\n")
        term.expect(name.encode())
        term.write(DETACH)
        assert term.wait() == 0


def test_debian_shell(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail()
    with terminal(jm, "shell", name) as term:
        term.prompt()
        term.write(b"echo $((6 * 7)) on $(hostname); exit 3\n")
        term.expect(f"42 on {name}".encode())
        assert term.wait() == 3
