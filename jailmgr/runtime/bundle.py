"""A jail as an OCI runtime-spec config.json: made from a plan by the manager, read by the supervisor.

OCI runtime-spec 1.2, config.md and config-linux.md. What the spec has no word for stands in annotations under
`org.jailmgr.` (strings, JSON where they hold more than one value).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from jailmgr.errors import JailmgrError
from jailmgr.runtime import devices, seccomp
from jailmgr.runtime.capabilities import BOUNDING
from jailmgr.runtime.cgroup_limits import DEFAULT_DEVICES
from jailmgr.runtime.cgroup_limits import IoLimit as IoLimit
from jailmgr.runtime.cgroup_limits import Limits as Limits
from jailmgr.runtime.jsonfile import read_json, write_json

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONFIG = "config.json"
FILES_MAX = 1 << 20
"""The hard limit on open files of a fresh boot (fs.nr_open, proc_sys_fs(5))."""
MANAGER = "jailmgr"
"""How a guest knows that it is in a container of ours: $container of process 1 (systemd's Container Interface)."""


class Plan(NamedTuple):
    """All that a jail's start depends on, chosen by the manager."""

    tenant: str
    jail: str
    hostname: str
    uid: int
    """The tenant's own host uid, which makes the user namespace."""
    idmap_base: int
    idmap_size: int
    cgroup: str
    """ROOT/TENANT/JAIL, below each hierarchy's mount point."""
    lower: str
    """The image's root file system; empty where `volume` itself is the (writable) root."""
    volume: str
    """Holds upper/ and work/; or is the root file system."""
    init: list[str]
    lib: str
    """The jail's directory of config.json, console log and last end."""
    environment: dict[str, str] = {}
    stop_signal: str = "SIGRTMIN+3"
    stop_timeout: int = 30
    notify: bool = False
    terminal: bool = True
    nics: list[dict[str, Any]] = []
    """As netlink.attach takes them."""
    dns: list[str] = []
    """Addresses of the network's DNS servers."""
    domain: str = ""
    """Of the names that they know of the network's jails."""
    limits: Limits = Limits()
    seccomp: str = ""
    """File of the compiled `linux.seccomp` section; empty for none."""
    keyctl: bool = False
    """As in seccomp.default_section."""
    apparmor: str = ""
    """Name of the loaded AppArmor profile; empty where the host has none."""
    oom_score_adj: int = 0
    """Of init, where the host lets its root lower it."""
    lxcfs: str = ""
    """Where an lxcfs is mounted, if one is when the jail starts; empty for none."""
    restart: str = "no"
    """no, on-failure, always: what to do when init ends by itself (a reboot always brings it back)."""
    uuid: str = ""
    """The jail's own, which systemd in it makes its machine-id(5) at its first boot; empty for none."""
    credentials: dict[str, str] = {}
    """For systemd in the jail, by name, in base64."""
    store: str = ""
    """What the manager's store holds of the jail, as JSON; the supervisor does not read it."""
    devices: tuple[devices.Device, ...] = ()
    """Devices of the host besides `DEVICES`."""


TERMINALS = 256
"""Of the jail's own devpts (mount option `max`). The kernel has kernel.pty.max for the whole host, of which
kernel.pty.reserve are for the host's own devpts."""
FILE_SYSTEMS = ("bcache", "btrfs", "erofs", "ext4", "f2fs", "nilfs2", "ocfs2", "xfs")
"""Those with a directory in /sys/fs for each that is mounted, or one for all."""
UNCOVERED = "/dev/.jailmgr"
"""Directory of a procfs and a sysfs without masks, for the jail's root alone (mode 0700). The kernel lets a user
namespace mount either only where its mount namespace has one that nothing covers (mnt_already_visible() in
fs/namespace.c); a read-only one would allow read-only mounts only. LXC has /dev/.lxc for this."""
_MOUNTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("/proc", "proc", ("nosuid", "nodev", "noexec")),
    ("/sys", "sysfs", ("nosuid", "nodev", "noexec", "ro")),
    ("/sys/fs/cgroup", "cgroup2", ("nosuid", "nodev", "noexec")),
    ("/dev", "tmpfs", ("nosuid", "noexec", "mode=755", "size=512k", "nr_inodes=2048")),
    (
        "/dev/pts",
        "devpts",
        ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5", f"max={TERMINALS}"),
    ),
    ("/dev/mqueue", "mqueue", ("nosuid", "nodev", "noexec")),
    ("/dev/shm", "tmpfs", ("nosuid", "nodev", "mode=1777")),
    ("/run", "tmpfs", ("nosuid", "nodev", "mode=755")),
    (f"{UNCOVERED}/proc", "proc", ("nosuid", "nodev", "noexec")),
    (f"{UNCOVERED}/sys", "sysfs", ("nosuid", "nodev", "noexec")),
)
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
"""Nodes of the host that every jail has as they are."""
MASKED = (
    "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug",
    "/proc/scsi", "/sys/firmware",
    # The host's disks and file systems: their names and sizes, and the paths of the pools' loop devices.
    "/proc/fs", "/proc/mdstat", "/proc/partitions", "/sys/block", "/sys/class/block", "/sys/dev/block",
    "/sys/devices/virtual/block",
    # Sizes and limits of the volumes of all jails (qgroups), and what else file systems show of themselves.
    *(f"/sys/fs/{name}" for name in FILE_SYSTEMS),
    # How many objects of each kind the kernel holds for everyone.
    "/sys/kernel/slab",
)  # fmt: skip
# /proc/pressure: a trigger that is written there gets a real-time kernel thread, outside of the jail's limits.
READONLY = ("/proc/bus", "/proc/irq", "/proc/pressure", "/proc/sysrq-trigger")


