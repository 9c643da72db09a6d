"""What a crash left behind: things of ours on the host that belong to no jail that runs and to no row of the store."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import msgspec

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.manager import lxcfs
from jailmgr.manager.adoption import adopt_all
from jailmgr.manager.opening import opened
from jailmgr.model import BUILD_TENANT, Jail
from jailmgr.network import bridge, dns, firewall, shaping
from jailmgr.runtime import cgroups, netlink
from jailmgr.runtime.shaping import DIRECTIONS
from jailmgr.runtime.state import (
    all_up,
    engine_runs,
    may_run,
    remove_state,
    running_jails,
    supervisor_process,
)
from jailmgr.storage.pool import is_open, open_pool
from jailmgr.storage.volume import half_deleted, half_made, list_builds, list_volumes
from jailmgr.store import READY, Store


class Leftover(msgspec.Struct, frozen=True):
    """Something of ours that nothing needs. `remove` is None where opening and closing the instance takes it away.

    `kept`: it may be all that is left of a jail whose row was lost, and is for the admin to judge.
    """

    what: str
    remove: Callable[[], object] | None = None
    kept: bool = False


class _Seen(NamedTuple):
    """`alive`: jails, builds and visits that may run, as (tenant, name); `engine`: one is at work."""

    alive: frozenset[tuple[str, str]]
    engine: bool

    @property
    def idle(self) -> bool:
        return not self.alive and not self.engine


def find_leftovers(root: Root) -> list[Leftover]:
    """All of them. With an engine running, what it may be about to make or remove is not counted.

    Raises JailmgrError where the store can't be read: then nothing can be told from what is in use.
    """
    return _find(root, engine_runs(root))


def fix(root: Root, adopt: bool = False) -> list[str]:
    """Remove the leftovers but those that are kept; a line for each. Raises JailmgrError, OSError.

    `adopt`: first take jails back that the store does not know, for which no engine may run.
    """
    with ExitStack() as held:
        alone = _keep_engines_out(root, held)
        if adopt and not alone:
            raise JailmgrError(
                "doctor --fix --adopt",
                "the engine is running, and the store is its own",
                "Stop it first: jailmgr engine stop. Jails run on.",
                "conflict",
            )
        adopted = adopt_all(root) if adopt else []
        found = [leftover for leftover in _find(root, not alone) if not leftover.kept]
        for leftover in found:
            if leftover.remove is not None:
                leftover.remove()
        done = [*adopted, *(f"removed {leftover.what}" for leftover in found)]
        if alone and os.path.exists(root.store):
            try:
                with opened(root, autostart=False):
                    pass
            except JailmgrError as error:
                done.append(f"not finished: {error}")
    return done


def _keep_engines_out(root: Root, held: ExitStack) -> bool:
    """Take the engine's own lock (engine/main.py), so that none begins meanwhile; False where one has it."""
    os.makedirs(root.run, mode=0o700, exist_ok=True)
    lock = os.open(f"{root.run}/engine.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    held.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _find(root: Root, engine: bool) -> list[Leftover]:
    store = Store(root.store)
    # What is there is listed before what may be there is asked for: rows and state files come first and go last.
    groups, disk = cgroups.list_groups(cgroups.discover(), root.cgroup), _on_disk(root)
    if not os.path.exists(root.store):
        return [*_of_host(root, store, _Seen(all_up(root), engine), groups)]
    store.open_to_read()
    try:
        found = [*_of_host(root, store, _Seen(all_up(root), engine), groups), *_of_disk(root, store, disk)]
        if not engine:
            found += [
                Leftover(f"jail {row.jail.full_name}, whose row says {row.state}")
                for row in store.rows()
                if row.state != READY
            ]
            found += _half_done(root)
        return found
    finally:
        store.close()


def _tenants(root: Root) -> list[str]:
    return _list(f"{root.run}/tenants")


def _of_host(root: Root, store: Store, seen: _Seen, groups: list[str]) -> Iterator[Leftover]:
    there = os.path.exists(root.store)
    rows = (
        {(row.jail.tenant, name): row.jail for row in store.rows() for name in (row.jail.name, row.next)}
        if there
        else {}
    )
    # The links of a jail whose row was lost have names that nobody knows any more.
    if all(key in rows or key[0] == BUILD_TENANT for key in seen.alive):
        yield from _of_network(root, store, seen, rows)
    if seen.idle and lxcfs.is_there(root):
        yield Leftover("lxcfs and its mount", partial(lxcfs.stop, root))
    for group in groups:
        if not _is_needed(root, group, seen):
            yield Leftover(f"cgroup {group}", partial(_remove_group, root, group, seen.engine))
    for tenant in _tenants(root):
        for jail in running_jails(root, tenant):
            if not may_run(root, tenant, jail):
                path = root.tenant_run(tenant)
                yield Leftover(f"state of {tenant}/{jail}, which has ended", partial(remove_state, path, jail))


def _of_network(
    root: Root, store: Store, seen: _Seen, rows: Mapping[tuple[str, str | None], Jail]
) -> Iterator[Leftover]:
    # A running engine keeps a network's bridge and DNS server when the last jail has gone.
    networks = {network.id: network for network in store.networks()} if os.path.exists(root.store) else {}
    # Between a jail's start and its state file there are milliseconds; an engine at work knows its own.
    needed = {nic.veth for key, jail in rows.items() for nic in jail.nics if key in seen.alive or seen.engine}
    for veth in bridge.list_veths(root):
        if veth not in needed:
            yield Leftover(f"interface {veth}", partial(netlink.detach, veth))
    names = {bridge.bridge_name(root, ident) for ident in networks}
    for name in bridge.list_bridges(root):
        if seen.idle or name not in names:
            yield Leftover(f"bridge {name}", partial(bridge.remove_bridge, root, name))
    yield from _queues(root, store, seen.idle)
    for ident in dns.list_dns(root):
        if seen.idle or ident not in networks:
            yield Leftover(f"DNS server of network {ident}", partial(dns.stop_dns, root, ident))
    if seen.idle and firewall.is_there(root):
        yield Leftover(f"nftables tables {root.table}", partial(firewall.remove_all, root))


def _queues(root: Root, store: Store, idle: bool) -> Iterator[Leftover]:
    tenants = store.tenants() if os.path.exists(root.store) else []
    needed = {shaping.ifb_name(root, tenant.id, direction) for tenant in tenants for direction in DIRECTIONS}
    for name in bridge.list_ifbs(root):
        if idle or name not in needed:
            yield Leftover(f"queues on {name}", partial(shaping.remove, root, name))


def _is_needed(root: Root, group: str, seen: _Seen) -> bool:
    """A tenant's group while an engine or anything of the tenant's is at work; below it, that of what may run.

    A supervisor that lives makes and removes those of its tenant.
    """
    tenant, *jail = group.split("/")[1:]
    if (not jail or tenant == BUILD_TENANT) and (seen.engine or any(tenant == key[0] for key in seen.alive)):
        return True
    return (tenant, *jail) in seen.alive or supervisor_process(root, tenant) is not None


def _remove_group(root: Root, group: str, engine: bool) -> None:
    """With what is in it, unless it has come into use meanwhile."""
    if not _is_needed(root, group, _Seen(all_up(root), engine)):
        hierarchies = cgroups.discover()
        cgroups.kill(hierarchies, group)
        cgroups.remove(hierarchies, group)


def _on_disk(root: Root) -> tuple[set[tuple[str, str]], list[tuple[str, str]]]:
    """Jails that have a directory, and those that have a volume."""
    lib = f"{root.lib}/jails"
    kept = {(tenant, jail) for tenant in _list(lib) for jail in _list(f"{lib}/{tenant}") if tenant != BUILD_TENANT}
    return kept, [*list_volumes(open_pool(root))] if is_open(root) else []


def _of_disk(root: Root, store: Store, disk: tuple[set[tuple[str, str]], list[tuple[str, str]]]) -> Iterator[Leftover]:
    known = {(row.jail.tenant, name) for row in store.rows() for name in (row.jail.name, row.next) if name}
    for key in sorted(disk[0] - known):
        yield Leftover(f"directory {root.jail_lib(*key)} of a jail that the store does not know", kept=True)
    for tenant, jail in disk[1]:
        if (tenant, jail) not in known:
            yield Leftover(f"volume {tenant}/{jail} of a jail that the store does not know", kept=True)


def _half_done(root: Root) -> Iterator[Leftover]:
    if not is_open(root):
        return
    pool = open_pool(root)
    for name in list_builds(pool):
        yield Leftover(f"build {name}, which was cut off")
    for name in half_made(pool):
        yield Leftover(f"{name} in the pool, which was cut off as it was made")
    for name in half_deleted(pool):
        yield Leftover(f"trash {name} in the pool, whose deletion was cut off")


def _list(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []
