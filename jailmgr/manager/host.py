"""A root's context, and the parts that keep state of their own, each in its own file.

The use cases are plain functions over it, a module for each verb. All are synchronous.
"""

from __future__ import annotations

import threading

from jailmgr.config import Root
from jailmgr.manager.accounting import Accountant
from jailmgr.manager.batches import Batches
from jailmgr.manager.builds import Builds
from jailmgr.manager.claiming import Claims
from jailmgr.manager.context import Context
from jailmgr.manager.cpu_meter import CpuMeter
from jailmgr.manager.disk_guard import DiskGuard
from jailmgr.manager.held_totals import HeldTotals
from jailmgr.manager.lxcfs import Lxcfs
from jailmgr.manager.pins import Pins
from jailmgr.manager.supervisors import Supervisors
from jailmgr.manager.view_cache import ViewCache
from jailmgr.manager.watch import Watcher
from jailmgr.model import Jail


class Manager(Context):
    """A root as opening.py opens it. One process at a time has it open: the engine holds run/engine.lock."""

    def __init__(self, root: Root) -> None:
        super().__init__(root)
        self.watcher = Watcher(root)
        self.supervisors = Supervisors(root, self.watcher)
        self.lxcfs = Lxcfs(root, self.watcher)
        self.pins = Pins(self)
        self.claims = Claims(self)
        self.totals = HeldTotals()
        self.cpu_meter = CpuMeter()
        self.builds = Builds()
        self.stopped_views = ViewCache()
        self.networks_up: set[int] = set()
        """Ids of networks whose bridge and rules are there."""
        self.disk_guard = DiskGuard(self)
        self.accountant = Accountant(self)
        self.ahead: Batches[str] | None = None
        """Makes volumes ahead, over these layers."""
        self.ended: Batches[tuple[str, str]] | None = None
        """Ends the flows of jails that have ended, by tenant and name."""
        self.autostart: threading.Thread | None = None

    def check_disk(self) -> None:
        """JailmgrError `full` where the host's disk has no room for anything that writes."""
        self.disk_guard.check()

    def make_ahead(self, image: str) -> None:
        """Have what takes long of the next jail of an image made before somebody waits for it; returns at once."""
        if self.ahead is not None:
            self.ahead.add(f"{self.root.image(image)}/rootfs")

    def end_flows(self, jail: Jail) -> None:
        """Have the connections of a jail that has ended ended; returns at once. Nothing after `close`."""
        if self.ended is not None:
            self.ended.add((jail.tenant, jail.name))

    def disk_is_full(self) -> bool:
        return self.disk_guard.full
