"""Start a jail: network, cgroup, bundle, and the tenant's supervisor asked to boot it."""

from __future__ import annotations

from contextlib import ExitStack

from jailmgr.errors import JailmgrError, full_name
from jailmgr.manager import lxcfs, networks
from jailmgr.manager.claiming import claim_idmap, claim_uid
from jailmgr.manager.host import Manager
from jailmgr.manager.pinning import forget_pin
from jailmgr.manager.plan import write_bundle
from jailmgr.manager.ports import check_host, ports_of
from jailmgr.manager.renumber import renumber_if_old
from jailmgr.manager.running import is_up, running
from jailmgr.manager.totals import ensure_totals
from jailmgr.model import Jail, Stopped
from jailmgr.runtime import attach, volume_format

WAIT_TIMEOUT = 120.0
"""Seconds `wait` gives init to tell that the system is up."""


def start(m: Manager, tenant: str, name: str, *, wait: bool = False) -> None:
    """Boot a stopped jail; on return its init has been exec'd, with `wait` it has reported that the system is up.

    Raises JailmgrError: `missing`, `conflict` where it runs, `exists` where a published port has been taken, `failed`.
    """
    with m.jail(tenant, name) as jail:
        if running(m, jail):
            raise JailmgrError(f"jail {full_name(tenant, name)}", "it runs already", "", "conflict")
        boot(m, jail)
    if wait:
        wait_ready(m, tenant, name)


def wait_ready(m: Manager, tenant: str, name: str) -> None:
    """Until the jail's init has told that the system is up, if it is one that does. JailmgrError `failed`.

    The jail isn't locked meanwhile: it can be stopped while it boots.
    """
    image = m.store.find_image(m.store.jail(tenant, name).image)
    if image is not None and image.recipe.notify and m.watcher is not None:
        m.watcher.wait_ready(tenant, name, WAIT_TIMEOUT)


def boot(m: Manager, jail: Jail) -> None:
    """`start` for a jail that is locked and doesn't run. What fails takes back what was done."""
    m.check_disk()
    _ = m.pool
    for port in ports_of(jail):
        check_host(port)
    claim_uid(m, jail.tenant)
    jail = claim_idmap(m, jail, resize=not is_up(m, jail))
    renumber_if_old(m, jail)
    # Here, since it may take seconds, and while a supervisor does it the tenant's other jails wait.
    volume_format.convert(m.root.volume(jail.tenant, jail.name))
    with ExitStack() as undo:
        networks.up(m, jail)
        undo.callback(_give_back, m, jail)
        lxcfs.up(m)
        if m.watcher is not None:
            m.watcher.watch(jail.tenant)
        supervisor = undo.enter_context(_supervisor(m, jail.tenant))
        with m.tenant(jail.tenant):
            write_bundle(m, jail)
            ensure_totals(m, jail.tenant)
            supervisor.start(jail.name)
        undo.pop_all()
    if m.watcher is not None:
        m.watcher.watch(jail.tenant)
        m.watcher.hold(supervisor, jail.tenant)
    else:
        supervisor.close()


def _give_back(m: Manager, jail: Jail) -> None:
    """Ports and CPUs of a jail that could not be started; not of one that its supervisor has started meanwhile."""
    if not is_up(m, jail):
        forget_pin(m, jail.tenant, jail.name)
        networks.unpublish(m, jail)


def _supervisor(m: Manager, tenant: str) -> attach.Supervisor:
    """A connection to the tenant's supervisor: the one that is held, where that still answers."""
    held = m.watcher.take(tenant) if m.watcher is not None else None
    if held is not None:
        try:
            held.ask("hello", within=attach.ANSWER_SECONDS)
            return held
        except JailmgrError:
            held.close()
    return attach.connect(m.root, tenant)


def restart(
    m: Manager, tenant: str, name: str, *, force: bool = False, timeout: int | None = None, wait: bool = False
) -> Stopped:
    """Stop and start; a stopped jail is refused (JailmgrError `conflict`)."""
    from jailmgr.manager.stop import stop

    stopped = stop(m, tenant, name, force=force, timeout=timeout)
    start(m, tenant, name, wait=wait)
    return stopped
