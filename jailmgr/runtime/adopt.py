"""A new supervisor takes over what the last one left: running jails by pidfd, dead ones by cleaning up after them, and
those that were about to be started again by starting them.
"""

from __future__ import annotations

import os
import socket
import sys
from time import time

from jailmgr.errors import JailmgrError
from jailmgr.runtime import enter, protocol
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.host import Host
from jailmgr.runtime.jail import Jail
from jailmgr.runtime.jsonfile import write_json
from jailmgr.runtime.proc import Process, open_process
from jailmgr.runtime.pty import check_master, open_pty
from jailmgr.runtime.state import LAST, WAITS, State, load_state, load_wait, remove_state, remove_wait, set_runs

CONSOLE_SECONDS = 5.0


def adopt_all(host: Host, jails: dict[str, Jail]) -> None:
    """Take over every jail with a file in the tenant's runtime directory.

    One that has both was about to be started when its supervisor died, or had just been: how far that came tells.
    """
    entries = os.listdir(host.run)
    for ending, take in ((".json", _adopt), (WAITS, _adopt_waiting)):
        for name in [entry.removesuffix(ending) for entry in entries if entry.endswith(ending)]:
            try:
                take(host, jails, name)
            except (JailmgrError, OSError):
                # One jail's trouble (at its limit of processes, say) must not leave the tenant without a supervisor.
                sys.excepthook(*sys.exc_info())


def adopt_late(host: Host, jails: dict[str, Jail], name: str) -> None:
    """Take over a running jail that `adopt_all` left alone for its config.json, which an engine may have written again.

    Raises JailmgrError, OSError.
    """
    if name not in jails and os.path.exists(f"{host.run}/{name}.json"):
        _adopt(host, jails, name)


def _adopt(host: Host, jails: dict[str, Jail], name: str) -> None:
    state = load_state(host.run, name)
    if state is None:
        print(
            f"jail {host.full_name(name)}: {host.run}/{name}.json is of another release, or broken: left alone",
            file=sys.stderr,
        )
        return
    try:
        jail = Jail(host, name, state.lib)
    except JailmgrError as error:
        _forget(host, name, state, error)
        return
    jail.bundle = jail.bundle._replace(cgroup=state.cgroup)
    if state.once:
        jail.clear()
        return
    pidfd = open_process(Process(state.pid, state.starttime)) if state.boot_id == host.boot_id else None
    if pidfd is None:
        write_json(f"{state.lib}/{LAST}", {"kind": "unknown", "at": time(), "by": "host", "status": 0})
        if state.boot_id == host.boot_id:
            jail.note_run(state, seen=False)
            waits = load_wait(host.run, name)
            if jail.bundle.restart == "no" and waits is None:
                set_runs(state.lib, False)
            else:
                jails[name] = jail
                jail.tries = waits.tries if waits is not None else 0
                jail.start_later(state.restarts + 1)
        jail.clear()
        return
    jails[name] = jail
    jail.adopt(state, pidfd)
    if jail.bundle.terminal:
        _give_console(host, jail)


def _forget(host: Host, name: str, state: State, error: JailmgrError) -> None:
    """A state file whose jail has no config.json of its own any more: it goes once its process has ended."""
    pidfd = open_process(Process(state.pid, state.starttime)) if state.boot_id == host.boot_id else None
    if pidfd is None:
        remove_state(host.run, name)
        return
    os.close(pidfd)
    why = f"process {state.pid} runs, and is left alone: {error}"
    print(f"jail {host.full_name(name)}: {why}", file=sys.stderr)


def _adopt_waiting(host: Host, jails: dict[str, Jail], name: str) -> None:
    wait = load_wait(host.run, name)
    if name in jails:
        if jails[name].running:
            remove_wait(host.run, name)
        return
    try:
        jail = Jail(host, name, wait.lib) if wait is not None and wait.boot_id == host.boot_id else None
    except JailmgrError:
        jail = None  # its directory is gone, or no jail of today's
    if jail is None or wait is None:
        remove_wait(host.run, name)
        return
    jails[name] = jail
    jail.tries = wait.tries
    jail.start_later(wait.restarts)


def _give_console(host: Host, jail: Jail) -> None:
    """A child inside makes the pty and puts it on /dev/console; what the guest does to it there harms nobody else."""
    enterer, control = enter.enter(jail.pidfd, jail.bundle, host.hierarchies, [], _replace_console)
    watch = os.pidfd_open(enterer)
    program = -1

    def heard() -> bool:
        nonlocal program
        try:
            said = protocol.receive(control)
        except (OSError, ValueError):
            return False
        if said is None:
            host.loop.forget(control.fileno())
            return False
        if "error" in said.body:
            jail.log.note(f"no new console: {said.body['error'].get('why')}")
        if "pid" in said.body and program < 0:
            try:
                program = os.pidfd_open(said.body["pid"])
            except ProcessLookupError:
                return True  # it has ended, and was reaped
            host.loop.watch(program, lambda _: done(program))
        if said.fds:
            try:
                check_master(said.fds[0])
            except JailmgrError:
                protocol.close_all(said.fds)
                return True
            jail.adopt_console(said.fds.pop(0))
            protocol.close_all(said.fds)
        return True

    def done(pidfd: int) -> None:
        while heard():
            pass
        host.loop.forget(pidfd)
        os.close(pidfd)
        host.reaper.look()

    def ready(_: int) -> None:
        heard()

    host.loop.watch(control.fileno(), ready)
    host.loop.watch(watch, lambda _: done(watch))


def _replace_console(sock: socket.socket, _proc: int) -> None:
    """Mounts as init did before its exec, and execs nothing: it stays out of the jail's profile as that did."""
    pty = open_pty("/dev/ptmx")
    try:
        kernel.umount("/dev/console", kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
    except OSError:
        pass
    slave = kernel.open_tree(f"/dev/pts/{pty.number}")
    target = os.open("/dev/console", os.O_PATH | os.O_NOFOLLOW | os.O_CREAT | os.O_CLOEXEC, 0o600)
    kernel.move_mount(slave, target)
    protocol.send(sock, {}, [pty.master])
