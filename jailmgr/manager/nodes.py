"""Devices of the host in a jail: its `unix-char` and `unix-block` devices, and those that every jail has."""

from __future__ import annotations

from jailmgr.devices import unix
from jailmgr.key_checks import parse_bool
from jailmgr.model import Jail
from jailmgr.runtime import devices

_KINDS = {"unix-char": "c", "unix-block": "b"}
_MODE = "0660"


def nodes_of(jail: Jail) -> list[devices.Device]:
    """The jail's own devices of the host, by their names."""
    return [_device(keys) for _, keys in sorted(jail.devices.items()) if keys.get("type") in _KINDS]


def _device(keys: dict[str, str]) -> devices.Device:
    path = unix.path_of(keys)
    return devices.Device(
        path=path,
        kind=_KINDS[keys["type"]],
        source=keys.get("source", path),
        numbers=(int(keys["major"]), int(keys["minor"])) if "major" in keys else None,
        uid=int(keys.get("uid", "0")),
        gid=int(keys.get("gid", "0")),
        mode=int(keys.get("mode", _MODE), 8),
        required=parse_bool(keys.get("required", "true")),
    )


def check_nodes(jail: Jail, before: Jail | None = None) -> None:
    """Refuse devices that the host has not, and `before` has not either.

    Raises JailmgrError: `missing`, `invalid` where there is something else than a device of that type.
    """
    had = nodes_of(before) if before is not None else []
    for device in nodes_of(jail):
        if device not in had and devices.look_up(device) is None and device.required:
            raise devices.missing(device)
