"""Start a jail: network, cgroup, bundle, and the tenant's supervisor asked to boot it."""

from __future__ import annotations

import time
from contextlib import ExitStack

from jailmgr.errors import JailmgrError, full_name
from jailmgr.manager import networks
from jailmgr.manager.host import Manager
from jailmgr.manager.plan import write_bundle
from jailmgr.manager.ports import check_host, ports_of
from jailmgr.manager.renumber import renumber_if_old
from jailmgr.manager.running import is_up, running
from jailmgr.manager.totals import ensure_totals
from jailmgr.model import Jail
from jailmgr.runtime import volume_format
from jailmgr.runtime.state import load_state

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
    if image is not None and image.recipe.notify and m.watcher.is_open:
        _wait_ready(m, tenant, name, WAIT_TIMEOUT)


def _wait_ready(m: Manager, tenant: str, name: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with m.watcher.changed:
        while True:
            state = load_state(m.root.tenant_run(tenant), name)
            if state is None:
                raise _not_up(tenant, name, "it ended before it was up")
            if state.ready:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                why = f"its init has not reported within {timeout:g} s that the system is up; the jail runs on"
                raise _not_up(tenant, name, why)
            m.watcher.changed.wait(left)


def _not_up(tenant: str, name: str, why: str) -> JailmgrError:
    return JailmgrError(f"jail {full_name(tenant, name)}", why, f"See: jailmgr logs {full_name(tenant, name)}")


def boot(m: Manager, jail: Jail) -> None:
    """`start` for a jail that is locked and doesn't run. What fails takes back what was done."""
    m.check_disk()
    _ = m.pool
    for port in ports_of(jail):
        check_host(port)
    m.claims.uid(jail.tenant)
    jail = m.claims.idmap(jail, resize=not is_up(m, jail))
    renumber_if_old(m, jail)
    # Here, since it may take seconds, and while a supervisor does it the tenant's other jails wait.
    volume_format.convert(m.root.volume(jail.tenant, jail.name))
    with ExitStack() as undo:
        networks.up(m, jail)
        undo.callback(_give_back, m, jail)
        m.lxcfs.up()
        m.supervisors.watch(jail.tenant)
        supervisor = undo.enter_context(m.supervisors.connect(jail.tenant))
        with m.tenant(jail.tenant):
            write_bundle(m, jail)
            ensure_totals(m, jail.tenant)
            supervisor.start(jail.name)
        undo.pop_all()
    m.supervisors.watch(jail.tenant)
    m.supervisors.hold(supervisor, jail.tenant)


def _give_back(m: Manager, jail: Jail) -> None:
    """Ports and CPUs of a jail that could not be started; not of one that its supervisor has started meanwhile."""
    if not is_up(m, jail):
        m.pins.forget(jail)
        networks.unpublish(m, jail)
