"""The host comes up and goes down: which jails start then, and how all are stopped in order."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby

import msgspec

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.key_checks import parse_bool
from jailmgr.keys import Config
from jailmgr.manager.host import Manager
from jailmgr.manager.reconcile import attempt
from jailmgr.manager.running import running
from jailmgr.manager.start import boot
from jailmgr.model import BUILD_TENANT, Jail, Recipe
from jailmgr.runtime import attach
from jailmgr.runtime.bundle import load_bundle
from jailmgr.runtime.jsonfile import read_json, write_json
from jailmgr.runtime.proc import open_process
from jailmgr.runtime.process import has_ended
from jailmgr.runtime.state import host_boot_id, jails_up, ran, supervisor_process
from jailmgr.store import Store

STARTS_AT_ONCE = 4
SHUTDOWN_SECONDS = 600.0
"""Of all jails together: no jail's keys and no init keep a host from going down."""
LATE_SECONDS = 5.0
"""For a supervisor to kill what is left after that."""
DOWN = "down.json"
"""In the run directory, with the boot's id: since jails were stopped for the host's end, none is started by itself."""


def autostart(m: Manager) -> None:
    """Start the jails that want it, once after each boot of the host: what every first engine does.

    Not one that begins after `shut_down` has cut that off.
    """
    with m.boot_lock:
        boot_id = host_boot_id()
        if m.store.fact("boot_id") != boot_id and _start_wanted(m):
            m.store.set_fact("boot_id", boot_id)


def start_wanted(m: Manager) -> None:
    """The same whenever it is asked for, and returns when all have been started."""
    with suppress(FileNotFoundError):
        os.unlink(f"{m.root.run}/{DOWN}")
    with m.boot_lock:
        if _start_wanted(m):
            m.store.set_fact("boot_id", host_boot_id())


def _start_wanted(m: Manager) -> bool:
    """Those with `boot.autostart`, and where that isn't set those that ran when the host went down; by priority.

    That and the delay are a tenant's own: tenants start side by side, and none waits for what another's jails say.
    False where the engine stops before all have been: the next one goes on. So it is where the host goes down.
    """
    wanted: dict[str, list[Jail]] = {}
    for jail in m.store.jails():
        if _wanted(m.root, jail):
            wanted.setdefault(jail.tenant, []).append(jail)
    if not wanted:
        return True
    at_once = threading.Semaphore(STARTS_AT_ONCE)
    with ThreadPoolExecutor(len(wanted), "autostart") as threads:
        return all([*threads.map(partial(_start_in_order, m, at_once), wanted.values())])


def _start_in_order(m: Manager, at_once: threading.Semaphore, jails: list[Jail]) -> bool:
    for jail in sorted(jails, key=lambda jail: -int(jail.config.get("boot.autostart.priority", 0))):
        if _goes_down(m.root):
            return False
        with at_once:
            attempt(f"starting {jail.name}", partial(_start_if_stopped, m, jail))
        if m.watcher.pause(float(jail.config.get("boot.autostart.delay", 0))):
            return False
    return True


def _goes_down(root: Root) -> bool:
    return (read_json(f"{root.run}/{DOWN}") or {}).get("boot_id") == host_boot_id()


def _wanted(root: Root, jail: Jail) -> bool:
    told = jail.config.get("boot.autostart")
    return ran(root, jail.tenant, jail.name) if told is None else parse_bool(told)


def _start_if_stopped(m: Manager, jail: Jail) -> None:
    with m.jail(jail.tenant, jail.name) as now:
        if not running(m, now):
            boot(m, now)


