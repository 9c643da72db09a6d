"""What an instance knows, in one SQLite file: tenants, networks, images, jails, published ports.

One process writes (the engine). Rows carry a state, written before the work it announces begins, so that what a crash
left half-done can be told from what is done.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any, Final, Literal
from uuid import uuid4

import msgspec

from jailmgr.database import Database
from jailmgr.errors import JailmgrError, full_name
from jailmgr.key_checks import near_miss
from jailmgr.keys import Config, Devices
from jailmgr.model import FIRST_IDMAP_SIZE, Image, Jail, Network, Nic, Port, Tenant
from jailmgr.store_copies import Damage

State = Literal["creating", "ready", "deleting", "renaming"]
CREATING: Final = "creating"
READY: Final = "ready"
DELETING: Final = "deleting"
RENAMING: Final = "renaming"

_JAILS = (
    "SELECT id, tenant, name, image, source, created_at, config, devices, idmap_base,"
    " (SELECT value FROM facts WHERE facts.name = 'idmap/' || jails.id), state, next FROM jails"
)


class Row(msgspec.Struct, frozen=True):
    """A jail and how far it is. `next`: the name it is getting, while `renaming`."""

    jail: Jail
    state: State
    next: str | None = None


class Store(Database):
    """What an instance knows. Each call is one transaction, or part of the caller's (`with store.transaction()`)."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._rows: dict[str | None, list[Row]] = {}
        self._rows_version = (-1, -1, -1)

    def verify(self) -> None:
        """As Database: the type of every field, states and addresses, none of which SQLite checks."""
        self._rows_version = (-1, -1, -1)  # another file may have the number of the one that was open before
        try:
            for row in self.rows():
                _check_types(row)
                _check_addresses([nic.ipv4 for nic in row.jail.nics], [nic.ipv6 for nic in row.jail.nics])
            for network in self.networks():
                _check_types(network)
                _check_addresses([network.ipv4], [network.ipv6])
            for kept in (*self.tenants(), *self.images(), *self.ports()):
                _check_types(kept)
        except (msgspec.MsgspecError, ValueError) as error:
            raise Damage(str(error)) from error

    def fact(self, name: str) -> str:
        """A small thing remembered (`set_fact`), or an empty string."""
        found = self.select("SELECT value FROM facts WHERE name = ?", name)
        return str(found[0][0]) if found else ""

    def set_fact(self, name: str, value: str) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    # tenants

    def tenants(self) -> list[Tenant]:
        return self.read(_tenant, "SELECT * FROM tenants ORDER BY name")

    def find_tenant(self, name: str) -> Tenant | None:
        found = self.read(_tenant, "SELECT * FROM tenants WHERE name = ?", name)
        return found[0] if found else None

    def tenant(self, name: str) -> Tenant:
        """JailmgrError `missing` where there is none of that name."""
        found = self.find_tenant(name)
        if found is None:
            names = [tenant.name for tenant in self.tenants()]
            raise JailmgrError(f"tenant {name}", "there is none of that name", near_miss(name, names), "missing")
        return found

    def add_tenant(self, name: str, config: dict[str, str], uid: int) -> Tenant:
        with self.transaction() as db:
            row = (name, time.time(), uid, _text(config))
            try:
                db.execute("INSERT INTO tenants (name, created_at, uid, config) VALUES (?, ?, ?, ?)", row)
            except sqlite3.IntegrityError:
                raise JailmgrError(f"tenant {name}", "there is one of that name already", "", "exists") from None
            return self.tenant(name)

    def set_tenant_config(self, name: str, config: dict[str, str]) -> None:
        with self.transaction() as db:
            db.execute("UPDATE tenants SET config = ? WHERE name = ?", (_text(config), name))

    def set_tenant_uid(self, name: str, uid: int) -> None:
        with self.transaction() as db:
            db.execute("UPDATE tenants SET uid = ? WHERE name = ?", (uid, name))

    def remove_tenant(self, name: str) -> None:
        """With its networks. JailmgrError `conflict` where it has jails."""
        with self.transaction() as db:
            if count := db.execute("SELECT count(*) FROM jails WHERE tenant = ?", (name,)).fetchone()[0]:
                raise JailmgrError(f"tenant {name}", f"it has {count} jails", "Delete them first.", "conflict")
            db.execute("DELETE FROM networks WHERE tenant = ?", (name,))
            db.execute("DELETE FROM tenants WHERE name = ?", (name,))

    # networks

    def networks(self, tenant: str | None = None) -> list[Network]:
        query = "SELECT * FROM networks WHERE ? IS NULL OR tenant = ? ORDER BY tenant, name"
        return self.read(_network, query, tenant, tenant)

    def find_network(self, tenant: str, name: str) -> Network | None:
        found = self.read(_network, "SELECT * FROM networks WHERE tenant = ? AND name = ?", tenant, name)
        return found[0] if found else None

    def add_network(self, tenant: str, name: str, make: Callable[[int], Network]) -> Network:
        """The network that `make` chooses for the id it is given; kept only if it could."""
        with self.transaction() as db:
            try:
                row = db.execute("INSERT INTO networks VALUES (NULL, ?, ?, '', '', 'bridge')", (tenant, name))
            except sqlite3.IntegrityError:
                raise JailmgrError(f"network {name}", "there is one of that name already", "", "exists") from None
            network = make(row.lastrowid or 0)
            self.set_network_addresses(network)
            return network

    def set_network_addresses(self, network: Network) -> None:
        with self.transaction() as db:
            db.execute("UPDATE networks SET ipv4 = ?, ipv6 = ? WHERE id = ?", (network.ipv4, network.ipv6, network.id))

    def addresses(self, network: Network) -> set[str]:
        """IPv4 addresses of its jails."""
        return {row[0] for row in self.select("SELECT ipv4 FROM nics WHERE network = ?", network.id)}

    def count_nics(self) -> dict[int, int]:
        """Jails of each network's id."""
        return dict(self.select("SELECT network, count(*) FROM nics GROUP BY network"))

    # images

    def images(self) -> list[Image]:
        """The newest last."""
        return [
            self._with_aliases(image) for image in self.read(_image, "SELECT image FROM images ORDER BY created_at")
        ]

    def find_image(self, fingerprint: str) -> Image | None:
        found = self.read(_image, "SELECT image FROM images WHERE fingerprint = ?", fingerprint)
        return self._with_aliases(found[0]) if found else None

    def image_of_key(self, key: str) -> Image | None:
        """The newest image built from inputs of this hash."""
        found = self.read(_image, "SELECT image FROM images WHERE key = ? ORDER BY created_at DESC LIMIT 1", key)
        return self._with_aliases(found[0]) if found and key else None

    def image_of_alias(self, alias: str) -> Image | None:
        found = self.select("SELECT fingerprint FROM aliases WHERE alias = ?", alias)
        return self.find_image(found[0][0]) if found else None

    def images_of_prefix(self, prefix: str) -> list[Image]:
        query = "SELECT image FROM images WHERE substr(fingerprint, 1, ?) = ?"
        return [self._with_aliases(image) for image in self.read(_image, query, len(prefix), prefix)]

    def put_image(self, image: Image) -> None:
        """Add or replace. Its aliases move to it from the images that had them."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?) ON CONFLICT (fingerprint)"
                " DO UPDATE SET key = excluded.key, created_at = excluded.created_at, image = excluded.image",
                (image.fingerprint, image.key, image.created_at, msgspec.json.encode(image)),
            )
            for alias in image.aliases:
                db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?)", (alias, image.fingerprint))

    def check_image_unused(self, fingerprint: str) -> None:
        """JailmgrError `conflict` where a jail is made of the image."""
        found = self.select("SELECT tenant, name FROM jails WHERE image = ? LIMIT 4", fingerprint)
        users = [full_name(tenant, name) for tenant, name in found]
        if users:
            told = ", ".join(users[:3]) + (" and others" if len(users) > 3 else "")
            hint = "Delete them first."
            raise JailmgrError(f"image {fingerprint[:12]}", f"jails are made of it: {told}", hint, "conflict")

    def remove_image(self, fingerprint: str) -> None:
        """With its aliases."""
        with self.transaction() as db:
            db.execute("DELETE FROM images WHERE fingerprint = ?", (fingerprint,))

    def count_jails_of_images(self, tenants: list[str] | None = None) -> dict[str, int]:
        """By fingerprint; those of some tenants only, or of all."""
        query = (
            "SELECT image, count(*) FROM jails WHERE ? IS NULL OR tenant IN (SELECT value FROM json_each(?)) GROUP BY 1"
        )
        told = None if tenants is None else _text(tenants)
        return dict(self.select(query, told, told))

    def _with_aliases(self, image: Image) -> Image:
        rows = self.select("SELECT alias FROM aliases WHERE fingerprint = ? ORDER BY alias", image.fingerprint)
        return msgspec.structs.replace(image, aliases=[row[0] for row in rows])

    # jails

    def rows(self, tenant: str | None = None) -> list[Row]:
        """All jails, of whatever state, by tenant and name; the same objects as long as nothing was changed."""
        with self._lock:
            version = self.version()
            if self._rows_version != version:
                self._rows.clear()
                self._rows_version = version
            if tenant not in self._rows:
                self._rows[tenant] = self._read_rows(tenant)
            return list(self._rows[tenant])

    def _read_rows(self, tenant: str | None) -> list[Row]:
        with self._lock:
            nics: dict[int, list[Nic]] = {}
            for jail, *nic in self.select("SELECT jail, name, network_name, veth, mac, ipv4, ipv6 FROM nics"):
                nics.setdefault(jail, []).append(Nic(*nic))
            query = f"{_JAILS} WHERE ? IS NULL OR tenant = ? ORDER BY tenant, name"
            return self.read(lambda row: _row(row, nics.get(row[0], [])), query, tenant, tenant)

    def find_row(self, tenant: str, name: str) -> Row | None:
        with self._lock:
            query = "SELECT name, network_name, veth, mac, ipv4, ipv6 FROM nics WHERE jail = ? ORDER BY name"
            found = self.read(
                lambda row: _row(row, [Nic(*nic) for nic in self.select(query, row[0])]),
                f"{_JAILS} WHERE tenant = ? AND name = ?",
                tenant,
                name,
            )
        return found[0] if found else None

    def jails(self, tenant: str | None = None) -> list[Jail]:
        """Those that are ready."""
        return [row.jail for row in self.rows(tenant) if row.state == READY]

    def jail(self, tenant: str, name: str) -> Jail:
        """A ready one; JailmgrError `missing` or, while it is made or taken away, `conflict`."""
        row = self.find_row(tenant, name)
        if row is None:
            names = [found[0] for found in self.select("SELECT name FROM jails WHERE tenant = ?", tenant)]
            close = near_miss(name, names, "{}")
            hint = f"Did you mean {full_name(tenant, close)}?" if close else "See jailmgr list --all-tenants."
            raise JailmgrError(f"jail {full_name(tenant, name)}", "there is none of that name", hint, "missing")
        if row.state != READY:
            doing = {CREATING: "created", DELETING: "deleted", RENAMING: "renamed"}[row.state]
            raise JailmgrError(
                f"jail {full_name(tenant, name)}", f"it is being {doing}", "Try again when that is done.", "conflict"
            )
        return row.jail

    def name_taken(self, tenant: str, name: str) -> bool:
        return bool(self.select("SELECT 1 FROM jails WHERE tenant = ? AND (name = ? OR next = ?)", tenant, name, name))

    def reserve(self, tenant: str, name: str, source: str, config: Config, devices: Devices) -> Jail:
        """A new row in state `creating`: from here on the name is taken. JailmgrError `exists`."""
        with self.transaction() as db:
            if self.name_taken(tenant, name):
                raise JailmgrError(
                    f"jail {full_name(tenant, name)}",
                    "there is one of that name already",
                    "Choose another, or delete it first.",
                    "exists",
                )
            db.execute(
                "INSERT INTO jails (tenant, name, state, image, source, created_at, config, devices, idmap_base)"
                " VALUES (?, ?, ?, '', ?, ?, ?, ?, 0)",
                (tenant, name, CREATING, source, time.time(), _text(config), _text(devices)),
            )
            row = self.find_row(tenant, name)
            assert row is not None
            self.uuid(row.jail)
            return row.jail

    def uuid(self, jail: Jail) -> str:
        """The jail's UUID. It belongs to the jail's id, which no other jail gets: neither a copy nor an import.

        One is made for a jail of a release before this one.
        """
        found = self.fact(_uuid_fact(jail))
        if not found:
            found = str(uuid4())
            self.set_fact(_uuid_fact(jail), found)
        return found

    def reserve_ids(self, jails: int, networks: int, tenants: int) -> None:
        """Give no id up to these to anything made from here on: what has it is there, and not in the store."""
        for table, last in (("jails", jails), ("networks", networks), ("tenants", tenants)):
            known = self.select("SELECT seq FROM sqlite_sequence WHERE name = ?", table)
            if last > (known[0][0] if known else 0):
                with self.transaction() as db:
                    db.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
                    db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, last))

    def take_back(self, jail: Jail, tenant: Tenant, networks: list[Network], ports: list[Port], uuid: str) -> None:
        """Put a ready jail's row back as it was, in place of any that has its id or name; its tenant's and networks'
        where there are none. All or nothing. JailmgrError `exists` where an id, address or port has become another's.
        """
        with self.transaction() as db:
            db.execute("DELETE FROM jails WHERE id = ? OR (tenant = ? AND name = ?)", (jail.id, jail.tenant, jail.name))
            try:
                self._take_back_tenant(tenant)
                for network in networks:
                    self._take_back_network(network)
                db.execute(
                    "INSERT INTO jails (id, tenant, name, state, image, source, created_at, config, devices,"
                    " idmap_base) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(jail.id, jail.tenant, jail.name, READY, jail.image, jail.source, jail.created_at),
                        *(_text(jail.config), _text(jail.devices), jail.idmap_base),
                    ),
                )
            except sqlite3.IntegrityError as error:
                raise JailmgrError(f"jail {jail.full_name}", f"its place is taken ({error})", "", "exists") from None
            self._set_idmap(jail)
            by_name = {network.name: network for network in networks}
            self.set_nics(jail, [(by_name[nic.network], nic) for nic in jail.nics])
            self.set_ports(jail, ports)
            if uuid:
                self.set_fact(_uuid_fact(jail), uuid)

    def _take_back_tenant(self, tenant: Tenant) -> None:
        found = self.find_tenant(tenant.name)
        if found is None:
            row = (tenant.id, tenant.name, tenant.created_at, tenant.uid, _text(tenant.config))
            with self.transaction() as db:
                db.execute("INSERT INTO tenants (id, name, created_at, uid, config) VALUES (?, ?, ?, ?, ?)", row)
        elif found.id != tenant.id:
            why = f"the store's tenant {tenant.name} is another one (id {found.id}, not {tenant.id})"
            raise JailmgrError(f"tenant {tenant.name}", why, "", "exists")

    def _take_back_network(self, network: Network) -> None:
        found = self.find_network(network.tenant, network.name)
        if found is None:
            row = (network.id, network.tenant, network.name, network.ipv4, network.ipv6, network.kind)
            with self.transaction() as db:
                db.execute("INSERT INTO networks (id, tenant, name, ipv4, ipv6, kind) VALUES (?, ?, ?, ?, ?, ?)", row)
        elif found.id != network.id:
            why = f"the store's network {network.name} is another one (id {found.id}, not {network.id})"
            raise JailmgrError(f"network {network.name}", why, "", "exists")

    def update(self, jail: Jail) -> None:
        """Write a jail's image, configuration, devices and id range."""
        with self.transaction() as db:
            db.execute(
                "UPDATE jails SET image = ?, config = ?, devices = ?, idmap_base = ? WHERE id = ?",
                (jail.image, _text(jail.config), _text(jail.devices), jail.idmap_base, jail.id),
            )
            self._set_idmap(jail)

    def _set_idmap(self, jail: Jail) -> None:
        """Remember the size of a jail's id range, with its base: a release before this one changes the base alone."""
        self.set_fact(_idmap_fact(jail), _text((jail.idmap_base, jail.idmap_size)))

    def set_nics(self, jail: Jail, nics: list[tuple[Network, Nic]]) -> None:
        """JailmgrError `exists` where an address is taken in its network."""
        with self.transaction() as db:
            db.execute("DELETE FROM nics WHERE jail = ?", (jail.id,))
            for network, nic in nics:
                try:
                    db.execute(
                        "INSERT INTO nics VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (jail.id, nic.name, network.id, network.name, nic.veth, nic.mac, nic.ipv4, nic.ipv6),
                    )
                except sqlite3.IntegrityError:
                    why = f"it is taken in network {network.name}"
                    raise JailmgrError(f"address {nic.ipv4}", why, "Leave --ip out for a free one.", "exists") from None

    def set_state(self, jail: Jail, state: State, next_name: str | None = None) -> None:
        with self.transaction() as db:
            try:
                db.execute("UPDATE jails SET state = ?, next = ? WHERE id = ?", (state, next_name, jail.id))
            except sqlite3.IntegrityError:
                taken = full_name(jail.tenant, next_name or jail.name)
                raise JailmgrError(f"jail {taken}", "the name is being given to another", "", "exists") from None

    def set_name(self, jail: Jail, name: str) -> None:
        """End a rename: the row gets its new name and is ready."""
        with self.transaction() as db:
            db.execute("UPDATE jails SET name = ?, next = NULL, state = ? WHERE id = ?", (name, READY, jail.id))

    def remove(self, jail: Jail) -> None:
        with self.transaction() as db:
            db.execute("DELETE FROM jails WHERE id = ?", (jail.id,))
            db.execute("DELETE FROM facts WHERE name IN (?, ?)", (_uuid_fact(jail), _idmap_fact(jail)))

    # ports

    def ports(self, tenant: str | None = None) -> list[Port]:
        rows = self.select(
            "SELECT j.tenant, j.name, p.host_address, p.host_port, p.port, p.protocol FROM ports p JOIN jails j"
            " ON j.id = p.jail WHERE ? IS NULL OR j.tenant = ? ORDER BY p.host_port, p.protocol, p.host_address",
            tenant,
            tenant,
        )
        return [Port(*row) for row in rows]

    def port_owner(self, port: Port) -> tuple[str, str] | None:
        """Tenant and name of the jail that has this host port, or one that overlaps with it; None if it is free."""
        found = self.select(
            "SELECT j.tenant, j.name FROM ports p JOIN jails j ON j.id = p.jail WHERE p.protocol = ? AND"
            " p.host_port = ? AND (p.host_address = ? OR p.host_address = '' OR ? = '')",
            port.protocol,
            port.host_port,
            port.host_address,
            port.host_address,
        )
        return (str(found[0][0]), str(found[0][1])) if found else None

    def set_ports(self, jail: Jail, ports: list[Port]) -> None:
        """A jail's published ports become these. JailmgrError `exists` where one is another jail's."""
        with self.transaction() as db:
            db.execute("DELETE FROM ports WHERE jail = ?", (jail.id,))
            for port in ports:
                if owner := self.port_owner(port):
                    raise port_published(port, owner)
                db.execute(
                    "INSERT INTO ports VALUES (?, ?, ?, ?, ?)",
                    (jail.id, port.host_address, port.host_port, port.port, port.protocol),
                )


