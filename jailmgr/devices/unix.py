"""Device types `unix-char` and `unix-block`: a device of the host in the jail's /dev, by a node of the jail's own.

Keys and defaults are LXD's ("Type: unix-char"). Two differ: `path` is below /dev, and a device that is not `required`
is looked for at each start and not while the jail runs.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

from jailmgr.devices.kind import DeviceType
from jailmgr.errors import JailmgrError
from jailmgr.key_checks import Key, truth, whole

MAJOR_MAX, MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1
"""MAJOR and MINOR of linux/kdev_t.h."""
_ID_MAX = 2**32 - 2
_MODE = re.compile(r"0?[0-7]{3}\Z", re.ASCII)
_PATH_MAX = 255
RESERVED = (
    "console", "fd", "full", "log", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
    "tty", "urandom", "zero",
)  # fmt: skip
"""First parts of names below /dev that every jail has already, or that its init makes."""


def _source(text: str) -> None:
    if not text.startswith("/") or "\0" in text or len(text) > _PATH_MAX:
        raise ValueError(f"{text!r} is not an absolute path of up to {_PATH_MAX} characters")


def _path(text: str) -> None:
    _source(text)
    first = text.removeprefix("/dev/").partition("/")[0]
    if not text.startswith("/dev/") or posixpath.normpath(text) != text:
        raise ValueError(f"{text!r} is not a path below /dev, without . and ..")
    if first in RESERVED:
        raise ValueError(f"/dev/{first} is the jail's own")


def _mode(text: str) -> None:
    if not _MODE.match(text):
        raise ValueError(f"{text!r} is not an octal mode such as 0660")


def path_of(device: Mapping[str, str]) -> str:
    """Where the device is in the jail."""
    return device.get("path") or device.get("source", "")


def _check(name: str, device: Mapping[str, str]) -> None:
    what = f"device {name}"
    if not path_of(device):
        hint = "Such as source=/dev/ttyUSB0, or source=/dev/ttyUSB0 path=/dev/modem."
        raise JailmgrError(what, "neither 'source' nor 'path' is given", hint, "invalid")
    if "path" not in device:
        try:
            _path(device["source"])
        except ValueError as error:
            raise JailmgrError(what, str(error), "Say where it is in the jail: path=/dev/NAME.", "invalid") from None
    if ("major" in device) != ("minor" in device):
        raise JailmgrError(what, "one of 'major' and 'minor' is given", "Give both, or neither.", "invalid")


_KEYS = {
    "source": Key(_source, False, "The device on the host, as `/dev/ttyUSB0`; where it isn't set, `path`."),
    "path": Key(_path, False, "Where it is in the jail, below /dev; where it isn't set, `source`."),
    "major": Key(whole(0, MAJOR_MAX), False, "Its major number; where it isn't set, that of the host's device."),
    "minor": Key(whole(0, MINOR_MAX), False, "Its minor number; the same."),
    "uid": Key(whole(0, _ID_MAX), False, "Its owner in the jail; 0 where it isn't set."),
    "gid": Key(whole(0, _ID_MAX), False, "Its group in the jail; 0 where it isn't set."),
    "mode": Key(_mode, False, "Its mode; `0660` where it isn't set."),
    "required": Key(
        truth, False, "`false`: the jail starts without it where the host hasn't it at that moment; else it doesn't."
    ),
}

CHAR = DeviceType(_KEYS, check=_check, place=path_of, root=True, waits=True)
BLOCK = DeviceType(_KEYS, check=_check, place=path_of, root=True, waits=True)
