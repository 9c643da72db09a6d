"""The types of devices that a jail takes: a module for each, and a line in `TYPES`.

A type is listed here once it does something. Names and keys are LXD's and Incus's ("Devices" in their documentation).
"""

from __future__ import annotations

from jailmgr.devices import disk, nic, proxy, unix
from jailmgr.devices.kind import DeviceType as DeviceType

TYPES: dict[str, DeviceType] = {
    "disk": disk.TYPE,
    "nic": nic.TYPE,
    "proxy": proxy.TYPE,
    "unix-block": unix.BLOCK,
    "unix-char": unix.CHAR,
}
"""By name."""

FIXED = {type_.only: kind for kind, type_ in TYPES.items() if type_.only}
"""Devices that every jail has, by name."""
