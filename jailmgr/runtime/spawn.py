"""From a bundle to a running init: one clone3(2) into the jail's namespaces.

The supervisor has the tenant's effective uid for it, so that the user namespace is the tenant's and the kernel's counts
per user add up there; the namespaces that are made in the same call belong to the new user namespace (namespaces(7)).
The mount namespace comes later: the supervisor mounts the root in a staging namespace, which the child then copies
(root_mount.py). While the child mounts the rest, the supervisor makes the network and whatever `meanwhile` is. No mount
is made in the host's mount namespace and nothing has a name until init runs, so that a kill of anyone at any line
leaves at most empty cgroups.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jailmgr.errors import JailmgrError, from_dict, from_os
from jailmgr.runtime import (
    apparmor,
    capabilities,
    cgroups,
    devices,
    lxcfs,
    netlink,
    process,
    protocol,
    reaper,
    resolvers,
    root_mount,
    rootfs,
    shaping,
)
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.bundle import Bundle
from jailmgr.runtime.cgroups import Hierarchies
from jailmgr.runtime.pty import check_master
from jailmgr.runtime.run_host import RUN_HOST, RunHost, make_run_host

STEP_SECONDS = 30.0
"""How long a step of a start may take: a tenant's own memory pressure may slow it, nothing else."""
_NAMESPACES = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
)
_LATER = kernel.CLONE_NEWCGROUP | kernel.CLONE_NEWTIME
"""Namespaces made once the child is in its cgroups, and those whose clocks are set before anyone is in them."""


class Spawned(NamedTuple):
    """A process that waits for `release` as process 1 of its jail. The fds are the receiver's."""

    pid: int
    pidfd: int
    control: socket.socket
    console: int | None
    notify: int | None
    stage: int
    """Of root_mount.staging, to be closed when nobody waits."""


class Stdio(NamedTuple):
    """fds 0 to 2 of a jail without a terminal."""

    stdin: int
    stdout: int
    stderr: int


class Payload(NamedTuple):
    """A Python function that runs in place of init, and the fds it needs."""

    work: Callable[[], None]
    fds: list[int]


def make_groups(hierarchies: Hierarchies, bundle: Bundle, nodes: list[devices.Node]) -> None:
    """The jail's cgroups, below its tenant's, held to its devices: v1's rules deny all before they allow, and by then
    process 1 may be opening its console.
    """
    root, tenant, _ = bundle.cgroup.split("/")
    cgroups.tenant_group(hierarchies, root, tenant)
    cgroups.create_jail_group(hierarchies, bundle.cgroup, bundle.idmap_base, bundle.limits.cpus)
    cgroups.device_rules(hierarchies, bundle.cgroup, [*cgroups.DEFAULT_DEVICES, *devices.rules(nodes)])


def spare(pid: int, oom_score_adj: int) -> None:
    """Have the kernel spare a process when memory runs out (proc_pid_oom_score_adj(5)): in vain on hosts whose root may
    not, for lack of CAP_SYS_RESOURCE.
    """
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(oom_score_adj))
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return


