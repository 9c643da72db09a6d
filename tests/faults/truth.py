"""What jailmgr reports, compared with what the kernel, the disk and the store show: each difference as a line."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from jailmgr.runtime.cgroup_hierarchies import relative
from jailmgr.runtime.proc import start_time
from tests.system.instance import Instance, alive, until
from tests.system.netns import run

SETTLES_WITHIN = 15.0
"""Seconds for what the kernel, or a new supervisor, removes in its own time."""
Key = tuple[str, str]
"""Tenant and name of a jail."""


class Reported(NamedTuple):
    """`list -A`, `port list` and the init of each running jail, by pid and start time."""

    jails: dict[Key, dict[str, Any]]
    ports: set[tuple[str, str, int, int, str]]
    inits: dict[Key, tuple[int, int]]

    def status(self, key: Key) -> str:
        """`Absent` where there is no such jail."""
        return str(self.jails[key]["status"]) if key in self.jails else "Absent"


def reported(instance: Instance) -> Reported:
    """Ask the command line."""
    rows = instance.json("list", "--all-tenants")
    jails = {(row["tenant"], row["name"]): row for row in rows}
    ports = {
        (key[0], key[1], port["host_port"], port["port"], port["protocol"])
        for key, row in jails.items()
        for port in row["ports"]
    }
    inits = {key: (row["init_pid"], start_time(row["init_pid"]) or 0) for key, row in jails.items() if row["init_pid"]}
    return Reported(jails, ports, inits)


def settled(instance: Instance) -> Reported:
    """A report that agrees with what is true; AssertionError with the differences, where it doesn't come to that."""
    said = reported(instance)
    left: list[str] = []

    def agrees() -> bool:
        nonlocal said
        said = reported(instance)
        left[:] = differences(instance, said)
        return not left

    until(agrees, SETTLES_WITHIN, left)
    return said


def differences(instance: Instance, said: Reported) -> list[str]:
    """What is reported and isn't true, or the other way round."""
    return [
        *_of_processes(instance, said),
        *_of_disk(instance, said),
        *_of_store(instance, said),
        *_of_network(instance, said),
    ]


def _of_processes(instance: Instance, said: Reported) -> Iterator[str]:
    groups = _groups(instance)
    for key, row in said.jails.items():
        name, inside = "/".join(key), groups.pop(key, set())
        if row["status"] in ("Running", "Frozen"):
            yield from (f"{name} is {row['status']}: {what}" for what in _of_running(instance, key, row, inside))
        elif row["status"] != "Stopped" or row["init_pid"] is not None:
            yield f"{name} is {row['status']} with init {row['init_pid']}"
        elif inside:
            yield f"{name} is stopped, and has processes {sorted(inside)}"
    for key, inside in groups.items():
        if inside and key[0] not in (".supervisors", "_build"):
            yield f"cgroup of {'/'.join(key)} has processes {sorted(inside)}, and no such jail is listed"


def _of_running(instance: Instance, key: Key, row: dict[str, Any], inside: set[int]) -> Iterator[str]:
    pid = row["init_pid"]
    if not pid or not alive(pid):
        yield f"init {pid} isn't alive"
        return
    if pid not in inside:
        yield f"init {pid} is in none of its cgroups"
    try:
        netns = os.readlink(f"/proc/{pid}/ns/net")
    except FileNotFoundError:
        yield f"init {pid} has ended"
        return
    if netns == os.readlink("/proc/self/ns/net"):
        yield "it has no network namespace"
    state = Path(instance.root.tenant_run(key[0]), f"{key[1]}.json")
    if not state.exists() or json.loads(state.read_text())["pid"] != pid:
        yield f"no state file has init {pid}"
    limit = row["limits"]["memory_bytes"]
    if limit is not None and limit not in (held := _memory_limits(instance, key)):
        yield f"limits.memory is {limit}, the kernel has {held}"


def _mounts() -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        return [line.split()[4] for line in file if line.split(" - ")[1].split()[0] in ("cgroup", "cgroup2")]


def _groups(instance: Instance) -> dict[Key, set[int]]:
    """The processes in the groups of each jail, of every hierarchy, without the zombies."""
    found: dict[Key, set[int]] = {}
    for mount in _mounts():
        top = f"{mount}/{relative(instance.root.cgroup)}"
        for directory, _, files in os.walk(top):
            parts = os.path.relpath(directory, top).split("/")
            if len(parts) < 2 or "cgroup.procs" not in files:
                continue
            inside = found.setdefault((parts[0], parts[1]), set())
            try:
                pids = Path(directory, "cgroup.procs").read_text().split()
            except OSError:
                continue
            inside |= {int(pid) for pid in pids if alive(int(pid))}
    return found


