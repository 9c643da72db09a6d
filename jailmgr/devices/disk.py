"""Device type `disk`: the root file system."""

from __future__ import annotations

from jailmgr.devices.kind import DeviceType
from jailmgr.key_checks import Key, at_least, one_of, rate

DISK_MIN = 1 << 20

TYPE = DeviceType(
    {
        "path": Key(one_of("/"), False, "Where it is mounted."),
        "pool": Key(one_of("default"), False, "The storage pool it lies in."),
        "size": Key(at_least(DISK_MIN), True, "Bytes it may take."),
        "limits.read": Key(rate, True, "Bytes (`20MiB`) or operations (`500iops`) a second that may be read."),
        "limits.write": Key(rate, True, "The same for what is written, by way of the page cache too."),
        "limits.max": Key(rate, True, "Both `limits.read` and `limits.write`."),
    },
    only="root",
)
