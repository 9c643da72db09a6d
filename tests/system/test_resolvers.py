"""A jail's programs find the network's DNS servers at each start, whichever of them resolves names there."""

from __future__ import annotations

import re

from jailmgr.runtime.resolvers import RESOLVERS, resolv_conf
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until
from tests.system.test_network import gateways

RESOLVED = "/run/systemd/resolved.conf.d/zz-jailmgr.conf"
CONNECTION = "/run/NetworkManager/system-connections/jailmgr.nmconnection"
UNMANAGED = "/run/NetworkManager/conf.d/jailmgr.conf"
ELSEWHERE = resolv_conf(["192.0.2.53"])
"""What jailmgr has written for another network."""


def write(jm: Instance, name: str, text: bytes) -> None:
    jm.exec(name, "sh", "-c", "cat >/etc/resolv.conf", stdin=text)


def reboot(jm: Instance, name: str) -> None:
    """Have the guest reboot itself: its supervisor starts it again, with no engine."""
    before = jm.info(name)["init_pid"]
    jm.sh(name, "kill -TERM 1", status=None)
    until(lambda: jm.status(name) == "Running" and jm.info(name)["init_pid"] != before, 20, "the reboot")


def test_a_start_hands_out_the_servers(jm: Instance, busybox_jail: MakeJail) -> None:
    name, other = busybox_jail(), busybox_jail()
    servers = gateways(jm, name)
    assert jm.exec(name, "cat", "/etc/resolv.conf").out.encode() == resolv_conf(servers)
    assert jm.exec(name, "cat", RESOLVED).out == f"[Resolve]\nDNS={' '.join(servers)}\nDomains=jailmgr\n"
    for resolver in RESOLVERS:
        kept = jm.exec(name, "stat", "-c", "%u:%g %a", f"/run/{resolver.path}").out
        assert kept == f"0:0 {resolver.mode:o}\n"
    assert jm.info(other)["ipv4"] in jm.exec(name, "nslookup", other).out


def test_resolv_conf_is_renewed_until_it_is_the_guests_own(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    ours = resolv_conf(gateways(jm, name))
    write(jm, name, ELSEWHERE)
    reboot(jm, name)
    assert jm.exec(name, "cat", "/etc/resolv.conf").out.encode() == ours
    own = ours + b"options rotate\n"
    write(jm, name, own)
    before = jm.exec(name, "stat", "-c", "%i %Y", "/etc/resolv.conf").out
    jm("restart", "--force", name)
    assert jm.exec(name, "cat", "/etc/resolv.conf").out.encode() == own
    assert jm.exec(name, "stat", "-c", "%i %Y", "/etc/resolv.conf").out == before
    given = jm.sh(name, "find /run -name '*jailmgr*' -type f").out.split()
    assert sorted(given) == sorted([RESOLVED, CONNECTION, UNMANAGED])
    assert "\nFallbackDNS=" in jm.exec(name, "cat", RESOLVED).out
    # NetworkManager finds the addresses and not the servers, and leaves the file alone.
    connection = jm.exec(name, "cat", CONNECTION).out
    assert f"\naddress1={jm.info(name)['ipv4']}/" in connection
    assert "dns" not in connection
    assert jm.exec(name, "cat", UNMANAGED).out == "[main]\nrc-manager=unmanaged\n"
    # One that links to what a program makes in /run is asked for by the guest, and one that it removes is not its own.
    link = "../run/systemd/resolve/stub-resolv.conf"
    jm.exec(name, "ln", "-sf", link, "/etc/resolv.conf")
    jm("restart", "--force", name)
    assert jm.exec(name, "readlink", "/etc/resolv.conf").out == f"{link}\n"
    assert "\nDNS=" in jm.exec(name, "cat", RESOLVED).out
    jm.exec(name, "rm", "/etc/resolv.conf")
    jm("restart", "--force", name)
    assert jm.exec(name, "cat", "/etc/resolv.conf").out.encode() == ours


def test_a_full_disk_keeps_no_jail_from_starting(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--disk", "8MiB")
    write(jm, name, ELSEWHERE)
    jm.sh(
        name, "dd if=/dev/urandom of=/fill bs=64k count=400; dd if=/dev/urandom of=/fill2 bs=4k count=400; sync", None
    )
    jm.sh(name, "echo x >/more", 1)
    jm("restart", "--force", name)
    assert "\nDNS=" in jm.exec(name, "cat", RESOLVED).out
    assert jm.sh(name, "ls -a /etc | grep resolv").out == "resolv.conf\n"
    jm.sh(name, "rm /fill; sync")


def test_debian_resolves_names_whatever_is_installed(
    jm: Instance, debian_jail: MakeJail, busybox_jail: MakeJail
) -> None:
    """systemd-resolved, openresolv and resolvconf, as a user installs them: at once, after a start, after a VPN."""
    name, other = debian_jail(), busybox_jail()
    own = gateways(jm, name)

    def install(*packages: str) -> None:
        command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *packages]
        jm("exec", name, "-e", "DEBIAN_FRONTEND=noninteractive", "--", *command, within=200)
        resolves()

    def resolves() -> None:
        assert jm.info(other)["ipv4"] in jm.exec(name, "getent", "ahostsv4", other).out

    def vpn_comes_and_goes() -> None:
        """As wg-quick(8) does with DNS=."""
        jm.sh(name, "echo nameserver 192.0.2.53 | resolvconf -a tun.wg0 -m 0 -x")
        assert servers(jm, name)[0] == "192.0.2.53"
        jm.sh(name, "resolvconf -d tun.wg0 -f")
        assert servers(jm, name) == own

    jm("exec", name, "--", "apt-get", "update", "-q", within=200)
    install("systemd-resolved")
    jm("restart", "--force", name, "--wait")
    assert "stub-resolv.conf" in jm.exec(name, "readlink", "/etc/resolv.conf").out
    resolves()
    install("openresolv", "systemd-resolved-")
    vpn_comes_and_goes()
    install("resolvconf")
    jm("restart", "--force", name, "--wait")
    resolves()
    vpn_comes_and_goes()


def servers(jm: Instance, name: str) -> list[str]:
    return re.findall(r"^nameserver (\S+)$", jm.exec(name, "cat", "/etc/resolv.conf").out, re.MULTILINE)
