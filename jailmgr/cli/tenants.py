"""tenant create, list, show, set, get, unset, usage, delete."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

import typer

from jailmgr.cli.client import ensure_engine, existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.jails import Cpus, Keys, Memory, Processes
from jailmgr.cli.layout import beside, cpu_time, local_time
from jailmgr.cli.output import agree, fields, show, table
from jailmgr.cli.request import merge, own_limits, split_pair
from jailmgr.cli.settings import Settings, check_label, wrong_usage
from jailmgr.units import format_size

Name = Annotated[str, typer.Argument(metavar="NAME", help="A tenant.")]
Disk = Annotated[str | None, typer.Option("--disk", metavar="SIZE", help="For all of its volumes, such as 100GiB.")]
Jails = Annotated[int | None, typer.Option("--jails", metavar="N", min=0, help="limits.instances.")]

SIZED = ("memory_bytes", "disk_bytes")
TITLES = {
    "instances": "Jails",
    "memory_bytes": "Memory",
    "cpu": "CPUs",
    "processes": "Processes",
    "disk_bytes": "Disk",
    "networks": "Networks",
    "snapshots": "Snapshots",
    "ports": "Ports",
    "ids": "Ids",
}


def add(app: typer.Typer) -> None:
    """Add the commands to the noun's app."""
    command(app, example="jailmgr tenant create acme --memory 8GiB --cpus 4 --disk 100GiB --jails 20")(create)
    command(app, "list", example="jailmgr tenant list --format json")(list_)
    command(app, "show", example="jailmgr tenant show acme")(show_)
    command(app, "set", example="jailmgr tenant set acme limits.memory=16GiB users=alice,bob")(set_)
    command(app, example="jailmgr tenant get acme limits.memory")(get)
    command(app, example="jailmgr tenant unset acme limits.memory")(unset)
    command(app, example="jailmgr tenant usage --since 30d --format csv")(usage)
    command(app, example="jailmgr tenant delete acme")(delete)


def create(
    settings: Settings,
    name: Name,
    memory: Memory = None,
    cpus: Cpus = None,
    disk: Disk = None,
    jails: Jails = None,
    processes: Processes = None,
    config: Keys = None,
) -> int:
    """Make a tenant, with totals that hold over all of its jails together."""
    check_label("tenant", name)
    own = own_limits(memory, cpus, processes)
    if disk is not None:
        own["limits.disk"] = disk
    if jails is not None:
        own["limits.instances"] = str(jails)
    keys = dict(split_pair(text, "-c") for text in config or [])
    merge(keys, own)
    made = ensure_engine(settings.root).call("POST", "/1.0/projects", {"name": name, "config": keys})
    show(settings, made, lambda: name)
    return 0


def list_(settings: Settings) -> int:
    """List the tenants: what their jails use now, beside their totals."""
    found = existing_engine(settings.root).call("GET", "/1.0/projects?recursion=1")
    show(settings, found, lambda: _table(found))
    return 0


def show_(settings: Settings, name: Name) -> int:
    """Show a tenant: total, promise and use of each resource, and its keys."""
    tenant = _look(settings, name)
    show(settings, tenant, lambda: _page(tenant))
    return 0


def set_(
    settings: Settings,
    name: Name,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="Keys and their new values.")],
) -> int:
    """Set keys of a tenant. Limits hold at once, for running jails too; restrictions for what is asked for later."""
    return _change(settings, name, dict(split_pair(text, "") for text in pairs))


def unset(
    settings: Settings,
    name: Name,
    keys: Annotated[list[str], typer.Argument(metavar="KEY", help="Keys to take away.")],
) -> int:
    """Take keys of a tenant away."""
    return _change(settings, name, dict.fromkeys(keys))


def get(
    settings: Settings, name: Name, key: Annotated[str, typer.Argument(metavar="KEY", help="The key to show.")]
) -> int:
    """Show a key's value. An empty line where it is not set."""
    value = _look(settings, name)["config"].get(key)
    if value is None:
        from jailmgr.tenant_keys import find_tenant_key

        find_tenant_key(key)
    show(settings, value, lambda: f"{value or ''}\n")
    return 0


def usage(
    settings: Settings,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A tenant.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="A date, a time, or how long ago (1h, 30d).")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="The same; else now.")] = None,
) -> int:
    """Show what tenants use now, beside their totals and promises; with --since or --until what they have used."""
    if name is not None:
        check_label("tenant", name)
    if since is not None or until is not None:
        return _billed(settings, name, since, until)
    if name is not None:
        found = [_look(settings, name)]
    else:
        found = existing_engine(settings.root).call("GET", "/1.0/projects?recursion=1")
    show(settings, found, lambda: _usage_table(found))
    return 0


