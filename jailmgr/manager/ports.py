"""Published ports: a jail's proxy devices, which the kernel's NAT carries out while the jail runs."""

from __future__ import annotations

from jailmgr.key_checks import parse_endpoint
from jailmgr.manager.host import Manager
from jailmgr.model import Jail, Port
from jailmgr.network.firewall import port_is_free
from jailmgr.store import port_published, port_taken


def ports_of(jail: Jail) -> list[Port]:
    """The ports a jail's devices publish."""
    found = []
    for device in jail.devices.values():
        if device.get("type") == "proxy":
            listen, connect = parse_endpoint(device["listen"]), parse_endpoint(device["connect"])
            found.append(Port(jail.tenant, jail.name, listen.address, listen.port, connect.port, listen.protocol))
    return found


def check_ports(m: Manager, jail: Jail, but: list[Port] | None = None) -> None:
    """Refuse ports that two of its devices, another jail, or a process of the host has, `but` those it has already."""
    ports = ports_of(jail)
    for index, port in enumerate(ports):
        if any(_collide(port, other) for other in ports[:index]):
            raise port_taken(port, "the jail publishes it twice")
        if port in (but or []):
            continue
        owner = m.store.port_owner(port)
        if owner and owner != (jail.tenant, jail.name):
            raise port_published(port, owner)
        check_host(port)


def check_host(port: Port) -> None:
    """Refuse a host port that some process of the host listens on."""
    if not port_is_free(port.host_address, port.host_port, port.protocol):
        raise port_taken(port, "something on the host listens there already")


def _collide(one: Port, other: Port) -> bool:
    same = (one.protocol, one.host_port) == (other.protocol, other.host_port)
    return same and (one.host_address == other.host_address or not one.host_address or not other.host_address)
