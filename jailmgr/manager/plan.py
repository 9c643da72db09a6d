"""A jail's configuration compiled: its kernel limits, its plan, its bundle on disk."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from binascii import b2a_base64
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.key_checks import parse_base64, parse_bool
from jailmgr.keys import BINARY_CREDENTIAL, KEYCTL, SOCKETCALL, TEXT_CREDENTIAL, Config, Devices
from jailmgr.manager.apparmor import ensure_profile
from jailmgr.manager.host import Manager
from jailmgr.manager.kept import keep
from jailmgr.manager.nodes import nodes_of
from jailmgr.model import Jail, Network, Nic, Recipe, Tenant
from jailmgr.network.bridge import bridge_name, uplink_mtu
from jailmgr.network.dns import DOMAIN
from jailmgr.network.shaping import shape_of
from jailmgr.runtime import cgroups, devices, seccomp
from jailmgr.runtime.bundle import CONFIG, IoLimit, Limits, Plan, compile_bundle, save_bundle
from jailmgr.runtime.jsonfile import read_json
from jailmgr.storage.device import block_device
from jailmgr.units import parse_allowance, parse_percent, parse_rate, parse_size

PERIOD = 100_000
"""CPU period in microseconds where the user names none: the kernel's own default (sched-bwc)."""


PROCESSES = 8192
"""Processes and threads of a jail that has no `limits.processes`; nothing was promised to it (manager/admission.py).
A quarter of the kernel's own kernel.pid_max, which is a limit of the whole host: a fork bomb stops there.
"""


def limits_of(config: Config) -> Limits:
    """The kernel's limits of a configuration that has been checked, but those that depend on the host: I/O, and CPUs.

    `limits.cpu` and a hard `limits.cpu.allowance` together: the smaller holds. A soft allowance (`50%`) and
    `limits.cpu.priority` are weights, as in LXD: the percentage, less 10 - priority.
    """
    if not any(key.startswith("limits.") for key in config):
        return Limits()
    quota, period, weight = _cpu(config)
    return Limits(
        memory=_size(config, "limits.memory"),
        swap=_swap(config.get("limits.memory.swap")),
        cpu_quota=quota,
        cpu_period=period,
        cpu_weight=weight,
        processes=int(config["limits.processes"]) if "limits.processes" in config else None,
        memory_min=_size(config, "limits.memory.min"),
    )


def kernel_limits(m: Manager, jail: Jail, tenant: Tenant | None = None) -> Limits:
    """`limits_of` with a limit of processes, the root device's I/O limits, the CPUs that it has while it runs, and on
    v1 with no more CPU than the tenant (its present form is found where it isn't given), which the kernel takes for an
    error there. JailmgrError `unavailable`.
    """
    limits, root = limits_of(jail.config), jail.devices.get("root", {})
    both = root.get("limits.max")
    if limits.processes is None and cgroups.directory(m.hierarchies, "pids", m.root.cgroup) is not None:
        limits = limits._replace(processes=PROCESSES)
    limits = limits._replace(
        io=io_limit(m, jail.name, root.get("limits.read", both), root.get("limits.write", both)),
        cpus=m.pins.of(jail),
    )
    if limits.cpu_quota is None or "cpu" not in m.hierarchies.v1:
        return limits
    tenant = tenant or m.store.find_tenant(jail.tenant)
    total = limits_of(tenant.config) if tenant is not None else Limits()
    if total.cpu_quota is None or (cpus_of(limits) or 0) <= (cpus_of(total) or 0):
        return limits
    return limits._replace(cpu_quota=total.cpu_quota, cpu_period=total.cpu_period)


def tenant_limits(m: Manager, tenant: Tenant) -> Limits:
    """The kernel's limits of a tenant's group. JailmgrError `unavailable`."""
    rate = tenant.config.get("limits.io")
    return limits_of(tenant.config)._replace(io=io_limit(m, tenant.name, rate, rate))


