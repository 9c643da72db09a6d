"""Jails that are on disk or run, and that the store does not know: an older store was put back, or a row was lost.

Nothing of theirs is removed, started, or given to another jail: names, ids, addresses and host ports stay theirs. They
are found as the engine opens, and `doctor --fix --adopt` takes them back (manager/adoption.py).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, full_name
from jailmgr.manager import kept
from jailmgr.manager.context import ADOPT, Context
from jailmgr.model import BUILD_TENANT, Jail, Network, Nic, OnDisk, Stranger
from jailmgr.runtime import cgroups
from jailmgr.runtime.bundle import load_bundle
from jailmgr.runtime.state import all_up
from jailmgr.storage.pool import is_made
from jailmgr.storage.volume import committed_usage, list_volumes
from jailmgr.store import Row, Store


def find_strangers(root: Root, rows: Iterable[Row], volumes: Iterable[tuple[str, str]]) -> list[Stranger]:
    """All of them, by tenant and name. `volumes`: tenant and jail of each volume there is."""
    known = {(row.jail.tenant, name): row.jail.id for row in rows for name in (row.jail.name, row.next) if name}
    up = all_up(root)
    found = []
    for tenant, name in sorted({*jails_on_disk(root), *volumes, *up}):
        on_disk = kept.read(root, tenant, name)
        row = known.get((tenant, name))
        if tenant != BUILD_TENANT and (row is None or on_disk.id not in (None, row)):
            addresses = _addresses(root, tenant, name, on_disk)
            found.append(Stranger(tenant, name, (tenant, name) in up, on_disk, addresses))
    return found


def jails_on_disk(root: Root) -> list[tuple[str, str]]:
    """Tenant and name of each jail that has a directory."""
    lib = f"{root.lib}/jails"
    return [
        (tenant, jail) for tenant in _folders(lib) if tenant != BUILD_TENANT for jail in _folders(f"{lib}/{tenant}")
    ]


def refuse_blank_store(root: Root, store: Store) -> None:
    """Refuse to begin a new store while jails are on disk or run. JailmgrError `failed`; nothing is changed."""
    if store.is_blank():
        _refuse_lost(root, store, "it is empty" if os.path.exists(root.store) else "it is gone")


def refuse_store_without_jails(root: Root, store: Store, volumes: Iterable[tuple[str, str]] = ()) -> None:
    """The same where an open store has rows of none of them."""
    if not store.rows():
        _refuse_lost(root, store, "it has no jails", volumes)


def meet_strangers(m: Context) -> None:
    """Find the strangers as the engine opens, and see that nothing of theirs is given to another jail.

    Raises JailmgrError where the store has no jail at all, and some are there: it was lost.
    """
    pool = m.pool if is_made(m.root) else None
    volumes = list_volumes(pool) if pool is not None else []
    refuse_store_without_jails(m.root, m.store, volumes)
    m.strangers = {(one.tenant, one.name): one for one in find_strangers(m.root, m.store.rows(), volumes)}
    known = [one.on_disk.kept for one in m.strangers.values() if one.on_disk.kept is not None]
    m.store.reserve_ids(
        jails=max(
            [
                *(committed_usage(pool) if pool is not None else ()),
                *(one.on_disk.id or 0 for one in m.strangers.values()),
                *_ids_of_links(m.root, "v"),
            ],
            default=0,
        ),
        networks=max([*(one.id for row in known for one in row.networks), *_ids_of_links(m.root, "b")], default=0),
        tenants=max([row.tenant.id for row in known], default=0),
    )


def check_free(m: Context, tenant: str, name: str) -> None:
    """Refuse a name of which anything is there: it may be all that is left of a jail whose row was lost.

    JailmgrError `conflict`. Its caller has taken the name in the store, so no jail of the store's is in the way.
    """
    run, lib = m.root.tenant_run(tenant), m.root.jail_lib(tenant, name)
    there = [
        what
        for what, exists in (
            ("volume", os.path.lexists(m.root.volume(tenant, name))),
            ("directory", os.path.lexists(lib)),
            ("state file", any(os.path.lexists(f"{run}/{name}{ending}") for ending in (".json", ".waits"))),
            ("cgroup", cgroups.exists(m.hierarchies, m.root.jail_cgroup(tenant, name))),
        )
        if exists
    ]
    if there:
        why = (
            f"{' and '.join(there)} of that name already exist{'s' * (len(there) == 1)}, and the store does not know it"
        )
        hint = f"{ADOPT} Or remove what `jailmgr doctor` names, or choose another name."
        raise JailmgrError(f"jail {full_name(tenant, name)}", why, hint, "conflict")


def check_tenant_free(m: Context, tenant: str) -> None:
    """Refuse to make or delete a tenant that the store says has no jails, while some are there. JailmgrError."""
    volumes = list_volumes(m.pool) if is_made(m.root) else []
    there = {*jails_on_disk(m.root), *volumes, *_up(m.root)}
    if found := sorted(name for of, name in there if of == tenant):
        why = f"jails of it exist that the store does not know: {', '.join(found[:3])}"
        raise JailmgrError(f"tenant {tenant}", why, ADOPT.replace(" it ", " them ", 1), "conflict")


def addresses_of_strangers(m: Context) -> set[str]:
    """IPv4 addresses that are no jail's of the store's, and not free."""
    return {address for one in m.strangers.values() for address in one.addresses}


def published_by_strangers(m: Context) -> list[tuple[Network, Nic, Jail]]:
    """The first interface of each that runs, to which its ports lead, for the rules."""
    found = []
    for one in m.strangers.values():
        if one.up and one.on_disk.kept is not None and one.on_disk.kept.jail.nics:
            jail, networks = one.on_disk.kept.jail, one.on_disk.kept.networks
            nic = jail.nics[0]
            found += [(network, nic, jail) for network in networks if network.name == nic.network]
    return found


def image_of_stranger(m: Context, fingerprint: str) -> str | None:
    """Full name of a jail that is made of the image and that the store does not know; None where there is none."""
    for one in m.strangers.values():
        if one.on_disk.kept is not None and one.on_disk.kept.jail.image == fingerprint:
            return full_name(one.tenant, one.name)
    return None


def _refuse_lost(root: Root, store: Store, why: str, volumes: Iterable[tuple[str, str]] = ()) -> None:
    if jails := {*jails_on_disk(root), *_up(root), *volumes}:
        names = ", ".join(f"{tenant}/{name}" for tenant, name in sorted(jails)[:3])
        hint = f"{store.remedy()} Or take the jails back from their config.json: jailmgr doctor --fix --adopt."
        raise JailmgrError(f"store {store.path}", f"{why}, but {len(jails)} jails are there ({names})", hint)


def _up(root: Root) -> set[tuple[str, str]]:
    return {(tenant, jail) for tenant, jail in all_up(root) if tenant != BUILD_TENANT}


def _addresses(root: Root, tenant: str, name: str, on_disk: OnDisk) -> frozenset[str]:
    if on_disk.kept is not None:
        return frozenset(nic.ipv4 for nic in on_disk.kept.jail.nics)
    try:
        bundle = load_bundle(root.jail_lib(tenant, name))
        return frozenset(text.partition("/")[0] for nic in bundle.nics for text in nic["addresses"] if "." in text)
    except (JailmgrError, OSError, KeyError, TypeError):
        return frozenset()


def _ids_of_links(root: Root, letter: str) -> list[int]:
    """Ids of jails (`v`) or networks (`b`) whose interfaces are there (network/bridge.py)."""
    pattern = re.compile(f"{re.escape(root.link_prefix)}{letter}([0-9a-f]{{1,7}})")
    return [int(found[1], 16) for _, name in socket.if_nameindex() if (found := pattern.fullmatch(name))]


def _folders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
