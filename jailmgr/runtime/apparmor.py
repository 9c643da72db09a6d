"""AppArmor: whether the host has it, what is loaded, and putting a process of a jail's under its profile.

Kernel's Documentation/admin-guide/LSM/apparmor.rst; the files below /proc/PID/attr as libapparmor's aa_change_onexec(2)
and aa_change_profile(2) use them. The profile is a label only: which processes may have it doesn't depend on their
namespaces, no_new_privs or seccomp filter where, as here, it is taken by one that is unconfined.
"""

from __future__ import annotations

import os

from jailmgr.errors import JailmgrError

PROFILE = "jailmgr"
_ENABLED = "/sys/module/apparmor/parameters/enabled"
_POLICY = "/sys/kernel/security/apparmor/policy/profiles"
_LOADED_HASHES = ("sha256", "sha1")
"""Of the compiled policy; which of them there is depends on the kernel's version, none where that is configured out."""


def enabled() -> bool:
    """Whether the kernel mediates by AppArmor, and its policy can be seen: not so in a container of another manager."""
    try:
        with open(_ENABLED, "rb", buffering=0) as file:
            on = file.read(1) == b"Y"
    except OSError:
        return False
    return on and os.path.isdir(_POLICY)


def loaded() -> bool:
    """Whether a profile of our name is loaded, ours or another's."""
    return bool(loaded_policy())


def loaded_policy() -> str:
    """What is loaded as `PROFILE`, told by its entry and hash so that any other policy reads otherwise; empty: none."""
    try:
        for entry in os.listdir(_POLICY):
            if entry.rpartition(".")[0] == PROFILE:
                return f"{entry} {_hash(f'{_POLICY}/{entry}')}"
    except FileNotFoundError:
        pass
    return ""


def _hash(entry: str) -> str:
    for name in _LOADED_HASHES:
        try:
            with open(f"{entry}/{name}", "rb", buffering=0) as file:
                return file.read(128).strip().decode("ascii")
        except FileNotFoundError:
            continue
    return ""


def label_of(pid: int) -> str:
    """A process's profile and mode, `jailmgr (enforce)`; empty where there is no such process or no AppArmor."""
    try:
        with open(f"/proc/{pid}/attr/apparmor/current", "rb", buffering=0) as file:
            return file.read(4096).rstrip(b"\0\n").decode("utf-8", "replace")
    except OSError:
        return ""


def open_proc(profile: str) -> int:
    """The host's /proc for `at_exec` and `at_once`, taken while it is in sight; -1 where there is no profile.

    In a jail's own /proc the guest may have mounted a file of its own in the place of the one that is written to.
    """
    return os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if profile else -1


def at_exec(profile: str, proc: int) -> None:
    """The calling thread's next execve(2) goes under `profile`, or fails; nothing for an empty one. Closes `proc`."""
    if profile:
        _write(profile, proc, "exec", f"exec {profile}")


def at_once(profile: str, proc: int) -> None:
    """The calling thread, which will exec nothing, goes under `profile`; nothing for an empty one. Closes `proc`."""
    if profile:
        _write(profile, proc, "current", f"changeprofile {profile}")


def _write(profile: str, proc: int, attribute: str, command: str) -> None:
    """Opened and written by one process: the kernel takes nothing from another, and says so by writing 0 bytes."""
    what = f"AppArmor profile {profile}"
    try:
        fd = os.open(f"thread-self/attr/apparmor/{attribute}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            written = os.write(fd, command.encode())
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise JailmgrError(what, "it is not loaded", "Restart the jail: that loads it.", "unavailable") from error
    except OSError as error:
        raise JailmgrError(what, f"could not be taken on ({error.strerror})") from error
    finally:
        os.close(proc)
    if written != len(command):
        raise JailmgrError(what, "could not be taken on (the kernel took nothing)")