def port_published(port: Port, owner: tuple[str, str]) -> JailmgrError:
    """The error for one that a jail has: named where it is the same tenant's, for no tenant hears of another."""
    if owner[0] == port.tenant:
        return port_taken(port, f"it is published by jail {'/'.join(owner)}")
    return port_taken(port, "another tenant publishes it")


def port_taken(port: Port, why: str) -> JailmgrError:
    """The error for a host port that can't be had."""
    where = f"{port.host_address}:" if port.host_address else ""
    return JailmgrError(f"port {where}{port.host_port}/{port.protocol}", why, "Choose another host port.", "exists")


def _uuid_fact(jail: Jail) -> str:
    return f"uuid/{jail.id}"


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _check_types(kept: msgspec.Struct) -> None:
    """Raises msgspec.MsgspecError where a field holds what its annotation does not allow."""
    msgspec.json.decode(msgspec.json.encode(kept), type=type(kept))


def _check_addresses(ipv4: list[str], ipv6: list[str]) -> None:
    """Raises ValueError."""
    for text in ipv4:
        IPv4Interface(text)
    for text in ipv6:
        IPv6Interface(text)


def _image(row: Any) -> Image:
    return msgspec.json.decode(row[0], type=Image)


def _network(row: Any) -> Network:
    return Network(*row)


def _tenant(row: Any) -> Tenant:
    ident, name, created_at, uid, config = row
    return Tenant(ident, name, created_at, uid, _CONFIG.decode(config))


_DEVICES = msgspec.json.Decoder(dict[str, dict[str, str]])
_CONFIG = msgspec.json.Decoder(dict[str, str])
_IDMAP = msgspec.json.Decoder(tuple[int, int])
"""Base and size of an id range."""


def _idmap_fact(jail: Jail) -> str:
    return f"idmap/{jail.id}"


def _row(row: Any, nics: list[Nic]) -> Row:
    ident, tenant, name, image, source, created_at, config, devices, idmap_base, idmap, state, next_name = row
    known_base, size = _IDMAP.decode(idmap) if idmap else (0, 0)
    jail = Jail(
        ident,
        tenant,
        name,
        image,
        source,
        created_at,
        _CONFIG.decode(config),
        _DEVICES.decode(devices),
        idmap_base,
        nics,
        size if idmap and known_base == idmap_base else FIRST_IDMAP_SIZE,
    )
    return Row(jail, state, next_name)
