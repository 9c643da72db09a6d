"""Into a running jail: a program exec'd there, or a Python function, with all that init has around it.

    supervisor ── fork ─▶ enterer ── clone(CLONE_PARENT) ─▶ the program

`enterer` is born in the jail's cgroups, joins the namespaces by the jail's pidfd and ends; the program is the
supervisor's own child. Neither is dumpable before the exec, so that the guest's root can't take hold of them.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime import apparmor, cgroups, process, protocol
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.bundle import Bundle
from jailmgr.runtime.cgroup_exec import exec_leaves
from jailmgr.runtime.cgroups import Hierarchies
from jailmgr.runtime.pty import make_controlling, open_pty

if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal

_ALL_NAMESPACES = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWCGROUP
    | kernel.CLONE_NEWTIME
)
_PASSWD_MAX = 1 << 20
_PAM_OF_LOGINS = "/etc/pam.d/su-l"
"""Where the jail has it, a login shell goes by its su(1): pam_systemd(8) makes it a session of the jail's logind."""
_NO_ID = 0xFFFFFFFF
"""-1 to setresuid(2), which leaves the uid as it is."""


class Command(NamedTuple):
    """What to exec. `user`: name, uid, or uid:gid; None for root. `login`: its shell, as a login shell."""

    args: list[str]
    env: dict[str, str]
    user: str | None
    cwd: str | None
    tty: bool
    login: bool


class Account(NamedTuple):
    name: str
    uid: int
    gid: int
    groups: list[int]
    home: str
    shell: str


def enter(
    init_pidfd: int,
    bundle: Bundle,
    hierarchies: Hierarchies,
    keep: list[int],
    work: Callable[[socket.socket, int], None],
) -> tuple[int, socket.socket]:
    """Fork a child into the jail that does `work(control, proc)`: the enterer's pid and our end of the control socket.

    `proc` is of apparmor.open_proc. The child keeps only `keep` of our fds. Messages come from it: {"pid": N} of the
    program, {"error": …}.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        enterer = _fork(hierarchies, bundle)
        if enterer == 0:
            ours.close()
            process.trap(
                "exec",
                partial(protocol.send, theirs),
                lambda: _enterer(theirs, init_pidfd, bundle, hierarchies, keep, work),
            )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    return enterer, ours


def _fork(hierarchies: Hierarchies, bundle: Bundle) -> int:
    refused: OSError | None = None
    for leaf in exec_leaves(hierarchies, bundle.cgroup, bundle.idmap_base):
        try:
            return kernel.fork_into(leaf)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EOPNOTSUPP, errno.EAGAIN):
                raise
            refused = error
        finally:
            if leaf is not None:
                os.close(leaf)
    assert refused is not None
    raise refused


def _enterer(
    sock: socket.socket,
    init_pidfd: int,
    bundle: Bundle,
    hierarchies: Hierarchies,
    keep: list[int],
    work: Callable[[socket.socket, int], None],
) -> None:
    kernel.close_all_but(sock.fileno(), init_pidfd, *keep)
    process.hide_arguments()
    proc = apparmor.open_proc(bundle.apparmor)
    cgroups.join_self(cgroups.open_tasks(hierarchies, bundle.cgroup))
    process.shut_imports()
    process.reset_signals()
    os.umask(0o022)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.setns(init_pidfd, _ALL_NAMESPACES)
    os.close(init_pidfd)
    os.setresgid(0, 0, 0)
    os.setgroups([])
    os.setresuid(0, 0, 0)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    # A signal between clone and send would end the enterer before it has reported the program's pid (runtime/child.py).
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
    pid = kernel.clone(kernel.CLONE_PARENT)
    if pid == 0:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        process.trap("exec", partial(protocol.send, sock), lambda: work(sock, proc))
    protocol.send(sock, {"pid": pid})


def run(sock: socket.socket, proc: int, command: Command, stdio: list[int], bundle: Bundle, bpf: bytes) -> None:
    """The program's side: terminal or fds, user, directory, privileges, exec. Runs in the jail."""
    apparmor.at_exec(bundle.apparmor, proc)
    if command.tty:
        pty = open_pty("/dev/ptmx")
        account = find_account(command.user)
        os.fchown(pty.slave, account.uid, -1)
        protocol.send(sock, {"tty": True}, [pty.master])
        os.close(pty.master)
        make_controlling(pty.slave)
    else:
        os.setsid()
        account = find_account(command.user)
        moved = [os.dup(fd) for fd in stdio]
        for target, fd in enumerate(moved):
            os.dup2(fd, target)
            status = os.fstat(fd)
            if stat.S_ISFIFO(status.st_mode) and status.st_uid == 0:
                os.fchown(fd, account.uid, -1)
        kernel.close_all_but(sock.fileno())
    home = account.home if account.home.startswith("/") else "/"
    env = command.env | {"HOME": home, "USER": account.name, "LOGNAME": account.name, "SHELL": account.shell}
    for directory in (command.cwd,) if command.cwd else (home, "/"):
        try:
            os.chdir(directory)
            break
        except OSError as error:
            if directory in ("/", command.cwd):
                raise JailmgrError("exec", f"{directory}: {os.strerror(error.errno or 0)}") from error
    process.set_limits(bundle.rlimits)
    process.become(bundle.capabilities, bpf)
    if command.login and os.path.exists(_PAM_OF_LOGINS):
        try:
            process.execute(["su", "-l", account.name], env)
        except FileNotFoundError:
            pass
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    try:
        if command.login:
            os.execve(account.shell, [f"-{os.path.basename(account.shell)}"], env)
        process.execute(command.args, env)
    except OSError as error:
        protocol.send(sock, {"error": from_os("exec", error).as_dict(), "errno": error.errno})


