"""The nouns of jailmgr, as they are passed around and kept. Frozen; times are seconds since the epoch."""

from __future__ import annotations

from typing import Any

import msgspec

from jailmgr.errors import full_name

DEFAULT_TENANT = "default"
BUILD_TENANT = "_build"
"""Whose jails the builds are; no tenant can have this name."""


class Recipe(msgspec.Struct, frozen=True):
    """What an image tells of how its jails are run; it comes from the template."""

    init: list[str] = msgspec.field(default_factory=lambda: ["/sbin/init"])
    stop_signal: str = "SIGRTMIN+3"
    stop_timeout: int = 30
    notify: bool = True
    """Init tells by sd_notify(3) that the system is up (systemd does in a container)."""
    oom_score_adj: int = 0
    """Of init (proc_pid_oom_score_adj(5)); all that it starts has it too, unless it sets another."""
    environment: dict[str, str] = {}


class CreateFile(msgspec.Struct, frozen=True):
    """A file rendered when a jail is created: its path in the jail, its Jinja2 source, its mode."""

    path: str
    source: str
    mode: int = 0o644


class Image(msgspec.Struct, frozen=True):
    """A built root file system. `fingerprint`: SHA-256 (hex) of its canonical tar."""

    fingerprint: str
    template: str
    """TEMPLATE/RELEASE[/VARIANT] it was built from."""
    aliases: list[str]
    size_bytes: int
    created_at: float
    architecture: str
    """As uname(2) says it: x86_64, aarch64."""
    recipe: Recipe
    files: list[CreateFile] = []
    packages: dict[str, str] = {}
    """Name to version."""
    key: str = ""
    """Hash of what the image was built from: a template that changed is built anew."""


class Network(msgspec.Struct, frozen=True):
    """A bridge of a tenant. `ipv4` and `ipv6` are the bridge's own addresses, with prefix length: `10.83.7.1/24`."""

    id: int
    tenant: str
    name: str
    ipv4: str
    ipv6: str
    kind: str = "bridge"


class Nic(msgspec.Struct, frozen=True):
    """A jail's interface. `ipv4` and `ipv6` without prefix length, `mac` as 0a:bb:cc:dd:ee:ff, `veth` the host end."""

    name: str
    network: str
    veth: str
    mac: str
    ipv4: str
    ipv6: str


class Port(msgspec.Struct, frozen=True):
    """A published port. `host_address` is empty for every address of the host, IPv4 and IPv6."""

    tenant: str
    jail: str
    host_address: str
    host_port: int
    port: int
    protocol: str


FIRST_IDMAP_SIZE = 65536
"""Number of ids of each jail of a release before `security.idmap.size`, which kept the base alone."""


class Jail(msgspec.Struct, frozen=True):
    """A jail as it is kept. `config` and `devices` are LXD's, as the user set them; the rest was chosen by us."""

    id: int
    """Never used again in this instance: interfaces, quota groups and the like are named after it."""
    tenant: str
    name: str
    image: str
    """Fingerprint."""
    source: str
    """What the user asked for."""
    created_at: float
    config: dict[str, str]
    devices: dict[str, dict[str, str]]
    idmap_base: int
    nics: list[Nic] = []
    idmap_size: int = FIRST_IDMAP_SIZE
    """Number of host ids from `idmap_base` on; `security.idmap.size` is what the next start gives the jail."""

    @property
    def full_name(self) -> str:
        """`TENANT/NAME`, as errors and hints name it."""
        return full_name(self.tenant, self.name)


class Tenant(msgspec.Struct, frozen=True):
    """`uid`: the host uid that makes this tenant's user namespaces, so that per-user kernel counts are its own."""

    id: int
    name: str
    created_at: float
    uid: int
    config: dict[str, str] = {}


class Amounts(msgspec.Struct, frozen=True):
    """So much of each resource of a tenant: what its jails may take together, were promised, or have; None: no limit.

    `cpu`: a number of CPUs.
    """

    instances: int | None = None
    memory_bytes: int | None = None
    cpu: float | None = None
    processes: int | None = None
    disk_bytes: int | None = None
    networks: int | None = None
    snapshots: int | None = None
    ports: int | None = None
    ids: int | None = None


class Used(Amounts, frozen=True):
    """What a tenant's jails use now; `instances` are those that run.

    `cpu` is the mean since it was last looked at, None where this engine has not looked before.
    """

    cpu_ns: int | None = None
    cache_bytes: int | None = None
    """Memory that jails left to the tenant's group as they stopped, mostly page cache. It is in no `memory_bytes`, but
    counts to the total `limits.memory`; the kernel frees it when the tenant's jails need it."""


class TenantView(msgspec.Struct, frozen=True):
    """A tenant as `tenant list` and `tenant usage` tell it: cli.md's fields and those of LXD's projects."""

    tenant: str
    name: str
    description: str
    created_at: str
    limits: Amounts
    allocated: Amounts
    used: Used
    users: list[str]
    groups: list[str]
    supervisor_pid: int | None
    config: dict[str, str]