def _memory_limits(instance: Instance, key: Key) -> list[int]:
    names = ("memory.max", "memory.limit_in_bytes")
    held = [
        Path(mount, relative(instance.root.cgroup), *key, name).read_text().strip()
        for mount in _mounts()
        for name in names
        if Path(mount, relative(instance.root.cgroup), *key, name).exists()
    ]
    return [int(limit) for limit in held if limit.isdigit()]


def _of_disk(instance: Instance, said: Reported) -> Iterator[str]:
    volumes = _two_levels(f"{instance.root.pool}/volumes")
    directories = {key for key in _two_levels(f"{instance.root.lib}/jails") if key[0] != "_build"}
    for what, found in (("volume", volumes), ("directory", directories)):
        if what == "volume" and not os.path.ismount(instance.root.pool):
            continue
        for key in found - said.jails.keys():
            yield f"{what} of {'/'.join(key)}, and no such jail is listed"
        for key in said.jails.keys() - found:
            yield f"{'/'.join(key)} has no {what}"


def _two_levels(top: str) -> set[Key]:
    try:
        return {(tenant, jail) for tenant in os.listdir(top) for jail in os.listdir(f"{top}/{tenant}")}
    except FileNotFoundError:
        return set()


def _of_store(instance: Instance, said: Reported) -> Iterator[str]:
    with closing(sqlite3.connect(f"file:{instance.root.store}?mode=ro", uri=True, timeout=10)) as db:
        rows = {(tenant, name): state for tenant, name, state in db.execute("SELECT tenant, name, state FROM jails")}
        ports = {
            (tenant, name, host_port, port, protocol)
            for tenant, name, host_port, port, protocol in db.execute(
                "SELECT tenant, name, host_port, port, protocol FROM ports JOIN jails ON jails.id = ports.jail"
            )
        }
    for key in rows.keys() ^ said.jails.keys():
        yield f"{'/'.join(key)}: {'in the store only' if key in rows else 'not in the store'}"
    for key, state in rows.items():
        if state != "ready":
            yield f"{'/'.join(key)} is {state}"
    for port in ports ^ said.ports:
        yield f"port {port}: {'in the store only' if port in ports else 'not in the store'}"


def _of_network(instance: Instance, said: Reported) -> Iterator[str]:
    addresses = {row["ipv4"]: key for key, row in said.jails.items() if key in said.inits}
    veths = {name for name in _links(instance) if name.startswith(f"{instance.root.link_prefix}v")}
    if len(veths) != len(addresses):
        yield f"{len(addresses)} jails run, and there are the interfaces {sorted(veths)}"
    published = {(protocol, port, addresses.get(address), to) for protocol, port, address, to in _published(instance)}
    expected = {
        (protocol, host_port, (tenant, name), port)
        for tenant, name, host_port, port, protocol in said.ports
        if (tenant, name) in said.inits
    }
    for entry in published ^ expected:
        yield f"port {entry}: {'in nftables only' if entry in published else 'not in nftables'}"


def _links(instance: Instance) -> list[str]:
    links = json.loads(run("ip", "-json", "link", "show") or "[]")
    return [link["ifname"] for link in links if link["ifname"].startswith(instance.root.link_prefix)]


def _published(instance: Instance) -> list[tuple[str, int, str, int]]:
    """Protocol, host port, address and port of each element of the map of ports."""
    tables = {
        (entry["table"]["family"], entry["table"]["name"])
        for entry in json.loads(run("nft", "--json", "list", "tables"))["nftables"]
        if "table" in entry
    }
    if ("inet", instance.root.table) not in tables:
        return []
    found = json.loads(run("nft", "--json", "list", "map", "inet", instance.root.table, "any_ipv4"))["nftables"]
    (elements,) = [entry["map"].get("elem", []) for entry in found if "map" in entry]
    return [(key["concat"][0], key["concat"][1], value["concat"][0], value["concat"][1]) for key, value in elements]


def marker_of(instance: Instance, key: Key) -> str:
    """The content of /root/marker of a jail, read where it lies in the pool."""
    return Path(instance.root.volume(*key), "upper/root/marker").read_text()
