"""The other side of the supervisor's socket: find or start a tenant's supervisor, ask it for things.

Used by the engine (start, stop, builds) and, for the local root, by the CLI itself (exec, console, cp).
"""

from __future__ import annotations

import os
import sys

from jailmgr.errors import JailmgrError, from_dict, full_name
from jailmgr.runtime import compact_json, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import Any

    from jailmgr.config import Root

_STARTING = "supervisor.starting"
_SCOPE_STARTING = "scope.starting"
_TRIES = 3
ANSWER_SECONDS = 10.0
"""For what a supervisor answers at once. One that hangs must not keep the engine from serving other tenants."""
_SPAWN = """
import sys
sys.path.insert(0, sys.argv[1])
from jailmgr.runtime.supervisor import main
main(sys.argv[2], int(sys.argv[3]), sys.argv[4])
"""
_RESUME = """
import sys
sys.path.insert(0, sys.argv[1])
from jailmgr.runtime.supervisor import resume
resume(sys.argv[2], int(sys.argv[3]))
"""


STOP_GRACE = 20.0
"""For a supervisor to answer after the time that a jail has to stop: it kills the jail then (jail.KILL_SECONDS)."""


class Supervisor:
    """A connection to a tenant's supervisor. While one is open, the supervisor stays, with or without jails."""

    def __init__(self, root: Root, tenant: str, sock: _socket.socket) -> None:
        self._root = root
        self._tenant = tenant
        self.sock = sock
        self.admitted = False
        """By the engine, for a user: there is a relay in between, which passes no fds of ours on."""

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def ask(
        self, operation: str, fds: list[int] | None = None, within: float | None = None, **values: Any
    ) -> protocol.Message:
        """Send a request and wait for its (first) answer. Raises JailmgrError with what the supervisor says.

        `within`: seconds it has for that; JailmgrError `unavailable` then, and the connection is of no more use.
        """
        if within is not None:
            self.sock.settimeout(within)
        try:
            self.tell(operation, fds, **values)
            return self.hear()
        finally:
            if within is not None:
                self.sock.settimeout(None)

    def tell(self, operation: str, fds: list[int] | None = None, **values: Any) -> None:
        try:
            protocol.send(self.sock, {"v": protocol.VERSION, "op": operation, **values}, fds)
        except OSError as error:
            raise self._lost() from error

    def hear_any(self) -> protocol.Message:
        """The next message, an error or not."""
        try:
            said = protocol.receive(self.sock)
        except TimeoutError as error:
            raise silent(self._tenant) from error
        except (OSError, ValueError) as error:
            raise self._lost() from error
        if said is None:
            raise self._lost()
        return said

    def hear(self) -> protocol.Message:
        """The next answer; an error is raised."""
        said = self.hear_any()
        if "error" in said.body:
            protocol.close_all(said.fds)
            raise from_dict(said.body["error"])
        return said

    def status(self) -> dict[str, Any]:
        """{"pid": N, "jails": {NAME: state.State as a dict}}."""
        return self.ask("status").body

    def start(self, jail: str, wait: bool = False, timeout: float = 120.0) -> dict[str, Any]:
        """Start a jail whose config.json is in place: its state. With `wait`, when its init says that it is up."""
        lib = self._root.jail_lib(self._tenant, jail)
        state: dict[str, Any] = self.ask("start", jail=jail, lib=lib, wait=wait, timeout=timeout).body["state"]
        return state

    def stop(
        self,
        jail: str,
        timeout: float = 30.0,
        force: bool = False,
        signal: str = "",
        by: str = "admin",
        grace: float = STOP_GRACE,
    ) -> dict[str, Any]:
        """Stop a jail, and wait until nothing of it is left: how it ended (model.Ending).

        `signal`: the bundle's when empty. After `timeout` seconds, or at once with `force`, it is killed.
        `by`: `admin`, or `host`: it is to run again when that is up again. `grace`: seconds the supervisor has to
        answer after that. Raises JailmgrError: `failed` where the jail outlives SIGKILL, `unavailable` where the
        supervisor does not answer.
        """
        within = (0.0 if force else timeout) + grace
        asked = self.ask("stop", within=within, jail=jail, signal=signal, timeout=timeout, force=force, by=by)
        last: dict[str, Any] = asked.body["last"]
        return last

    def _lost(self) -> JailmgrError:
        return JailmgrError(
            f"supervisor of {self._tenant}", "the connection broke", "Its jails run on; try again.", "unavailable"
        )


