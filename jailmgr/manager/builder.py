"""Commands of a build, run as root of a jail of our own runtime: no package script runs as the host's root."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jailmgr import claims
from jailmgr.errors import JailmgrError
from jailmgr.keys import IDS, IDS_MIN
from jailmgr.manager.apparmor import ensure_profile
from jailmgr.manager.host import Manager
from jailmgr.manager.plan import Calls, seccomp_filter
from jailmgr.model import BUILD_TENANT as TENANT
from jailmgr.progress import Cancelled
from jailmgr.runtime import attach, cgroups
from jailmgr.runtime.bundle import Limits, Plan, compile_bundle, save_bundle
from jailmgr.runtime.state import remove_state
from jailmgr.storage.volume import delete_build, list_builds, sync_pool

LIMITS = Limits(processes=4096)
_POLL = 0.5
"""Seconds."""

Runner = Callable[[list[str], dict[str, str], Callable[[bytes], None]], int]
"""Runs argv with an environment, gives its output as it comes, returns its exit status."""


def claim_idmap(m: Manager, name: str) -> tuple[int, int]:
    """Claim an id range for a build: its first id and size, which is the least where the default has no room.

    Raises JailmgrError `full`.
    """
    try:
        return claims.claim_idmap(m.root, claim_key(name), None, IDS), IDS
    except JailmgrError as error:
        if error.code != "full":
            raise
        return claims.claim_idmap(m.root, claim_key(name), None, IDS_MIN), IDS_MIN


def run_in_build(m: Manager, name: str, target: str, idmap: tuple[int, int], cancelled: Cancelled) -> Runner:
    """The Runner of one build: `target` is its root file system, writable, its owners shifted by `idmap`."""
    lib = m.root.jail_lib(TENANT, name)
    cgroup = m.root.jail_cgroup(TENANT, name)

    def run(argv: list[str], environment: dict[str, str], output: Callable[[bytes], None]) -> int:
        os.makedirs(lib, mode=0o700, exist_ok=True)
        plan = Plan(
            tenant=TENANT,
            jail=name,
            hostname="build",
            uid=claims.claim_uid(m.root, TENANT),
            idmap_base=idmap[0],
            idmap_size=idmap[1],
            cgroup=cgroup,
            lower="",
            volume=target,
            init=argv,
            lib=lib,
            environment=environment,
            terminal=False,
            limits=LIMITS,
            seccomp=seccomp_filter(m.root, Calls(raw_volume=True)),
            apparmor=ensure_profile(m.root),
        )
        save_bundle(lib, compile_bundle(plan))
        with _killed_when(cancelled, lambda: cgroups.kill(m.hierarchies, cgroup)):
            return attach.run_once(m.root, TENANT, name, output)

    return run


@contextmanager
def _killed_when(cancelled: Cancelled, kill: Callable[[], None]) -> Iterator[None]:
    """A build that is silent has to hear that nobody wants it any more, too."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL):
            if cancelled():
                kill()
                return

    watcher = threading.Thread(target=watch, name="build", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def remove_build(m: Manager, name: str) -> None:
    """Everything of a build, but its image: processes, groups, volume, id range. Idempotent."""
    cgroup = m.root.jail_cgroup(TENANT, name)
    cgroups.kill(m.hierarchies, cgroup)
    cgroups.remove(m.hierarchies, cgroup)
    delete_build(m.pool, name)
    sync_pool(m.pool)  # else the room of a build that filled the pool comes back with btrfs' next commit, in 30 s
    claims.release(m.root, "idmap", claim_key(name))
    remove_state(m.root.tenant_run(TENANT), name)
    shutil.rmtree(m.root.jail_lib(TENANT, name), ignore_errors=True)


def builds_left(m: Manager) -> set[str]:
    """Names of builds something is left of."""
    lib = os.path.dirname(m.root.jail_lib(TENANT, "_"))
    return {*list_builds(m.pool), *(os.listdir(lib) if os.path.isdir(lib) else [])}


def claim_key(name: str) -> str:
    """The key of a build's id range among the host's claims."""
    return f"build/{name}"
