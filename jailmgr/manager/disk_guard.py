"""The host's disk running full under the pool: whoever writes is held still before a write of the pool could fail.

A btrfs pool's file is sparse, so others can use up the space it counts on; btrfs answers one failed write of its own
by turning read-only, under every jail. A pool of kind `project` is the host's own disk, which jails without a limit
would fill under everything else. A thread looks at how much is left, the more often the less that is. When too little
is, running jails are frozen, builds given up and starts refused; when there is space again, the jails that it froze
run on.
"""

from __future__ import annotations

import logging
import os
import threading

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.manager.context import Context
from jailmgr.runtime import cgroups
from jailmgr.runtime.jsonfile import read_json, write_json
from jailmgr.runtime.state import running_jails
from jailmgr.storage.pool import writable
from jailmgr.units import format_size

FLOOR = 256 << 20
"""Bytes of the host's disk that are never the pool's."""
ENOUGH = 2 * FLOOR
"""Bytes above which frozen jails run on; not at FLOOR itself, or they would stop and go."""
_FASTEST = 2 << 30
"""Bytes a second that a disk may take: how long it may be looked away."""
_SLOWEST_LOOK, _QUICKEST_LOOK = 5.0, 0.1
"""Seconds."""

log = logging.getLogger(__name__)


def space_left(root: Root) -> int | None:
    """Bytes that jails may still write before the host's disk is in danger; None where it can't be, by them.

    Raises OSError.
    """
    return writable(root, FLOOR)


class DiskGuard:
    """Watches over the disk from `start` to `stop`."""

    def __init__(self, m: Context) -> None:
        self._m = m
        self._held_file = f"{m.root.run}/held.json"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._full = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End. What is frozen stays so, for the next engine to let go. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def full(self) -> bool:
        """Too little is left, as of the last look."""
        return self._full

    def check(self) -> None:
        """JailmgrError `full` where nothing may begin that writes."""
        if self._full:
            raise JailmgrError(
                "the host's disk",
                f"it is nearly full; jails are held still until {format_size(ENOUGH)} are free",
                "Free some space on it.",
                "full",
            )

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                pause = self._look()
            except (OSError, JailmgrError) as error:
                log.error("the host's disk could not be looked after: %s", error)
                pause = _SLOWEST_LOOK

    def _look(self) -> float:
        """One look, and what follows from it; seconds until the next."""
        left = space_left(self._m.root)
        held = self._held()
        if left is not None and left <= 0:
            if not self._full:
                log.error("the host's disk is nearly full: jails are held still until there is space")
            self._full = True
            self._hold(held)
        elif left is None or left > ENOUGH - FLOOR:
            self._full = False
            self._let_go(held)
        return _SLOWEST_LOOK if left is None else min(max(left / _FASTEST, _QUICKEST_LOOK), _SLOWEST_LOOK)

    def _held(self) -> list[str]:
        return list((read_json(self._held_file) or {}).get("jails", []))

    def _hold(self, held: list[str]) -> None:
        """Freeze what runs and isn't frozen; the note first, so that a crash leaves none frozen that is in no note."""
        for tenant in self._tenants():
            for name in running_jails(self._m.root, tenant):
                cgroup = self._m.root.jail_cgroup(tenant, name)
                if cgroups.is_frozen(self._m.hierarchies, cgroup):
                    continue
                if f"{tenant}/{name}" not in held:
                    held.append(f"{tenant}/{name}")
                    write_json(self._held_file, {"jails": held})
                try:
                    cgroups.freeze(self._m.hierarchies, cgroup, 2.0, keep=True)
                except JailmgrError as error:
                    log.warning("%s; it is tried again", error)

    def _let_go(self, held: list[str]) -> None:
        for path in held:
            tenant, _, name = path.partition("/")
            try:
                if name in running_jails(self._m.root, tenant):
                    cgroups.thaw(self._m.hierarchies, self._m.root.jail_cgroup(tenant, name))
            except JailmgrError as error:
                log.warning("%s", error)
        if held:
            log.warning("the host's disk has space again: %d jails run on", len(held))
            os.unlink(self._held_file)

    def _tenants(self) -> list[str]:
        try:
            return os.listdir(f"{self._m.root.run}/tenants")
        except FileNotFoundError:
            return []
