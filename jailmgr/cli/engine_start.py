"""Starting the engine where none runs: by its socket unit where systemd has that, else as a daemon of our own.

On a host with systemd it is never a part of the login session of who came first, with which it would end: such a daemon
begins in a scope of its own (systemd-run(1)).
"""

from __future__ import annotations

import os
import sys

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_dict
from jailmgr.runtime import compact_json, scope
from jailmgr.runtime.cgroup_hierarchies import SYSTEMD

START_WITHIN = 120.0
"""Seconds a new engine has until it serves: it first mends what a crash left."""
SOCKET_UNIT = "jailmgr.socket"
NO_SUCH_UNIT = 5
"""systemctl's exit status (LSB's "program is not installed")."""

_ENGINE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from jailmgr.engine.main import main; sys.exit(main())"


def start_engine(root: Root) -> None:
    """Have an engine that answers at its socket, or will. The caller holds `engine.starting`.

    Raises the JailmgrError with which it failed to start.
    """
    if root.at or not _start_socket():
        _start_daemon(root)


def _start_socket() -> bool:
    """Have systemd listen in the engine's stead; False on a host without it, or where it has no such unit."""
    if not SYSTEMD:
        return False
    # `start` would do nothing where the unit is active and another engine has taken its socket's file away.
    argv = ["systemctl", "--quiet", "restart", SOCKET_UNIT]
    null = [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
    try:
        pid = os.posix_spawnp(argv[0], argv, {"PATH": os.defpath}, file_actions=null)
    except FileNotFoundError:
        return False
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status in (0, NO_SUCH_UNIT):
        return status == 0
    why = f"systemd does not start {SOCKET_UNIT} (systemctl ended with status {status})"
    raise JailmgrError("starting the engine", why, f"See: systemctl status {SOCKET_UNIT}", "unavailable")


def engine_environment(root: Root) -> dict[str, str]:
    """The environment of an engine for `root`: the caller's, with the root it is to serve."""
    environment = {key: value for key, value in os.environ.items() if key not in ("JAILMGR_ROOT", "JAILMGR_TENANT")}
    if root.at:
        environment["JAILMGR_ROOT"] = root.at
    environment.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return environment


def engine_argv() -> list[str]:
    """The engine's own process: without Typer, and deaf to the current directory and PYTHON* variables (-I)."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [sys.executable, "-I", "-c", _ENGINE, package]


def _start_daemon(root: Root) -> None:
    """Start an engine in a session of its own and return when it serves (it writes to JAILMGR_READY_FD)."""
    ready, told = os.pipe()
    environment = engine_environment(root) | {"JAILMGR_READY_FD": str(told)}
    log = os.open(f"{root.run}/engine.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        child = os.fork()
        if child == 0:
            _become_engine(environment, log, told)
        os.close(told)
        answer = _read_ready(root, ready)
    finally:
        os.close(ready)
        os.close(log)
    if not answer:
        raise JailmgrError(
            "starting the engine", _last_line(f"{root.run}/engine.log"), f"See {root.run}/engine.log.", "unavailable"
        )
    if answer.lstrip().startswith(b"{"):
        failure = compact_json.loads(answer)
        if failure.get("what"):
            raise from_dict(failure)


def _become_engine(environment: dict[str, str], log: int, told: int) -> None:
    """In the forked child: never returns."""
    import signal

    try:
        os.setsid()
        os.chdir("/")
        os.umask(0o022)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.set_inheritable(told, True)
        os.closerange(3, told)
        os.closerange(told + 1, os.sysconf("SC_OPEN_MAX"))
        argv = scope.begin_apart("Engine of jailmgr", engine_argv())
        os.execve(argv[0], argv, environment)
    finally:
        os._exit(127)


def _read_ready(root: Root, ready: int) -> bytes:
    """The line that the engine writes when it serves or has failed; nothing where it died."""
    import select
    import time

    deadline, answer = time.monotonic() + START_WITHIN, b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([ready], [], [], left)[0]:
            raise JailmgrError(
                "starting the engine",
                f"it was not ready within {START_WITHIN:.0f} s",
                f"See {root.run}/engine.log.",
                "unavailable",
            )
        part = os.read(ready, 65536)
        answer += part
        if not part or b"\n" in part:
            return answer


def _last_line(path: str) -> str:
    """The last line of a log, for an error's sake."""
    with open(path, "rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a word"