class Billed(msgspec.Struct, frozen=True):
    """Used in a span of time: a jail's, or those of all of a tenant's jails together."""

    cpu_seconds: float
    memory_byte_hours: int
    """Page cache included."""
    disk_byte_hours: int
    received_bytes: int
    sent_bytes: int
    running_hours: float


class JailBilled(Billed, frozen=True):
    """`jail`: the last name it had; it may have been deleted since."""

    jail: str


class TenantBilled(Billed, frozen=True):
    """`since` and `until`: RFC 3339, UTC. A tenant that has been deleted since stands here as well, and limits nothing.

    cli.md's fields besides: `used` in that span, `cpu`, `memory_bytes` and `disk_bytes` as means over it.
    """

    tenant: str
    since: str
    until: str
    limits: Amounts
    allocated: Amounts
    used: Used
    users: list[str]
    supervisor_pid: int | None
    jails: list[JailBilled]


class Usage(msgspec.Struct, frozen=True):
    """What a jail uses now; None where it isn't known."""

    memory_bytes: int | None = None
    cpu_ns: int | None = None
    processes: int | None = None
    disk_bytes: int | None = None


class Ending(msgspec.Struct, frozen=True):
    """How a jail last ended. `kind`: poweroff, reboot, exit, signal, oom, unknown; `by`: guest, admin, kernel, host."""

    kind: str
    at: float
    by: str
    status: int = 0
    """Exit status for `exit`, signal number for `signal`."""
    timed_out: bool = False
    """Init was asked to end, did not in time, and was killed."""


class Stopped(msgspec.Struct, frozen=True):
    """How a stop went. `killed_after`: the seconds that init had, where it did not end in them."""

    last: Ending
    killed_after: int | None = None


class JailView(msgspec.Struct, frozen=True, omit_defaults=False):
    """A jail as `list` tells it: cli.md's fields and LXD's, in one object."""

    name: str
    tenant: str
    status: str
    """Running, Stopped, Frozen or Error."""
    init_pid: int | None
    ipv4: str
    ipv6: str
    image: str
    created_at: str
    """RFC 3339, UTC."""
    limits: dict[str, Any]
    """memory_bytes, cpu (number of CPUs, float), processes, disk_bytes; None where there is none."""
    usage: Usage
    config: dict[str, str]
    devices: dict[str, dict[str, str]]
    project: str
    source: str
    ports: list[Port]
    type: str = "container"


class JailInfo(JailView, frozen=True):
    """`info`: the same and what an admin looks for when something is odd."""

    supervisor_pid: int | None = None
    netns: str | None = None
    """/proc/PID/ns/net."""
    cgroups: dict[str, str] = {}
    """Controller to directory."""
    rootfs: str = ""
    """/proc/PID/root of a running jail, else its volume."""
    log: str = ""
    pool: str = ""
    idmap: str = ""
    uuid: str = ""
    """No other jail's; systemd in it has it as its machine-id(5) from its first boot on."""
    apparmor: str = ""
    """Profile and mode of a running jail's init, `jailmgr (enforce)`; empty on hosts without AppArmor."""
    started_at: str | None = None
    last_ended: Ending | None = None
    restarts: int = 0


class ImageView(msgspec.Struct, frozen=True):
    """An image, as `image list` shows it. `jails`: how many are made of it."""

    fingerprint: str
    aliases: list[str]
    template: str
    size_bytes: int
    created_at: str
    architecture: str
    jails: int


class ImageInfo(ImageView, frozen=True):
    """`image show`: with its manifest (package to version) and how its jails are run."""

    packages: dict[str, str] = {}
    recipe: Recipe = Recipe()
    files: list[str] = []
    key: str = ""


class NetworkView(msgspec.Struct, frozen=True):
    """A network, as `network list` shows it. `jails`: how many are attached, running or not."""

    name: str
    tenant: str
    kind: str
    ipv4: str
    ipv6: str
    bridge: str
    jails: int


class Kept(msgspec.Struct, frozen=True):
    """A jail's row, its tenant's and those of its networks."""

    jail: Jail
    tenant: Tenant
    networks: list[Network]
    uuid: str = ""
    """Of the jail; empty in a config.json of a release before this one."""


class OnDisk(msgspec.Struct, frozen=True):
    """What a config.json says of whose it is. `id` is None where it can't be known."""

    id: int | None = None
    kept: Kept | None = None


class Stranger(msgspec.Struct, frozen=True):
    """A jail that is on disk or runs, and that the store does not know.

    `up`: it runs, or may. `addresses`: its IPv4 addresses, without prefix length.
    """

    tenant: str
    name: str
    up: bool
    on_disk: OnDisk
    addresses: frozenset[str]
