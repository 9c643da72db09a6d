"""What a jail's config.json keeps of the store: enough to take the jail back where its row was lost.

An annotation beside those of the bundle, written with it, and again whenever the row changes while the jail is stopped.
Only this module and manager/strangers.py read it; the supervisor does not.
"""

from __future__ import annotations

import contextlib
import re
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any

import msgspec

from jailmgr.config import Root
from jailmgr.manager.context import Context
from jailmgr.model import Jail, Kept, OnDisk
from jailmgr.runtime.bundle import CONFIG, save_bundle
from jailmgr.runtime.jsonfile import read_json
from jailmgr.runtime.plainfile import read_bytes

ANNOTATION = "org.jailmgr.store"


class _Annotations(msgspec.Struct):
    store: str = msgspec.field(name=ANNOTATION, default="")
    nics: str = msgspec.field(name="org.jailmgr.nics", default="[]")


class _Config(msgspec.Struct):
    annotations: _Annotations


def keep(m: Context, jail: Jail) -> str:
    """The annotation of a jail, as JSON."""
    networks = [m.store.find_network(jail.tenant, name) for name in {nic.network for nic in jail.nics}]
    found = [network for network in networks if network is not None]
    kept = Kept(jail, m.store.tenant(jail.tenant), found, m.store.uuid(jail))
    return msgspec.json.encode(kept).decode()


def renew(m: Context, jail: Jail) -> None:
    """Write the annotation of a jail whose row has changed; nothing where it has no config.json. Raises OSError."""
    directory = m.root.jail_lib(jail.tenant, jail.name)
    config = read_json(f"{directory}/{CONFIG}")
    if config is not None and config.get("annotations", {}).get(ANNOTATION) != (kept := keep(m, jail)):
        config["annotations"][ANNOTATION] = kept
        save_bundle(directory, config)


def read(root: Root, tenant: str, name: str) -> OnDisk:
    """Whose the config.json in the directory of that name is.

    One of a release before the annotation names the jail's id by its interface, `PREFIXvID` (network/bridge.py).
    """
    try:
        config = msgspec.json.decode(read_bytes(f"{root.jail_lib(tenant, name)}/{CONFIG}"), type=_Config)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return OnDisk()
    with contextlib.suppress(msgspec.MsgspecError, ValueError):
        kept = msgspec.json.decode(config.annotations.store, type=Kept)
        _check_addresses(kept)
        if kept.jail.tenant == tenant:
            return OnDisk(kept.jail.id, kept)
    return OnDisk(_id_of_veth(root, config.annotations.nics))


def _check_addresses(kept: Kept) -> None:
    """Raises ValueError where an address is none or a network is missing: the store would be refused with such a row.

    As store.verify.
    """
    for ipv4, ipv6 in [(of.ipv4, of.ipv6) for of in kept.jail.nics] + [(of.ipv4, of.ipv6) for of in kept.networks]:
        IPv4Interface(ipv4)
        IPv6Interface(ipv6)
    if missing := {nic.network for nic in kept.jail.nics} - {network.name for network in kept.networks}:
        raise ValueError(f"no network {min(missing)}")


def _id_of_veth(root: Root, nics: str) -> int | None:
    with contextlib.suppress(msgspec.MsgspecError, UnicodeError):
        for nic in msgspec.json.decode(nics, type=list[dict[str, Any]]):
            if found := re.fullmatch(f"{re.escape(root.link_prefix)}v([0-9a-f]+)", str(nic.get("veth"))):
                return int(found[1], 16)
    return None