def _billed(settings: Settings, name: str | None, since: str | None, until: str | None) -> int:
    now = time.time()
    began, ended = _time("--since", since, now, 0.0), min(_time("--until", until, now, now), now)
    if began > ended:
        raise wrong_usage("tenant usage", "the span ends before it begins", "Give --since an earlier time.")
    whose = f"&project={name}" if name else ""
    found = existing_engine(settings.root).call("GET", f"/internal/usage?since={began:.3f}&until={ended:.3f}{whose}")
    if settings.format == "csv":
        rows = [
            {"tenant": tenant["tenant"], "since": tenant["since"], "until": tenant["until"], **jail}
            for tenant in found
            for jail in tenant["jails"]
        ]
        show(settings, rows, lambda: "")
    else:
        show(settings, found, lambda: _bill_table(found))
    return 0


def _time(option: str, text: str | None, now: float, default: float) -> float:
    if text is None:
        return default
    from jailmgr.times import parse_time

    try:
        return parse_time(text, now)
    except ValueError as error:
        raise wrong_usage(f"{option} {text}", str(error), "Such as --since 30d, or --since 2026-11-01.") from None


def delete(settings: Settings, name: Name) -> int:
    """Delete a tenant without jails, and its networks."""
    check_label("tenant", name)
    agree(settings, f"tenant {name}", f"Delete tenant {name}?")
    existing_engine(settings.root).call("DELETE", f"/1.0/projects/{name}")
    show(settings, {"tenant": name}, lambda: "")
    return 0


def _look(settings: Settings, name: str) -> dict[str, Any]:
    check_label("tenant", name)
    found: dict[str, Any] = existing_engine(settings.root).call("GET", f"/1.0/projects/{name}")
    return found


def _change(settings: Settings, name: str, config: dict[str, Any]) -> int:
    check_label("tenant", name)
    changed = ensure_engine(settings.root).call("PATCH", f"/1.0/projects/{name}", {"config": config})
    show(settings, changed, lambda: "")
    return 0


def _told(resource: str, amount: Any) -> str:
    if amount is None:
        return "-"
    return format_size(int(amount)) if resource in SIZED else f"{amount:g}"


def _table(tenants: list[dict[str, Any]]) -> str:
    header = ["NAME", "JAILS", "RUNNING", "MEMORY", "CPUS", "PROCS", "DISK", "USERS"]
    rows = []
    for tenant in tenants:
        used, limits = tenant["used"], tenant["limits"]
        jails = beside(str(tenant["allocated"]["instances"]), limits["instances"], str)
        row = [tenant["name"], jails, str(used["instances"])]
        row += [
            beside(_told(resource, used[resource]), limits[resource], partial(_told, resource))
            for resource in ("memory_bytes", "cpu", "processes", "disk_bytes")
        ]
        row.append(",".join([*tenant["users"], *(f"@{group}" for group in tenant["groups"])]) or "-")
        rows.append(row)
    return table(header, rows)


def _usage_table(tenants: list[dict[str, Any]]) -> str:
    """A line for each resource that is used, promised or limited."""
    rows = []
    for tenant in tenants:
        for resource, title in TITLES.items():
            amounts = [tenant[kind][resource] for kind in ("used", "allocated", "limits")]
            if any(amounts) or amounts[-1] is not None:
                rows.append([tenant["name"], title.lower(), *(_told(resource, amount) for amount in amounts)])
        if cache := tenant["used"]["cache_bytes"]:
            rows.append([tenant["name"], "left by stopped jails", format_size(cache), "-", "-"])
        rows.append([tenant["name"], "cpu time", cpu_time(tenant["used"]["cpu_ns"]), "-", "-"])
    return table(["TENANT", "RESOURCE", "USED", "PROMISED", "TOTAL"], rows)


def _bill_table(tenants: list[dict[str, Any]]) -> str:
    header = ["TENANT", "JAIL", "CPU", "MEMORY", "DISK", "IN", "OUT", "RUNNING"]
    rows = []
    for tenant in tenants:
        rows += [_bill_row(tenant["tenant"], jail["jail"], jail) for jail in tenant["jails"]]
        rows.append(_bill_row(tenant["tenant"], "(all)", tenant))
    return table(header, rows)


def _bill_row(tenant: str, jail: str, used: dict[str, Any]) -> list[str]:
    return [
        tenant,
        jail,
        cpu_time(round(used["cpu_seconds"] * 1e9)),
        f"{format_size(used['memory_byte_hours'])}h",
        f"{format_size(used['disk_byte_hours'])}h",
        format_size(used["received_bytes"]),
        format_size(used["sent_bytes"]),
        f"{used['running_hours']:.1f}h",
    ]


def _page(tenant: dict[str, Any]) -> str:
    pid = tenant["supervisor_pid"]
    what = [
        ("Name", tenant["name"]),
        ("Created", local_time(tenant["created_at"])),
        ("Users", ", ".join(tenant["users"]) or "-"),
        ("Groups", ", ".join(tenant["groups"]) or "-"),
        ("Supervisor", f"process {pid}" if pid else "-"),
    ]
    keys = fields(sorted(tenant["config"].items()))
    return fields(what) + "\n" + _usage_table([tenant]) + (f"\n{keys}" if keys else "")
