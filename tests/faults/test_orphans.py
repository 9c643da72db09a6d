"""A supervisor is killed: with a child on its way into a frozen jail, or just after it was started."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from jailmgr.runtime.state import supervisor_process
from tests.faults.truth import settled
from tests.system.instance import Instance, kill, until
from tests.system.leftovers import processes

AT_ONCE = 5.0
"""Seconds; a supervisor that hangs gets ten."""


def kill_supervisor(instance: Instance) -> int:
    process = supervisor_process(instance.root, "default")
    assert process is not None
    kill(process.pid)
    return process.pid


def replaced(instance: Instance, old: int) -> None:
    """Wait until another supervisor has adopted the jails."""

    def other() -> bool:
        process = supervisor_process(instance.root, "default")
        return process is not None and process.pid != old

    until(other, 15, "another supervisor")


def test_a_paused_jail_keeps_its_tenant_from_no_supervisor(new_instance: Callable[[], Instance]) -> None:
    """Each supervisor that adopts the paused jail leaves a child in it when it is killed."""
    instance = new_instance()
    for name in ("paused", "other"):
        instance("launch", "busybox", name)
    instance("pause", "paused")
    before = settled(instance)
    for _ in range(3):
        replaced(instance, kill_supervisor(instance))
        began = time.monotonic()
        assert instance.exec("other", "echo", "here").out == "here\n"
        assert time.monotonic() - began < AT_ONCE
    instance("resume", "paused")
    assert instance.exec("paused", "echo", "here").out == "here\n"
    after = settled(instance)
    assert after.inits == before.inits
    old = [argv for _, argv in processes(instance.root) if "runtime.supervisor" in argv]
    until(lambda: len([argv for _, argv in processes(instance.root) if "runtime.supervisor" in argv]) == 1, 10, old)


def test_an_engine_watches_the_supervisor_that_it_starts(new_instance: Callable[[], Instance]) -> None:
    """Engine and supervisor are killed, the next engine starts another supervisor, and that is killed."""
    instance = new_instance()
    instance("launch", "busybox", "guest")
    before = settled(instance)
    kill(instance.engine_pid())
    kill_supervisor(instance)
    instance("list")
    replaced(instance, kill_supervisor(instance))
    assert settled(instance).inits == before.inits


def test_a_guest_that_freezes_its_execs_can_be_stopped(new_instance: Callable[[], Instance]) -> None:
    """The guest's root does the same from inside: it freezes the group that `exec` is born in."""
    instance = new_instance()
    instance("launch", "busybox", "guest")
    instance("launch", "busybox", "other")
    group = "/sys/fs/cgroup/.exec"
    script = (
        f"printf '#!/bin/sh\\nmkdir {group}; echo 1 >{group}/cgroup.freeze\\nsleep 1000\\n' >/etc/rc; chmod +x /etc/rc"
    )
    instance.sh("guest", script)
    instance("restart", "--force", "guest")
    with instance.popen("exec", "guest", "--", "true", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as asked:
        until(lambda: any(_frozen(pid) for pid, _ in processes(instance.root)), 15, "the exec is frozen")
        replaced(instance, kill_supervisor(instance))
        assert asked.wait(15) == 125
    began = time.monotonic()
    assert instance.exec("other", "echo", "here").out == "here\n"
    assert time.monotonic() - began < AT_ONCE
    instance("stop", "--force", "guest", within=20)


def _frozen(pid: int) -> bool:
    """Whether the process is in the frozen group."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            return "/.exec\n" in file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
