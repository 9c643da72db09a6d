"""From the options of launch and create to the API's request: configuration keys and devices, LXD's."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from jailmgr.cli.settings import wrong_usage
from jailmgr.units import parse_cpus

DEVICES = ("root", "eth0")
"""Devices whose keys may be written DEVICE.KEY among the configuration keys; published ports (`port-…`) too."""

CREDENTIALS = "systemd.credential"
"""What keys of credentials begin with, those in base64 too."""


class Wanted(NamedTuple):
    """What launch and create may be told, as the user wrote it."""

    memory: str | None = None
    cpus: str | None = None
    disk: str | None = None
    processes: int | None = None
    network: str | None = None
    ip: str | None = None
    publish: list[str] | None = None
    environment: list[str] | None = None
    config: list[str] | None = None


class PortSpec(NamedTuple):
    """`[HOSTADDR:]HOSTPORT:PORT[/udp]`. `host_address` is empty for every address of the host."""

    host_address: str
    host_port: int
    port: int
    protocol: str


def instance_request(source: str, name: str | None, wanted: Wanted) -> dict[str, Any]:
    """Body of POST /1.0/instances. Raises JailmgrError (invalid) for what can't be read.

    An option of its own (`--memory`) and `-c` for the same key exclude each other.
    """
    config, devices = split_keys(wanted.config or [])
    own = own_limits(wanted.memory, wanted.cpus, wanted.processes)
    for text in wanted.environment or []:
        key, value = split_pair(text, "-e")
        own[f"environment.{key}"] = value
    merge(config, own)
    if wanted.disk is not None:
        _set(devices, "root", "size", wanted.disk)
    if wanted.network is not None:
        _set(devices, "eth0", "network", wanted.network)
    if wanted.ip is not None:
        _set(devices, "eth0", "ipv6.address" if ":" in wanted.ip else "ipv4.address", wanted.ip)
    for text in wanted.publish or []:
        port = parse_port(text)
        devices[port_device(port)] = {
            "type": "proxy",
            "listen": f"{port.protocol}:{_bracketed(port.host_address or '0.0.0.0')}:{port.host_port}",
            "connect": f"{port.protocol}:127.0.0.1:{port.port}",
            "nat": "true",
        }
    body: dict[str, Any] = {"source": {"type": "template", "alias": source}, "config": config, "devices": devices}
    return body if name is None else {"name": name, **body}


def own_limits(memory: str | None, cpus: str | None, processes: int | None) -> dict[str, str]:
    """Keys of --memory, --cpus and --processes."""
    own: dict[str, str] = {}
    if memory is not None:
        own["limits.memory"] = memory
    if cpus is not None:
        try:
            own.update(parse_cpus(cpus))
        except ValueError as error:
            raise wrong_usage(f"--cpus {cpus}", str(error), "Such as --cpus 2 or --cpus 1.5.") from None
    if processes is not None:
        own["limits.processes"] = str(processes)
    return own


def merge(config: dict[str, str], own: dict[str, str]) -> None:
    """Add to the keys of `-c` those of options of their own, which may not say otherwise."""
    for key, value in own.items():
        if config.setdefault(key, value) != value:
            raise wrong_usage(f"-c {key}={config[key]}", f"another option says {value}", "Give one of the two.")


def _set(devices: dict[str, dict[str, str]], device: str, key: str, value: str) -> None:
    if devices.setdefault(device, {}).setdefault(key, value) != value:
        raise wrong_usage(f"-c {device}.{key}", f"another option says {value}", "Give one of the two.")


def split_pair(text: str, option: str) -> tuple[str, str]:
    """Key and value of `KEY=VALUE`; the value may be empty."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise wrong_usage(f"{option} {text}".strip(), "a key and its value are wanted", "Write KEY=VALUE.")
    return key, value


def split_keys(pairs: list[str], option: str = "-c") -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Configuration and devices of `KEY=VALUE` words; `root.size=5GiB` is the root device's.

    Reads stdin for the value of a credential that is given as `-`.
    """
    config: dict[str, str] = {}
    devices: dict[str, dict[str, str]] = {}
    from_stdin = ""
    for text in pairs:
        key, value = split_pair(text, option)
        if value == "-" and key.startswith(CREDENTIALS):
            if from_stdin:
                raise wrong_usage(f"{key}=-", f"{from_stdin} is read from stdin already", "Set one after the other.")
            from_stdin, value = key, _secret_from_stdin(key)
        device, of_device = split_device(key)
        if device:
            devices.setdefault(device, {})[of_device] = value
        else:
            config[key] = value
    return config, devices


def _secret_from_stdin(key: str) -> str:
    """A credential that every user of the host could read on the command line (proc_pid_cmdline(5))."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        hint = f"Set {CREDENTIALS}-binary.NAME to its base64."
        raise wrong_usage(f"{key}=-", "what stdin has is not UTF-8", hint) from None


def split_device(key: str) -> tuple[str, str]:
    """Device and its key of `eth0.ipv4.address`; the device is empty where the key is configuration."""
    device, dot, of_device = key.partition(".")
    if dot and (device in DEVICES or device.startswith("port-")):
        return device, of_device
    return "", key


def parse_port(text: str) -> PortSpec:
    """A port to publish: `8080:80`, `127.0.0.1:53:53/udp`, `[::1]:8080:80`. Raises JailmgrError (invalid) otherwise."""
    ports, slash, protocol = text.partition("/")
    front, _, port = ports.rpartition(":")
    address, colon, host_port = front.rpartition(":")
    if colon and address[:1] == "[" and address[-1:] == "]":
        address = address[1:-1]
    elif ":" in address:
        raise _no_port(text, "an IPv6 address goes into brackets")
    if slash and protocol not in ("tcp", "udp"):
        raise _no_port(text, f"{protocol!r} is neither tcp nor udp")
    if colon and not address:
        raise _no_port(text, "the address is empty")
    return PortSpec(address, port_number(host_port, text), port_number(port, text), protocol or "tcp")


def port_number(text: str, whole: str) -> int:
    """1 to 65535."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise _no_port(whole, f"{text!r} is not a port number" if text else "a port is missing")
    return int(text)


def _no_port(text: str, why: str) -> Exception:
    return wrong_usage(f"port {text}", why, "Write [HOSTADDR:]HOSTPORT:PORT[/udp], such as 8080:80 or [::1]:53:53/udp.")


def port_device(port: PortSpec) -> str:
    """The device's name of a published port: `port-8080-tcp`; with the address in it where there is one."""
    address = f"{port.host_address.replace(':', '_')}-" if port.host_address else ""
    return f"port-{address}{port.host_port}-{port.protocol}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
