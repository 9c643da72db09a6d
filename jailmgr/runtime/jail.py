"""One jail in its supervisor: started, watched, stopped, started again; and what is told when it ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import time
from typing import Any

from jailmgr.errors import JailmgrError
from jailmgr.runtime import cgroups, devices, fuse, netlink, process, protocol, spawn, stop_signal, volume_format
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.bundle import CONFIG, Bundle, load_bundle
from jailmgr.runtime.console import Console, Log, Watcher
from jailmgr.runtime.ending import ending
from jailmgr.runtime.host import Host
from jailmgr.runtime.jail_notes import Notes
from jailmgr.runtime.loop import Timer
from jailmgr.runtime.notify import Notify
from jailmgr.runtime.proc import start_time
from jailmgr.runtime.reaper import Exit
from jailmgr.runtime.state import (
    State,
    Wait,
    remove_state,
    write_state,
)

STUCK = "stuck"
"""Kind of the answer to a stop that could not be carried out."""
BACKOFF = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
KILL_SECONDS = 10.0
"""From SIGKILL to an answer for those who wait, though the jail has not ended."""
FUSE_SECONDS = 1.0
"""Between two looks for FUSE connections of a jail that has been killed."""
THAW_SECONDS, CLEAR_SECONDS = 1.0, 2.0
"""For what usually takes no time, and while which the tenant's other jails wait."""
REAP_SECONDS = 2.0
STEADY_SECONDS = 60.0
"""A jail that ran that long begins its back-off anew."""


