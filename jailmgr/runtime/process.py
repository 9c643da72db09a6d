"""The last steps before a program of the jail begins, alike for init and for what is exec'd: limits, privileges, exec.

Everything here runs in a forked child with the jail's namespaces. The module path is emptied there, for an import
after pivot_root or setns would run the guest's files.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime import capabilities, seccomp
from jailmgr.runtime import syscalls as kernel

if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal

_DEFAULT_LIMITS = (
    resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC,
    resource.RLIMIT_RSS,
)  # fmt: skip


def trap(what: str, tell: Callable[[dict[str, Any]], None], work: Callable[[], object]) -> NoReturn:
    """Run `work` as the whole life of a forked child: what it raises is told, nothing returns to the parent's code."""
    gc.disable()  # it would write to every object, and have each page of the parent's copied
    status = 1
    try:
        work()
        status = 0
    except JailmgrError as error:
        tell({"error": error.as_dict()})
    except OSError as error:
        tell({"error": from_os(what, error).as_dict()})
    except BaseException as error:  # noqa: BLE001 - the last frame of a process
        tell({"error": JailmgrError(what, repr(error)).as_dict()})
    finally:
        os._exit(status)


_ARGUMENTS = kernel.find_arguments()


def hide_arguments() -> None:
    """Show a guest nothing of the supervisor's command line, which has paths of the host and the tenant's name."""
    kernel.hide_arguments(_ARGUMENTS, b"jailmgr")


def has_ended(pidfd: int, seconds: float) -> bool:
    """Whether a process has ended, or does within so many seconds (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def pid_of(pidfd: int) -> int:
    """Pid of a pidfd's process in our pid namespace, -1 once it has been reaped (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        return next((int(line[4:]) for line in file if line.startswith(b"Pid:")), -1)


def shut_imports() -> None:
    """No module is loaded from here on."""
    sys.path.clear()
    sys.meta_path.clear()


def reset_signals() -> None:
    """Default actions and an empty mask: Python ignores SIGPIPE and SIGXFSZ, and exec keeps what is ignored.

    By `_signal`: each of the sixty through `signal`'s enums is half a millisecond of a start.
    """
    for number in range(1, _signal.NSIG):
        if _signal.getsignal(number) not in (_signal.SIG_DFL, None):
            _signal.signal(number, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())


def set_limits(rlimits: list[tuple[str, int, int]]) -> None:
    """Set resource limits of a fresh boot, as far as the caller may raise them: in a jail not at all (setrlimit(2))."""
    for which in _DEFAULT_LIMITS:
        _set_limit(which, resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    for name, soft, hard in rlimits:
        _set_limit(getattr(resource, name), soft, hard)


def _set_limit(which: int, soft: int, hard: int) -> None:
    most = resource.getrlimit(which)[1]
    try:
        resource.setrlimit(which, (soft, hard))
    except (ValueError, OSError):
        if most != resource.RLIM_INFINITY:
            hard = most if hard == resource.RLIM_INFINITY else min(hard, most)
            soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
        try:
            resource.setrlimit(which, (soft, hard))
        except OSError:
            return  # fs.nr_open is below what the process has


def become(keep: list[str], bpf: bytes) -> None:
    """A new session keyring, the bounding set, and last the filter."""
    kernel.join_new_keyring()
    capabilities.drop(keep)
    if bpf:
        seccomp.load(bpf)


def execute(args: list[str], env: dict[str, str]) -> NoReturn:
    """execve(2), searched for in the environment's PATH; the OSError of the best candidate when none can run."""
    program, worst = args[0], FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), args[0])
    found: OSError = worst
    folders = [""] if "/" in program else [f"{folder}/" for folder in env.get("PATH", "").split(":") if folder]
    for folder in folders:
        try:
            os.execve(f"{folder}{program}", args, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            found = error
            found.filename = program
    raise found


def signal_number(name: str) -> int:
    """Number of `SIGTERM`, `SIGRTMIN+3` or `15` (signal(7)); JailmgrError on anything else."""
    base, _, more = name.partition("+")
    if name.isascii() and name.isdigit() and 0 < int(name) < 65:
        return int(name)
    try:
        number = int(signal.Signals[base]) + (int(more) if more else 0)
    except (KeyError, ValueError):
        number = 0
    if not 0 < number < 65:
        raise JailmgrError("signal", f"{name} is none", "", "invalid")
    return number
