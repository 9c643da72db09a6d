"""Device type `proxy`: a port of the host that leads into the jail."""

from __future__ import annotations

from collections.abc import Mapping

from jailmgr.devices.kind import DeviceType
from jailmgr.errors import JailmgrError
from jailmgr.key_checks import Key, endpoint, one_of, parse_endpoint


def _check(name: str, device: Mapping[str, str]) -> None:
    for end in ("listen", "connect"):
        if end not in device:
            hint = "Such as listen=tcp:0.0.0.0:8080 connect=tcp:127.0.0.1:80."
            raise JailmgrError(f"device {name}", f"a proxy needs {end!r}", hint, "invalid")
    if parse_endpoint(device["listen"]).protocol != parse_endpoint(device["connect"]).protocol:
        raise JailmgrError(f"device {name}", "its two ends speak different protocols", "", "invalid")


TYPE = DeviceType(
    {
        "listen": Key(endpoint, True, "Where the host listens: `tcp:0.0.0.0:8080`."),
        "connect": Key(endpoint, True, "Where it leads in the jail: `tcp:127.0.0.1:80`; only the port counts."),
        "nat": Key(one_of("true"), True, "Forwarded by the kernel's NAT; there is no other way here."),
    },
    check=_check,
)
