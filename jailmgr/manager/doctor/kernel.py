"""What of the kernel jails need: system calls, namespaces, file systems, cgroup controllers and where each is."""

from __future__ import annotations

import os
import platform
import shutil

from jailmgr.manager.doctor.check import SBIN, Check, check, read
from jailmgr.runtime import cgroups, syscalls
from jailmgr.runtime.cgroup_hierarchies import SYSTEMD

KERNEL_MIN = (6, 1)
"""Debian 12's: overlay with idmapped layers (5.19), cgroup.kill (5.14), idmapped btrfs (5.15)."""
SQUOTA_MIN = (6, 7)

MODULES = {
    "overlay": "jails share their image by it",
    "btrfs": "the storage pool",
    "loop": "the pool lies in a file",
    "veth": "a jail's interface",
    "bridge": "a tenant's network",
}
TRAFFIC = {"ifb": "ifb", "sch_htb": "htb", "cls_bpf": "cls_bpf", "act_mirred": "tcf_mirred"}
"""What rates of NICs and tenants need: modules, and how their symbols begin where they are built in."""
BOOT_V2 = "Boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on /sys/fs/cgroup."
CONTROLLERS = {
    "memory": "limits.memory",
    "cpu": "limits.cpu",
    "pids": "limits.processes",
    "io": "root.limits.read, limits.write, limits.max and a tenant's limits.io",
}


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 18) of `6.18.44-arch1`."""
    major, _, rest = release.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return int(major), int(digits or 0)


def kernel_checks() -> list[Check]:
    """Version, system calls, namespaces, what is built in or a module."""
    release = platform.release()
    version, least = kernel_version(release), ".".join(map(str, KERNEL_MIN))
    found = [check("kernel", version >= KERNEL_MIN, release, f"Linux {least} or newer is needed.")]
    lacking = syscalls.missing()
    detail = f"missing: {', '.join(lacking)}" if lacking else f"all {len(syscalls.NEEDED)} are there"
    remedy = f"Linux {least} or newer is needed, with no filter on it."
    found.append(check("system calls", not lacking, detail, remedy))
    for kind in ("user", "mnt", "pid", "net", "uts", "ipc", "cgroup", "time"):
        there = os.path.exists(f"/proc/self/ns/{kind}")
        detail = "there" if there else "missing"
        found.append(check(f"namespace {kind}", there, detail, "A kernel with this namespace is needed."))
    mapped = version >= (5, 19)
    detail = "overlay's layers can be mapped" if mapped else f"not in {release}"
    found.append(check("idmapped mounts", mapped, detail, "Linux 5.19 or newer is needed."))
    actions = read("/proc/sys/kernel/seccomp/actions_avail")
    detail = "filters system calls" if actions else "missing"
    found.append(check("seccomp", bool(actions), detail, "A kernel with CONFIG_SECCOMP_FILTER is needed."))
    for name, why in MODULES.items():
        there, detail = _module(name, release)
        found.append(check(name, there, detail if there else f"{detail}: {why}", f"modprobe {name}"))
    lacking = [
        name for name, symbol in TRAFFIC.items() if not (_module(name, release)[0] or _module(symbol, release)[0])
    ]
    detail = f"missing: {', '.join(lacking)}: rates of NICs and tenants are refused" if lacking else "all is there"
    found.append(check("traffic control", not lacking, detail, f"modprobe -a {' '.join(lacking)}", "warning"))
    simple = version >= SQUOTA_MIN
    detail = (
        "btrfs counts by simple quotas" if simple else f"not in {release}: classic groups are used, which are slower"
    )
    found.append(check("simple quotas", simple, detail, "Linux 6.7 or newer has them.", "warning"))
    return found


def _module(name: str, release: str) -> tuple[bool, str]:
    """Loaded, built in, or there to be loaded by the kernel when it is asked for."""
    systems = {line.split()[-1] for line in read("/proc/filesystems").splitlines()}
    if (
        name in systems
        or os.path.isdir(f"/sys/module/{name}")
        or (name == "loop" and os.path.exists("/dev/loop-control"))
    ):
        return True, "in the kernel"
    for listing in ("modules.dep", "modules.builtin"):
        if f"/{name}.ko" in read(f"/lib/modules/{release}/{listing}"):
            return True, "a module"
    # What is built in and takes no parameter is told nowhere else.
    return (True, "in the kernel") if f" {name}_" in read("/proc/kallsyms") else (False, "missing")


def cgroup_checks() -> list[Check]:
    """Each controller, and in which hierarchy it was found; on a host with systemd, what it takes to have a scope."""
    h = cgroups.discover()
    there = bool(h.unified)
    found = [check("cgroup v2", there, h.unified or "not mounted", f"Guests see only it. {BOOT_V2}")]
    for controller, keys in CONTROLLERS.items():
        place = f"v2, {h.unified}" if controller in h.v2 else f"v1, {h.v1[controller]}" if controller in h.v1 else ""
        if controller == "io":
            detail = place or f"not of v2 here: {keys} are refused"
            found.append(check("cgroup io", bool(place), detail, BOOT_V2, "warning"))
        else:
            detail = place or f"missing: {keys} is refused"
            found.append(check(f"cgroup {controller}", bool(place), detail, f"It is needed for {keys}; {BOOT_V2}"))
    devices = f"v1, {h.v1['devices']}" if "devices" in h.v1 else "v2, by BPF programs" if there else ""
    found.append(check("cgroup devices", bool(devices), devices or "missing", BOOT_V2))
    freezer = "v2, cgroup.freeze" if there else f"v1, {h.v1['freezer']}" if "freezer" in h.v1 else ""
    found.append(check("cgroup freezer", bool(freezer), freezer or "missing: pause is refused", BOOT_V2, "warning"))
    if closed := cgroups.not_writable():
        detail = f"{', '.join(closed)} can't be written: jails see the names of the groups in it"
        found.append(check("cgroup names", False, detail, "Mount it for writing.", "warning"))
    if SYSTEMD:
        program = shutil.which("systemd-run", path=SBIN)
        detail = f"jailmgr.slice/jailmgr.scope, by {program}" if program else "no systemd-run"
        found.append(check("systemd scope", program is not None, detail, "apt install systemd"))
    return found
