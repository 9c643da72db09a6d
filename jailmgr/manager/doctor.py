"""Whether the host has what jails need: a list of checks, each with its remedy. Changes nothing, needs no engine."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
from collections.abc import Callable
from typing import Literal

import msgspec

from jailmgr import claims
from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.manager.disk_guard import space_left
from jailmgr.manager.leftovers import find_leftovers
from jailmgr.manager.leftovers import fix as fix
from jailmgr.network import nft
from jailmgr.runtime import cgroups, syscalls
from jailmgr.storage.pool import MIN_SIZE, host_headroom
from jailmgr.store import Store
from jailmgr.units import format_size

Severity = Literal["error", "warning"]
SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"

KERNEL_MIN = (6, 1)
"""Debian 12's: overlay with idmapped layers in a user namespace (5.19), cgroup.kill (5.14), idmapped btrfs (5.15)."""
SQUOTA_MIN = (6, 7)

TOOLS: dict[str, tuple[str, Severity, str]] = {
    "mkfs.btrfs": ("btrfs-progs", "error", "makes the storage pool"),
    "dnsmasq": ("dnsmasq-base", "error", "names of jails"),
    "debootstrap": ("debootstrap", "warning", "builds Debian images"),
}
PROTOCOLS = "/etc/protocols"
LIBRARIES = {"nftables": "libnftables1", "seccomp": "libseccomp2"}
SYSCTLS = {
    "fs/inotify/max_user_instances": (1024, "each jail with systemd takes some 8 of its tenant's"),
    "fs/inotify/max_user_watches": (65536, "shared by the jails of a tenant"),
    "kernel/keys/maxkeys": (1000, "keyrings; shared by the jails of a tenant"),
    "kernel/pty/max": (1024, "a console takes one, each shell another"),
    "user/max_user_namespaces": (256, "a jail takes one"),
}
"""Least values for some hundred jails, and why."""


class Check(msgspec.Struct, frozen=True):
    """One check's outcome. `remedy` is empty where there is nothing to do."""

    check: str
    ok: bool
    severity: Severity
    detail: str
    remedy: str = ""


def doctor(root: Root) -> list[Check]:
    """All checks, in the order a host is set up."""
    groups: list[tuple[str, Callable[[], list[Check]]]] = [
        ("rights", _rights),
        ("kernel", _kernel),
        ("cgroups", _cgroups),
        ("nftables", _nftables),
        ("tools", _tools),
        ("sysctl", _sysctls),
        ("ids", _ids),
        ("disk", lambda: _disk(root)),
        ("store", lambda: _store(root)),
        ("leftovers", lambda: _leftovers(root)),
    ]
    found = []
    for name, look in groups:
        try:
            found += look()
        except JailmgrError as error:
            found.append(Check(name, False, "error", str(error), error.hint))
        except OSError as error:
            found.append(Check(name, False, "error", str(error)))
    return found


def _check(name: str, ok: bool, detail: str, remedy: str = "", severity: Severity = "error") -> Check:
    return Check(name, ok, severity, detail, "" if ok else remedy)


