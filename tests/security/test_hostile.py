"""The guest's root as the attacker: what was tried against the runtime and must go on failing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from jailmgr.runtime.state import supervisor_process
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until

_EVIL_NSS = """
#include <fcntl.h>
__attribute__((constructor)) static void run(void) { open("/OWNED", O_CREAT | O_WRONLY, 0666); }
"""


def _supervisor(jm: Instance) -> int:
    process = supervisor_process(jm.root, "default")
    assert process is not None
    return process.pid


def _zombies(parent: int) -> list[str]:
    done = subprocess.run(["ps", "-o", "stat=", "--ppid", str(parent)], capture_output=True, text=True)
    return [line for line in done.stdout.split() if line.startswith("Z")]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("running", [True, False])
def test_cp_loads_no_library_of_the_jails(jm: Instance, busybox_jail: MakeJail, tmp_path: Path, running: bool) -> None:
    """CVE-2019-14271: names of owners are asked for by nsswitch.conf, which says what to load."""
    jail, library = busybox_jail(), tmp_path / "libnss_evil.so.2"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=_EVIL_NSS.encode(), check=True)
    folder = f"/lib/{sysconfig.get_config_var('MULTIARCH')}"
    jm.sh(jail, f"mkdir -p {folder}; echo 'passwd: evil' >/etc/nsswitch.conf; echo x >/f; chown 4242 /f")
    for place in (folder, "/lib"):
        jm("cp", str(library), f"{jail}:{place}/")
    if not running:
        jm("stop", "--force", jail)
    jm("cp", f"{jail}:/f", str(tmp_path / "f"))
    if not running:
        jm("start", jail)
    jm.sh(jail, "test ! -e /OWNED")


def test_links_in_place_of_proc_lead_into_the_jail_only(jm: Instance, busybox_jail: MakeJail, tmp_path: Path) -> None:
    """The paths to make read-only were looked up by the host's root once: a link showed any directory of it."""
    for name in ("bus", "fs", "irq", "sysrq-trigger"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "secret").write_text("the host's")
    jail = busybox_jail()
    jm.sh(jail, f"umount -l /proc; rmdir /proc; mkdir -p {tmp_path}; ln -s {tmp_path} /proc")
    jm("stop", "--force", jail)
    jm("start", jail)
    jm.sh(jail, f"test ! -e {tmp_path}/bus/secret && test -e {tmp_path}/self")


def test_exec_at_the_memory_limit_leaves_no_zombie_and_a_jail_that_stops(jm: Instance, busybox_jail: MakeJail) -> None:
    jail = busybox_jail("--memory", "16MiB")
    jm.exec(
        jail,
        "sh",
        "-c",
        "for i in 1 2 3 4 5 6 7 8; do (dd if=/dev/zero of=/dev/shm/$i bs=1M count=3); done",
        status=None,
    )
    for _ in range(12):
        assert jm.exec(jail, "true", status=None, within=10).status in (0, 125, 137)
    until(lambda: not _zombies(_supervisor(jm)), 10)
    jm("stop", "--force", jail, within=10)


def test_a_frozen_exec_group_can_be_left_and_costs_no_fd(jm: Instance, busybox_jail: MakeJail) -> None:
    jail = busybox_jail()
    group = "/sys/fs/cgroup/.exec"
    jm.sh(jail, f"printf '#!/bin/sh\\nmkdir {group}; echo 1 >{group}/cgroup.freeze\\n' >/etc/rc; chmod +x /etc/rc")
    jm("stop", "--force", jail)
    jm("start", jail)
    fds = f"/proc/{_supervisor(jm)}/fd"
    time.sleep(0.5)
    before = len(os.listdir(fds))
    for number in (signal.SIGINT, signal.SIGKILL):
        process = jm.popen("exec", jail, "--", "true", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1)
        process.send_signal(number)
        process.wait(5)
    until(lambda: len(os.listdir(fds)) <= before, 5)
    jm("stop", "--force", jail, within=10)


def test_execs_that_fail_cost_no_fd(jm: Instance, busybox_jail: MakeJail) -> None:
    jail = busybox_jail()
    fds = f"/proc/{_supervisor(jm)}/fd"
    jm.exec(jail, "true")
    before = len(os.listdir(fds))
    for _ in range(20):
        jm.exec(jail, "/nothing", status=127)
        jm("exec", "-u", "nobody-here", jail, "--", "true", status=125)
    until(lambda: len(os.listdir(fds)) <= before, 5)


def test_cp_of_a_paused_jail_is_refused_at_once(jm: Instance, busybox_jail: MakeJail, tmp_path: Path) -> None:
    jail = busybox_jail()
    jm("pause", jail)
    jm.refused("cp", f"{jail}:/etc/passwd", str(tmp_path / "x"), within=10)
    jm("resume", jail)
