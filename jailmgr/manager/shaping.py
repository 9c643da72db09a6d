"""Rates of jails and tenants: their queues made before a jail needs them, and changed while it runs.

What the kernel holds is made of the store's word each time: whatever a crash left is put right by the next start,
change or opening of the instance.
"""

from __future__ import annotations

from jailmgr.manager.host import Manager
from jailmgr.manager.plan import write_bundle
from jailmgr.manager.running import running
from jailmgr.model import Jail, Tenant
from jailmgr.network import bridge, firewall
from jailmgr.network import shaping as queues
from jailmgr.network.nft import NftError
from jailmgr.runtime import shaping as filters


def shaped_veths(m: Manager, jails: list[Jail]) -> set[str]:
    """Host's ends of those jails whose sending has a limit, their own or their tenant's."""
    tenants = {tenant.name: tenant for tenant in m.store.tenants()}
    return {
        nic.veth
        for jail in jails
        for nic in jail.nics
        if "egress" in queues.shape_of(m.root, tenants[jail.tenant], jail)
    }


def up(m: Manager, jail: Jail) -> bool:
    """Make the queues of a jail that is about to start, or runs; whether all it sends comes by way of one. Idempotent.

    A running jail is led to them here, one that starts by its supervisor. JailmgrError `unavailable` where the kernel
    can't. The caller holds the network lock.
    """
    tenant = m.store.tenant(jail.tenant)
    shape = queues.shape_of(m.root, tenant, jail)
    for direction in shape:
        queues.set_tenant(m.root, tenant, direction)
        queues.set_jail(m.root, tenant, jail, direction)
    if shape:
        for nic in jail.nics:
            filters.attach(nic.veth, shape)
    return "egress" in shape


def apply(m: Manager, jail: Jail) -> None:
    """Have the kernel say what the store says of a jail's rates, after they have been changed. Raises JailmgrError."""
    with m.network_lock:
        tenant, veths = m.store.tenant(jail.tenant), [nic.veth for nic in jail.nics]
        shape = queues.shape_of(m.root, tenant, jail)
        free = [direction for direction in filters.DIRECTIONS if direction not in shape]
        if running(m, jail) and up(m, jail):
            _hold(m, veths)
        if "egress" in free:
            firewall.let_from_queue(m.root, veths)
        for veth in veths:
            filters.detach(veth, free)
        for direction in free:
            queues.remove_jail(m.root, tenant, jail, direction)


def apply_tenant_rates(m: Manager, name: str) -> None:
    """Have the kernel say what the store says of a tenant's totals, for all its jails. Idempotent.

    To be called when the store has the new ones; again, when it has the old ones back, where it raises JailmgrError.
    """
    with m.tenant(name):
        tenant = m.store.tenant(name)
        with m.network_lock:
            for direction in filters.DIRECTIONS:
                if queues.is_made(m.root, tenant, direction):
                    queues.set_tenant(m.root, tenant, direction)
        for jail in m.store.jails(name):
            if running(m, jail):
                write_bundle(m, jail)
            apply(m, jail)


def follow(m: Manager, jail: Jail) -> None:
    """Lead a jail to its queues that has just been started, with what its config.json said a moment ago."""
    with m.network_lock:
        # It may have been deleted meanwhile, and its queues with it.
        if running(m, jail) and up(m, jail):
            _hold(m, [nic.veth for nic in jail.nics])


def forget(m: Manager, jail: Jail) -> None:
    """Take away what is there for a jail that is being deleted, and queues that no other jail needs. Idempotent."""
    tenant = m.store.find_tenant(jail.tenant)
    if tenant is None:
        return
    with m.network_lock:
        if "egress" in queues.shape_of(m.root, tenant, jail):
            firewall.let_from_queue(m.root, [nic.veth for nic in jail.nics])
        made = [direction for direction in filters.DIRECTIONS if queues.is_made(m.root, tenant, direction)]
        others = [other for other in m.store.jails(tenant.name) if other.id != jail.id] if made else []
        for direction in made:
            queues.remove_jail(m.root, tenant, jail, direction)
            if not any(direction in queues.shape_of(m.root, tenant, other) for other in others):
                queues.remove(m.root, queues.ifb_name(m.root, tenant.id, direction))


def take_down(m: Manager) -> None:
    """Remove all queues of ours from the host. No jail runs."""
    for name in bridge.list_ifbs(m.root):
        queues.remove(m.root, name)


def take_down_tenant(m: Manager, tenant: Tenant) -> None:
    """Remove the queues of a tenant without jails."""
    with m.network_lock:
        for direction in filters.DIRECTIONS:
            queues.remove(m.root, queues.ifb_name(m.root, tenant.id, direction))


def _hold(m: Manager, veths: list[str]) -> None:
    try:
        firewall.hold_to_queue(m.root, veths)
    except NftError as error:
        # Somebody has flushed all tables; the next start of a jail brings ours back, with this in them.
        if not error.missing:
            raise
