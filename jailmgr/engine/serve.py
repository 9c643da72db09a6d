"""From an open manager to a served socket, and back down again when a signal asks for it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from jailmgr.config import Root
from jailmgr.engine import systemd
from jailmgr.engine.app import make_app
from jailmgr.engine.background import Operations
from jailmgr.engine.door import Door
from jailmgr.engine.protocol import Server
from jailmgr.engine.requests import Engine
from jailmgr.manager.access import is_shared
from jailmgr.manager.host import Manager
from jailmgr.manager.opening import opened

GRACE_SECONDS = 30.0
"""What running operations get when the engine is told to stop; the next start mends what a cut one left."""
REQUEST_SECONDS = 5.0
"""The same for a request that is in the manager."""
THREADS = 32
"""Requests that may be in the manager at a time, some of them waiting for a jail's lock."""

ROOT_LOOK_SECONDS = 1.0
"""Between two looks at whether the root is still there."""

log = logging.getLogger(__name__)


def serve(root: Root, serves: Callable[[], None], given: Mapping[str, socket.socket] | None = None) -> None:
    """Open the manager, call `serves` once requests are answered, return after a signal when all is put away.

    `given`: sockets that others made and keep (systemd.take_sockets); else they are made. The caller holds
    `engine.lock`. Raises JailmgrError where the manager can't be opened.
    """
    with opened(root) as manager:
        if not asyncio.run(_serve(root, manager, serves, given or {})):
            # Their threads would keep the process from ending, and what they work on is no longer to be touched.
            log.warning(
                "operations still run %.0f s after the signal: the next engine mends what they leave", GRACE_SECONDS
            )
            os._exit(0)
    log.info("engine ended")


async def _serve(root: Root, manager: Manager, serves: Callable[[], None], given: Mapping[str, socket.socket]) -> bool:
    """True when nobody works with the manager any more."""
    listening = given.get(systemd.ENGINE)
    threads = ThreadPoolExecutor(THREADS, "request")
    operations = Operations()
    door = Door(root, manager)
    door.give({name: sock for name, sock in given.items() if name != systemd.ENGINE})
    door.app = make_app(Engine(root, manager, operations, threads, time.time(), door))
    server = Server(door.app, serves)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)

    await door.settle(is_shared(manager))
    serving = asyncio.create_task(server.serve([listening or listen(root)]))
    stopped = asyncio.create_task(stop.wait())
    watching = asyncio.create_task(_stop_without_root(root, stop))
    log.info("engine serves %s, pid %d", root.socket, os.getpid())
    await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
    log.info("engine stops")
    watching.cancel()
    # Who has connected by now is still served; who finds no socket starts the next engine, which waits for our lock.
    if listening is None:
        with suppress(FileNotFoundError):
            os.unlink(root.socket)
    idle = await operations.close(GRACE_SECONDS)
    await door.close()
    server.leave.set()
    await serving

    def shut() -> None:
        threads.shutdown(cancel_futures=True)
        door.shares.threads.shutdown(cancel_futures=True)

    closing = threading.Thread(target=shut, daemon=True)
    closing.start()
    closing.join(REQUEST_SECONDS)
    return idle and not closing.is_alive()


async def _stop_without_root(root: Root, stop: asyncio.Event) -> None:
    """Set `stop` when the root's run directory, or our lock in it, has been removed: no command finds us any more."""
    lock = f"{root.run}/engine.lock"
    ours = os.stat(lock).st_ino
    while True:
        await asyncio.sleep(ROOT_LOOK_SECONDS)
        try:
            there = os.stat(lock).st_ino == ours
        except OSError:
            there = False
        if not there:
            log.warning("%s has been removed: the engine ends", lock)
            stop.set()
            return


def listen(root: Root) -> socket.socket:
    """The engine's socket, mode 0600, in place of one that a killed engine left. asyncio listens on it."""
    with suppress(FileNotFoundError):
        os.unlink(root.socket)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(root.socket)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock
