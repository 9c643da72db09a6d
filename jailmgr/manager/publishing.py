"""Publish ports of jails, take them back and list them: each is a proxy device in the jail's configuration."""

from __future__ import annotations

from jailmgr.errors import JailmgrError, full_name
from jailmgr.key_checks import Endpoint, parse_endpoint
from jailmgr.manager.configure import configure
from jailmgr.manager.host import Manager
from jailmgr.model import Port
from jailmgr.store import port_published


def list_ports(m: Manager, tenant: str | None = None) -> list[Port]:
    """Published ports, of stopped jails too."""
    return m.store.ports(tenant)


def publish(
    m: Manager, tenant: str, jail: str, host_address: str, host_port: int, port: int, protocol: str = "tcp"
) -> Port:
    """Publish a port of a jail, at once if it runs. JailmgrError `exists` where the host port is taken."""
    host = f"[{host_address}]" if ":" in host_address else host_address or "0.0.0.0"
    device = {
        "type": "proxy",
        "listen": f"{protocol}:{host}:{host_port}",
        "connect": f"{protocol}:127.0.0.1:{port}",
        "nat": "true",
    }
    listen = _checked(device["listen"])
    _checked(device["connect"])
    wanted = Port(tenant, jail, listen.address, listen.port, port, protocol)
    if owner := m.store.port_owner(wanted):
        raise port_published(wanted, owner)
    name = f"port-{host_port}-{protocol}"
    if name in m.store.jail(tenant, jail).devices:
        name += "-" + listen.address.replace(":", ".").strip(".")
    configure(m, tenant, jail, {}, {name: dict(device)})
    return wanted


def _checked(endpoint: str) -> Endpoint:
    try:
        return parse_endpoint(endpoint)
    except ValueError as error:
        raise JailmgrError("port", str(error), "Such as 8080:80, 127.0.0.1:8080:80 or 53:53/udp.", "invalid") from None


def unpublish(
    m: Manager, tenant: str, jail: str, host_port: int, protocol: str | None = None, host_address: str | None = None
) -> None:
    """Take back a jail's host port, of both protocols and any address unless given. JailmgrError `missing`."""
    gone: dict[str, dict[str, str | None] | None] = {}
    for name, device in m.store.jail(tenant, jail).devices.items():
        if device.get("type") == "proxy":
            listen = parse_endpoint(device["listen"])
            if (
                listen.port == host_port
                and protocol in (None, listen.protocol)
                and host_address in (None, listen.address)
            ):
                gone[name] = None
    if not gone:
        raise JailmgrError(
            f"port {host_port}",
            f"jail {full_name(tenant, jail)} does not publish it",
            "See jailmgr port list.",
            "missing",
        )
    configure(m, tenant, jail, {}, gone)
