"""Limits, device rules and counts of a group, behind one form for cgroup v1 and v2.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/{memory,devices,pids}.rst and
scheduler/sched-bwc.rst. For groups of jails (`ROOT/TENANT/JAIL`) and tenants (`ROOT/TENANT`). Standard library only.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime import device_bpf
from jailmgr.runtime.cgroup_cpuset import pin
from jailmgr.runtime.cgroup_hierarchies import Hierarchies, directory, field, read, read_or, relative, write

PERIOD_US = 100_000
"""The kernel's default of cpu.cfs_period_us and cpu.max."""
WEIGHT = 100
"""The kernel's default of cpu.weight; v1's cpu.shares has 1024 for it."""


class IoLimit(NamedTuple):
    """What a group may read from and write to a block device, page cache written back included; None is no limit."""

    device: str
    """`MAJOR:MINOR` of a whole disk or a loop device, not of a partition."""
    read_bps: int | None = None
    """Bytes a second."""
    write_bps: int | None = None
    read_iops: int | None = None
    """Operations a second."""
    write_iops: int | None = None


class Limits(NamedTuple):
    """What a group may use; None is no limit."""

    memory: int | None = None
    """Bytes."""
    swap: int | None = None
    """Bytes of swap, beside the memory."""
    cpu_quota: int | None = None
    """Microseconds of CPU time in each period, 1000 or more."""
    cpu_period: int | None = None
    """Microseconds, 1000 to 1000000; None is 100 ms."""
    cpu_weight: int | None = None
    """1 to 10000, as v2's cpu.weight; None is 100."""
    processes: int | None = None
    """Threads count as well."""
    io: IoLimit | None = None
    memory_min: int | None = None
    """Bytes that are not taken from it for the sake of others; v2 only."""
    cpus: str | None = None
    """The CPUs it runs on, as a list of the kernel's: `0-2,5`; not so on a host without a cpuset controller."""


class Write(NamedTuple):
    """A value for a file of the group."""

    path: str
    value: str


