"""Device type `nic`: the jail's interface, on a network of its tenant."""

from __future__ import annotations

from jailmgr.devices.kind import DeviceType
from jailmgr.key_checks import Key, bit_rate, ipv4, label, one_of

TYPE = DeviceType(
    {
        "network": Key(label, False, "The tenant's network it is attached to."),
        "name": Key(one_of("eth0"), False, "The interface's name in the jail."),
        "ipv4.address": Key(ipv4, False, "Its IPv4 address; one is chosen where none is given."),
        "limits.ingress": Key(bit_rate, True, "Bits a second the jail may receive, headers included: `10Mbit`."),
        "limits.egress": Key(bit_rate, True, "The same for what it sends."),
        "limits.max": Key(bit_rate, True, "Both `limits.ingress` and `limits.egress`."),
    },
    only="eth0",
)
