"""Tenants' networks: kept in the store, brought up on the host when a jail of theirs starts, listed."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import IPv4Interface

from jailmgr import claims
from jailmgr.errors import JailmgrError
from jailmgr.key_checks import near_miss
from jailmgr.keys import CONNECTIONS, CONNECTIONS_MAX, Devices
from jailmgr.manager import shaping
from jailmgr.manager.admission import admit_network
from jailmgr.manager.host import Manager
from jailmgr.manager.ports import ports_of
from jailmgr.manager.running import is_up
from jailmgr.manager.strangers import addresses_of_strangers, published_by_strangers
from jailmgr.model import Jail, Network, NetworkView, Nic, Port, Tenant
from jailmgr.network import addresses, bridge, dns, firewall, flows
from jailmgr.network.nft import NftError
from jailmgr.runtime import netlink
from jailmgr.runtime.state import read_state
from jailmgr.tenant_keys import may_be_used

DEFAULT = "default"


def claim(m: Manager, network: Network) -> None:
    """Claim a network's subnet on the host again. JailmgrError `conflict` where it has been taken meanwhile."""
    claims.claim_subnet(m.root, claim_key(network), str(IPv4Interface(network.ipv4).network))


def claim_key(network: Network) -> str:
    """The key of a network's subnet among the host's claims, as addresses.new_network has it."""
    return str(network.id)


def find_or_make(m: Manager, tenant: str, name: str) -> Network:
    """A tenant's network; its `default` is made when it is first asked for. JailmgrError `missing` for any other."""
    network = m.store.find_network(tenant, name)
    if network is not None:
        return network
    check_network(m, tenant, name)
    try:
        with m.store.transaction():
            network = m.store.add_network(
                tenant, name, lambda ident: addresses.new_network(m.root, ident, tenant, name, None, None)
            )
            admit_network(m, tenant)
            return network
    except JailmgrError as error:
        there = m.store.find_network(tenant, name)
        if error.code != "exists" or there is None:
            raise
        return there


def check_network(m: Manager, tenant: str, name: str) -> None:
    """Refuse a network the tenant has not, and `find_or_make` would not make."""
    if name == DEFAULT or m.store.find_network(tenant, name) is not None:
        return
    names = [DEFAULT, *(network.name for network in m.store.networks(tenant))]
    raise JailmgrError(f"network {name}", f"tenant {tenant} has none of that name", near_miss(name, names), "missing")


def check_address(m: Manager, tenant: str, network_name: str, wanted: str, but: Jail | None = None) -> None:
    """Refuse an IPv4 address that is outside of the network or taken, before anything is made."""
    network = m.store.find_network(tenant, network_name)
    if network is not None:
        own = {nic.ipv4 for nic in but.nics} if but else set()
        addresses.choose_address(network, (m.store.addresses(network) | addresses_of_strangers(m)) - own, wanted)


def assign_nics(m: Manager, jail: Jail, devices: Devices) -> list[Nic]:
    """Choose the jail's addresses and keep them. JailmgrError `invalid` or `exists` for a wanted one that can't be."""
    device = devices.get("eth0", {})
    network = find_or_make(m, jail.tenant, device.get("network", DEFAULT))
    with m.store.transaction():
        taken = (m.store.addresses(network) | addresses_of_strangers(m)) - {nic.ipv4 for nic in jail.nics}
        ipv4, ipv6 = addresses.choose_address(network, taken, device.get("ipv4.address"))
        nic = Nic(
            name="eth0",
            network=network.name,
            veth=bridge.veth_name(m.root, jail.id),
            mac=addresses.mac_for(m.root, ipv4),
            ipv4=ipv4,
            ipv6=ipv6,
        )
        m.store.set_nics(jail, [(network, nic)])
    return [nic]


def keep_nics(m: Manager, jail: Jail) -> None:
    """Give a jail the addresses in the store that this row of it has."""
    m.store.set_nics(jail, [(_of(m, jail, nic), nic) for nic in jail.nics])