_THROTTLES = (
    "throttleReadBpsDevice", "throttleWriteBpsDevice", "throttleReadIOPSDevice", "throttleWriteIOPSDevice",
)  # fmt: skip
"""config-linux.md, Block IO, in the order of IoLimit's fields."""


def compile_bundle(plan: Plan) -> dict[str, Any]:
    """The OCI configuration of `plan`."""
    environment = {"PATH": PATH, "container": MANAGER}
    if plan.terminal:
        environment["TERM"] = "linux"
    environment |= plan.environment
    mapping = [{"containerID": 0, "hostID": plan.idmap_base, "size": plan.idmap_size}]
    annotations = {
        "tenant": plan.tenant,
        "jail": plan.jail,
        "uid": str(plan.uid),
        "lower": plan.lower,
        "lib": plan.lib,
        "stop-signal": plan.stop_signal,
        "stop-timeout": str(plan.stop_timeout),
        "notify": json.dumps(plan.notify),
        "nics": json.dumps(plan.nics),
        "dns": json.dumps(plan.dns),
        "domain": plan.domain,
        "cpu-weight": json.dumps(plan.limits.cpu_weight),
        "seccomp": plan.seccomp,
        "lxcfs": plan.lxcfs,
        "restart": plan.restart,
        "uuid": plan.uuid,
        "credentials": json.dumps(plan.credentials),
        "store": plan.store,
        "devices": json.dumps([device._asdict() for device in plan.devices]),
    }
    profile = {"apparmorProfile": plan.apparmor} if plan.apparmor else {}
    return {
        "ociVersion": "1.2.0",
        "process": {
            "terminal": plan.terminal,
            "user": {"uid": 0, "gid": 0},
            "args": plan.init,
            "env": [f"{name}={value}" for name, value in environment.items()],
            "cwd": "/",
            "capabilities": {kind: list(BOUNDING) for kind in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": FILES_MAX}],
            "noNewPrivileges": False,
            "oomScoreAdj": plan.oom_score_adj,
            **profile,
        },
        "root": {"path": plan.volume, "readonly": False},
        "hostname": plan.hostname,
        "mounts": [
            {"destination": path, "type": kind, "source": kind, "options": list(options)}
            for path, kind, options in _MOUNTS
        ],
        "linux": {
            "uidMappings": mapping,
            "gidMappings": mapping,
            "namespaces": [
                {"type": kind} for kind in ("user", "mount", "pid", "network", "uts", "ipc", "cgroup", "time")
            ],
            "cgroupsPath": f"/{plan.cgroup}",
            "resources": _resources(plan.limits),
            "seccomp": seccomp.default_section(raw_volume=not plan.lower, keyctl=plan.keyctl),
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READONLY),
        },
        "annotations": {f"org.jailmgr.{key}": value for key, value in annotations.items()},
    }


def _resources(limits: Limits) -> dict[str, Any]:
    """config-linux.md, Control groups. OCI's memory.swap is memory and swap together."""
    resources: dict[str, Any] = {"devices": list(DEFAULT_DEVICES)}
    if limits.memory is not None:
        resources["memory"] = {"limit": limits.memory}
        if limits.swap is not None:
            resources["memory"]["swap"] = limits.memory + limits.swap
    if limits.memory_min is not None:
        resources["unified"] = {"memory.min": str(limits.memory_min)}
    if limits.cpu_quota is not None:
        resources["cpu"] = {"quota": limits.cpu_quota, "period": limits.cpu_period or 100_000}
    if limits.cpus is not None:
        resources.setdefault("cpu", {})["cpus"] = limits.cpus
    if limits.processes is not None:
        resources["pids"] = {"limit": limits.processes}
    if limits.io is not None:
        major, _, minor = limits.io.device.partition(":")
        at = {"major": int(major), "minor": int(minor)}
        rates = zip(_THROTTLES, limits.io[1:], strict=True)
        resources["blockIO"] = {name: [at | {"rate": rate}] for name, rate in rates if rate is not None}
    return resources


