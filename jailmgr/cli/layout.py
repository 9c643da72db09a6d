"""Jails as people read them: the table of `list`, the page of `info`."""

from __future__ import annotations

import time

from jailmgr.cli.output import GAP, fields, table
from jailmgr.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    View = dict[str, Any]
    """A model.JailView or JailInfo, as JSON has it."""


def jail_table(views: list[View], with_tenant: bool) -> str:
    """`list`: usage beside its limit, as `21.3MiB/512MiB`."""
    header = ["NAME", "STATUS", "IPV4", "IPV6", "IMAGE", "MEMORY", "CPU", "PROCS", "DISK"]
    rows = [_row(view) for view in views]
    if with_tenant:
        header.insert(0, "TENANT")
        rows = [[view["tenant"], *row] for view, row in zip(views, rows, strict=True)]
    return table(header, rows)


def _row(view: View) -> list[str]:
    usage, limits = view.get("usage") or {}, view.get("limits") or {}
    return [
        view["name"],
        view["status"],
        view.get("ipv4") or "-",
        view.get("ipv6") or "-",
        image_name(view),
        beside(format_size(usage.get("memory_bytes")), limits.get("memory_bytes"), format_size),
        beside(cpu_time(usage.get("cpu_ns")), limits.get("cpu"), cpus),
        beside(_number(usage.get("processes")), limits.get("processes"), str),
        beside(format_size(usage.get("disk_bytes")), limits.get("disk_bytes"), format_size),
    ]


def beside(used: str, limit: Any, show: Any) -> str:
    """`21.3MiB/512MiB`; what is used alone where there is no limit."""
    return used if limit is None else f"{used}/{show(limit)}"


def image_name(view: View) -> str:
    """What the jail was made from, as the user named it; else the start of the image's fingerprint."""
    return str(view.get("source") or str(view.get("image") or "-")[:12])


def cpu_time(nanoseconds: int | None) -> str:
    """CPU time used: `0.4s`, `12s`, `3m05s`, `2h10m`."""
    if nanoseconds is None:
        return "-"
    seconds = nanoseconds / 1e9
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def cpus(limit: float) -> str:
    """A limit of CPUs: `2cpu`, `1.5cpu`."""
    return f"{limit:g}cpu"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def local_time(at: float | str | None) -> str:
    """Seconds since the epoch, or RFC 3339, in the host's time zone: `2026-01-31 08:15:02 +0100`."""
    if at is None:
        return "-"
    if isinstance(at, str):
        from datetime import datetime

        try:
            at = datetime.fromisoformat(at).timestamp()
        except ValueError:
            return str(at)
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(at))


def span(seconds: float) -> str:
    """A span for people: `8 s`, `12 min`, `5 h 3 min`, `9 d 4 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def ending(last: View | None) -> str:
    """`poweroff by guest at …`, `exit 1 by guest at …`, `signal 9 (SIGKILL) by admin at …`, and why it was killed."""
    if not last:
        return "-"
    what = str(last.get("kind", "unknown"))
    if what == "exit":
        what = f"exit {last.get('status', 0)}"
    elif what == "signal":
        what = signal_name(int(last.get("status", 0)))
    late = ", init had not ended in time" if last.get("timed_out") else ""
    return f"{what} by {last.get('by', 'unknown')} at {local_time(last.get('at'))}{late}"


def signal_name(number: int) -> str:
    """`signal 9 (SIGKILL)`; a number with no name stands alone."""
    import signal

    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def jail_page(info: View) -> str:
    """`info`: what it is, what it uses, where its parts are, how it last ended."""
    usage, limits = info.get("usage") or {}, info.get("limits") or {}
    status = info["status"]
    if info.get("started_at"):
        status += f" since {local_time(info['started_at'])}{_age(info['started_at'])}"
    what = [
        ("Name", info["name"]),
        ("Tenant", info["tenant"]),
        ("Status", status),
        ("Image", f"{image_name(info)} ({str(info.get('image') or '-')[:12]})"),
        ("Created", local_time(info.get("created_at"))),
        ("Last ended", ending(info.get("last_ended"))),
        ("Restarts", str(info.get("restarts", 0))),
        ("IPv4", info.get("ipv4") or "-"),
        ("IPv6", info.get("ipv6") or "-"),
    ]
    for index, port in enumerate(info.get("ports") or []):
        what.append(("Ports" if index == 0 else "", published(port)))
    using = [
        ("Memory", _of(format_size(usage.get("memory_bytes")), limits.get("memory_bytes"), format_size)),
        ("CPU", _of(cpu_time(usage.get("cpu_ns")), limits.get("cpu"), lambda limit: f"{limit:g} CPUs", ", at most ")),
        ("Processes", _of(_number(usage.get("processes")), limits.get("processes"), str)),
        ("Disk", _of(format_size(usage.get("disk_bytes")), limits.get("disk_bytes"), format_size)),
    ]
    where = [
        ("Init", _process(info.get("init_pid"))),
        ("Supervisor", _process(info.get("supervisor_pid"))),
        ("Network", info.get("netns") or "-"),
        ("Root", info.get("rootfs") or "-"),
        ("Console log", info.get("log") or "-"),
        ("Pool", info.get("pool") or "-"),
        ("Ids", info.get("idmap") or "-"),
        ("UUID", info.get("uuid") or "-"),
        ("AppArmor", info.get("apparmor") or "-"),
    ]
    by_directory: dict[str, list[str]] = {}
    for controller, directory in (info.get("cgroups") or {}).items():
        by_directory.setdefault(directory, []).append(controller or "unified")
    groups = [(", ".join(controllers), directory) for directory, controllers in by_directory.items()]
    config = [(key, value) for key, value in flat_keys(info).items()]
    sections = [
        ("", what),
        ("Usage", using),
        ("On the host", where),
        ("Control groups", groups),
        ("Configuration", config),
    ]
    return "\n".join(_section(title, pairs) for title, pairs in sections if pairs)


def _section(title: str, pairs: list[tuple[str, str]]) -> str:
    if not title:
        return fields(pairs)
    return f"{title}\n" + "".join(f"{GAP}{line}\n" for line in fields(pairs).splitlines())


def _of(used: str, limit: Any, show: Any, word: str = " of ") -> str:
    return used if limit is None else f"{used}{word}{show(limit)}"


def _process(pid: int | None) -> str:
    return "-" if pid is None else f"process {pid}"


def _age(started_at: float | str) -> str:
    from datetime import datetime

    try:
        began = started_at if isinstance(started_at, float | int) else datetime.fromisoformat(started_at).timestamp()
    except ValueError:
        return ""
    return f" ({span(time.time() - began)})"


def published(port: View) -> str:
    """`192.0.2.1:8080 -> 80/tcp`; `*` for every address of the host."""
    address = port.get("host_address") or "*"
    if ":" in address:
        address = f"[{address}]"
    return f"{address}:{port['host_port']} -> {port['port']}/{port['protocol']}"


def flat_keys(view: View) -> dict[str, str]:
    """Configuration and devices as `set` takes them: `limits.memory`, `root.size`, `eth0.ipv4.address`."""
    flat = dict(sorted((view.get("config") or {}).items()))
    for device, keys in sorted((view.get("devices") or {}).items()):
        flat.update({f"{device}.{key}": value for key, value in sorted(keys.items()) if key != "type"})
    return flat