def io_limit(m: Manager, name: str, read: str | None, write: str | None) -> IoLimit | None:
    """Of rates as `20MiB` or `500iops`, on the block device that the pool is on today. JailmgrError `unavailable`."""
    rates = [parse_rate(text) if text else (None, None) for text in (read, write)]
    if rates == [(None, None)] * 2:
        return None
    (read_bps, read_iops), (write_bps, write_iops) = rates
    device = block_device(m.pool)
    if not device:
        why = "the pool's file system lies on no block device"
        hint = "Do without limits.read, limits.write, limits.max and limits.io."
        raise JailmgrError(f"I/O limit of {name}", why, hint, "unavailable")
    return IoLimit(device, read_bps, write_bps, read_iops, write_iops)


def _size(config: Mapping[str, str], key: str) -> int | None:
    return parse_size(config[key]) if key in config else None


def _swap(value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return None if parse_bool(value) else 0
    except ValueError:
        return parse_size(value)


def _cpu(config: Config) -> tuple[int | None, int | None, int | None]:
    """Quota, period and weight."""
    quotas: list[tuple[int, int]] = []
    weight: int | None = None
    if cpus := config.get("limits.cpu"):
        quotas.append((int(cpus) * PERIOD, PERIOD))
    allowance, priority = config.get("limits.cpu.allowance", ""), config.get("limits.cpu.priority")
    if allowance and not allowance.endswith("%"):
        quotas.append(parse_allowance(allowance))
    if allowance.endswith("%") or priority is not None:
        share = parse_percent(allowance) if allowance.endswith("%") else 100
        weight = max(1, share - (10 - int(priority or 10)))
    quota, period = min(quotas, key=lambda pair: pair[0] / pair[1], default=(None, None))
    return quota, period, weight


def cpus_of(limits: Limits) -> float | None:
    """Number of CPUs' worth of time; None where there is no limit."""
    if limits.cpu_quota is None or limits.cpu_period is None:
        return None
    return round(limits.cpu_quota / limits.cpu_period, 3)


def disk_of(devices: Devices) -> int | None:
    """Bytes the root device may take; None where there is no limit."""
    return _size(devices.get("root", {}), "size")


def credentials_of(config: Config) -> dict[str, str]:
    """Credentials for the guest's systemd, by name, in base64."""
    found = {}
    for key, value in config.items():
        if key.startswith(TEXT_CREDENTIAL):
            found[key.removeprefix(TEXT_CREDENTIAL)] = value.encode()
        elif key.startswith(BINARY_CREDENTIAL):
            found[key.removeprefix(BINARY_CREDENTIAL)] = parse_base64(value)
    return {name: b2a_base64(content, newline=False).decode() for name, content in found.items()}


def stop_timeout(jail: Jail, recipe: Recipe) -> int:
    """Seconds between the stop signal and the kill."""
    return int(jail.config.get("boot.host_shutdown_timeout", recipe.stop_timeout))


def make_plan(m: Manager, jail: Jail, stopped: bool = False) -> Plan:
    """All that the jail's start depends on. Reads the store; changes only the kept filter and the loaded profile.

    `stopped`: choose no CPUs, which a jail that does not run would keep from others.
    """
    image = m.store.find_image(jail.image)
    if image is None:
        raise JailmgrError(f"jail {jail.full_name}", f"its image {jail.image[:12]} is gone", "", "missing")
    tenant = m.store.tenant(jail.tenant)
    shape = shape_of(m.root, tenant, jail)
    networks = [(_network(m, jail.tenant, nic), nic) for nic in jail.nics]
    variables = {
        key.removeprefix("environment."): value for key, value in jail.config.items() if key.startswith("environment.")
    }
    calls = _calls(jail)
    return Plan(
        tenant=jail.tenant,
        jail=jail.name,
        hostname=jail.name,
        uid=tenant.uid,
        idmap_base=jail.idmap_base,
        idmap_size=jail.idmap_size,
        cgroup=m.root.jail_cgroup(jail.tenant, jail.name),
        lower=f"{m.root.image(jail.image)}/rootfs",
        volume=m.root.volume(jail.tenant, jail.name),
        init=image.recipe.init,
        lib=m.root.jail_lib(jail.tenant, jail.name),
        environment=image.recipe.environment | variables,
        stop_signal=image.recipe.stop_signal,
        stop_timeout=stop_timeout(jail, image.recipe),
        notify=image.recipe.notify,
        nics=[nic_plan(m.root, network, nic, shape) for network, nic in networks],
        dns=[address.partition("/")[0] for network, _ in networks[:1] for address in (network.ipv4, network.ipv6)],
        domain=DOMAIN,
        limits=kernel_limits(m, jail)._replace(cpus=None if stopped else m.pins.choose(jail)),
        seccomp=seccomp_filter(m.root, calls),
        keyctl=calls.keyctl,
        apparmor=ensure_profile(m.root),
        oom_score_adj=image.recipe.oom_score_adj,
        lxcfs=m.root.lxcfs,
        restart=jail.config.get("restart", "no"),
        uuid=m.store.uuid(jail),
        credentials=credentials_of(jail.config),
        store=keep(m, jail),
        devices=(*devices.DEFAULT, *nodes_of(jail)),
    )


def _network(m: Manager, tenant: str, nic: Nic) -> Network:
    network = m.store.find_network(tenant, nic.network)
    if network is None:
        raise JailmgrError(f"network {nic.network}", f"tenant {tenant} has none of that name", "", "missing")
    return network


def nic_plan(root: Root, network: Network, nic: Nic, shape: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    """A NIC as netlink.attach takes it; with `shape`, if there is one, for shaping.attach."""
    gateway4, _, length4 = network.ipv4.partition("/")
    gateway6, _, length6 = network.ipv6.partition("/")
    return {
        "name": nic.name,
        "veth": nic.veth,
        "bridge": bridge_name(root, network.id),
        "mac": nic.mac,
        "mtu": uplink_mtu(),
        "addresses": [f"{nic.ipv4}/{length4}", f"{nic.ipv6}/{length6}"],
        "gateways": [gateway4, gateway6],
        **({"shape": shape} if shape else {}),
    }


def write_bundle(m: Manager, jail: Jail, stopped: bool = False) -> str:
    """Compile and save the jail's config.json; returns its directory. A running jail reads it when it reboots.

    `stopped`: as make_plan; it is for `cp`, which needs no engine, and for adoption. A start writes it again.
    """
    m.check_known(jail.tenant, jail.name)
    directory = m.root.jail_lib(jail.tenant, jail.name)
    bundle = compile_bundle(make_plan(m, jail, stopped))
    # Replacing a file costs a start some milliseconds of the host's disk; most starts are as the last one.
    if read_json(f"{directory}/{CONFIG}") != bundle:
        save_bundle(directory, bundle)
    return directory


class Calls(NamedTuple):
    """What differs between filters.

    `raw_volume` and `keyctl` are those of seccomp.default_section, `socketcall` is that of seccomp.compile.
    """

    raw_volume: bool = False
    keyctl: bool = False
    socketcall: bool = False


def _calls(jail: Jail) -> Calls:
    opened = {key: parse_bool(jail.config.get(key, "false")) for key in (KEYCTL, SOCKETCALL)}
    return Calls(keyctl=opened[KEYCTL], socketcall=opened[SOCKETCALL])


def seccomp_filter(root: Root, calls: Calls) -> str:
    """The file of the compiled filter, made once for each deny list, libseccomp and architecture."""
    path = f"{root.run}/seccomp/{_digest(calls)}.bpf"
    if not os.path.exists(path):
        section = seccomp.default_section(raw_volume=calls.raw_volume, keyctl=calls.keyctl)
        compiled = seccomp.compile(section, calls.socketcall)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        new = f"{path}.{os.getpid()}.{threading.get_ident()}"
        with open(new, "wb") as file:
            file.write(compiled)
        os.rename(new, path)
    return path


@cache
def _digest(calls: Calls) -> str:
    """Name a filter by all that it is compiled from, which stays the same while an engine runs."""
    section = seccomp.default_section(raw_volume=calls.raw_volume, keyctl=calls.keyctl)
    parts = [section, platform.machine(), platform.release(), *["socketcall"] * calls.socketcall]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
