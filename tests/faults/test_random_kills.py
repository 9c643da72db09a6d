"""SIGKILL of the engine and of supervisors, at any moment of any operation: what is reported stays true.

A failure prints its seed: JAILMGR_FAULT_SEEDS=SEED[,SEED...] repeats its operations, and JAILMGR_FAULT_OPERATIONS=N
sets how many. Which line of the product a kill hits depends on the machine, so a repetition may take some runs.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jailmgr.runtime.state import engine_runs, supervisor_process
from jailmgr.runtime.syscalls import libc
from tests.faults.operations import ABSENT, FROZEN, Operation, choose
from tests.faults.truth import Key, Reported, marker_of, settled
from tests.system.instance import Instance, Result, kill, until
from tests.system.leftovers import leftovers, running

SEEDS = [int(seed) for seed in os.environ.get("JAILMGR_FAULT_SEEDS", "11,12").split(",")]
OPERATIONS = int(os.environ.get("JAILMGR_FAULT_OPERATIONS", "120"))
KILLS = 0.7
"""Share of the operations amid which something is killed."""
LONGEST = 0.25
"""Seconds after the start of an operation, at most, until the kill: as long as most of them take."""
AMID = 0.8
"""Share of the kills that wait for the first change of a file: of the store, of a jail or of its state."""
WORK = 0.05
"""Seconds after that, at most, and mostly a few thousandths: the engine works for ten to fifty on an operation."""
WITHOUT_ENGINE = ("exec", "cp", "info", "list")
"""Commands that change no file of the engine's."""
CHANGES = 0x2 | 0x80 | 0x100 | 0x200
"""IN_MODIFY, IN_MOVED_TO, IN_CREATE, IN_DELETE (inotify(7))."""


class Killer(threading.Thread):
    """Kills the engine, supervisors or both, once, after a while."""

    def __init__(self, instance: Instance, operation: Operation, chance: random.Random) -> None:
        super().__init__()
        self._instance = instance
        amid = chance.random() < AMID and operation.argv[0] not in WITHOUT_ENGINE
        self._began = _watch_work(instance) if amid else -1
        self._delay = chance.random() ** 3 * WORK if amid else chance.random() * LONGEST
        self._targets = chance.choice(["engine", "engine", "supervisors", "both"])
        self.killed: list[str] = []
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            if self._began >= 0:
                select.select([self._began], [], [], LONGEST)
                os.close(self._began)
            time.sleep(self._delay)  # the moment of the crash: nothing is waited for
            if self._targets in ("engine", "both"):
                self._kill("engine", _engine(self._instance))
            if self._targets in ("supervisors", "both"):
                run = Path(self._instance.root.run, "tenants")
                for tenant in sorted(os.listdir(run)) if run.is_dir() else []:
                    process = supervisor_process(self._instance.root, tenant)
                    self._kill(f"supervisor of {tenant}", process.pid if process else None)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.failed = error

    def _kill(self, what: str, pid: int | None) -> None:
        try:
            if pid is not None:
                kill(pid)
                self.killed.append(what)
        except ProcessLookupError:
            return


def _watch_work(instance: Instance) -> int:
    """An inotify fd that is readable once the engine or a supervisor has begun to change something."""
    fd = libc.inotify_init1(os.O_CLOEXEC)
    assert fd >= 0
    lib, run = Path(instance.root.lib), Path(instance.root.run)
    for folder in (lib, *lib.glob("jails/*"), *lib.glob("jails/*/*"), *run.glob("tenants/*")):
        if folder.is_dir():
            libc.inotify_add_watch(fd, os.fsencode(folder), ctypes.c_uint32(CHANGES))
    return int(fd)


def _engine(instance: Instance) -> int | None:
    """Its pid, without starting one."""
    if not engine_runs(instance.root):
        return None
    text = Path(instance.root.run, "engine.lock").read_text()
    return int(text) if text else None


