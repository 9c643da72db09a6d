"""What a tenant's runtime directory and a jail's own say about it: small JSON files anyone may read.

RUN/tenants/TENANT/JAIL.json exists while the jail runs, JAIL.waits while its supervisor is about to start it again, and
LIB/jails/TENANT/JAIL/last.json tells how it last ended.
"""

from __future__ import annotations

import fcntl
import os
from typing import Any, NamedTuple

from jailmgr.config import Root
from jailmgr.runtime.jsonfile import read_json, write_json
from jailmgr.runtime.proc import Process, start_time

VERSION = 1
LAST = "last.json"
RUNS = "runs"
"""An empty file beside it from the jail's start to an end that isn't the host's: it is to run again after a boot."""
WAITS = ".waits"
LOCK = "supervisor.lock"
SUPERVISOR_LOG = "supervisor.log"


class State(NamedTuple):
    """A running jail. `starttime` as in syscalls.Process; times are seconds since the epoch."""

    pid: int
    starttime: int
    started_at: float
    restarts: int
    ready: bool
    """Init has told that the system is up."""
    oom_kills: int
    """Of its cgroup when it started."""
    cgroup: str
    lib: str
    boot_id: str
    """Of the host: a file from before a reboot tells of no process of today."""
    once: bool = False
    """Not the jail's own init but a build, or a visit of `cp` to a stopped jail: it ends with who asked for it."""
    version: int = VERSION


class Wait(NamedTuple):
    """A jail between two runs, of which only its supervisor's timer knows otherwise. As State."""

    lib: str
    restarts: int
    """The number of the start to come."""
    tries: int
    """How far its back-off has come."""
    boot_id: str


def host_boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def write_state(run: str, jail: str, state: State) -> None:
    write_json(f"{run}/{jail}.json", state._asdict())


def load_state(run: str, jail: str) -> State | None:
    """The file's content, whatever has become of the process; None when there is none or it isn't one of ours."""
    content = read_json(f"{run}/{jail}.json")
    if content is None or content.get("version") != VERSION:
        return None
    try:
        return State(**content)
    except TypeError:
        return None


def remove_state(run: str, jail: str) -> None:
    try:
        os.unlink(f"{run}/{jail}.json")
    except FileNotFoundError:
        pass


def write_wait(run: str, jail: str, wait: Wait) -> None:
    write_json(f"{run}/{jail}{WAITS}", wait._asdict())


def load_wait(run: str, jail: str) -> Wait | None:
    """The file's content; None when there is none or it isn't one of ours."""
    try:
        return Wait(**(read_json(f"{run}/{jail}{WAITS}") or {}))
    except TypeError:
        return None


def waits(root: Root, tenant: str, jail: str) -> bool:
    """Whether it is about to be started again: by its supervisor or, if that was killed, the next one.

    A supervisor of a release from before there was this file keeps that to itself.
    """
    return os.path.exists(f"{root.tenant_run(tenant)}/{jail}{WAITS}")


def remove_wait(run: str, jail: str) -> None:
    try:
        os.unlink(f"{run}/{jail}{WAITS}")
    except FileNotFoundError:
        pass


def read_state(root: Root, tenant: str, jail: str) -> State | None:
    """A running jail's state; None when it doesn't run.

    One whose init has just ended runs until its supervisor has cleared it away and said how it ended.
    """
    state = load_state(root.tenant_run(tenant), jail)
    if state is None or state.once:
        return None
    if start_time(state.pid) == state.starttime or supervisor_process(root, tenant) is not None:
        return state
    return None


def may_run(root: Root, tenant: str, jail: str) -> bool:
    """Whether a state file stands for what lives: the jail, a build, a visit, or what another release knows."""
    path = f"{root.tenant_run(tenant)}/{jail}.json"
    state = load_state(root.tenant_run(tenant), jail)
    if state is None:
        return os.path.exists(path)
    return start_time(state.pid) == state.starttime or supervisor_process(root, tenant) is not None


def set_runs(lib: str, runs: bool) -> None:
    """Note that the jail with this directory runs, or that it has ended for good. Raises OSError."""
    if runs:
        os.close(os.open(f"{lib}/{RUNS}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        return
    try:
        os.unlink(f"{lib}/{RUNS}")
    except FileNotFoundError:
        pass


def ran(root: Root, tenant: str, jail: str) -> bool:
    """Whether the jail runs, or ran until the host went down."""
    return os.path.exists(f"{root.jail_lib(tenant, jail)}/{RUNS}")


def running_jails(root: Root, tenant: str) -> list[str]:
    """Names of the jails with a state file: one directory read, however many are stopped."""
    return _names(root, tenant, ".json")


def waiting_jails(root: Root, tenant: str) -> list[str]:
    """Names of the jails of which `waits` is true."""
    return _names(root, tenant, WAITS)


def jails_up(root: Root, tenant: str) -> list[str]:
    """Names of both, by one look: one that goes over from this to that is not missed."""
    return sorted({*_names(root, tenant, ".json", WAITS)})


def all_up(root: Root) -> frozenset[tuple[str, str]]:
    """Tenant and name of all that may run or is about to: builds, visits and jails that no store knows of, too.

    In doubt it is among them: this is asked by what cleans up.
    """
    try:
        tenants = os.listdir(f"{root.run}/tenants")
    except FileNotFoundError:
        return frozenset()
    return frozenset(
        (tenant, jail)
        for tenant in tenants
        for jail in jails_up(root, tenant)
        if waits(root, tenant, jail) or may_run(root, tenant, jail)
    )


def _names(root: Root, tenant: str, *endings: str) -> list[str]:
    try:
        names = os.listdir(root.tenant_run(tenant))
    except FileNotFoundError:
        return []
    return [name.removesuffix(ending) for name in names for ending in endings if name.endswith(ending)]


def read_last(root: Root, tenant: str, jail: str) -> dict[str, Any] | None:
    """How the jail last ended: kind, at, by, status (model.Ending)."""
    return read_json(f"{root.jail_lib(tenant, jail)}/{LAST}")


def supervisor_process(root: Root, tenant: str) -> Process | None:
    """The tenant's supervisor, by the lock file it holds; None when it isn't alive."""
    content = read_json(f"{root.tenant_run(tenant)}/{LOCK}")
    if content is None:
        return None
    process = Process(int(content.get("pid", 0)), int(content.get("starttime", -1)))
    return process if start_time(process.pid) == process.starttime else None


def engine_runs(root: Root) -> bool:
    """Whether an engine holds its lock."""
    try:
        fd = os.open(f"{root.run}/engine.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