class Jail:
    """A jail that runs, is about to be started again, or has just ended.

    `waiters` are called with the JSON of how it ended, once; `ready_waiters` when its init says that it is up.
    """

    def __init__(self, host: Host, name: str, lib: str) -> None:
        self.host = host
        self.name = name
        self.lib = lib
        self.bundle: Bundle = self._load()
        self.log = Log(lib)
        self.notes = Notes(name, host.run, lib, self.log)
        self.state: State | None = None
        self.pidfd = -1
        self._netns = -1
        """Held while it runs: with init the kernel would take the interface away, and what that has counted."""
        self.console: Console | None = None
        self.waiters: list[Callable[[dict[str, Any]], None]] = []
        self.ready_waiters: list[Callable[[], None]] = []
        self._visit: spawn.Spawned | None = None
        self.notify: Notify | None = None
        self.ours = False
        self.stopping = ""
        self.once = False
        """Runs for a client, with its pipes (state.State): a reboot ends it, and nobody starts it again."""
        self.killed = False
        self.timed_out = False
        """Killed since init has not ended in the time that a stop gave it."""
        self._reaped = False
        self._reap_timer: Timer | None = None
        self.kill_timer: Timer | None = None
        self.stop_request: stop_signal.Request | None = None
        self.start_timer: Timer | None = None
        self.tries = 0
        self.restarts = 0
        """Of the start that `start_timer` is for."""

    @property
    def running(self) -> bool:
        return self.state is not None

    @property
    def alive(self) -> bool:
        """Running, or on its way there again."""
        return self.running or self.start_timer is not None

    def _load(self) -> Bundle:
        """The bundle on disk, once it is known to be this jail's: a directory may have come from another by a rename.

        JailmgrError `missing`, `conflict`.
        """
        bundle = load_bundle(self.lib)
        tenant = os.path.basename(self.host.run)
        mine = (bundle.tenant, bundle.jail, bundle.lib) == (tenant, self.name, self.lib)
        path = f"/{tenant}/{self.name}"
        if not mine or not bundle.cgroup.endswith(path) or (bundle.lower and not bundle.volume.endswith(path)):
            why = f"the {CONFIG} in {self.lib} is that of {bundle.tenant}/{bundle.jail}, on {bundle.volume}"
            hint = "Nothing was changed. An engine that starts writes it again: jailmgr engine stop; jailmgr list."
            raise JailmgrError(f"jail {self.full_name}", why, hint, "conflict")
        return bundle

    def start(self, restarts: int = 0, stdio: spawn.Stdio | None = None, bundle: Bundle | None = None) -> None:
        """From the bundle on disk to init exec'd; `bundle` is that, where it has just been read.

        Raises JailmgrError, with nothing left of the attempt. A jail that was to be started again still is, whoever
        asked for this start: what kept it from that (a full disk, no bridge) may pass. Not if its directory is gone.
        """
        waits = self.start_timer is not None
        try:
            self._begin(bundle or self._load(), restarts, stdio, None)
        except BaseException:
            if waits and os.path.isdir(self.lib):
                self.start_later(self.restarts)
            else:
                self._cancel_start()
                self.notes.waits(None)
            self.host.changed(self)
            raise

    def visit(self, payload: spawn.Payload) -> None:
        """Run a function of ours as process 1 of a stopped jail, with no network. `visit_result` tells how it went."""
        bundle = self.bundle._replace(nics=[], terminal=False, notify=False, lxcfs="", restart="no", devices=[])
        self._begin(bundle, 0, None, payload)

    def visit_result(self) -> dict[str, Any]:
        """After a visit has ended: the error it met, or its exit."""
        assert self._visit is not None
        try:
            spawn.result(self._visit)
        except JailmgrError as error:
            return {"error": error.as_dict()}
        finally:
            self._visit.control.close()
            self._visit = None
        return {"exit": {"code": 0}}

    def _begin(self, bundle: Bundle, restarts: int, stdio: spawn.Stdio | None, payload: spawn.Payload | None) -> None:
        self._cancel_start()
        self.bundle, hierarchies = bundle, self.host.hierarchies
        self.once = stdio is not None or payload is not None
        bpf, nodes = self.host.filter(bundle.seccomp), devices.find(bundle.devices)
        self.ours, self.stopping, self.killed, self._reaped = True, "", False, False
        self.timed_out = False
        try:
            if bundle.lower:
                volume_format.convert(bundle.volume)
            spawn.make_groups(hierarchies, bundle, nodes)
        except BaseException:
            # Processes that are in the group are not this start's: what is empty goes, and nothing is killed.
            with suppress(JailmgrError):
                cgroups.remove(hierarchies, bundle.cgroup, timeout=0)
            raise
        try:
            spawned = spawn.spawn(bundle, hierarchies, bpf, nodes, stdio, payload, partial(self._prepare, restarts))
            self.host.loop.after(0.0, partial(os.close, spawned.stage))
            try:
                if payload is None:
                    spawn.release(spawned)
                else:
                    self._visit = spawned
                    protocol.send(spawned.control, {})
            except BaseException:
                spawn.give_up(spawned)
                raise
        except BaseException:
            self._forget()
            self._clear_or_note()
            raise
        self.pidfd = spawned.pidfd
        self.notes.waits(None)  # not before its state is written: an engine finds it up at any moment
        if not self.once:
            self.notes.runs(True)
        self._watch(spawned.console, spawned.notify)
        self.host.changed(self)

    def _prepare(self, restarts: int, pid: int) -> None:
        """What has to be in place before init begins, and can be done while it is being made."""
        hierarchies, bundle = self.host.hierarchies, self.bundle
        self.host.reaper.is_new(pid)
        cgroups.set_limits(hierarchies, bundle.cgroup, bundle.limits)
        if bundle.oom_score_adj:
            spawn.spare(pid, bundle.oom_score_adj)
        self.state = State(
            pid, start_time(pid) or 0, time(), restarts, False,
            cgroups.oom_kills(hierarchies, bundle.cgroup), bundle.cgroup, self.lib, self.host.boot_id, self.once,
        )  # fmt: skip
        write_state(self.host.run, self.name, self.state)
        self._hold_netns(pid)

    def _hold_netns(self, pid: int) -> None:
        if self.bundle.nics:
            try:
                self._netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self.log.note(f"its network is not held: {error}")

    def adopt(self, state: State, pidfd: int) -> None:
        """Take over a jail whose supervisor died."""
        self.log.note("the supervisor was replaced; what the console showed meanwhile is lost")
        self.take_over(state, pidfd, False, None, None)

    def take_over(self, state: State, pidfd: int, ours: bool, console: int | None, notify: int | None) -> None:
        """Watch over a jail that runs. `ours`: its init is a child of this process, whoever that was when it began."""
        self.state, self.pidfd, self.ours = state, pidfd, ours
        self._hold_netns(state.pid)
        self._watch(console, notify)

    def adopt_console(self, master: int) -> None:
        """A new console for an adopted jail."""
        if self.running and self.console is None:
            self.console = Console(self.host.loop, master, self.log, lambda _: None)
        else:
            os.close(master)

    def _watch(self, console: int | None, notify: int | None) -> None:
        self.host.loop.watch(self.pidfd, lambda _: self._ended())
        if console is not None:
            self.console = Console(self.host.loop, console, self.log, lambda _: None)
        if notify is not None:
            self.notify = Notify(self.host.loop, notify, self._up)

    def _up(self) -> None:
        if self.state is not None:
            self.state = self.state._replace(ready=True)
            write_state(self.host.run, self.name, self.state)
            waiting, self.ready_waiters = self.ready_waiters, []
            for waiter in waiting:
                waiter()

    def stop(self, by_signal: str, timeout: float, force: bool, by: str = "admin") -> None:
        """Ask init to end, and kill the jail when it hasn't after `timeout` seconds; at once with `force`.

        `by`: `admin`, or `host` where that goes down.
        """
        if self.start_timer is not None:
            self._cancel_start()
            self.stopping = by
            self._settle({"kind": "exit", "at": time(), "by": by, "status": 0})
            return
        if not self.running:
            return
        number = process.signal_number(by_signal)
        self.stopping = by
        if self.kill_timer is not None:
            self.kill_timer.cancel()
            self.kill_timer = None
        if force or timeout <= 0:
            self._kill()
            return
        cgroups.thaw(self.host.hierarchies, self.bundle.cgroup, THAW_SECONDS)
        self.ask(number)
        self.kill_after(timeout)

    def ask(self, number: int) -> None:
        """Send init a signal, as soon as init takes it."""
        if self.state is not None:
            self._take_back()
            self.stop_request = stop_signal.Request(self.host.loop, self.state.pid, number, self._send)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def _take_back(self) -> None:
        if self.stop_request is not None:
            self.stop_request.cancel()
            self.stop_request = None

    def _kill(self) -> None:
        """Kill process 1, which takes all of its pid namespace along (pid_namespaces(7)), and all of the jail's groups.

        A tracer with PTRACE_O_TRACEEXIT (ptrace(2)) holds process 1 at its end, before the others are killed. Process 1
        goes on once the tracer is gone.
        """
        self.kill_timer = None
        self._take_back()
        if self.running:
            self.killed = True
            self.host.loop.after(KILL_SECONDS, partial(self._outlives_kill, self.state))
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return
            try:
                cgroups.send_kill(self.host.hierarchies, self.bundle.cgroup)
                if cgroups.is_frozen(self.host.hierarchies, self.bundle.cgroup):
                    # v1's freezer holds even what is killed. Thawed first, a guest could fork away from the kill.
                    cgroups.thaw(self.host.hierarchies, self.bundle.cgroup, THAW_SECONDS)
            except JailmgrError as error:
                self.log.note(f"only process 1 could be killed: {error}")
            if self.state is not None:
                self._abort_fuse(self.state.pid)

    def _abort_fuse(self, pid: int) -> None:
        """Abort the guest's FUSE connections until init has ended: one may have been in the making as it was killed."""
        if self.state is None or self.state.pid != pid:
            return
        try:
            fuse.abort(self.bundle.idmap_base, self.bundle.idmap_size)
        except OSError as error:
            self.log.note(f"its FUSE connections could not be aborted: {error}")
        self.host.loop.after(FUSE_SECONDS, partial(self._abort_fuse, pid))

    def _outlives_kill(self, state: State | None) -> None:
        """Answer those who wait for its end: it may wait in the kernel for ever. It is watched on."""
        if self.state is None or self.state != state or self._visit is not None:
            return
        pids = cgroups.members(self.host.hierarchies, state.cgroup)
        self.log.note(f"has not ended {KILL_SECONDS:.0f} s after SIGKILL; its processes: {pids[:10]}")
        waiting, self.waiters = self.waiters, []
        for waiter in waiting:
            waiter({"kind": STUCK, "at": time(), "by": "kernel", "status": 0, "pids": pids[:10]})

    def _ended(self) -> None:
        if self.state is None:
            return
        if self.ours:
            self.host.loop.forget(self.pidfd)
            self.host.reaper.report(self.state.pid, self._reaped_as)
        else:
            self._has_ended(self.state, kernel.pidfd_exit_status(self.pidfd))

    def _reaped_as(self, how: Exit | None) -> None:
        if self.state is not None:
            self._has_ended(self.state, kernel.pidfd_exit_status(self.pidfd) if how is None else how.wait_status)

    def _has_ended(self, state: State, status: int | None) -> None:
        if status is None and not (self._reaped or self.killed):
            # An adopted init has ended, and its parent of now has not asked yet: its exit code comes with EPOLLHUP.
            self._reaped = True
            self.host.loop.watch(self.pidfd, lambda _: self._ended(), 0)
            self._reap_timer = self.host.loop.after(REAP_SECONDS, self._ended)
            return
        if self._reap_timer is not None:
            self._reap_timer.cancel()
            self._reap_timer = None
        killed = status == signal.SIGKILL
        out_of_memory = killed and cgroups.oom_kills(self.host.hierarchies, state.cgroup) > state.oom_kills
        told = ending(status, stopping=self.stopping, ours=self.ours, killed=self.killed, out_of_memory=out_of_memory)
        told["timed_out"] = self.timed_out and killed
        self.host.loop.forget(self.pidfd)
        os.close(self.pidfd)
        self._take_back()
        if self.kill_timer is not None:
            self.kill_timer.cancel()
            self.kill_timer = None
        again = told["kind"] == "reboot" and not self.stopping and not self.once
        failed = told["kind"] in ("oom", "unknown", "signal") or (told["kind"] == "exit" and told["status"] != 0)
        if not self.stopping and told["kind"] != "reboot":
            again = self.bundle.restart == "always" or (self.bundle.restart == "on-failure" and failed)
        self.note_run(state, seen=True)
        if time() - state.started_at > STEADY_SECONDS:
            self.tries = 0
        at_once = told["kind"] == "reboot" and self.tries == 0
        if again:
            # Before its state file goes: an engine that ends takes the network of a jail that isn't up off the host.
            if at_once:
                self.tries += 1
                self.start_after(0.0, state.restarts + 1)
            else:
                self.start_later(state.restarts + 1)
        self._forget()
        self.log.note(f"ended: {told['kind']} by {told['by']}")
        self._clear_or_note()
        if not again:
            self._settle(told)
            return
        self.notes.last(told)
        if at_once:
            self._start_again()

    def start_later(self, restarts: int) -> None:
        """Start again after a pause that grows with each failure."""
        wait = BACKOFF[min(self.tries, len(BACKOFF) - 1)]
        self.tries += 1
        self.start_after(wait, restarts)

    def start_after(self, seconds: float, restarts: int) -> None:
        """Start again then, as the so-manieth time. A file tells the engine, and the next supervisor, of it."""
        self.restarts = restarts
        self.start_timer = self.host.loop.after(seconds, self._start_again)
        self._note_wait()

    def _cancel_start(self) -> None:
        if self.start_timer is not None:
            self.start_timer.cancel()
            self.start_timer = None

    @property
    def full_name(self) -> str:
        return self.host.full_name(self.name)

    def kill_after(self, seconds: float) -> None:
        """Kill it then, unless it has ended."""
        self.kill_timer = self.host.loop.after(seconds, self._kill_late)

    def _kill_late(self) -> None:
        self.timed_out = self.running
        self._kill()

    def _start_again(self) -> None:
        try:
            self.start(self.restarts)
        except (JailmgrError, OSError) as error:
            self.log.note(f"could not be started again: {error}")
            ending = {"kind": "failed", "at": time(), "by": "host", "status": 0, "why": str(error)}
            if self.alive:
                self.notes.last(ending)
            else:
                self._settle(ending)

    def _note_wait(self) -> None:
        self.notes.waits(Wait(self.lib, self.restarts, self.tries, self.host.boot_id))

    def note_run(self, state: State, seen: bool) -> None:
        """Write down what a run that has ended has used. `seen`: its end was watched."""
        if not state.once:
            self.notes.used(self.host.hierarchies, state, [nic["veth"] for nic in self.bundle.nics], seen)

    def _settle(self, ending: dict[str, Any]) -> None:
        """It has ended, and is not started again."""
        if self._visit is None:
            self.notes.last(ending)
        self.notes.waits(None)
        if self.stopping != "host" and not self.once:
            self.notes.runs(False)
        waiting, self.waiters = self.waiters, []
        for waiter in waiting:
            waiter(ending)
        self.log.close()
        self.host.changed(self)

    def _forget(self) -> None:
        """The process is gone: so are its console, its notify socket and its state."""
        self.state, self.pidfd = None, -1
        if self.notify is not None:
            self.notify.close()
            self.notify = None
        if self.console is not None:
            self.console.close()
            self.console = None
        self.ready_waiters.clear()

    def _clear_or_note(self) -> None:
        """Clear; who waits gets an answer in any case. The state file stays for a next supervisor to clear."""
        try:
            self.clear()
        except (JailmgrError, OSError) as error:
            self.log.note(f"not all of it could be removed: {error}")

    def clear(self) -> None:
        """Take away what a run of it used; the state file last, which tells a next supervisor to do this."""
        for nic in self.bundle.nics:
            self._detach(nic["veth"])
        if self._netns >= 0:
            os.close(self._netns)
            self._netns = -1
        cgroups.kill(self.host.hierarchies, self.bundle.cgroup, CLEAR_SECONDS)
        cgroups.remove(self.host.hierarchies, self.bundle.cgroup, CLEAR_SECONDS)
        remove_state(self.host.run, self.name)

    def _detach(self, veth: str) -> None:
        """The kernel takes a pair away with the namespace that we let go, while nobody waits for the 20 ms of that.

        Unless somebody else holds it: so it is looked for later, by its index. Its name may be the next run's by then.
        """
        if self._netns < 0:
            netlink.detach(veth)
        elif index := netlink.index_of(veth):
            self.host.detach_later(index)

    def watch_console(self, sock: socket.socket, typed: bool) -> None:
        """Show the console on `sock`; with `typed`, type what comes from it."""
        if self.console is None:
            raise JailmgrError(f"console of {self.name}", "there is none now", "", "conflict")
        self.console.add(Watcher(sock, typed))