def up(m: Manager, jail: Jail) -> None:
    """Make the host's side of a jail's network, before it starts: bridge, rules, names, published ports. Idempotent.

    A jail that runs may have been started by an older release: its port gets what a new one is given. Where it fails,
    the host ports that this call claimed are given back, and no others: those of a jail that runs stay published.
    """
    with m.network_lock, ExitStack() as undo:
        for port in ports_of(jail):
            _claim_port(m, jail, port, undo)
        shaped = shaping.up(m, jail)
        for nic in jail.nics:
            network = _of(m, jail, nic)
            fresh = not _is_up(m, network)
            if fresh:
                claim(m, network)
                group = bridge.tenant_group(m.store.tenant(jail.tenant).id)
                bridge.ensure_network(m.root, network, group)
            netlink.hold_port(nic.veth, nic.mac)
            if fresh:
                apply_firewall(m, also=jail)
                # Rules load conntrack, where that is a module, and with it its sysctl.
                bridge.make_room()
            else:
                try:
                    firewall.add_jail(m.root, network, nic, ports_of(jail), connections_of(jail))
                    if shaped:
                        firewall.hold_to_queue(m.root, [nic.veth])
                except NftError as error:
                    if not error.missing:
                        raise
                    apply_firewall(m, also=jail)
            m.networks_up.add(network.id)
            if fresh or not dns.is_served(m.root, network):
                dns.ensure_dns(m.root, network, _names(m, network))
        undo.pop_all()


def unpublish(m: Manager, jail: Jail) -> None:
    """Lead the host ports of a jail that has ended nowhere. `follow` ends its flows, off the path of `stop`."""
    with m.network_lock:
        for port in ports_of(jail):
            firewall.unpublish(m.root, port, jail.nics[0])
            claims.release(m.root, "port", _port_key(port))


def publish_port(m: Manager, jail: Jail, port: Port) -> None:
    """Lead a port of the host to a running jail, and the flows to this port too.

    Raises JailmgrError, `conflict` where another jail or instance has the port.
    """
    _publish_rule(m, jail, port)
    flows.publish([(port, jail.nics[0])], _subnets(m))


def _publish_rule(m: Manager, jail: Jail, port: Port) -> None:
    with ExitStack() as undo:
        _claim_port(m, jail, port, undo)
        firewall.publish(m.root, port, jail.nics[0])
        undo.pop_all()


def unpublish_port(m: Manager, jail: Jail, port: Port) -> None:
    """Take that back; fine where it wasn't done. Established TCP connections of a running jail stay."""
    firewall.unpublish(m.root, port, jail.nics[0])
    flows.unpublish([(port, jail.nics[0])])
    claims.release(m.root, "port", _port_key(port))


def _claim_port(m: Manager, jail: Jail, port: Port, undo: ExitStack) -> None:
    """Claim a port of the host; `undo` gets what takes a new claim back. JailmgrError `conflict`."""
    if claims.claim_port(m.root, _port_key(port), port.host_address, port.host_port, port.protocol):
        undo.callback(unpublish_port, m, jail, port)


def _port_key(port: Port) -> str:
    """The owner of a host port among the host's claims, so that no two instances publish the same one."""
    return f"jail {port.tenant}/{port.jail} at {port.host_address or '*'}:{port.host_port}/{port.protocol}"


def follow(m: Manager, tenant: str, name: str) -> None:
    """Published ports of a jail that has just been started or has ended lead to it, or nowhere; so do its queues."""
    row = m.store.find_row(tenant, name)
    if row is not None and read_state(m.root, tenant, name) is not None:
        shaping.follow(m, row.jail)
    with m.network_lock:
        # Once more: `configure` changes ports in the store first, and then under this lock.
        row = m.store.find_row(tenant, name)
        if row is None:
            return
        jail, ports = row.jail, ports_of(row.jail)
        runs = read_state(m.root, tenant, name) is not None
        if not runs:
            unpublish(m, jail)
        for port in ports if runs else ():
            _publish_rule(m, jail, port)
    # Outside of the lock: starts of other jails wait for it.
    if not runs:
        m.end_flows(jail)
    elif ports:
        flows.publish([(port, jail.nics[0]) for port in ports], _subnets(m))


def settle(m: Manager, alive: Iterable[Jail]) -> None:
    """Take back what jails have left that ended while no engine ran: claims of host ports, and rules for them.

    `up` renews the rules where a jail is alive. Raises JailmgrError.
    """
    up = [*alive, *(jail for _, _, jail in published_by_strangers(m))]
    claims.release_ports(m.root, [_port_key(port) for jail in up for port in ports_of(jail)])
    if not up and any(name.startswith(m.root.link_prefix) for _, name in socket.if_nameindex()):
        with m.network_lock:
            apply_firewall(m)


