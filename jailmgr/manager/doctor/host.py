"""The host around the kernel: rights, tools, sysctls, security modules, ids, names."""

from __future__ import annotations

import ctypes.util
import os
import shutil

from jailmgr import claims
from jailmgr.keys import IDS
from jailmgr.manager import apparmor
from jailmgr.manager.doctor.check import SBIN, Check, Severity, check, read
from jailmgr.network import bridge
from jailmgr.runtime import apparmor as apparmor_kernel

TOOLS: dict[str, tuple[str, Severity, str]] = {
    "mkfs.btrfs": ("btrfs-progs", "error", "makes the storage pool"),
    "dnsmasq": ("dnsmasq-base", "error", "names of jails"),
    "debootstrap": ("debootstrap", "warning", "builds Debian images"),
    "busybox": ("busybox-static", "warning", "the busybox template"),
    "lxcfs": ("lxcfs", "warning", "jails see the host's memory, CPUs and load in place of their own"),
}
LIBRARIES = {"nftables": "libnftables1", "seccomp": "libseccomp2"}
SYSCTLS = {
    "fs.inotify.max_user_instances": (1024, "each jail with systemd takes some 8 of its tenant's"),
    "fs.inotify.max_user_watches": (65536, "shared by the jails of a tenant"),
    "kernel.keys.maxkeys": (1000, "keyrings; shared by the jails of a tenant"),
    "kernel.pty.max": (1024, "a console takes one, each shell another"),
    "user.max_user_namespaces": (256, "a jail takes one"),
} | {name: (least, "a table that all jails share: a start of a jail raises it") for name, least in bridge.ROOM.items()}
"""Least values for some hundred jails, and why. More is in the package's sysctl.d file."""
FUSE = "/dev/fuse"
RESOLV_CONF = "/etc/resolv.conf"
SELINUX = "/sys/fs/selinux/enforce"


def rights_checks() -> list[Check]:
    return [check("root", os.geteuid() == 0, f"uid {os.geteuid()}", "Run it as root.")]


def tool_checks() -> list[Check]:
    """Programs and libraries, each with its package."""
    found = []
    for tool, (package, severity, why) in TOOLS.items():
        path = shutil.which(tool, path=SBIN)
        found.append(check(tool, path is not None, path or f"missing: {why}", f"apt install {package}", severity))
    if shutil.which("lxcfs", path=SBIN) is not None:
        there = os.path.exists(FUSE)
        detail = FUSE if there else f"no {FUSE}, without which lxcfs serves nothing"
        found.append(check("fuse", there, detail, "modprobe fuse", "warning"))
    for library, package in LIBRARIES.items():
        name = ctypes.util.find_library(library)
        found.append(check(f"lib{library}", name is not None, name or "missing", f"apt install {package}"))
    return found


def sysctl_checks() -> list[Check]:
    found = []
    for name, (least, why) in SYSCTLS.items():
        value = _sysctl(name)
        if value is not None:
            detail = f"{value}" if value >= least else f"{value}, less than {least}: {why}"
            found.append(check(name, value >= least, detail, f"sysctl -w {name}={least}", "warning"))
    return found


def raise_sysctls() -> list[str]:
    """Set those that are below the least value to it, until the next boot; a line for each. Raises OSError."""
    done = []
    for name, (least, _) in SYSCTLS.items():
        value = _sysctl(name)
        if value is not None and value < least:
            with open(_path(name), "w", encoding="ascii") as file:
                file.write(str(least))
            done.append(f"{name} raised from {value} to {least}, until the host boots")
    return done


def _path(name: str) -> str:
    return f"/proc/sys/{name.replace('.', '/')}"


def _sysctl(name: str) -> int | None:
    text = read(_path(name))
    return int(text) if text.isdigit() else None


def security_checks() -> list[Check]:
    """Linux security modules: what confines jails besides namespaces, and what may be in their way."""
    if not apparmor_kernel.enabled():
        found = [check("AppArmor", True, "not on here: jails go without its profile")]
    elif apparmor.disabled():
        detail = f"on, but the profile is switched off in {apparmor.ETC}/disable"
        remedy = f"rm {apparmor.ETC}/disable/{apparmor_kernel.PROFILE}"
        found = [check("AppArmor", False, detail, remedy, "warning")]
    else:
        parser = apparmor.find_parser()
        loaded = "its profile for jails is loaded" if apparmor_kernel.loaded() else "the first jail loads its profile"
        detail = f"on, {loaded}" if parser else "on, but its profile for jails can't be loaded: no apparmor_parser"
        found = [check("AppArmor", bool(parser), detail, "apt install apparmor", "warning")]
    if (enforcing := read(SELINUX)) in ("0", "1"):
        detail = "enforcing, with no policy for jails" if enforcing == "1" else "permissive"
        remedy = "Where it refuses something to a jail (ausearch -m avc): setenforce 0."
        found.append(check("SELinux", enforcing == "0", detail, remedy, "warning"))
    return found


def id_checks() -> list[Check]:
    """Ranges of ids for jails, of which none may be another's by subuid(5) or subgid(5)."""
    clash = []
    for path in claims.SUBORDINATE:
        for fields in (line.split(":") for line in read(path).splitlines()):
            if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
                start, count = int(fields[1]), int(fields[2])
                if any(start < end and first < start + count for first, end in claims.REGIONS):
                    clash.append(f"{path} gives {start} to {fields[0]}")
    ranges = claims.count_ranges(IDS)
    detail = f"{ranges} ranges of {IDS} ids" + (f"; {', '.join(clash[:2])}" if clash else "")
    return [check("id ranges", ranges > 64, detail, "Move the ranges of /etc/subuid and /etc/subgid.")]


def name_checks() -> list[Check]:
    """A resolver of the host's, to which the jails' one passes on what it doesn't know."""
    servers = [
        line.split()[1]
        for line in read(RESOLV_CONF).splitlines()
        if line.split()[:1] == ["nameserver"] and line.split()[1:]
    ]
    detail = ", ".join(servers) or f"no nameserver in {RESOLV_CONF}: jails know each other's names only"
    return [check("resolver", bool(servers), detail, f"Name one in {RESOLV_CONF}.", "warning")]
