"""device list, add, set, remove: a jail's devices, LXD's."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jailmgr.cli.command import command
from jailmgr.cli.configuration import change, look
from jailmgr.cli.jails import Name
from jailmgr.cli.output import show, table
from jailmgr.cli.request import split_pair
from jailmgr.cli.settings import Settings
from jailmgr.errors import JailmgrError

DeviceName = Annotated[str, typer.Argument(metavar="DEVICE", help="The device's name.")]
Pairs = Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="Keys of the device and their values.")]


def add(app: typer.Typer) -> None:
    """Add the commands to the noun's app."""
    command(app, "list", example="jailmgr device list web")(list_)
    command(app, "add", example="jailmgr device add web modem unix-char source=/dev/ttyUSB0")(add_)
    command(app, "set", example="jailmgr device set web modem mode=0666")(set_)
    command(app, "remove", example="jailmgr device remove web modem")(remove)


def list_(settings: Settings, name: Name) -> int:
    """List a jail's devices that were set; a jail has a root and an eth0 in any case."""
    devices: dict[str, dict[str, str]] = look(settings, name)["devices"]
    rows = [
        [device, keys["type"], " ".join(f"{key}={value}" for key, value in keys.items() if key != "type")]
        for device, keys in devices.items()
    ]
    show(settings, devices, lambda: table(["DEVICE", "TYPE", "KEYS"], rows))
    return 0


def add_(
    settings: Settings,
    name: Name,
    device: DeviceName,
    kind: Annotated[str, typer.Argument(metavar="TYPE", help="unix-char, unix-block, proxy, disk or nic.")],
    pairs: Pairs,
) -> int:
    """Add a device to a jail."""
    if device in look(settings, name)["devices"]:
        hint = f"Change it: jailmgr device set {name} {device} KEY=VALUE"
        raise JailmgrError(f"device {device}", f"already exists in {name}", hint, "exists")
    return change(settings, name, {}, {device: {"type": kind, **_keys(pairs)}})


def set_(settings: Settings, name: Name, device: DeviceName, pairs: Pairs) -> int:
    """Set keys of a jail's device. An empty value takes a key away."""
    _check_there(settings, name, device)
    return change(settings, name, {}, {device: {key: value or None for key, value in _keys(pairs).items()}})


def remove(settings: Settings, name: Name, device: DeviceName) -> int:
    """Remove a device from a jail."""
    _check_there(settings, name, device)
    return change(settings, name, {}, {device: None})


def _keys(pairs: list[str]) -> dict[str, str]:
    return dict(split_pair(text, "") for text in pairs)


def _check_there(settings: Settings, name: str, device: str) -> None:
    there: dict[str, Any] = look(settings, name)["devices"]
    if device not in there:
        raise JailmgrError(f"device {device}", f"not found in {name}", f"See: jailmgr device list {name}", "missing")
