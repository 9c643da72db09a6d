"""Rates by what distributions' kernels have: modules loaded when they are asked for, and fq_codel in the leaves."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.system.instance import Instance
from tests.system.netns import run
from tests.system.traffic import jail_netns, megabits


def test_a_rate_holds_and_its_queue_is_fair(host: Instance, jail: Callable[..., str]) -> None:
    limited, free = jail("-c", "eth0.limits.max=2Mbit"), jail()
    ifbs = [link["ifname"] for link in json.loads(run("ip", "-json", "link", "show", "type", "ifb"))]
    ours = [name for name in ifbs if name.startswith(host.root.link_prefix)]
    assert len(ours) == 2
    for name in ours:
        root, *leaves = run("tc", "qdisc", "show", "dev", name).splitlines()
        assert root.split()[1] == "htb"
        assert [leaf.split()[1] for leaf in leaves] == ["fq_codel"] * 2
    with jail_netns(host, limited) as here, jail_netns(host, free) as there:
        assert 0.2 < megabits(here, there, host.info(free)["ipv4"]) < 3.5
        assert 0.2 < megabits(here, there, host.info(free)["ipv4"], receives=True) < 3.5
        host("unset", limited, "eth0.limits.max")
        assert megabits(here, there, host.info(free)["ipv4"]) > 10
