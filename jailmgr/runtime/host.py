"""What the jails of a supervisor share: its loop, the host's cgroups, seccomp filters, links that are still to go."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

from jailmgr.errors import JailmgrError, full_name
from jailmgr.runtime import netlink
from jailmgr.runtime.cgroups import Hierarchies
from jailmgr.runtime.loop import Loop
from jailmgr.runtime.reaper import Reaper
from jailmgr.runtime.state import host_boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from jailmgr.runtime.jail import Jail

DETACH_SECONDS = 1.0


class Host:
    """What the jails of a supervisor share."""

    def __init__(self, loop: Loop, run: str, hierarchies: Hierarchies, changed: Callable[[Jail], None]) -> None:
        self.loop = loop
        self.run = run
        self.hierarchies = hierarchies
        self.changed = changed
        self.boot_id = host_boot_id()
        self.reaper = Reaper(loop)
        self._filters: dict[str, bytes] = {}
        self._links: set[int] = set()

    def full_name(self, jail: str) -> str:
        """With the tenant, which the runtime directory is named after."""
        return full_name(os.path.basename(self.run), jail)

    def detach_later(self, index: int) -> None:
        """Remove a link that is to go by itself, if it hasn't by then."""
        self._links.add(index)
        self.loop.after(DETACH_SECONDS, partial(self._detach, index))

    def detach_now(self) -> None:
        """For a supervisor that ends: nobody would come to it later."""
        for index in tuple(self._links):
            try:
                self._detach(index)
            except JailmgrError:
                sys.excepthook(*sys.exc_info())

    def _detach(self, index: int) -> None:
        self._links.discard(index)
        netlink.detach_index(index)

    def filter(self, path: str) -> bytes:
        """The compiled seccomp filter of that file; its name has its hash, so it never changes."""
        if path and path not in self._filters:
            with open(path, "rb") as file:
                self._filters[path] = file.read()
        return self._filters.get(path, b"")
