"""Open a root and close it: make the parts work together, finish what a crash left, and watch over the jails."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from jailmgr import claims
from jailmgr.config import Root
from jailmgr.manager import boot, networks
from jailmgr.manager.batches import Batches
from jailmgr.manager.host import Manager
from jailmgr.manager.reconcile import reconcile, take_down
from jailmgr.manager.strangers import refuse_blank_store
from jailmgr.storage.volume import keep_ready

AHEAD_SECONDS = 1.0
"""Without a new jail, before volumes are made ahead: each commits a transaction, for which a `create` waits."""
ENDED_SECONDS = 0.2
"""Without a jail's end, before flows are ended: each look goes through the host's whole table."""


@contextmanager
def opened(root: Root, autostart: bool = True) -> Iterator[Manager]:
    """Open a root, and close it at the end. Raises as `open_manager`."""
    m = Manager(root)
    open_manager(m, autostart)
    try:
        yield m
    finally:
        close_manager(m)


def open_manager(m: Manager, autostart: bool = True) -> None:
    """Open the store, finish or undo what a crash left, find the jails that run and watch over them.

    `autostart`: the first time after a boot of the host, start the jails that want it.
    Raises JailmgrError where the store can't be read, or is gone while its jails are there.
    """
    refuse_blank_store(m.root, m.store)
    for directory in (m.root.lib, m.root.run):
        os.makedirs(directory, mode=0o700, exist_ok=True)
    claims.claim_mark(m.root)
    m.store.open(copy=False)
    try:
        _register(m)
        m.watcher.open()
        reconcile(m)
        m.store.renew_copy()
        m.disk_guard.start()
        _start_batches(m)
        m.accountant.start()
        m.watcher.start()
        if autostart:
            m.autostart = threading.Thread(target=boot.autostart, args=(m,), name="autostart", daemon=True)
            m.autostart.start()
    except BaseException:
        _shut(m)
        raise


def close_manager(m: Manager) -> None:
    """Stop watching. Where no jail runs, all that is ours goes off the host; else it stays. Idempotent."""
    if not m.watcher.is_open:
        return
    _stop(m)
    try:
        take_down(m)
    finally:
        m.store.close()


def _register(m: Manager) -> None:
    """What follows a jail that comes or goes, in this order, and a supervisor that was replaced."""
    m.watcher.on_jail_change = [
        lambda tenant, _: m.supervisors.watch(tenant),
        partial(networks.follow, m),
        m.pins.follow,
    ]
    m.supervisors.on_replaced = [m.lxcfs.again]


def _start_batches(m: Manager) -> None:
    m.ahead = Batches("ahead", AHEAD_SECONDS, partial(_make_ahead, m))
    m.ahead.start()
    m.ended = Batches("ended", ENDED_SECONDS, partial(networks.end_flows_of, m))
    m.ended.start()
    if m.pool_if_open is not None:
        for image in m.store.images():
            m.make_ahead(image.fingerprint)


def _make_ahead(m: Manager, layers: set[str]) -> None:
    if not m.disk_is_full():
        for layer in layers:
            keep_ready(m.pool, [layer])


def _stop(m: Manager) -> None:
    m.watcher.stop()
    if m.autostart is not None:
        m.autostart.join()  # a jail that it starts has lxcfs, and is watched
    m.watcher.close()
    m.supervisors.stop()
    m.disk_guard.stop()
    for batches in (m.ahead, m.ended):
        if batches is not None:
            batches.stop()
    m.ahead = m.ended = None
    m.accountant.stop()


def _shut(m: Manager) -> None:
    try:
        _stop(m)
    finally:
        m.store.close()