class World:
    """What must be true: who exists, with which marker; the state of each jail is what was reported last."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.said: Reported = settled(instance)
        self.markers: dict[Key, set[str]] = {}
        """By jail, what its marker may hold: two values where a write was cut off."""

    def check(self, operation: Operation, ended: Result, killed: list[str]) -> None:
        """Check that all other jails are as before, and that the operation's jail is in a state that it may leave."""
        if killed and operation.about is not None:
            # The supervisor does one thing after the other: after this it has done what it was asked for before.
            self.instance("exec", "/".join(operation.about), "--", "true", status=None)
        before, self.said = self.said, settled(self.instance)
        mine = {operation.about, operation.to}
        for key in before.jails.keys() - mine:
            assert self.said.status(key) == before.status(key), f"{key} was {before.status(key)}"
            assert self.said.inits.get(key) == before.inits.get(key), f"{key} has another init"
        assert self.said.jails.keys() - mine <= before.jails.keys()
        if operation.about is not None:
            self._check_own(operation, ended, before)
        for key, may_be in self.markers.items():
            assert marker_of(self.instance, key) in may_be, f"marker of {key}"

    def _check_own(self, operation: Operation, ended: Result, before: Reported) -> None:
        assert operation.about is not None
        now = operation.about
        if operation.to is not None and self.said.status(operation.to) != ABSENT:
            now = operation.to
            assert self.said.status(operation.about) == ABSENT, "it has two names"
        elif operation.to is not None:
            assert ended.status != 0, "it has its old name"
        assert self.said.status(now) in (operation.amid if ended.status else operation.leaves)
        if now == operation.about and operation.leaves == operation.amid:
            assert self.said.inits.get(now) == before.inits.get(now), "it has another init"
        self._follow_marker(operation, ended, now)

    def _follow_marker(self, operation: Operation, ended: Result, now: Key) -> None:
        assert operation.about is not None
        may_be = self.markers.pop(operation.about, None)
        if operation.writes is not None:
            may_be = {operation.writes} if ended.status == 0 else None
        if may_be is not None and self.said.status(now) != ABSENT:
            self.markers[now] = may_be


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_any_moment(new_instance: Callable[[], Instance], seed: int) -> None:
    """Every operation, with a SIGKILL amid more than half of them."""
    instance, done = new_instance(), list[str]()
    chance, moments = random.Random(seed), random.Random(seed + 1_000_000)
    instance("launch", "busybox", "first")
    world, tenants = World(instance), {"default"}
    try:
        for number in range(OPERATIONS):
            operation = choose(chance, world.said, tenants, number)
            killer = Killer(instance, operation, moments) if moments.random() < KILLS else None
            done.append(" ".join(operation.argv))
            if killer is not None:
                killer.start()
            ended = instance(*operation.argv, status=None, stdin=operation.stdin)
            killed = []
            if killer is not None:
                killer.join()
                assert killer.failed is None, killer.failed
                killed = killer.killed
            done[-1] += f"  status {ended.status}" + (f", killed: {', '.join(killed)}" if killed else "")
            assert ended.status == 0 or killed, ended.told()
            assert ended.status == 0 or "Error: " in ended.err or operation.argv[0] == "exec", ended.told()
            world.check(operation, ended, killed)
            tenants = {row["tenant"] for row in instance.json("tenant", "list")}
        _end(instance, world)
        print("\n".join(done))
    except BaseException as error:
        told = "\n".join(done[-12:])
        raise AssertionError(
            f"JAILMGR_FAULT_SEEDS={seed}, operation {len(done) - 1}; the last ones:\n{told}"
        ) from error


def _end(instance: Instance, world: World) -> None:
    """Delete everything: then `doctor` finds nothing that is left, and so do we."""
    assert world.said.jails, "the trial ended with no jail to look at"
    for key in world.said.jails:
        if world.said.status(key) == FROZEN:
            instance("resume", "/".join(key))
        instance("delete", "--force", "/".join(key))
    for row in instance.json("tenant", "list"):
        if row["tenant"] != "default":
            instance("tenant", "delete", row["tenant"])
    settled(instance)
    instance("engine", "stop")
    left: set[str] = set()

    def gone() -> bool:
        left.clear()
        left.update(running(leftovers(instance.root)))
        return not left

    until(gone, 15, left)
    checks = {row["check"]: row for row in instance("doctor", "--format", "json", status=None).json}
    assert checks["leftovers"]["ok"], checks["leftovers"]
