"""port publish, list, unpublish."""

from __future__ import annotations

from typing import Annotated

import typer

from jailmgr.cli.client import existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.jails import Name
from jailmgr.cli.output import show, table
from jailmgr.cli.request import parse_port, port_number
from jailmgr.cli.settings import Settings, split_name, wrong_usage


def add(app: typer.Typer) -> None:
    """Add the commands to the noun's app."""
    command(app, example="jailmgr port publish web 8080:80")(publish)
    command(app, "list", example="jailmgr port list --format json")(list_)
    command(app, example="jailmgr port unpublish web 8080")(unpublish)


def publish(
    settings: Settings,
    name: Name,
    port: Annotated[
        str, typer.Argument(metavar="[HOSTADDR:]HOSTPORT:PORT[/udp]", help="The host's end, and the jail's port.")
    ],
) -> int:
    """Lead a port of the host into a jail, over IPv4 and IPv6."""
    tenant, jail = split_name(settings, name)
    body = {"tenant": tenant, "jail": jail, **parse_port(port)._asdict()}
    existing_engine(settings.root).call("POST", f"/1.0/ports?project={tenant}", body)
    show(settings, body, lambda: "")
    return 0


def list_(
    settings: Settings,
    all_tenants: Annotated[bool, typer.Option("--all-tenants", "-A", help="Ports of every tenant.")] = False,
) -> int:
    """List the published ports."""
    whose = "all-projects=true" if all_tenants else f"project={settings.tenant}"
    found = existing_engine(settings.root).call("GET", f"/1.0/ports?{whose}")
    header = ["JAIL", "TENANT", "HOST ADDRESS", "HOST PORT", "PORT", "PROTOCOL"]
    rows = [
        [
            port["jail"],
            port["tenant"],
            port["host_address"] or "*",
            str(port["host_port"]),
            str(port["port"]),
            port["protocol"],
        ]
        for port in found
    ]
    show(settings, found, lambda: table(header, rows))
    return 0


def unpublish(
    settings: Settings,
    name: Name,
    port: Annotated[str, typer.Argument(metavar="[HOSTADDR:]HOSTPORT[/udp]", help="The host's end.")],
) -> int:
    """Take a published port back; both protocols and every address where the port says neither."""
    tenant, jail = split_name(settings, name)
    ends, slash, protocol = port.partition("/")
    address, colon, number = ends.rpartition(":")
    if slash and protocol not in ("tcp", "udp"):
        raise wrong_usage(f"port {port}", f"{protocol!r} is neither tcp nor udp", "Write 8080 or 8080/udp.")
    body: dict[str, object] = {"tenant": tenant, "jail": jail, "host_port": port_number(number, port)}
    if colon:
        body["host_address"] = address.strip("[]")
    if slash:
        body["protocol"] = protocol
    existing_engine(settings.root).call("DELETE", f"/1.0/ports?project={tenant}", body)
    show(settings, body, lambda: "")
    return 0
