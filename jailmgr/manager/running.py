"""Whether a jail runs, by the state its supervisor keeps (runtime/state.py)."""

from __future__ import annotations

from jailmgr.errors import JailmgrError
from jailmgr.manager.host import Manager
from jailmgr.model import Jail
from jailmgr.runtime.state import read_state, waits


def running(m: Manager, jail: Jail) -> bool:
    """Whether the jail's init is alive, with or without a supervisor."""
    return read_state(m.root, jail.tenant, jail.name) is not None


def is_up(m: Manager, jail: Jail) -> bool:
    """Whether it runs, or is about to be started again, for which it needs the pool and its network as they are."""
    # It may go over from the one to the other, or back, between two looks.
    return running(m, jail) or waits(m.root, jail.tenant, jail.name) or running(m, jail)


def not_running(jail: Jail) -> JailmgrError:
    return JailmgrError(
        f"jail {jail.full_name}", "it is not running", f"Start it: jailmgr start {jail.full_name}", "conflict"
    )
