"""Where the host's cgroup hierarchies are, and reading and writing their files.

Sources: cgroups(7), and the kernel's Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst. A host has cgroup v2 alone,
v1 alone, or both ("hybrid"), and then each controller is in one of them. Standard library only.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from jailmgr.errors import JailmgrError
from jailmgr.runtime.plainfile import read_bytes

LIMITING = ("cpu", "memory", "pids")
"""Controllers that hold a limit of ours: switched on in v2 wherever they are not."""

PASSED_ON = ("cpuset", "io")
"""Given to the guest on v2 where the host's root group gives them to its children; never switched on there by us."""

ONLY_V1 = ("devices",)
"""v2 has no controller for devices, it takes BPF programs."""

WITHOUT_V2 = ("cpuacct", "freezer")
"""What v2 groups do with no controller (cpu.stat, cgroup.freeze): v1's are used where there is no v2 at all."""


_FLAGS = ("rw", "ro", "none", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "favordynmods")

SYSTEMD = os.path.isdir("/run/systemd/system")
"""This host's process 1 is systemd, and cgroups are its own (sd_booted(3)): runtime/scope.py."""

SLICE = "jailmgr.slice"


class Hierarchies(NamedTuple):
    """What `discover` found. Directories have no slash at their end."""

    unified: str
    """Where our root group goes in the v2 tree; empty on a host without v2."""
    v2: tuple[str, ...]
    """Controllers of ours that are v2's here."""
    v1: dict[str, str]
    """Other controllers of ours to the mount point of their hierarchy; co-mounted ones share it."""
    mounts: tuple[str, ...]
    """The mount points of `v1`, each once."""
    cpuset: str = ""
    """Mount point of v1's cpuset; empty where v2 has it, or the host hasn't. A group there needs CPUs before anyone can
    join it (runtime/cgroup_cpuset.py)."""
    others: dict[str, str] = {}
    """All other v1 hierarchies, named ones too (`name=systemd`), to their mount points. A jail has a group in each: in
    a hierarchy that it never joined, the root of its cgroup namespace is the host's group and shows all names."""


def discover(mountinfo: str | None = None) -> Hierarchies:
    """The host's hierarchies as mounted in this mount namespace (proc_pid_mountinfo(5)); some 0.1 ms, worth keeping.

    `mountinfo`: a file to read in place of /proc/self/mountinfo. Raises JailmgrError where neither version is mounted.
    """
    unified = ""
    v1: dict[str, str] = {}
    places: dict[bytes, tuple[str, str]] = {}
    with open(mountinfo or "/proc/self/mountinfo", "rb") as file:
        for line in file.read().splitlines():
            before, _, after = line.partition(b" - ")
            kind = after.partition(b" ")[0]
            if kind not in (b"cgroup", b"cgroup2"):
                continue
            place = before.split(b" ")
            path = _unescape(place[4])
            if b"ro" in place[5].split(b","):
                continue
            if kind == b"cgroup2":
                unified = unified or path
                continue
            # One hierarchy may be mounted at several places: the device number says which it is.
            options = os.fsdecode(after.split(b" ")[2]).split(",")
            places.setdefault(place[2], (",".join(each for each in options if not _is_flag(each)), path))
            for option in options:
                v1.setdefault(option, path)
    v2: tuple[str, ...] = ()
    if unified:
        offered = read(f"{unified}/cgroup.controllers").split()
        # systemd gives all that it knows down to a scope that is delegated, once there is one.
        passed = offered if SYSTEMD else read_or(f"{unified}/cgroup.subtree_control", "").split()
        v2 = tuple(c for c in LIMITING if c in offered) + tuple(c for c in PASSED_ON if c in passed)
    used = [c for c in LIMITING if c not in v2] + list(ONLY_V1) + ([] if unified else list(WITHOUT_V2))
    cpuset = v1.get("cpuset", "") if "cpuset" not in v2 else ""
    v1 = {controller: v1[controller] for controller in used if controller in v1}
    if not unified and not v1:
        raise JailmgrError(
            "cgroups",
            "no cgroup file system is mounted for writing",
            "Mount one: mount -t cgroup2 cgroup2 /sys/fs/cgroup",
            "unavailable",
        )
    mounts = tuple(dict.fromkeys(v1.values()))
    cpuset = "" if cpuset in mounts else cpuset
    others = {name: path for name, path in places.values() if path not in (*mounts, cpuset)}
    return Hierarchies(unified, v2, v1, mounts, cpuset, others)


def not_writable(mountinfo: str = "/proc/self/mountinfo") -> list[str]:
    """Mount points of v1 hierarchies that are mounted read-only everywhere: no jail can have a group in them."""
    closed: dict[bytes, str] = {}
    with open(mountinfo, "rb") as file:
        found = [line.split(b" ") for line in file.read().splitlines() if b" - cgroup " in line]
    open_ = {place[2] for place in found if b"rw" in place[5].split(b",")}
    for place in found:
        if place[2] not in open_:
            closed.setdefault(place[2], _unescape(place[4]))
    return list(closed.values())


def _is_flag(option: str) -> bool:
    """Whether a mount option of v1 is neither a controller nor the hierarchy's name (cgroups(7))."""
    return option in _FLAGS or option.startswith("release_agent=")


def _unescape(path: bytes) -> str:
    """A path of mountinfo, which writes space, tab, newline and backslash as octal."""
    for code, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        path = path.replace(code, char)
    return os.fsdecode(path)


def relative(cgroup: str) -> str:
    """The directory of the group `ROOT/TENANT/JAIL` (or one above it) below a hierarchy's mount point.

    With systemd ROOT is a scope of it.

    `tasks` is a good name for a jail and a file in every v1 directory; directories of ours have no other name in common
    with the kernel's files, which carry a dot or an underscore. Raises JailmgrError for what is no group of ours.
    """
    parts = cgroup.split("/")
    if not 1 <= len(parts) <= 3 or "" in parts or cgroup[0] == "." or "/." in cgroup or "\0" in cgroup:
        raise JailmgrError(f"cgroup {cgroup!r}", "not the name of a group of jailmgr", code="invalid")
    if SYSTEMD:
        cgroup = "/".join([SLICE, f"{parts[0]}.scope", *parts[1:]])
    if "tasks" in parts:
        cgroup = "/".join("tasks.d" if part == "tasks" else part for part in cgroup.split("/"))
    return cgroup


def directory(h: Hierarchies, controller: str, cgroup: str) -> str | None:
    """The group's directory in the hierarchy that has `controller`; None where the host has no such controller."""
    if controller in h.v2:
        return f"{h.unified}/{relative(cgroup)}"
    mount = h.v1.get(controller)
    return None if mount is None else f"{mount}/{relative(cgroup)}"


def read(path: str) -> str:
    """The file's text, without white space at its ends. Raises OSError."""
    return read_bytes(path).decode("utf-8", "replace").strip()


def read_or(path: str, default: str) -> str:
    """The same, and `default` where the file or its group is not there (ENODEV: removed between open and read)."""
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return default
    except OSError as error:
        if error.errno == errno.ENODEV:
            return default
        raise


def write(path: str, value: str) -> None:
    """Write in one call, as the kernel wants it. Raises OSError, with the file's name."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def field(text: str, name: str) -> int:
    """The number after `name` in a flat keyed file (`populated 1`); 0 where it is not there."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