def spawn(
    bundle: Bundle,
    hierarchies: Hierarchies,
    bpf: bytes,
    nodes: list[devices.Node],
    stdio: Stdio | None = None,
    payload: Payload | None = None,
    meanwhile: Callable[[int], None] = lambda _pid: None,
) -> Spawned:
    """Build a jail up to the point where only the exec is missing.

    The jail's cgroups are there. `nodes`: those of make_groups. `meanwhile` is called with the child's pid while that
    mounts. Raises JailmgrError with the step that failed; nothing is left of the attempt then.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(STEP_SECONDS)
    leaf, tasks = cgroups.leaf_fd(hierarchies, bundle.cgroup), cgroups.open_tasks(hierarchies, bundle.cgroup)
    pid, stage = 0, -1
    host: RunHost | None = None
    try:
        with root_mount.staging() as staged:
            try:
                with capabilities.effective_uid(bundle.uid):
                    pid = kernel.fork_into(leaf, _NAMESPACES)
                    if pid == 0:
                        work = partial(_init, theirs, tasks, bundle, bpf, nodes, stdio, payload)
                        process.trap("start", partial(protocol.send, theirs), work)
            finally:
                theirs.close()
                protocol.close_all(tasks if leaf is None else [leaf, *tasks])
            _mount_root(ours, pid, bundle)
        stage = staged
        _lead(ours, pid, bundle, nodes)
        if payload is None:
            host = make_run_host(bundle)
            _hand_over(ours, host)
        meanwhile(pid)
        fds = _hear(ours, "mounted").fds
        console = fds[0] if bundle.terminal and payload is None else None
        if console is not None:
            check_master(console)
        return Spawned(pid, os.pidfd_open(pid), ours, console, None if host is None else host.notify, stage)
    except BaseException as error:
        if stage >= 0:
            os.close(stage)
        if host is not None and host.notify is not None:
            os.close(host.notify)
        if not pid:
            ours.close()
            if isinstance(error, OSError):
                raise _refused(error) from error
            raise
        said = _abandon(ours, pid)
        for nic in bundle.nics:
            netlink.detach(nic["veth"])
        if said is not None and isinstance(error, JailmgrError | OSError):
            raise said from error
        raise


def _refused(error: OSError) -> JailmgrError:
    """Why clone3(2) would not make the namespaces."""
    if error.errno in (errno.ENOSPC, errno.EUSERS):
        hint = "Raise the sysctls user.max_*_namespaces: a jail takes one of each kind."
        return JailmgrError("start", "the host or the tenant has all the namespaces it may have", hint, "full")
    if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
        hint = "`jailmgr doctor` tells which of them is missing."
        return JailmgrError("start", f"the kernel makes no namespaces ({error.strerror})", hint, "unavailable")
    return from_os("start", error)


def _mount_root(ours: socket.socket, pid: int, bundle: Bundle) -> None:
    """Write the id maps of the new user namespace, with which the child goes on, and mount the jail's root by them."""
    for kind in ("uid", "gid"):
        fd = os.open(f"/proc/{pid}/{kind}_map", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, f"0 {bundle.idmap_base} {bundle.idmap_size}\n".encode())
        finally:
            os.close(fd)
    protocol.send(ours, {})
    userns = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        root_mount.mount(bundle.lower, bundle.volume, userns, bundle.idmap_base)
    finally:
        os.close(userns)


def _lead(ours: socket.socket, pid: int, bundle: Bundle, nodes: list[devices.Node]) -> None:
    """Let the child copy the staging namespace; meanwhile make its network.

    The child receives its devices first, and last what lxcfs shows, where there are these.
    """
    mounts: list[int] = []
    try:
        if nodes:
            mounts.append(devices.make(nodes, bundle.idmap_base, bundle.idmap_size))
        limits_view = lxcfs.open_whole(bundle.lxcfs)
        if limits_view is not None:
            mounts.append(limits_view)
        protocol.send(ours, {"limits_view": limits_view is not None}, mounts)
    finally:
        protocol.close_all(mounts)
    if bundle.nics:
        netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for nic in bundle.nics:
                netlink.attach(nic, netns)
                if "shape" in nic:
                    shaping.attach(nic["veth"], nic["shape"])
        finally:
            os.close(netns)


def _hand_over(ours: socket.socket, host: RunHost) -> None:
    """Send /run/host, whose mount is closed, to the child, which attaches it last."""
    try:
        protocol.send(ours, {"environment": host.environment}, [host.mount])
    finally:
        os.close(host.mount)


def _abandon(ours: socket.socket, pid: int) -> JailmgrError | None:
    """End what a failed start has begun; what the child said of it, where the child failed first.

    It would end by itself, too, when it hears no more from us.
    """
    told: JailmgrError | None = None
    os.kill(pid, signal.SIGKILL)
    reaper.wait_killed(pid)
    try:
        while (said := protocol.receive(ours)) is not None:
            protocol.close_all(said.fds)
            if "error" in said.body:
                told = from_dict(said.body["error"])
    except (OSError, ValueError):
        pass
    ours.close()
    return told


def release(spawned: Spawned) -> None:
    """Let init begin; returns when it was exec'd. Raises JailmgrError when it could not be."""
    try:
        protocol.send(spawned.control, {})
        result(spawned)
    finally:
        spawned.control.close()


def give_up(spawned: Spawned) -> None:
    """End a process 1 that could not be released. It ends by itself, unless it was about to exec what the guest has."""
    spawned.control.close()
    signal.pidfd_send_signal(spawned.pidfd, signal.SIGKILL)
    reaper.wait_killed(spawned.pid)
    for fd in (spawned.pidfd, spawned.console, spawned.notify):
        if fd is not None:
            os.close(fd)


