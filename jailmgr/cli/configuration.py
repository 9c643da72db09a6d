"""set, get, unset, show: a jail's configuration keys and its devices' (`root.size`, `eth0.ipv4.address`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from jailmgr.cli.client import existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.jails import Name
from jailmgr.cli.layout import flat_keys
from jailmgr.cli.output import fields, remark, show
from jailmgr.cli.request import split_device, split_keys
from jailmgr.cli.settings import Settings, name_of, split_name

ALIASES = {
    "limits.disk": "root.size",
    "limits.ingress": "eth0.limits.ingress",
    "limits.egress": "eth0.limits.egress",
}
"""Short names of a device's key."""


def add(app: typer.Typer) -> None:
    """Add the commands to the app."""
    command(app, "set", example="jailmgr set web limits.memory=1GiB limits.processes=500")(set_)
    command(app, "get", example="jailmgr get web limits.memory")(get)
    command(app, "unset", example="jailmgr unset web limits.memory")(unset)
    command(app, "show", example="jailmgr show web")(show_)


def set_(
    settings: Settings,
    name: Name,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="Keys and their new values.")],
) -> int:
    """Set configuration keys. At once where the kernel can, else at the next start, and it says so."""
    config, devices = split_keys(pairs, "")
    return change(settings, name, config, devices)


def unset(
    settings: Settings,
    name: Name,
    keys: Annotated[list[str], typer.Argument(metavar="KEY", help="Keys to take away.")],
) -> int:
    """Take configuration keys away."""
    config: dict[str, Any] = {}
    devices: dict[str, dict[str, Any]] = {}
    for key in keys:
        device, of_device = split_device(key)
        if device:
            devices.setdefault(device, {})[of_device] = None
        else:
            config[key] = None
    return change(settings, name, config, devices)


def change(settings: Settings, name: str, config: dict[str, Any], devices: Mapping[str, dict[str, Any] | None]) -> int:
    """Have the engine change a jail's keys and devices, those that are None removed, and report what waits."""
    tenant, jail = split_name(settings, name)
    body = {"config": config, "devices": devices}
    answer = existing_engine(settings.root).call("PATCH", f"/1.0/instances/{jail}?project={tenant}", body) or {}
    waiting = answer.get("restart_needed") or []
    document = {"name": jail, "tenant": tenant, "restart_needed": waiting}
    show(settings, document, lambda: "")
    if waiting:
        remark(
            settings, f"{', '.join(waiting)}: takes effect at the next start (jailmgr restart {name_of(tenant, jail)})"
        )
    return 0


def get(
    settings: Settings, name: Name, key: Annotated[str, typer.Argument(metavar="KEY", help="The key to show.")]
) -> int:
    """Show a configuration key's value. An empty line where it is not set."""
    value = flat_keys(look(settings, name)).get(ALIASES.get(key, key))
    if value is None:
        from jailmgr.keys import find_key

        if not split_device(key)[0]:
            find_key(key)
    show(settings, value, lambda: f"{value or ''}\n")
    return 0


def show_(settings: Settings, name: Name) -> int:
    """Show a jail's configuration and devices."""
    view = look(settings, name)
    document = {key: view.get(key) for key in ("name", "tenant", "config", "devices")}
    show(settings, document, lambda: fields(list(flat_keys(view).items())))
    return 0


def look(settings: Settings, name: str) -> dict[str, Any]:
    """The jail as the engine shows it."""
    tenant, jail = split_name(settings, name)
    view: dict[str, Any] = existing_engine(settings.root).call("GET", f"/1.0/instances/{jail}?project={tenant}")
    return view
