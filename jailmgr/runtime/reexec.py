"""A supervisor becomes that of another release, in place: same pid, the same fds, still the parent of its inits.

    old: snapshot ─▶ memfd ─▶ execve ─▶ new: restore

`protocol.SNAPSHOT` changes where `restore` of the release before could not read it, or would read it wrongly: who asks
compares it first.
Imported when a supervisor begins, since later the files may be another release's. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any

from jailmgr.errors import JailmgrError
from jailmgr.runtime import protocol
from jailmgr.runtime.child import Child
from jailmgr.runtime.console import Watcher
from jailmgr.runtime.jail import Jail
from jailmgr.runtime.session import Session
from jailmgr.runtime.state import State

if TYPE_CHECKING:
    from jailmgr.runtime.supervisor import Supervisor


def steady(supervisor: Supervisor) -> bool:
    """Whether all that goes on can be told in a snapshot: no start, build or copy is half done."""
    return all(not jail.once and not jail.ready_waiters for jail in supervisor.jails.values()) and all(
        session.steady for session in supervisor.sessions
    )


def replace(supervisor: Supervisor, argv: list[str]) -> None:
    """Become `argv` with the memfd's number behind it. Returns only where that can't be executed: OSError then.

    Nothing has changed in that case but that children could see the fds, and there is nobody to fork one.
    """
    content, fds = snapshot(supervisor)
    memfd = os.memfd_create("jailmgr-supervisor")
    try:
        with open(os.dup(memfd), "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.lseek(memfd, 0, os.SEEK_SET)
        for fd in fds:
            os.set_inheritable(fd, True)
        os.set_inheritable(memfd, True)
        os.execve(argv[0], [*argv, str(memfd)], {"PATH": os.defpath, "LC_ALL": "C.UTF-8"})
    finally:
        os.close(memfd)
        for fd in fds:
            os.set_inheritable(fd, False)


def snapshot(supervisor: Supervisor) -> tuple[dict[str, Any], list[int]]:
    """All that the supervisor knows, and the fds that are named in it."""
    jails = {name: _jail(jail) for name, jail in supervisor.jails.items()}
    sessions = [_session(session) for session in supervisor.sessions]
    content = {
        "version": protocol.SNAPSHOT,
        "listener": supervisor.listener.fileno(),
        "lock": supervisor.lock,
        "jails": jails,
        "sessions": sessions,
    }
    fds = [content["listener"], content["lock"], *(session["sock"] for session in sessions)]
    fds += [session["child"]["pidfd"] for session in sessions if session["child"]]
    for jail in jails.values():
        fds += [fd for fd in (jail["pidfd"], jail["console"], jail["notify"]) if fd is not None]
        fds += [watcher["sock"] for watcher in jail["watchers"]]
    return content, fds


def _jail(jail: Jail) -> dict[str, Any]:
    console = jail.console
    return {
        "lib": jail.lib,
        "state": None if jail.state is None else jail.state._asdict(),
        "pidfd": None if jail.state is None else jail.pidfd,
        "ours": jail.ours,
        "stopping": jail.stopping,
        "killed": jail.killed,
        "tries": jail.tries,
        "restarts": jail.restarts,
        "asks": jail.stop_request.number if jail.stop_request is not None and jail.stop_request.pending else None,
        "kill_at": None if jail.kill_timer is None else jail.kill_timer.due,
        "start_at": None if jail.start_timer is None else jail.start_timer.due,
        "notify": None if jail.notify is None else jail.notify.fd,
        "console": None if console is None else console.master,
        "typed": "" if console is None else console.typed.decode("latin-1"),
        "watchers": [] if console is None else [_watcher(watcher) for watcher in console.watchers],
    }


def _watcher(watcher: Watcher) -> dict[str, Any]:
    pending = watcher.pending.decode("latin-1")
    return {"sock": watcher.sock.fileno(), "typed": watcher.typed, "pending": pending}


def _session(session: Session) -> dict[str, Any]:
    child, shows = session.child, session.console_of
    return {
        "sock": session.sock.fileno(),
        "shows": "" if shows is None else shows.name,
        "stops": session.stops,
        "admitted": session.admitted,
        "used": session.used,
        "child": None if child is None else {"pidfd": child.pidfd, "signalled": child.signalled},
    }


def load(memfd: int) -> dict[str, Any]:
    """The snapshot, every fd in it close-on-exec again. JailmgrError `invalid` where it is none we can read."""
    with open(memfd, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict) or content.get("version") not in protocol.SNAPSHOTS:
        raise JailmgrError("supervisor", "the one before has left a state that this one can't read", "", "invalid")
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                fcntl.fcntl(int(name), fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            except OSError:
                continue  # that of the listing itself
    return content


def restore(supervisor: Supervisor, content: dict[str, Any]) -> None:
    """Take up what `snapshot` has told."""
    jails = supervisor.jails
    for name, told in content["jails"].items():
        try:
            jails[name] = Jail(supervisor.host, name, told["lib"])
        except JailmgrError:
            # Its config.json is damaged: `adopt_late` takes it once an engine has written that again.
            sys.excepthook(*sys.exc_info())
            sockets = [watcher["sock"] for watcher in told["watchers"]]
            protocol.close_all(
                [fd for fd in (told["pidfd"], told["console"], told["notify"], *sockets) if fd is not None]
            )
            continue
        _restore_jail(jails[name], told)
    for told in content["sessions"]:
        session = supervisor.add_session(socket.socket(fileno=told["sock"]))
        if told.get("admitted"):
            session.admit(told["admitted"], told["used"])
        session.console_of = jails.get(told["shows"])
        if told["child"]:
            session.child = Child.of_program(session, told["child"]["pidfd"], told["child"]["signalled"])
        if told["stops"] in jails:
            session.wait_for_end(jails[told["stops"]])
        elif told["stops"]:
            session.close()


def _restore_jail(jail: Jail, told: dict[str, Any]) -> None:
    jail.stopping, jail.killed, jail.tries = told["stopping"], told["killed"], told["tries"]
    if told["start_at"] is not None:
        jail.start_after(max(0.0, told["start_at"] - monotonic()), told["restarts"])
    if told["state"] is None:
        return
    jail.take_over(State(**told["state"]), told["pidfd"], told["ours"], told["console"], told["notify"])
    if told.get("asks") is not None:
        jail.ask(told["asks"])
    if told["kill_at"] is not None:
        jail.kill_after(max(0.0, told["kill_at"] - monotonic()))
    if jail.console is not None:
        jail.console.typed += told["typed"].encode("latin-1")
        for each in told["watchers"]:
            watcher = Watcher(socket.socket(fileno=each["sock"]), each["typed"])
            watcher.pending += each["pending"].encode("latin-1")
            jail.console.add(watcher)