def result(spawned: Spawned) -> None:
    """What process 1 has said since its release; returns at the exec, or at the end of a payload that did well."""
    said = protocol.receive(spawned.control)
    if said is not None:
        raise from_dict(said.body["error"])


def _hear(sock: socket.socket, step: str) -> protocol.Message:
    try:
        said = protocol.receive(sock)
    except TimeoutError:
        raise JailmgrError("start", f"nothing heard for {STEP_SECONDS:.0f} s while waiting for {step}") from None
    if said is None:
        raise JailmgrError("start", f"the child ended before {step} (killed, or out of its memory limit)")
    if "error" in said.body:
        raise from_dict(said.body["error"])
    return said


def _start_clocks() -> None:
    """The jail's uptime begins at 0: the offsets of its time namespace, and into it (time_namespaces(7)).

    A process that is not dumpable may not write to its own files in /proc: for that one write this one is, while no
    program of the jail runs yet that could trace it.
    """
    with open("/proc/uptime", "rb", buffering=0) as file:
        seconds = int(file.read(64).split(b".")[0])
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    fd = os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, f"monotonic -{seconds} 0\nboottime -{seconds} 0\n".encode())
    finally:
        os.close(fd)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    fd = os.open("/proc/self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
    kernel.setns(fd, kernel.CLONE_NEWTIME)
    os.close(fd)


def _go(sock: socket.socket) -> protocol.Message:
    """The supervisor's next word; without one it is gone, and so are we."""
    said = protocol.receive(sock)
    if said is None:
        os._exit(1)
    return said


def _init(
    sock: socket.socket,
    tasks: list[int],
    bundle: Bundle,
    bpf: bytes,
    nodes: list[devices.Node],
    stdio: Stdio | None,
    payload: Payload | None,
) -> None:
    """Process 1, from its clone to its exec."""
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    process.hide_arguments()
    kernel.close_all_but(sock.fileno(), *tasks, *(stdio or ()), *(payload.fds if payload else ()))
    process.shut_imports()
    process.reset_signals()
    os.umask(0o022)
    proc = apparmor.open_proc(bundle.apparmor)
    cgroups.join_self(tasks)
    kernel.unshare(_LATER)
    _go(sock)
    os.setresgid(0, 0, 0)
    os.setgroups([])
    os.setresuid(0, 0, 0)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    _start_clocks()
    kernel.sethostname(bundle.hostname)
    said = _go(sock)
    limits_view = said.fds.pop() if said.body["limits_view"] else None
    made = rootfs.Nodes(said.fds.pop(), nodes) if nodes else None
    kernel.unshare(kernel.CLONE_NEWNS)
    root, scratch = rootfs.assemble()
    rootfs.populate(root, scratch, bundle, made, limits_view)
    if payload is None:
        resolvers.hand_out(root, bundle)
    shown: list[int] = []
    console = rootfs.open_console(root) if bundle.terminal and payload is None else None
    if console is not None:
        shown.append(console.master)
    environment: dict[str, str] = {}
    if payload is None:
        said = _go(sock)
        environment = said.body["environment"]
        rootfs.attach(root, said.fds[0], RUN_HOST)
    rootfs.enter(root)
    protocol.send(sock, {"step": "mounted"}, shown)
    _go(sock)
    protocol.close_all(shown)
    if payload is not None:
        process.become(bundle.capabilities, bpf)
        apparmor.at_once(bundle.apparmor, proc)
        payload.work()
        return
    _stand_on(console.slave if console else None, stdio)
    process.set_limits(bundle.rlimits)
    process.become(bundle.capabilities, bpf)
    apparmor.at_exec(bundle.apparmor, proc)
    process.execute(bundle.args, bundle.env | environment)


def _stand_on(slave: int | None, stdio: Stdio | None) -> None:
    """Put the console, `stdio` or /dev/null on fds 0 to 2, in a session of its own that has no controlling terminal.

    The kernel starts process 1 so too (init/main.c, console_on_rootfs). A terminal is that of one session alone
    (ioctl_tty(2), TIOCSCTTY), and the one that needs the console is a getty's.
    """
    os.setsid()
    if slave is not None:
        stdio = Stdio(slave, slave, slave)
    elif stdio is None:
        # Never the supervisor's own log.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stdio = Stdio(null, null, null)
    for target, fd in enumerate(stdio):
        os.dup2(fd, target)
