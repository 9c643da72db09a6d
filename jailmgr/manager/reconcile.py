"""What opening and closing an instance does to the host: finish or undo what a crash left, find what runs, take down.

Only what has a row of ours is touched. A volume nobody knows is named by `doctor`, never removed here: it may be all
that is left of a jail whose row was lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from jailmgr import claims
from jailmgr.errors import JailmgrError
from jailmgr.image import store as image_store
from jailmgr.manager import lxcfs, networks
from jailmgr.manager.builder import builds_left, remove_build
from jailmgr.manager.configure import finish_rename
from jailmgr.manager.delete import finish_delete
from jailmgr.manager.host import Manager
from jailmgr.manager.kept import read as read_kept
from jailmgr.manager.kept import renew as renew_kept
from jailmgr.manager.plan import write_bundle
from jailmgr.manager.ports import ports_of
from jailmgr.manager.running import is_up, running
from jailmgr.manager.strangers import meet_strangers
from jailmgr.manager.totals import renew_totals
from jailmgr.manager.upgrade import renew_supervisor
from jailmgr.model import Jail
from jailmgr.runtime import attach, cgroups
from jailmgr.runtime.bundle import load_bundle
from jailmgr.runtime.state import all_up, jails_up, supervisor_process
from jailmgr.storage.pool import is_made
from jailmgr.storage.volume import discard_half_made, reap
from jailmgr.store import CREATING, READY, RENAMING, Row

log = logging.getLogger(__name__)


def reconcile(m: Manager) -> None:
    """Bring what is there and what the store says together. One thing that fails is logged, and the rest goes on.

    Raises JailmgrError where the store was lost.
    """
    if is_made(m.root):
        attempt("the pool", lambda: m.pool)
    meet_strangers(m)
    _claim_again(m)
    if m.pool_if_open is not None:
        attempt("what was deleted", partial(reap, m.pool))
        attempt("what was half made", partial(discard_half_made, m.pool))
        attempt("builds", partial(_remove_builds, m))
        attempt("images", partial(_compare_images, m))
    for row in m.store.rows():
        if row.state != READY:
            attempt(f"jail {row.jail.full_name}, {row.state}", partial(_finish, m, row))
    alive = [jail for jail in m.store.jails() if is_up(m, jail)]
    attempt("ports of jails that have ended", partial(networks.settle, m, alive))
    for jail in alive:
        attempt(f"the network of {jail.name}", partial(networks.up, m, jail))
        attempt(f"the CPUs of {jail.name}", partial(m.pins.follow, jail.tenant, jail.name))
        attempt(f"config.json of {jail.name}", partial(_mend_bundle, m, jail))
    # Those with a state file whose init is gone, too: how they ended is for a supervisor to say and to clear away.
    for tenant in {jail.tenant for jail in alive}:
        attempt(f"the totals of {tenant}", partial(renew_totals, m, tenant))
    # And those with a supervisor: one of an older release tells nobody of a jail that it is about to start again.
    for tenant in filter(partial(_is_watched, m), {jail.tenant for jail in m.store.jails()}):
        attempt(f"the supervisor of {tenant}", partial(_watch_over, m, tenant))
    for jail in alive:
        if not running(m, jail):
            attempt(f"the ports of {jail.name}", partial(networks.follow, m, jail.tenant, jail.name))
    attempt("lxcfs", partial(m.lxcfs.settle, bool(all_up(m.root))))
    if not m.store.fact("kept"):
        attempt("what config.json files keep of the store", partial(_keep_all, m))


def take_down(m: Manager) -> None:
    """Where no jail is up: our bridges, rules, DNS servers, cgroups, lxcfs and the pool's mount go off the host.

    Nor one that another release started, or whose row was lost.
    """
    if all_up(m.root):
        return
    with ExitStack() as rest:
        if not m.store.rows():
            rest.callback(claims.release_all, m.root)
        rest.callback(m.shut_pool)
        rest.callback(cgroups.remove_root, m.hierarchies, m.root.cgroup)
        rest.callback(lxcfs.stop, m.root)
        rest.callback(networks.take_down, m)


def attempt(what: str, do: Callable[[], object]) -> bool:
    """Do it, and return whether that went well; what can be expected to fail is logged as an error of `what`."""
    try:
        do()
    except (JailmgrError, OSError) as error:
        log.error("%s: %s", what, error)
        return False
    return True


def _finish(m: Manager, row: Row) -> None:
    """Go on with what a row announces.

    A jail in state `creating` that has its config.json is whole, and may have run: the row is of an older store.
    """
    kept = read_kept(m.root, row.jail.tenant, row.jail.name).kept
    if row.state == RENAMING:
        finish_rename(m, row)
    elif row.state == CREATING and kept is not None and kept.jail.id == row.jail.id:
        m.store.take_back(kept.jail, kept.tenant, kept.networks, ports_of(kept.jail), kept.uuid)
    else:
        finish_delete(m, row.jail, row.next)


def _mend_bundle(m: Manager, jail: Jail) -> None:
    """Write the config.json of a jail that is up again where it is damaged: without it no supervisor takes the jail."""
    try:
        load_bundle(m.root.jail_lib(jail.tenant, jail.name))
    except JailmgrError:
        write_bundle(m, jail)


def _keep_all(m: Manager) -> None:
    """Once, for jails whose config.json an earlier release wrote."""
    done = [attempt(f"config.json of {jail.name}", partial(renew_kept, m, jail)) for jail in m.store.jails()]
    if all(done):
        m.store.set_fact("kept", "1")


def _is_watched(m: Manager, tenant: str) -> bool:
    return bool(jails_up(m.root, tenant)) or supervisor_process(m.root, tenant) is not None


def _watch_over(m: Manager, tenant: str) -> None:
    m.supervisors.watch(tenant)
    if supervisor_process(m.root, tenant) is None:
        log.info("tenant %s has no supervisor: a new one adopts its jails", tenant)
        attach.connect(m.root, tenant).close()
        m.supervisors.watch(tenant)  # once more: before, there was no supervisor to watch
    else:
        renew_supervisor(m.root, tenant)


def _claim_again(m: Manager) -> None:
    """Claims are kept in /run. What is in use is claimed anew after a loss; what isn't, at the next start of a jail."""
    for tenant in m.store.tenants():
        attempt(f"the uid of {tenant.name}", partial(m.claims.uid, tenant.name))
    for network in m.store.networks():
        attempt(f"the subnet of {network.name}", partial(networks.claim, m, network))


def _remove_builds(m: Manager) -> None:
    for name in builds_left(m):
        remove_build(m, name)


def _compare_images(m: Manager) -> None:
    """The pool's word counts: an image sealed just before a crash gets its row, a row without an image goes."""
    there = {image.fingerprint: image for image in image_store.list_images(m.pool)}
    known = {image.fingerprint for image in m.store.images()}
    for fingerprint in there.keys() - known:
        m.store.put_image(there[fingerprint])
    for fingerprint in known - there.keys():
        try:
            m.store.check_image_unused(fingerprint)
        except JailmgrError:
            log.error("image %s is gone from the pool, and jails are made of it", fingerprint[:12])
        else:
            m.store.remove_image(fingerprint)
