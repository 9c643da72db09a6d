"""What a type of device is: the keys that it takes, and what its devices may not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from jailmgr.key_checks import Key


def _nothing(_name: str, _device: Mapping[str, str]) -> None:
    return


def _nowhere(_device: Mapping[str, str]) -> str:
    return ""


class DeviceType(msgspec.Struct, frozen=True):
    """A type of device."""

    keys: dict[str, Key]
    """By name, besides `type`."""
    only: str = ""
    """The name of the one device of this type that a jail has; empty where a jail has any number of them."""
    check: Callable[[str, Mapping[str, str]], None] = _nothing
    """Refuses a device, by its name and keys, whose keys are right one by one only. Raises JailmgrError `invalid`."""
    place: Callable[[Mapping[str, str]], str] = _nowhere
    """What no two devices of a jail may share, as a path in it; empty for nothing."""
    root: bool = False
    """Only the host's root may add, change or remove such a device, no user of a tenant."""
    waits: bool = False
    """A change of a running jail's device waits for the next start; else it takes effect at once or is refused."""
