"""doctor on the host as it is, with one thing after the other broken."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jailmgr.manager.doctor.host import SYSCTLS
from tests.system.conftest import MakeJail
from tests.system.instance import Instance
from tests.system.leftovers import leftovers
from tests.system.netns import OUTSIDE, run

INSTANCES = Path("/proc/sys/fs/inotify/max_user_instances")
CHECKS = {
    "root", "kernel", "system calls", "namespace user", "namespace time", "idmapped mounts", "seccomp", "overlay",
    "btrfs", "loop", "veth", "bridge", "traffic control", "simple quotas", "cgroup v2", "cgroup memory", "cgroup cpu",
    "cgroup pids", "cgroup io", "cgroup devices", "cgroup freezer", "nftables", "protocols", "firewall forward",
    "firewall input", "connection limits", "connection flows", "bridge netfilter", "mkfs.btrfs", "dnsmasq",
    "debootstrap", "busybox", "lxcfs", "fuse", "libnftables", "libseccomp", "AppArmor",
    "fs.inotify.max_user_instances", "kernel.keys.maxkeys", "kernel.pty.max", "pressure", "terminals", "processes",
    "keys", "id ranges", "resolver", "disk", "store", "leftovers", "inode numbers",
}  # fmt: skip


def checks(jm: Instance) -> dict[str, dict[str, Any]]:
    return {check["check"]: check for check in jm("doctor", "--format", "json", status=None).json}


def test_every_requirement_has_a_line(jm: Instance, busybox_jail: MakeJail) -> None:
    busybox_jail()
    done = jm("doctor", "--format", "json", status=None)
    found = done.json
    assert {check["check"] for check in found} >= CHECKS
    for check in found:
        assert check.keys() >= {"check", "ok", "severity", "detail", "remedy"}
        assert check["ok"] or check["remedy"], check
    assert checks(jm)["leftovers"]["ok"]
    assert done.status == int(any(check["severity"] == "error" and not check["ok"] for check in found))


@pytest.fixture
def sysctls() -> Iterator[None]:
    """All that `--fix` may raise is put back."""
    paths = [Path("/proc/sys", *name.split(".")) for name in SYSCTLS]
    before = {path: path.read_text() for path in paths if path.exists()}
    yield
    for path, value in before.items():
        if path.read_text() != value:
            path.write_text(value)


@pytest.mark.xdist_group("doctor-fix")
def test_what_a_running_engine_keeps_is_no_leftover(jm: Instance, sysctls: None) -> None:
    """After the last jail has gone, too: a bridge, its DNS server and the rules are there for the next one."""
    assert jm.json("list", "--all-tenants") == []
    assert jm.json("engine", "status")["running"]

    def kept() -> set[str]:
        return {line for line in leftovers(jm.root) if line.startswith(("link ", "table ")) or "dnsmasq" in line}

    before = kept()
    assert any(line.startswith(f"link {jm.root.link_prefix}b") for line in before)
    assert any("dnsmasq" in line for line in before)
    assert checks(jm)["leftovers"]["detail"] == "none"
    assert "removed" not in jm("doctor", "--fix", status=None).err
    assert kept() == before


@pytest.mark.xdist_group("doctor-fix")
def test_fix_raises_a_sysctl(jm: Instance, sysctls: None) -> None:
    INSTANCES.write_text("128")
    low = checks(jm)["fs.inotify.max_user_instances"]
    assert (low["ok"], low["severity"]) == (False, "warning")
    said = jm("doctor", "--fix", status=None)
    assert "fs.inotify.max_user_instances raised from 128 to 1024" in said.err
    assert checks(jm)["fs.inotify.max_user_instances"]["ok"]
    assert "raised" not in jm("doctor", "--fix", status=None).err


def test_limits_that_the_kernel_forgets(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    assert checks(jm)["connection limits"]["ok"]
    mac = jm.sh(name, "cat /sys/class/net/eth0/address").out.strip()
    run("nft", "delete", "element", "inet", jm.root.table, "opened", f"{{ {mac} }}")
    found = checks(jm)["connection limits"]
    assert (found["ok"], found["severity"]) == (False, "warning")
    assert "1 jails" in found["detail"]
    jm("restart", "--force", name)
    assert checks(jm)["connection limits"]["ok"]


@pytest.fixture
def ruleset() -> Iterator[Callable[[str], None]]:
    """Loads a table `ip filter`, as other firewalls of a host have it, in the session's network namespace."""

    def load(chains: str) -> None:
        run("nft", "-f", "-", stdin=f"table ip filter {{\n{chains}\n}}\n")

    yield load
    run("nft", "delete", "table", "ip", "filter")


FORWARD = "chain FORWARD { type filter hook forward priority filter; policy drop; }"
INPUT = "chain INPUT { type filter hook input priority filter; policy drop; }"


def test_another_firewall_that_drops_what_it_does_not_know(
    jm: Instance, busybox_jail: MakeJail, ruleset: Callable[[str], None]
) -> None:
    name = busybox_jail()
    ping, ask = f"ping -c 1 -W 1 {OUTSIDE[0]}", f"nslookup {name}.jailmgr"
    assert checks(jm)["firewall forward"]["ok"]
    jm.sh(name, ping)
    jm.sh(name, ask)
    ruleset(f"{FORWARD}\n{INPUT}")
    jm.sh(name, ping, status=1)
    jm.sh(name, f"timeout 2 {ask}", status=None)
    for hook in ("forward", "input"):
        found = checks(jm)[f"firewall {hook}"]
        assert (found["ok"], found["severity"]) == (False, "error")
        assert f"ip filter {hook.upper()} drops" in found["detail"]
        for command in found["remedy"].split(" && "):
            subprocess.run(shlex.split(command), check=True, timeout=20)
        assert checks(jm)[f"firewall {hook}"]["ok"]
    jm.sh(name, ping)
    jm.sh(name, ask)


@pytest.mark.parametrize(
    ("chains", "remedy"),
    [
        (f"chain DOCKER-USER {{ }}\n{FORWARD}", "iptables -I DOCKER-USER -i"),
        (f"chain ufw-user-forward {{ }}\n{FORWARD}", "ufw route allow in on"),
    ],
    ids=["docker", "ufw"],
)
def test_the_remedy_is_the_other_firewalls_own(
    jm: Instance, ruleset: Callable[[str], None], chains: str, remedy: str
) -> None:
    ruleset(chains)
    found = checks(jm)["firewall forward"]
    assert not found["ok"]
    assert remedy in found["remedy"]
    assert f"{jm.root.link_prefix}b+" in found["remedy"]
