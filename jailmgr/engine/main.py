"""The engine's process: `python -m jailmgr.engine.main`, or `jailmgr engine run` in the foreground.

Two locks (flock(2)) lie in the run directory. `engine.starting` is held by whoever starts an engine until it serves:
a command, or a foreground engine itself. `engine.lock` is held by the engine for life.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress

from jailmgr import __version__
from jailmgr.config import Root, find_root
from jailmgr.engine import systemd
from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime.standard_fds import open_closed

READY_FD = "JAILMGR_READY_FD"
"""Environment variable: the descriptor on which a background engine tells, in a line of JSON, that it serves
({"ready": true, "pid": …}), or the error it failed with (JailmgrError.as_dict)."""
M_ARENA_MAX = -8
"""malloc.h"""
PREDECESSOR_SECONDS = 60.0
"""How long an engine that is ending may take."""


def main() -> int:
    """The process that a command or systemd starts; its exit status."""
    open_closed()
    ready, given, told = _ready_fd(), systemd.take_sockets(), systemd.take_notify()
    try:
        run(find_root(), ready, given, told)
    except JailmgrError as error:
        print(f"Error: {error}\nHint: {error.hint}" if error.hint else f"Error: {error}", file=sys.stderr)
        _tell(ready, error.as_dict())
        if systemd.ENGINE in given:
            _refuse(given[systemd.ENGINE], error)
        return 1
    return 0


def run(root: Root, ready: int | None = None, given: Mapping[str, socket.socket] | None = None, told: str = "") -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP.

    `ready`: see READY_FD; with it the log goes to run/engine.log, without it to stderr. `given` are the sockets to
    serve, and `told` where to say that we do, where systemd gave them to us. Raises JailmgrError: `denied` where we
    aren't root, `conflict` where another engine serves this root, or what the manager can't start with.
    """
    if os.geteuid() != 0:
        raise JailmgrError("engine", "it makes namespaces and mounts, which only root may", "Run it as root.", "denied")
    os.umask(0o022)
    with ExitStack() as held, ExitStack() as starting:
        try:
            os.makedirs(root.run, mode=0o700, exist_ok=True)
            if ready is None:
                fcntl.flock(_open_lock(f"{root.run}/engine.starting", starting), fcntl.LOCK_EX)
            _become_the_one(root, held, alone=systemd.ENGINE in (given or {}))
            _raise_descriptor_limit()
            _share_one_heap()
        except OSError as error:
            raise from_os("starting the engine", error) from error

        # Imported late: a second engine is refused before it costs anything.
        from jailmgr.engine.logfile import log_to
        from jailmgr.engine.serve import serve

        log_to(f"{root.run}/engine.log" if ready is not None else None)

        def serves() -> None:
            _describe(root, held)
            _tell(ready, {"ready": True, "pid": os.getpid()})
            systemd.notify(told, "READY=1")
            starting.close()

        serve(root, serves, given)


def _become_the_one(root: Root, held: ExitStack, alone: bool) -> None:
    """Take `engine.lock`, put our pid into it. One that is ending is waited for, one that serves is `conflict`.

    `alone`: who answers at the socket is nobody but us.
    """
    lock = _open_lock(f"{root.run}/engine.lock", held)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _wait_for_lock(root, lock, alone)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def _wait_for_lock(root: Root, lock: int, alone: bool) -> None:
    taken = threading.Event()

    def take() -> None:
        fcntl.flock(lock, fcntl.LOCK_EX)
        taken.set()

    deadline = time.monotonic() + PREDECESSOR_SECONDS
    threading.Thread(target=take, daemon=True).start()
    pause = 0.05
    while not taken.wait(pause):
        pause = 1.0
        pid = os.pread(lock, 20, 0).decode(errors="replace") or "?"
        if not alone and _answers(root):
            raise JailmgrError(
                f"engine at {root.socket}",
                f"another engine (pid {pid}) serves it",
                "End that one first (jailmgr engine stop), or give this one another JAILMGR_ROOT.",
                "conflict",
            )
        if time.monotonic() > deadline:
            raise JailmgrError(
                f"engine at {root.socket}",
                f"another engine (pid {pid}) neither serves it nor ends",
                f"See {root.run}/engine.log. Killing it (kill -9 {pid}) stops no jail.",
                "conflict",
            )


def _answers(root: Root) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(root.socket)
        except OSError:
            return False
    return True


def _open_lock(path: str, held: ExitStack) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    held.callback(os.close, lock)
    return lock


def _raise_descriptor_limit() -> None:
    """As far as allowed: pidfds and connections come out of one budget, whose default (1024) is select(2)'s."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _share_one_heap() -> None:
    """One malloc arena for all threads (mallopt(3)): with one for each, 40 jails started at once left 18 MiB behind."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def _describe(root: Root, held: ExitStack) -> None:
    """run/engine.json: who serves, for whoever looks without asking."""
    path = f"{root.run}/engine.json"
    content = {"pid": os.getpid(), "version": __version__, "started_at": time.time()}
    with open(f"{path}.new", "w") as file:
        json.dump(content, file)
    os.replace(f"{path}.new", path)
    held.callback(_remove, path)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):  # the root may have been removed
        os.unlink(path)


def _refuse(listening: socket.socket, error: JailmgrError) -> None:
    """Answer who waits at the socket with why there is no engine; systemd would let them wait, and start us again."""
    from jailmgr.engine.answers import error_content

    body = json.dumps(error_content(error)).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    listening.setblocking(False)
    while True:
        try:
            waiting, _ = listening.accept()
        except BlockingIOError:
            return
        with waiting:
            waiting.settimeout(1.0)
            try:
                waiting.recv(65536)
                waiting.sendall(head.encode() + body)
            except OSError:
                continue


def _ready_fd() -> int | None:
    """READY_FD's descriptor, kept from our own children."""
    told = os.environ.pop(READY_FD, "")
    if not told.isdecimal():
        return None
    os.set_inheritable(int(told), False)
    return int(told)


def _tell(ready: int | None, content: Mapping[str, object]) -> None:
    """Say it to who started us and hang up; they may have gone, which is no concern of ours."""
    if ready is None:
        return
    try:
        os.write(ready, json.dumps(content).encode() + b"\n")
        os.close(ready)
    except OSError:
        return


if __name__ == "__main__":
    sys.exit(main())