DEFAULT_DEVICES: tuple[dict[str, Any], ...] = (
    {"allow": False, "access": "rwm"},
    {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
    {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
    {"allow": True, "type": "c", "major": 1, "minor": 7, "access": "rwm"},
    {"allow": True, "type": "c", "major": 1, "minor": 8, "access": "rwm"},
    {"allow": True, "type": "c", "major": 1, "minor": 9, "access": "rwm"},
    {"allow": True, "type": "c", "major": 5, "minor": 0, "access": "rwm"},
    {"allow": True, "type": "c", "major": 5, "minor": 1, "access": "rwm"},
    {"allow": True, "type": "c", "major": 5, "minor": 2, "access": "rwm"},
    {"allow": True, "type": "c", "major": 136, "access": "rwm"},
)
"""OCI `linux.resources.devices`: null zero full random urandom tty console ptmx pts/* (devices.txt), no more."""


def set_limits(h: Hierarchies, cgroup: str, limits: Limits) -> None:
    """Set all limits of a group, of one with running processes too. What was set before a failure is undone.

    Raises JailmgrError: `conflict` where the memory in use is above the limit and can't be given back, or (v1) where
    the CPU quota is above the tenant's or a tenant's below that of one of its jails; `unavailable` where the host lacks
    what a limit needs; `invalid`. Processes above their limit are left alone, but nothing in the group can fork then.
    """
    done: list[Write] = []
    path = ""
    try:
        for path, value in plan_limits(h, cgroup, limits):
            before = _io_before(path, value) if path.endswith("/io.max") else _normal(read(path))
            if before == value:
                continue
            if path.endswith("/memory.max"):
                _reclaim(cgroup, path, value)
            write(path, value)
            done.append(Write(path, before))
        path = "cpuset.cpus"
        pin(h, cgroup, limits.cpus)
    except (OSError, JailmgrError) as error:
        for step in reversed(done):
            write(step.path, step.value)
        if isinstance(error, JailmgrError):
            raise
        raise _refusal(cgroup, limits, path, error) from error


def plan_limits(h: Hierarchies, cgroup: str, limits: Limits) -> list[Write]:
    """What `set_limits` would write, in order; a value that is there already is skipped when carried out.

    Reads the present values on v1, where one limit may not pass another on the way. Raises JailmgrError, OSError.
    """
    period = limits.cpu_period or PERIOD_US
    if limits.cpu_quota is not None and (limits.cpu_quota < 1000 or not 1000 <= period <= 1_000_000):
        why = f"{limits.cpu_quota} us in each {period} us is more or less than the kernel takes"
        raise JailmgrError(f"CPU limit of {cgroup}", why, "Periods are 1 ms to 1 s, shares 1 ms or more.", "invalid")
    check_limits(h, cgroup, limits)
    steps: list[Write] = []
    memory = directory(h, "memory", cgroup)
    if memory is not None:
        steps += (_memory_v2 if "memory" in h.v2 else _memory_v1)(cgroup, memory, limits)
    cpu = directory(h, "cpu", cgroup)
    if cpu is not None:
        steps += (_cpu_v2 if "cpu" in h.v2 else _cpu_v1)(cpu, limits.cpu_quota, period, limits.cpu_weight or WEIGHT)
    pids = directory(h, "pids", cgroup)
    if pids is not None:
        steps.append(Write(f"{pids}/pids.max", _value(limits.processes)))
    if "io" in h.v2:
        steps += _io_v2(f"{directory(h, 'io', cgroup)}/io.max", limits.io)
    return steps


def check_limits(h: Hierarchies, cgroup: str, limits: Limits) -> None:
    """Refuse limits that this host has nothing to hold them by: JailmgrError `unavailable`. Touches no group."""
    asked = {
        "memory": limits.memory is not None or limits.swap is not None,
        "cpu": limits.cpu_quota is not None,
        "pids": limits.processes is not None,
    }
    for controller in (name for name, wanted in asked.items() if wanted and directory(h, name, cgroup) is None):
        raise JailmgrError(
            f"limits of {cgroup}",
            f"this host has no cgroup controller for {controller}",
            "`jailmgr doctor` tells what the kernel lacks and how to switch it on.",
            "unavailable",
        )
    if limits.memory_min is not None and "memory" not in h.v2:
        raise JailmgrError(
            f"memory kept for {cgroup}",
            "cgroup v1, which has this host's memory controller, can't keep any",
            "Boot with systemd.unified_cgroup_hierarchy=1, or do without limits.memory.min.",
            "unavailable",
        )
    if limits.io is not None and "io" not in h.v2:
        raise JailmgrError(
            f"I/O limit of {cgroup}",
            "cgroup v1's controller, which this host has, doesn't hold what is written by way of the page cache",
            "Boot with systemd.unified_cgroup_hierarchy=1, or do without limits.read, .write, .max and limits.io.",
            "unavailable",
        )


def _value(limit: object, unlimited: str = "max") -> str:
    return unlimited if limit is None else str(limit)


def _normal(text: str) -> str:
    """v1 tells no limit of memory as the largest multiple of the page size below 2**63, and takes -1 for it."""
    return "-1" if len(text) >= 19 and text.isdigit() and int(text) >= 2**62 else text


def _memory_v2(cgroup: str, path: str, limits: Limits) -> list[Write]:
    steps = [
        Write(f"{path}/memory.max", _value(limits.memory)),
        Write(f"{path}/memory.min", str(limits.memory_min or 0)),
    ]
    if _counts_swap(cgroup, f"{path}/memory.swap.max", limits):
        steps.append(Write(f"{path}/memory.swap.max", _value(limits.swap)))
    return steps


def _memory_v1(cgroup: str, path: str, limits: Limits) -> list[Write]:
    """memsw is memory and swap together, and may never be below memory: which goes first depends on where they are."""
    steps = [Write(f"{path}/memory.limit_in_bytes", _value(limits.memory, "-1"))]
    if _counts_swap(cgroup, f"{path}/memory.memsw.limit_in_bytes", limits):
        both = None if limits.memory is None or limits.swap is None else limits.memory + limits.swap
        at = Write(f"{path}/memory.memsw.limit_in_bytes", _value(both, "-1"))
        steps.insert(0 if both is None or both >= int(read(steps[0].path)) else 1, at)
    return steps


def _counts_swap(cgroup: str, path: str, limits: Limits) -> bool:
    """Kernels booted with swapaccount=0 have no such file; on a host that has no swap, that is as good as a limit."""
    if os.path.exists(path):
        return True
    if limits.swap is not None and len(read_or("/proc/swaps", "").splitlines()) > 1:
        raise JailmgrError(
            f"swap limit of {cgroup}",
            "this kernel does not count swap",
            "Boot the host with swapaccount=1, or without swap.",
            "unavailable",
        )
    return False


def _cpu_v2(path: str, quota: int | None, period: int, weight: int) -> list[Write]:
    return [Write(f"{path}/cpu.max", f"{_value(quota)} {period}"), Write(f"{path}/cpu.weight", str(weight))]


def _cpu_v1(path: str, quota: int | None, period: int, weight: int) -> list[Write]:
    """The kernel checks quota/period against the tenant's at every write: a new period goes in while there is none."""
    steps = []
    if read(f"{path}/cpu.cfs_period_us") != str(period):
        steps = [Write(f"{path}/cpu.cfs_quota_us", "-1"), Write(f"{path}/cpu.cfs_period_us", str(period))]
    steps.append(Write(f"{path}/cpu.cfs_quota_us", _value(quota, "-1")))
    steps.append(Write(f"{path}/cpu.shares", str(min(max(weight * 1024 // 100, 2), 262144))))
    return steps


def _io_v2(path: str, limit: IoLimit | None) -> list[Write]:
    """What was set for other devices goes: a pool's loop device may be another one than when it was set."""
    devices = [line.split()[0] for line in read_or(path, "").splitlines()]
    wanted = {device: IoLimit(device) for device in devices} | ({limit.device: limit} if limit is not None else {})
    return [Write(path, _io_line(each)) for each in wanted.values()]


def _io_line(limit: IoLimit) -> str:
    """As io.max is read and written (cgroup-v2.rst, "IO Interface Files")."""
    values = zip(("rbps", "wbps", "riops", "wiops"), limit[1:], strict=True)
    return " ".join([limit.device, *(f"{name}={_value(value)}" for name, value in values)])


def _io_before(path: str, value: str) -> str:
    device = value.split()[0]
    return next((line for line in read(path).splitlines() if line.split()[0] == device), _io_line(IoLimit(device)))


def _reclaim(cgroup: str, path: str, value: str) -> None:
    """Below its use, v2 would kill to meet a new memory.max, where v1 refuses: give back caches first, then refuse too.

    memory.reclaim is Linux 5.19's; it gives EAGAIN when it could not free as much.
    """
    group = path.removesuffix("/memory.max")
    if value == "max":
        return
    used = int(read(f"{group}/memory.current"))
    if used <= int(value):
        return
    try:
        write(f"{group}/memory.reclaim", str(used - int(value)))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOENT):
            raise
    used = int(read(f"{group}/memory.current"))
    if used > int(value):
        raise _below_use(cgroup, used, int(value))


def _below_use(cgroup: str, used: int, limit: int) -> JailmgrError:
    return JailmgrError(
        f"memory limit of {cgroup}",
        f"{_mebibytes(used)} are in use and can't be given back, the limit would be {_mebibytes(limit)}",
        "Stop something in there first, or choose a higher limit.",
        "conflict",
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _refusal(cgroup: str, limits: Limits, path: str, error: OSError) -> JailmgrError:
    group, _, name = path.rpartition("/")
    if error.errno == errno.EBUSY and name.startswith("memory."):
        counter = "memory.memsw.usage_in_bytes" if "memsw" in name else "memory.usage_in_bytes"
        used = int(read_or(f"{group}/{counter}", "0"))
        return _below_use(cgroup, used, (limits.memory or 0) + (limits.swap or 0 if "memsw" in name else 0))
    if error.errno == errno.EINVAL and name.startswith("cpu.cfs"):
        return _above_tenant(cgroup, limits, group.rpartition("/")[0])
    return from_os(f"limits of {cgroup}", error)


def _above_tenant(cgroup: str, limits: Limits, tenant: str) -> JailmgrError:
    quota, period = limits.cpu_quota or 0, limits.cpu_period or PERIOD_US
    bound = int(read_or(f"{tenant}/cpu.cfs_quota_us", "-1"))
    bound_period = int(read_or(f"{tenant}/cpu.cfs_period_us", str(PERIOD_US)))
    why = f"{quota} us in each {period} us is below what a jail in it has"
    if bound > 0 and quota / period > bound / bound_period:
        why = f"{quota} us in each {period} us is above the tenant's {bound} us in each {bound_period} us"
    return JailmgrError(f"CPU limit of {cgroup}", why, "Change the other limit first.", "conflict")


def device_rules(h: Hierarchies, cgroup: str, rules: Iterable[Mapping[str, Any]] = DEFAULT_DEVICES) -> bool:
    """Let the group open and make these devices only: by v1's controller, else by BPF on v2. False where neither is.

    `rules`: OCI's `linux.resources.devices`, in order; a rule without `type` is for all devices, one without `major` or
    `minor` for all numbers. The kernel takes no change of the first rule's kind once the group has groups below it.
    Raises JailmgrError.
    """
    path = directory(h, "devices", cgroup)
    if path is None:
        return _device_program(h, cgroup, rules)
    files: dict[bool, int] = {}
    try:
        for allow, name in ((True, "devices.allow"), (False, "devices.deny")):
            files[allow] = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        for rule in rules:
            numbers = f"{rule.get('major', '*')}:{rule.get('minor', '*')}"
            line = f"{rule.get('type', 'a')} {numbers} {rule.get('access', 'rwm')}"
            os.write(files[bool(rule["allow"])], line.encode())
    except OSError as error:
        raise from_os(f"device rules of {cgroup}", error) from error
    finally:
        for fd in files.values():
            os.close(fd)
    return True


def _device_program(h: Hierarchies, cgroup: str, rules: Iterable[Mapping[str, Any]]) -> bool:
    if not h.unified:
        return False
    try:
        device_bpf.attach(f"{h.unified}/{relative(cgroup)}", rules)
    except OSError as error:
        raise from_os(f"device rules of {cgroup}", error) from error
    return True


def usage(h: Hierarchies, cgroup: str) -> tuple[int | None, int | None, int | None]:
    """Memory in bytes (page cache included), CPU time in ns, threads, of the group and all below; None if not known."""
    if h.unified:
        stat = read_or(f"{h.unified}/{relative(cgroup)}/cpu.stat", "")
        cpu = field(stat, "usage_usec") * 1000 if stat else None
    else:
        cpu = _number(h, "cpuacct", cgroup, "cpuacct.usage")
    return memory_usage(h, cgroup), cpu, _number(h, "pids", cgroup, "pids.current")


def memory_usage(h: Hierarchies, cgroup: str) -> int | None:
    """Return the memory of the group and all below in bytes, page cache included; None if not known."""
    return _number(h, "memory", cgroup, "memory.current" if "memory" in h.v2 else "memory.usage_in_bytes")


def _number(h: Hierarchies, controller: str, cgroup: str, name: str) -> int | None:
    path = directory(h, controller, cgroup)
    text = "" if path is None else read_or(f"{path}/{name}", "")
    return int(text) if text else None


def oom_kills(h: Hierarchies, cgroup: str) -> int:
    """Processes of the group that the kernel killed for want of memory since the group was made; 0 where not known."""
    path = directory(h, "memory", cgroup)
    if path is None:
        return 0
    name = "memory.events" if "memory" in h.v2 else "memory.oom_control"
    return field(read_or(f"{path}/{name}", ""), "oom_kill")
