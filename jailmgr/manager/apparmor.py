"""The jails' AppArmor profile, loaded before the first jail that runs under it. Its text is packaging/apparmor/jailmgr.

The admin has the last word as with any other profile: what is in /etc/apparmor.d is loaded rather than what came with
jailmgr, and where it is disabled there (aa-disable(8)), jails start without.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.runtime import apparmor
from jailmgr.runtime.apparmor import PROFILE
from jailmgr.runtime.jsonfile import read_json, write_json

ETC = "/etc/apparmor.d"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
NOTE = "apparmor.json"
"""In the instance's RUN: which text was loaded last, and what the kernel then called it."""
_PARSE_SECONDS = 120

_lock = threading.Lock()


def ensure_profile(root: Root) -> str:
    """The name of the profile that jails are to run under, which is loaded then; empty where there is none.

    None: the host has no AppArmor, no apparmor_parser, or the admin has disabled the profile (`doctor` tells). Raises
    JailmgrError `unavailable` where it could not be loaded: a jail is not started without a wall that its host has.
    """
    if not apparmor.enabled() or disabled():
        return ""
    with _lock:
        path = profile_file()
        note = {"text": _digest(path), "policy": apparmor.loaded_policy()}
        if note["policy"] and note == read_json(f"{root.run}/{NOTE}"):
            return PROFILE
        parser = find_parser()
        if not parser:
            return PROFILE if note["policy"] else ""
        _load(parser, path)
        write_json(f"{root.run}/{NOTE}", note | {"policy": apparmor.loaded_policy()})
        return PROFILE


def disabled() -> bool:
    """Whether the admin has switched the profile off: /etc/apparmor.d/disable/jailmgr."""
    return os.path.lexists(f"{ETC}/disable/{PROFILE}")


def find_parser() -> str:
    """Path of apparmor_parser(8), of Debian's package apparmor; empty where it is missing."""
    return shutil.which("apparmor_parser", path=SBIN) or ""


def profile_file() -> str:
    """The profile's text: the host's own, else what came with jailmgr."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    places = (ETC, f"{package}/_apparmor", f"{os.path.dirname(package)}/packaging/apparmor")
    for place in places:
        if os.path.isfile(f"{place}/{PROFILE}"):
            return f"{place}/{PROFILE}"
    raise JailmgrError("AppArmor profile", f"jailmgr was installed without it ({places[1]})", "Install it again.")


def _digest(path: str) -> str:
    """Of the text, the features that it goes by and the site's part of it."""
    digest = hashlib.sha256()
    for part in (path, f"{os.path.dirname(path)}/abi/{PROFILE}", f"{ETC}/local/{PROFILE}"):
        try:
            with open(part, "rb") as file:
                digest.update(file.read())
        except FileNotFoundError:
            pass
        digest.update(b"\0")
    return digest.hexdigest()


def _load(parser: str, path: str) -> None:
    """Put it into the kernel, in place of one of the same name: its processes go over to the new one.

    Past the parser's cache, which knows files by their base name.
    """
    include = f"--Include={os.path.dirname(path)}"
    what, hint = "AppArmor profile", f"See: apparmor_parser --replace {include} {path}"
    try:
        done = subprocess.run(
            [parser, "--replace", "--skip-cache", "--skip-read-cache", include, path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PARSE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JailmgrError(what, f"{path}: {error}", hint, "unavailable") from error
    if done.returncode != 0 or not apparmor.loaded():
        said = done.stderr.strip().replace("\n", "; ") or f"apparmor_parser ended with {done.returncode}"
        raise JailmgrError(what, f"{path} could not be loaded: {said}", hint, "unavailable")