def shut_down(root: Root) -> list[JailmgrError]:
    """Stop every jail that runs, those of the highest `boot.stop.priority` first and those of one at a time together.

    Those that are about to be started again, too. Tenants side by side, and SHUTDOWN_SECONDS at most: then what is left
    is killed. By their supervisors, with no engine: when a host goes down, none may be started any more. What runs now
    is started again after the boot. Gives what could not be stopped, after which the rest was. Where the store can't be
    read, that is among it, and the jails are stopped as if they had none of the keys above: a host that goes down
    doesn't wait.
    """
    failed: list[JailmgrError] = []
    configs: dict[tuple[str, str], Config] = {}
    try:
        configs = _configs(root)
    except JailmgrError as error:
        failed.append(error)
    try:
        if os.path.isdir(root.run):
            write_json(f"{root.run}/{DOWN}", {"boot_id": host_boot_id()})
    except OSError as error:
        failed.append(from_os(f"{root.run}/{DOWN}", error))
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    if tenants := _tenants(root):
        with ThreadPoolExecutor(len(tenants)) as threads:
            for errors in threads.map(partial(_shut_down_tenant, root, configs, deadline), tenants):
                failed += errors
    return failed


def _shut_down_tenant(
    root: Root, configs: dict[tuple[str, str], Config], deadline: float, tenant: str
) -> list[JailmgrError]:
    failed: list[JailmgrError] = []
    try:
        _replace_if_hung(root, tenant)
    except (JailmgrError, OSError) as error:
        failed.append(error if isinstance(error, JailmgrError) else from_os(f"supervisor of {tenant}", error))
    alive = jails_up(root, tenant)
    order = {jail: -int(configs.get((tenant, jail), {}).get("boot.stop.priority", 0)) for jail in alive}
    for _, together in groupby(sorted(alive, key=order.__getitem__), key=order.__getitem__):
        jails = list(together)
        with ThreadPoolExecutor(len(jails)) as threads:
            ends = [
                threads.submit(_stop, root, tenant, jail, configs.get((tenant, jail), {}), deadline) for jail in jails
            ]
        for jail, end in zip(jails, ends, strict=True):
            try:
                end.result()
            except JailmgrError as error:
                failed.append(error)
            except OSError as error:
                failed.append(from_os(f"jail {tenant}/{jail}", error))
    return failed


def _replace_if_hung(root: Root, tenant: str) -> None:
    """Kill a supervisor that does not answer: its jails live on, and the next one, which adopts them, stops them."""
    hung = supervisor_process(root, tenant)
    if hung is None:
        return
    try:
        attach.connect(root, tenant, start=False).close()
    except JailmgrError as error:
        pidfd = open_process(hung) if error.code == "unavailable" else None
        if pidfd is None:
            raise
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            has_ended(pidfd, LATE_SECONDS)
        finally:
            os.close(pidfd)


def _stop(root: Root, tenant: str, jail: str, config: Config, deadline: float) -> None:
    try:
        stop_timeout = load_bundle(root.jail_lib(tenant, jail)).stop_timeout
    except JailmgrError:
        stop_timeout = Recipe().stop_timeout  # its config.json is damaged, or gone: it is stopped all the same
    timeout = float(config.get("boot.host_shutdown_timeout", stop_timeout))
    with attach.connect(root, tenant) as supervisor:
        try:
            left = max(0.0, deadline - time.monotonic())
            supervisor.stop(jail, min(timeout, left), by="host", grace=min(attach.STOP_GRACE, left + LATE_SECONDS))
        except JailmgrError as error:
            if error.code != "conflict":
                raise


def _configs(root: Root) -> dict[tuple[str, str], Config]:
    if not os.path.exists(root.store):
        return {}
    store = Store(root.store)
    store.open_to_read(quiet=True)
    try:
        return {(jail.tenant, jail.name): jail.config for jail in store.jails()}
    except msgspec.MsgspecError as error:
        raise JailmgrError(f"store {root.store}", f"a jail in it can't be read: {error}") from error
    finally:
        store.close()


def _tenants(root: Root) -> list[str]:
    try:
        return [name for name in os.listdir(f"{root.run}/tenants") if name != BUILD_TENANT]
    except FileNotFoundError:
        return []
