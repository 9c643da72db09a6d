"""Delete a jail: everything of it, in an order that a crash at any point lets the next start go on with."""

from __future__ import annotations

import os
import shutil

from jailmgr.errors import JailmgrError, full_name
from jailmgr.manager import networks
from jailmgr.manager.host import Manager
from jailmgr.manager.running import running
from jailmgr.manager.stop import end_if_alive
from jailmgr.model import Jail
from jailmgr.runtime import cgroups
from jailmgr.runtime.state import remove_state, remove_wait
from jailmgr.storage.pool import is_made
from jailmgr.storage.volume import delete_volume
from jailmgr.store import CREATING, DELETING


def delete(m: Manager, tenant: str, name: str, *, force: bool = False, ident: int | None = None) -> None:
    """Delete a jail with all that is in it; a running one only with `force`, which kills it.

    `ident`: only the jail with this id. Raises JailmgrError: `missing`, `conflict` where it runs, is being made, or is
    another jail than the one of that id.
    """
    with m.jail_of_any_state(tenant, name) as row:
        jail = row.jail
        if ident not in (None, jail.id):
            raise JailmgrError(f"jail {full_name(tenant, name)}", "another jail has that name now", "", "conflict")
        if row.state == CREATING:
            raise JailmgrError(
                f"jail {full_name(tenant, name)}", "it is being created", "Try again when that is done.", "conflict"
            )
        if running(m, jail) and not force:
            hint = f"Stop it first (jailmgr stop {full_name(tenant, name)}), or use --force."
            raise JailmgrError(f"jail {full_name(tenant, name)}", "it is running", hint, "conflict")
        m.store.set_state(jail, DELETING)
        finish_delete(m, jail, row.next)


def finish_delete(m: Manager, jail: Jail, other_name: str | None = None) -> None:
    """Remove all that a row in state `deleting` or `creating` stands for, and last the row. Idempotent.

    `other_name`: the name a half-done rename was giving it. Where a name is another jail's by now, which the store does
    not know, that jail keeps all it has.
    """
    names = [name for name in (jail.name, other_name) if name and (jail.tenant, name) not in m.strangers]
    if jail.name in names:
        end_if_alive(m, jail)
        m.accountant.settle(jail)
        networks.forget(m, jail)
    for name in names:
        cgroups.remove(m.hierarchies, m.root.jail_cgroup(jail.tenant, name))
        # Before the volume: reconcile takes a row in state `creating` with its config.json for a whole jail.
        lib = m.root.jail_lib(jail.tenant, name)
        if os.path.isdir(lib):
            shutil.rmtree(lib)
        if is_made(m.root):
            delete_volume(m.pool, jail.tenant, name, jail.id)
        remove_state(m.root.tenant_run(jail.tenant), name)
        remove_wait(m.root.tenant_run(jail.tenant), name)
    if jail.id not in {stranger.on_disk.id for stranger in m.strangers.values()}:
        m.claims.release(jail)
    m.store.remove(jail)
    m.stopped_views.forget(jail.id)
    if not m.store.jails(jail.tenant):
        m.supervisors.release(jail.tenant)