def _rights() -> list[Check]:
    return [_check("root", os.geteuid() == 0, f"uid {os.geteuid()}", "Run it as root.")]


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 18) of `6.18.44-arch1`."""
    major, _, rest = release.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return int(major), int(digits or 0)


def _kernel() -> list[Check]:
    release = platform.release()
    version = kernel_version(release)
    least = ".".join(map(str, KERNEL_MIN))
    found = [_check("kernel", version >= KERNEL_MIN, release, f"Linux {least} or newer is needed.")]
    for kind in ("user", "mnt", "pid", "net", "uts", "ipc", "cgroup", "time"):
        there = os.path.exists(f"/proc/self/ns/{kind}")
        found.append(
            _check(
                f"namespace {kind}", there, "there" if there else "missing", "A kernel with this namespace is needed."
            )
        )
    found.append(
        _check(
            "idmapped mounts",
            version >= (5, 19),
            "overlay's layers can be mapped" if version >= (5, 19) else f"not in {release}",
            "Linux 5.19 or newer is needed.",
        )
    )
    lacking = syscalls.missing()
    detail = f"missing: {', '.join(lacking)}" if lacking else f"all {len(syscalls.NEEDED)} are there"
    found.append(
        _check("system calls", not lacking, detail, f"Linux {least} or newer is needed, with no filter on it.")
    )
    for kind in ("overlay", "btrfs"):
        there, detail = _file_system(kind, release)
        found.append(_check(kind, there, detail, f"A kernel with {kind} is needed (modprobe {kind})."))
    simple = version >= SQUOTA_MIN
    found.append(
        _check(
            "simple quotas",
            simple,
            "btrfs counts by simple quotas"
            if simple
            else f"not in {release}: classic quota groups are used, which are slower",
            "Linux 6.7 or newer has them.",
            "warning",
        )
    )
    return found


def _file_system(kind: str, release: str) -> tuple[bool, str]:
    with open("/proc/filesystems", encoding="ascii") as file:
        if any(line.split()[-1] == kind for line in file):
            return True, "in the kernel"
    for listing in ("modules.dep", "modules.builtin"):
        try:
            with open(f"/lib/modules/{release}/{listing}", encoding="utf-8") as file:
                if any(f"/{kind}.ko" in line for line in file):
                    return True, "a module"
        except FileNotFoundError:
            continue
    return False, "missing"


def _cgroups() -> list[Check]:
    hierarchies = cgroups.discover()
    where = "Boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on /sys/fs/cgroup."
    found = [
        _check(
            "cgroup v2", bool(hierarchies.unified), hierarchies.unified or "not mounted", f"Guests see only it. {where}"
        )
    ]
    for controller in ("memory", "cpu", "pids"):
        if controller in hierarchies.v2:
            detail = f"v2, {hierarchies.unified}"
        else:
            detail = f"v1, {hierarchies.v1[controller]}" if controller in hierarchies.v1 else "missing"
        remedy = f"limits of {controller} need it; {where}"
        found.append(_check(f"cgroup {controller}", detail != "missing", detail, remedy[0].upper() + remedy[1:]))
    return found


def _nftables() -> list[Check]:
    try:
        nft.run([{"list": {"tables": None}}])
    except (JailmgrError, OSError) as error:
        return [
            _check("nftables", False, str(error), "Install it: apt install libnftables1; the kernel needs nf_tables.")
        ]
    there = os.path.exists(PROTOCOLS)
    detail = PROTOCOLS if there else f"no {PROTOCOLS}, where libnftables looks tcp and udp up"
    return [_check("nftables", True, "answers"), _check("protocols", there, detail, "apt install netbase")]


def _tools() -> list[Check]:
    found = []
    for tool, (package, severity, why) in TOOLS.items():
        path = shutil.which(tool, path=SBIN)
        found.append(_check(tool, path is not None, path or f"missing: {why}", f"apt install {package}", severity))
    for library, package in LIBRARIES.items():
        name = ctypes.util.find_library(library)
        found.append(_check(f"lib{library}", name is not None, name or "missing", f"apt install {package}"))
    return found


def _sysctls() -> list[Check]:
    found = []
    for path, (least, why) in SYSCTLS.items():
        name = path.replace("/", ".")
        try:
            with open(f"/proc/sys/{path}", encoding="ascii") as file:
                value = int(file.read())
        except FileNotFoundError:
            continue
        detail = f"{value}" if value >= least else f"{value}, less than {least}: {why}"
        found.append(_check(name, value >= least, detail, f"sysctl -w {name}={least}", "warning"))
    return found


def _ids() -> list[Check]:
    free = claims.LAST_ID - claims.FIRST_ID
    clash = []
    for path in claims.SUBORDINATE:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = [line.strip().split(":") for line in file]
        except FileNotFoundError:
            continue
        for fields in lines:
            if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
                start, count = int(fields[1]), int(fields[2])
                overlap = min(start + count, claims.LAST_ID) - max(start, claims.FIRST_ID)
                if overlap > 0:
                    clash.append(f"{path} gives {start} to {fields[0]}")
                    free -= overlap
    detail = f"{max(0, free) // claims.RANGE} ranges from {claims.FIRST_ID}" + (
        f"; {', '.join(clash[:2])}" if clash else ""
    )
    return [_check("id ranges", free > 64 * claims.RANGE, detail, "Move the ranges of /etc/subuid and /etc/subgid.")]


def _disk(root: Root) -> list[Check]:
    if os.path.exists(root.pool_file):
        writable = space_left(root)
        if writable is not None and writable <= 0:
            remedy = "Free some space on the host's disk: jails are held still until there is some."
            return [_check("disk", False, "the host's disk is nearly full", remedy)]
        left = host_headroom(root)
        detail = f"{format_size(max(0, left))} would be left on the host's disk with the pool full"
        remedy = "The host's disk can be full before the pool is: free some space."
        return [_check("disk", left > 0, detail, remedy, "warning")]
    at = root.lib
    while not os.path.isdir(at):
        at = os.path.dirname(at)
    found = os.statvfs(at)
    free = found.f_bavail * found.f_frsize
    enough = free > 4 * MIN_SIZE
    return [_check("disk", enough, f"{format_size(free)} free at {at}", f"{format_size(4 * MIN_SIZE)} are needed.")]


def _store(root: Root) -> list[Check]:
    if not os.path.exists(root.store):
        return [_check("store", True, "none yet")]
    store = Store(root.store)
    store.open_to_read()
    try:
        return [_check("store", True, f"{len(store.rows())} jails, {len(store.images())} images")]
    finally:
        store.close()


def _leftovers(root: Root) -> list[Check]:
    found = [leftover.what for leftover in find_leftovers(root)]
    detail = "none" if not found else f"{len(found)}: {', '.join(found[:8])}" + (", …" if len(found) > 8 else "")
    return [_check("leftovers", not found, detail, "jailmgr doctor --fix removes them.")]
