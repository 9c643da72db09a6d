"""Take jails back into the store that are on disk or run, and that it does not know (`doctor --fix --adopt`)."""

from __future__ import annotations

import os
import time

import msgspec

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os, full_name
from jailmgr.manager import kept
from jailmgr.manager.ports import ports_of
from jailmgr.manager.strangers import find_strangers
from jailmgr.model import Jail, Stranger
from jailmgr.runtime.bundle import CONFIG
from jailmgr.storage.pool import is_made, open_pool
from jailmgr.storage.volume import list_volumes
from jailmgr.store import Store


def adopt_all(root: Root) -> list[str]:
    """Take back every jail that can be; a line for each, and for each that can't be with the reason.

    Its config.json says what its row was, and its tenant's and networks' where those are gone as well. The caller holds
    the engine's lock. A store that holds nothing is set aside first. Raises JailmgrError, OSError.
    """
    store = Store(root.store)
    lines = _set_blank_aside(store)
    store.open(copy=False)
    try:
        volumes = list_volumes(open_pool(root)) if is_made(root) else []
        found = find_strangers(root, store.rows(), volumes)
        # Of a tenant or network that is gone, the config.json that was written last knows best.
        for stranger in sorted(found, key=lambda one: -_written(root, one)):
            name = f"{stranger.tenant}/{stranger.name}"
            try:
                _adopt(root, store, stranger, (stranger.tenant, stranger.name) in volumes)
            except JailmgrError as error:
                lines.append(f"not adopted: {name}: {error.why}")
            else:
                lines.append(f"adopted {name}")
    finally:
        store.close()
    return lines


def _adopt(root: Root, store: Store, stranger: Stranger, has_volume: bool) -> None:
    name = f"jail {full_name(stranger.tenant, stranger.name)}"
    found = stranger.on_disk.kept
    if found is None:
        raise JailmgrError(name, f"its {CONFIG} is missing, damaged, or of a release before this one", "", "missing")
    if not has_volume:
        raise JailmgrError(name, "its volume is missing", "", "missing")
    if owner := _owner_on_disk(root, store, found.jail.id):
        raise JailmgrError(name, f"it has the id of {owner}: one of the two is a copy", "", "exists")
    # A rename that was cut off leaves the old name in the file; the directory has the new one.
    jail: Jail = msgspec.structs.replace(found.jail, name=stranger.name)
    store.take_back(jail, found.tenant, found.networks, ports_of(jail), found.uuid)


def _owner_on_disk(root: Root, store: Store, ident: int) -> str:
    """Full name of the store's jail with that id, where its config.json says so too; else empty."""
    for jail in (row.jail for row in store.rows()):
        if jail.id == ident and kept.read(root, jail.tenant, jail.name).id == ident:
            return jail.full_name
    return ""


def _set_blank_aside(store: Store) -> list[str]:
    """Move a file without a schema away, with the log beside it, which may be all that is left of the store."""
    if not os.path.exists(store.path) or not store.is_blank():
        return []
    aside = f"{store.path}.empty.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    try:
        for tail in ("-wal", "-shm", ""):
            if os.path.exists(f"{store.path}{tail}"):
                os.rename(f"{store.path}{tail}", f"{aside}{tail}")
    except OSError as error:
        raise from_os(f"store {store.path}", error) from error
    return [f"set the empty store aside as {aside}"]


def _written(root: Root, stranger: Stranger) -> float:
    try:
        return os.stat(f"{root.jail_lib(stranger.tenant, stranger.name)}/{CONFIG}").st_mtime
    except OSError:
        return 0.0
