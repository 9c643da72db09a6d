"""Stop a jail, and hold its processes still for a while."""

from __future__ import annotations

import msgspec

from jailmgr.errors import JailmgrError, full_name
from jailmgr.manager import networks
from jailmgr.manager.host import Manager
from jailmgr.manager.plan import stop_timeout
from jailmgr.manager.running import is_up, not_running, running
from jailmgr.model import Ending, Jail, Recipe, Stopped
from jailmgr.runtime import attach, cgroups
from jailmgr.runtime.state import supervisor_process


def stop(m: Manager, tenant: str, name: str, *, force: bool = False, timeout: int | None = None) -> Stopped:
    """Have init stop by its image's signal, kill after `timeout` seconds (None: the jail's own); `force` kills.

    Returns how it ended.
    Raises JailmgrError: `missing`, `conflict` where it isn't running.
    """
    with m.jail(tenant, name) as jail:
        if not is_up(m, jail) and supervisor_process(m.root, tenant) is None:
            raise not_running(jail)
    # The supervisor is waited for with the jail unlocked, so that an impatient `stop --force` gets through.
    return end(m, jail, force, timeout)


def end(m: Manager, jail: Jail, force: bool, timeout: int | None = None) -> Stopped:
    """`stop` for a jail that runs, or is about to be started again. JailmgrError `conflict` if neither."""
    image = m.store.find_image(jail.image)
    recipe = image.recipe if image else Recipe()
    if timeout is None:
        timeout = stop_timeout(jail, recipe)
    cgroup = m.root.jail_cgroup(jail.tenant, jail.name)
    if not force and cgroups.is_frozen(m.hierarchies, cgroup):
        cgroups.thaw(m.hierarchies, cgroup)
    with attach.connect(m.root, jail.tenant) as supervisor:
        last = msgspec.convert(supervisor.stop(jail.name, timeout, force, recipe.stop_signal), Ending)
    networks.unpublish(m, jail)
    return Stopped(last, timeout if last.timed_out else None)


def end_if_alive(m: Manager, jail: Jail) -> None:
    """Kill it, if there is anything to kill."""
    if is_up(m, jail) or supervisor_process(m.root, jail.tenant) is not None:
        try:
            end(m, jail, force=True)
        except JailmgrError as error:
            if error.code != "conflict" or is_up(m, jail):
                raise


def freeze(m: Manager, tenant: str, name: str) -> None:
    """Hold every process of a running jail still. JailmgrError `conflict` where it isn't running, or is frozen."""
    with m.jail(tenant, name) as jail:
        cgroup = _running_cgroup(m, jail)
        if cgroups.is_frozen(m.hierarchies, cgroup):
            raise JailmgrError(f"jail {full_name(tenant, name)}", "it is paused already", "", "conflict")
        cgroups.freeze(m.hierarchies, cgroup)


def unfreeze(m: Manager, tenant: str, name: str) -> None:
    """Let a frozen jail run on. JailmgrError `conflict` where it isn't running, or isn't frozen."""
    with m.jail(tenant, name) as jail:
        cgroup = _running_cgroup(m, jail)
        if not cgroups.is_frozen(m.hierarchies, cgroup):
            raise JailmgrError(f"jail {full_name(tenant, name)}", "it is not paused", "", "conflict")
        m.check_disk()
        cgroups.thaw(m.hierarchies, cgroup)


def _running_cgroup(m: Manager, jail: Jail) -> str:
    if not running(m, jail):
        raise not_running(jail)
    return m.root.jail_cgroup(jail.tenant, jail.name)