class Mount(NamedTuple):
    target: str
    kind: str
    options: tuple[str, ...]


class Bundle(NamedTuple):
    """What the supervisor needs of a config.json."""

    tenant: str
    jail: str
    hostname: str
    uid: int
    idmap_base: int
    idmap_size: int
    cgroup: str
    lower: str
    volume: str
    args: list[str]
    env: dict[str, str]
    terminal: bool
    capabilities: list[str]
    rlimits: list[tuple[str, int, int]]
    mounts: list[Mount]
    masked: list[str]
    readonly: list[str]
    limits: Limits
    lib: str
    stop_signal: str
    stop_timeout: int
    notify: bool
    nics: list[dict[str, Any]]
    dns: list[str]
    domain: str
    seccomp: str
    apparmor: str
    lxcfs: str
    restart: str
    oom_score_adj: int
    devices: list[devices.Device]
    uuid: str
    credentials: dict[str, str]


def read_bundle(config: dict[str, Any]) -> Bundle:
    """The supervisor's view of a configuration; JailmgrError when something is missing in it."""
    try:
        return _read(config)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise JailmgrError("bundle", f"not a configuration of ours ({error!r})", "", "invalid") from error


def _read(config: dict[str, Any]) -> Bundle:
    process, linux = config["process"], config["linux"]
    own = {key.removeprefix("org.jailmgr."): value for key, value in config["annotations"].items()}
    resources = linux["resources"]
    memory, cpu = resources.get("memory", {}), resources.get("cpu", {})
    limit, both = memory.get("limit"), memory.get("swap")
    kept = resources.get("unified", {}).get("memory.min")
    return Bundle(
        tenant=own["tenant"],
        jail=own["jail"],
        hostname=config["hostname"],
        uid=int(own["uid"]),
        idmap_base=linux["uidMappings"][0]["hostID"],
        idmap_size=linux["uidMappings"][0]["size"],
        cgroup=linux["cgroupsPath"].lstrip("/"),
        lower=own["lower"],
        volume=config["root"]["path"],
        args=process["args"],
        env=dict(entry.split("=", 1) for entry in process["env"]),
        terminal=process["terminal"],
        capabilities=process["capabilities"]["bounding"],
        rlimits=[(entry["type"], entry["soft"], entry["hard"]) for entry in process["rlimits"]],
        mounts=[Mount(entry["destination"], entry["type"], tuple(entry["options"])) for entry in config["mounts"]],
        masked=linux["maskedPaths"],
        readonly=linux["readonlyPaths"],
        limits=Limits(
            limit,
            both - limit if both is not None and limit is not None else None,
            cpu.get("quota"),
            cpu.get("period"),
            json.loads(own["cpu-weight"]),
            resources.get("pids", {}).get("limit"),
            _io(resources.get("blockIO", {})),
            None if kept is None else int(kept),
            cpu.get("cpus"),
        ),
        lib=own["lib"],
        stop_signal=own["stop-signal"],
        stop_timeout=int(own["stop-timeout"]),
        notify=json.loads(own["notify"]),
        nics=json.loads(own["nics"]),
        dns=json.loads(own.get("dns", "[]")),
        domain=own.get("domain", ""),
        seccomp=own["seccomp"],
        apparmor=process.get("apparmorProfile", ""),
        lxcfs=own.get("lxcfs", ""),
        restart=own["restart"],
        oom_score_adj=process.get("oomScoreAdj", 0),
        devices=devices.parse(json.loads(own.get("devices", "[]"))),
        uuid=own.get("uuid", ""),
        credentials=json.loads(own.get("credentials", "{}")),
    )


def _io(throttles: dict[str, Any]) -> IoLimit | None:
    entries = [throttles.get(name, [None])[0] for name in _THROTTLES]
    device = next((f"{entry['major']}:{entry['minor']}" for entry in entries if entry), None)
    return None if device is None else IoLimit(device, *(entry and entry["rate"] for entry in entries))


def save_bundle(directory: str, config: dict[str, Any]) -> None:
    """Write DIRECTORY/config.json in one piece: what is there is either the old or the new."""
    write_json(f"{directory}/{CONFIG}", config)


def load_bundle(directory: str) -> Bundle:
    """Read DIRECTORY/config.json; JailmgrError when it isn't there or isn't one."""
    config = read_json(f"{directory}/{CONFIG}")
    if config is None:
        raise JailmgrError("bundle", f"no {CONFIG} in {directory}", "", "missing")
    return read_bundle(config)