def find_account(user: str | None) -> Account:
    """A user by the jail's own /etc/passwd and /etc/group (passwd(5)), read as text: the guest's NSS is not run."""
    wanted = user or "0"
    wanted, has_group, group = wanted.partition(":")
    entry = None
    for fields in _table("/etc/passwd", 7):
        if fields[0] == wanted or fields[2] == wanted:
            entry = fields
            break
    if entry is None and not (wanted.isascii() and wanted.isdigit()):
        raise JailmgrError("exec", f"no user {wanted} in the jail", "", "missing")
    try:
        if entry is None:
            entry = [wanted, "", wanted, "0" if wanted == "0" else wanted, "", "/", "/bin/sh"]
        uid, gid = int(entry[2]), int(entry[3])
        gid = _group_id(group) if has_group else gid
        if not (0 <= uid < _NO_ID and 0 <= gid < _NO_ID):
            raise ValueError(f"{uid}:{gid} are no ids")
        groups = [gid, *(int(row[2]) for row in _table("/etc/group", 4) if entry[0] in row[3].split(","))]
    except ValueError as error:
        raise JailmgrError("exec", f"the jail's /etc/passwd or /etc/group is broken ({error})") from error
    name = "root" if entry[0] == "0" else entry[0]
    return Account(name, uid, gid, groups[:256], entry[5] or "/", entry[6] or "/bin/sh")


def _group_id(group: str) -> int:
    for row in _table("/etc/group", 4):
        if group in (row[0], row[2]):
            return int(row[2])
    if group.isascii() and group.isdigit():
        return int(group)
    raise JailmgrError("exec", f"no group {group} in the jail", "", "missing")


def _table(path: str, columns: int) -> list[list[str]]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        text = os.read(fd, _PASSWD_MAX).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)
    rows = [line.split(":") for line in text.split("\n")]
    return [row for row in rows if len(row) >= columns]


def read_command(body: dict[str, Any], base: dict[str, str]) -> Command:
    """A command out of a request; ValueError or KeyError when it isn't one."""
    args, env, user, cwd = body["args"], body.get("env", {}), body.get("user"), body.get("cwd")
    strings = [*args, *env.keys(), *env.values(), *(text for text in (user, cwd) if text is not None)]
    if not all(isinstance(text, str) and "\0" not in text for text in strings):
        raise ValueError("strings without NUL")
    login = bool(body.get("login"))
    if not args and not login:
        raise ValueError("no command")
    return Command(args, {**base, **env}, user, cwd, bool(body.get("tty")), login)
