"""Restart a jail."""

from __future__ import annotations

from jailmgr.manager.host import Manager
from jailmgr.manager.start import start
from jailmgr.manager.stop import stop
from jailmgr.model import Stopped


def restart(
    m: Manager, tenant: str, name: str, *, force: bool = False, timeout: int | None = None, wait: bool = False
) -> Stopped:
    """Stop and start; a stopped jail is refused (JailmgrError `conflict`)."""
    stopped = stop(m, tenant, name, force=force, timeout=timeout)
    start(m, tenant, name, wait=wait)
    return stopped