def end_flows_of(m: Manager, names: Iterable[tuple[str, str]]) -> None:
    """`end_flows` of the jails of that tenant and name each; one that was deleted or renamed has none of its own."""
    rows = [m.store.find_row(tenant, name) for tenant, name in names]
    end_flows(m, [row.jail for row in rows if row is not None])


def end_flows(m: Manager, jails: Iterable[Jail]) -> None:
    """End the flows of jails' addresses, but of those that run again. Raises JailmgrError.

    The kernel goes through the host's whole table for it: 9 ms of a CPU where that has 262,144 buckets.
    """
    jail_of = {nic.ipv4: jail for jail in jails for nic in jail.nics}
    nics = [nic for jail in jail_of.values() for nic in jail.nics]
    flows.end(nics, lambda nic: not is_up(m, jail_of[nic.ipv4]))


def end_flows_to(m: Manager, jail: Jail, ports: Iterable[Port]) -> None:
    """End the flows that ports led to a jail that does not run, also where it is about to be started again.

    Where it is not, all flows of its addresses end. Raises JailmgrError.
    """
    flows.unpublish([(port, nic) for port in ports for nic in jail.nics[:1]])
    end_flows(m, [jail])


def _subnets(m: Manager) -> flows.Subnets:
    return flows.Subnets([*m.store.networks(), *(network for network, _, _ in published_by_strangers(m))])


def forget(m: Manager, jail: Jail) -> None:
    """Take away all that `leave` does, a jail's name in DNS and its queues; fine where they never were there."""
    with m.network_lock:
        shaping.forget(m, jail)
        leave(m, jail)
        refresh_names_of(m, jail)


def leave(m: Manager, jail: Jail) -> None:
    """Take away what belongs to a stopped jail's addresses, before another jail may get them. Idempotent.

    That is their elements in the rules, their flows, and the host ports that lead to them. Raises JailmgrError.
    """
    with m.network_lock:
        ports = ports_left(m, jail)
        for nic in jail.nics:
            firewall.remove_jail(m.root, nic, ports)
        for port in ports:
            claims.release(m.root, "port", _port_key(port))
        end_flows(m, [jail])


def ports_left(m: Manager, jail: Jail) -> list[Port]:
    """Return the ports that a stopped jail still has on the host: `follow` may come later. Others may be another's."""
    return [port for port in ports_of(jail) if claims.has_port(m.root, _port_key(port))]


def refresh_names(m: Manager, network: Network) -> None:
    """Give a network's DNS the names of its jails as they are in the store; nothing where it isn't up."""
    with m.network_lock:
        if _is_up(m, network):
            dns.tell_dns(m.root, network, _names(m, network))


def refresh_names_of(m: Manager, *jails: Jail) -> None:
    """Do that for each network that these jails are in."""
    for tenant, name in {(jail.tenant, nic.network) for jail in jails for nic in jail.nics}:
        if (network := m.store.find_network(tenant, name)) is not None:
            refresh_names(m, network)


def apply_firewall(m: Manager, also: Jail | None = None) -> None:
    """Replace all of our rules: every jail's addresses, and the ports of those that run (and of `also`).

    Addresses of stopped ones too: a restart policy may bring a jail back with nobody to add them. Jails that run and
    that the store does not know keep their network.
    """
    networks = {(network.tenant, network.name): network for network in m.store.networks()}
    ports: list[tuple[Network, Nic]] = []
    published: list[tuple[Port, Nic]] = []
    jails = m.store.jails()
    for jail in jails:
        ports += [(networks[jail.tenant, nic.network], nic) for nic in jail.nics]
        if jail.nics and ((also and jail.id == also.id) or read_state(m.root, jail.tenant, jail.name)):
            published += [(port, jail.nics[0]) for port in ports_of(jail)]
    shaped = shaping.shaped_veths(m, jails)
    strange = published_by_strangers(m)
    ports += [(network, nic) for network, nic, _ in strange]
    published += [(port, nic) for _, nic, jail in strange for port in ports_of(jail)]
    bridges = {network.id: network for network in [*networks.values(), *(network for network, _, _ in strange)]}
    connections = firewall.Connections(
        {nic.veth: connections_of(jail) for jail in [*jails, *(jail for _, _, jail in strange)] for nic in jail.nics},
        {
            bridge.tenant_group(tenant.id): limit
            for tenant in m.store.tenants()
            if (limit := total_connections(tenant)) is not None
        },
    )
    firewall.apply_all(m.root, list(bridges.values()), ports, published, shaped, connections)
    flows.settle(published, flows.Subnets(bridges.values()), partial(_addresses_in_use, m))