def connect(root: Root, tenant: str, start: bool = True) -> Supervisor:
    """Connect to the tenant's supervisor; with `start`, start one when there is none.

    Raises JailmgrError `unavailable`. A supervisor that is started adopts the jails that run.
    """
    run = root.tenant_run(tenant)
    for _ in range(_TRIES):
        sock = _try(run)
        if sock is not None:
            return Supervisor(root, tenant, sock)
        if not start:
            break
        import fcntl

        os.makedirs(run, 0o700, exist_ok=True)
        with open(f"{run}/{_STARTING}", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sock = _try(run)
            if sock is not None:
                return Supervisor(root, tenant, sock)
            from jailmgr.runtime.orphans import end_orphans

            end_orphans(run)
            _start(root, run)
            sock = _try(run)
            if sock is not None:
                return Supervisor(root, tenant, sock)
    raise silent(tenant)


def silent(tenant: str) -> JailmgrError:
    """The error of a supervisor that hangs, or that there is none of."""
    hint = "See supervisor.log in its directory. Killing it stops no jail: another one takes them over."
    return JailmgrError(f"supervisor of {tenant}", "does not answer", hint, "unavailable")


def connect_user(root: Root, tenant: str, jail: str) -> Supervisor:
    """For users who are not root: the engine has the jail's supervisor talk to them, about this jail only."""
    try:
        sock = protocol.connect(root.users, protocol.SESSIONS)
    except OSError:
        raise JailmgrError("jailmgr", "only root may do this", "Run it with sudo.", "denied") from None
    supervisor = Supervisor(root, tenant, sock)
    supervisor.admitted = True
    try:
        protocol.send(sock, {"v": protocol.VERSION, "tenant": tenant, "jail": jail})
    except OSError:
        raise JailmgrError("session", "it was refused", "Close some others.", "unavailable") from None
    supervisor.hear()
    return supervisor


def connect_running(root: Root, tenant: str, jail: str) -> Supervisor:
    """For `exec` and its like: the supervisor of a jail that runs, started anew when it was killed."""
    if os.geteuid() != 0:
        return connect_user(root, tenant, jail)
    sock = _try(root.tenant_run(tenant))
    if sock is not None:
        return Supervisor(root, tenant, sock)
    from jailmgr.runtime.state import running_jails

    if jail not in running_jails(root, tenant):
        raise JailmgrError(
            f"jail {full_name(tenant, jail)}",
            "is not running",
            f"Start it: jailmgr start {full_name(tenant, jail)}",
            "conflict",
        )
    return connect(root, tenant)


def _try(run: str) -> _socket.socket | None:
    """Connect and hear a word: one that is just ending takes connections it will never answer."""
    try:
        sock = protocol.connect(run, protocol.SOCKET, ANSWER_SECONDS)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except BlockingIOError:
        raise silent(os.path.basename(run)) from None
    if not protocol.listener_lives(sock):
        sock.close()
        return None
    try:
        sock.settimeout(ANSWER_SECONDS)
        protocol.send(sock, {"v": protocol.VERSION, "op": "hello"})
        said = protocol.receive(sock)
        if said is not None:
            _check_version(said.body, run)
            sock.settimeout(None)
            return sock
    except TimeoutError:
        raise silent(os.path.basename(run)) from None
    except (ConnectionResetError, BrokenPipeError):
        pass
    sock.close()
    return None


def _check_version(hello: dict[str, Any], run: str) -> None:
    if hello.get("v") != protocol.VERSION:
        why = f"it speaks version {hello.get('v')} of the protocol, this jailmgr {protocol.VERSION}"
        hint = "Start the engine anew (jailmgr engine stop): it has supervisors go over to its release. Jails run on."
        raise JailmgrError(f"supervisor of {os.path.basename(run)}", why, hint, "unavailable")


def _start(root: Root, run: str) -> None:
    """A supervisor of its own session. With systemd one at a time: the first makes the scope, and the others enter it.

    A scope may end between a look at it and the next step, or its name not be free for a moment: that shows as an
    error of systemd's, and then there is another one to make.
    """
    from jailmgr.runtime.cgroup_hierarchies import SYSTEMD

    if not SYSTEMD:
        _begin(root, run)
        return
    import fcntl

    with open(f"{root.run}/{_SCOPE_STARTING}", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in reversed(range(_TRIES)):
            try:
                _begin(root, run)
                return
            except JailmgrError as error:
                if error.code != "unavailable" or not left:
                    raise


def _begin(root: Root, run: str) -> None:
    """It has nothing of ours but the pipe on which it says that it listens."""
    from jailmgr.runtime import scope

    ear, mouth = os.pipe()
    try:
        os.set_inheritable(mouth, True)
        group = scope.directory(root.cgroup)
        argv = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _SPAWN, package(), run, str(mouth), group]
        if group:
            argv = scope.begin(root.cgroup, argv)
        pid = os.posix_spawn(argv[0], argv, {"PATH": os.defpath, "LC_ALL": "C.UTF-8"})
    finally:
        os.close(mouth)
    try:
        os.waitpid(pid, 0)
        with open(ear, "rb") as pipe:
            said = pipe.readline()
    except OSError as error:
        raise JailmgrError("supervisor", str(error), "", "unavailable") from error
    if said.strip():
        raise from_dict(compact_json.loads(said))
    if not said:
        raise JailmgrError("supervisor", "ended while it started", f"See {run}/supervisor.log.", "unavailable")


def package() -> str:
    import jailmgr

    return os.path.dirname(os.path.dirname(os.path.abspath(jailmgr.__file__)))


def successor(root: Root, tenant: str) -> list[str]:
    """The command line of a supervisor of this release that goes on in the process of another (runtime/reexec.py).

    It gets the number of a memfd as its last word; with -1 it only sees that it could.
    """
    return [sys.executable, "-I", "-S", "-X", "utf8", "-c", _RESUME, package(), root.tenant_run(tenant)]


def run_once(root: Root, tenant: str, jail: str, output: Callable[[bytes], None]) -> int:
    """Run a jail whose init is a program (a build) to its end; what it writes goes to `output`. Its exit status.

    Its config.json is in place and has no terminal. Raises JailmgrError where the program could not be started or
    didn't exit by itself.
    """
    ear, mouth = os.pipe()
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    with open(ear, "rb", buffering=0) as pipe, connect(root, tenant) as supervisor:
        try:
            supervisor.tell("run", [null, mouth, mouth], jail=jail, lib=root.jail_lib(tenant, jail))
        finally:
            os.close(mouth)
            os.close(null)
        while chunk := pipe.read(65536):
            output(chunk)
        last = supervisor.hear().body["last"]
    if last["kind"] != "exit":
        why = "ran out of memory" if last["kind"] == "oom" else f"ended by {last['kind']} {last.get('status') or ''}"
        raise JailmgrError(f"build {jail}", why.strip())
    return int(last["status"])