def _addresses_in_use(m: Manager) -> set[str]:
    """Return the addresses of jails that run or may run, and of those that the store does not know."""
    nics = [nic for jail in m.store.jails() if is_up(m, jail) for nic in jail.nics]
    nics += [nic for _, nic, _ in published_by_strangers(m)]
    return {address for nic in nics for address in (nic.ipv4, nic.ipv6)} | addresses_of_strangers(m)


def connections_of(jail: Jail) -> int:
    """Return how many connections a jail may have."""
    return int(jail.config.get("limits.connections", CONNECTIONS))


def total_connections(tenant: Tenant) -> int | None:
    """Return how many connections a tenant's jails may have together; None where there is no limit.

    A tenant that others than root use has one, or its jails could take all that the host tracks.
    """
    if "limits.connections" in tenant.config:
        return int(tenant.config["limits.connections"])
    return CONNECTIONS_MAX if may_be_used(tenant.config) else None


def limit_connections(m: Manager, jail: Jail) -> None:
    """Hold a jail to its number of connections, after that has been changed in the store. Raises JailmgrError."""
    with m.network_lock, _rules_may_be_gone():
        for nic in jail.nics:
            firewall.limit_jail(m.root, nic, connections_of(jail))


def limit_total_connections(m: Manager, tenant: Tenant, total: int | None) -> None:
    """Hold a tenant's jails together to a number of connections; None: to none. Raises JailmgrError."""
    with m.network_lock, _rules_may_be_gone():
        firewall.limit_tenant(m.root, bridge.tenant_group(tenant.id), total)


@contextmanager
def _rules_may_be_gone() -> Iterator[None]:
    """No jail runs, or somebody has flushed all rules: the next start of a jail brings ours back, with this in them."""
    try:
        yield
    except NftError as error:
        if not error.missing:
            raise


def take_down(m: Manager) -> None:
    """Remove every bridge, rule, queue and DNS server of ours from the host. No jail runs."""
    with m.network_lock:
        shaping.take_down(m)
        for network in m.store.networks():
            dns.stop_dns(m.root, network.id)
            bridge.remove_network(m.root, network)
        firewall.remove_all(m.root)
        flows.settle([], _subnets(m), tuple)
        m.networks_up.clear()


def take_down_one(m: Manager, network: Network) -> None:
    """Remove one network from the host."""
    with m.network_lock:
        dns.stop_dns(m.root, network.id)
        bridge.remove_network(m.root, network)
        firewall.remove_network(m.root, network)
        flows.settle([], flows.Subnets([network]), tuple)
        m.networks_up.discard(network.id)


def list_networks(m: Manager, tenant: str | None = None) -> list[NetworkView]:
    """Networks by tenant and name."""
    counts = m.store.count_nics()
    return [
        NetworkView(
            name=network.name,
            tenant=network.tenant,
            kind=network.kind,
            ipv4=network.ipv4,
            ipv6=network.ipv6,
            bridge=bridge.bridge_name(m.root, network.id),
            jails=counts.get(network.id, 0),
        )
        for network in m.store.networks(tenant)
    ]


def _of(m: Manager, jail: Jail, nic: Nic) -> Network:
    network = m.store.find_network(jail.tenant, nic.network)
    if network is None:
        raise JailmgrError(f"network {nic.network}", f"tenant {jail.tenant} has none of that name", "", "missing")
    return network


def _is_up(m: Manager, network: Network) -> bool:
    if network.id not in m.networks_up:
        return False
    try:
        return socket.if_nametoindex(bridge.bridge_name(m.root, network.id)) > 0
    except OSError:
        return False


def _names(m: Manager, network: Network) -> dict[str, tuple[str, str]]:
    return {
        jail.name: (nic.ipv4, nic.ipv6)
        for jail in m.store.jails(network.tenant)
        for nic in jail.nics
        if nic.network == network.name
    }
