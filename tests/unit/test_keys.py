"""Configuration keys: what is taken, what is refused and how it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jailmgr import key_checks, keys
from jailmgr.errors import JailmgrError
from jailmgr.manager.plan import cpus_of, limits_of
from jailmgr.runtime.bundle import Limits
from jailmgr.units import parse_rate


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limits.memory", "512MiB"),
        ("limits.memory", "1.5GiB"),
        ("limits.memory.swap", "false"),
        ("limits.memory.swap", "128MiB"),
        ("limits.cpu", "2"),
        ("limits.cpu.allowance", "150ms/100ms"),
        ("limits.cpu.allowance", "50%"),
        ("limits.cpu.priority", "0"),
        ("limits.processes", "500"),
        ("limits.connections", "1"),
        ("limits.connections", "16384"),
        ("limits.disk", "5GiB"),
        ("boot.autostart", "true"),
        ("restart", "on-failure"),
        ("security.idmap.isolated", "true"),
        ("security.idmap.size", "65536"),
        ("security.idmap.size", "200001"),
        ("security.idmap.size", "2147418112"),
        ("environment.LANG", "C.UTF-8"),
        ("environment.EMPTY", ""),
        ("user.owner", "anna, büro 3"),
        ("systemd.credential.passwd.hashed-password.root", "$y$j9T$"),
        ("systemd.credential.systemd.unit-dropin.dev-disk\\x2da.mount~50-x", "[Unit]\n"),
        ("systemd.credential-binary.foo", "YmF6"),
        ("systemd.credential-binary.foo", "YmF6YQ"),
        ("systemd.credential-binary.foo", "YmF6=========\n"),
        ("systemd.credential-binary.foo", ""),
    ],
)
def test_good_values(key: str, value: str) -> None:
    keys.check_config({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limits.memory", "0"),
        ("limits.memory", "-5MiB"),
        ("systemd.credential-binary.foo", "YmF6Y"),
        ("systemd.credential-binary.foo", "Ym-6"),
        ("systemd.credential..", "x"),
        ("systemd.credential.a/b", "x"),
        ("systemd.credential.a:b", "x"),
        ("systemd.credential.", "x"),
        ("limits.memory", "12 parsecs"),
        ("limits.cpu", "1.5"),
        ("limits.cpu", "0"),
        ("limits.cpu", "0-3"),
        ("limits.cpu", "²"),
        ("limits.cpu.allowance", "0%"),
        ("limits.cpu.allowance", "1us/100ms"),
        ("limits.processes", "0"),
        ("limits.connections", "0"),
        ("limits.connections", "16385"),
        ("limits.processes", "9" * 4000),
        ("security.idmap.isolated", "false"),
        ("security.idmap.size", "65535"),
        ("security.idmap.size", "2147418113"),
        ("security.idmap.size", "64KiB"),
        ("security.idmap.size", "-1"),
        ("security.idmap.size", ""),
        ("boot.autostart", "maybe"),
        ("restart", "sometimes"),
        ("environment.A", "a\0b"),
    ],
)
def test_bad_values(key: str, value: str) -> None:
    with pytest.raises(JailmgrError) as caught:
        keys.check_config({key: value})
    assert caught.value.code == "invalid"
    assert key in caught.value.what


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("limits.memry", "limits.memory"), ("limit.cpu", "limits.cpu"), ("boot.auto_start", "boot.autostart")],
)
def test_unknown_keys_are_told_with_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(JailmgrError) as caught:
        keys.check_config({wrong: "1"})
    assert caught.value.hint == f"Did you mean {meant}?"


def test_a_base_of_the_users_own_is_refused_with_the_reason() -> None:
    with pytest.raises(JailmgrError) as caught:
        keys.find_key("security.idmap.base")
    assert caught.value.code == "invalid"
    assert "no two jails have one in common" in caught.value.why
    assert "security.idmap.size" in caught.value.hint


@pytest.mark.parametrize("key", ["environment.1A", "environment.", "environment.A=B", "user.", "user.a b", ""])
def test_bad_names_below_a_prefix(key: str) -> None:
    with pytest.raises(JailmgrError):
        keys.check_config({key: "x"})


@pytest.mark.parametrize("name", ["a", "web-1", "1web", "x" * 63])
def test_names(name: str) -> None:
    keys.check_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "x" * 64, "ä", "a\n", "../a", "٣"])
def test_what_is_no_dns_label(name: str) -> None:
    with pytest.raises(JailmgrError) as caught:
        keys.check_name(name)
    assert caught.value.code == "invalid"


@pytest.mark.parametrize(("text", "rate"), [("20MiB", (20 << 20, None)), ("1", (1, None)), ("500iops", (None, 500))])
def test_rates(text: str, rate: tuple[int | None, int | None]) -> None:
    assert parse_rate(text) == rate
    keys.check_devices({"root": {"limits.max": text}})


@pytest.mark.parametrize("text", ["", "0", "0iops", "iops", "1.5iops", "-1", "fast", "20MiB/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(JailmgrError) as caught:
        keys.check_devices({"root": {"limits.read": text}})
    assert caught.value.code == "invalid"


def test_a_name_that_would_do_is_offered() -> None:
    with pytest.raises(JailmgrError) as caught:
        keys.check_name("My_Web")
    assert "my-web would do" in caught.value.hint


@given(st.text(max_size=80))
def test_no_key_or_name_raises_anything_else(text: str) -> None:
    for check in (keys.check_name, keys.find_key, lambda text: keys.check_devices({text: {text: text}})):
        assert _code(check, text) in ("", "invalid")


@given(st.sampled_from(sorted(keys.CONFIG)), st.text(max_size=40))
def test_no_value_raises_anything_else(key: str, value: str) -> None:
    code = _code(keys.check_config, {key: value})
    assert code in ("", "invalid")
    if not code:
        limits_of({key: value})


def _code(check: Callable[[Any], object], value: Any) -> str:
    """The code of the error that was raised, empty for none."""
    try:
        check(value)
    except JailmgrError as error:
        return error.code
    return ""


def test_short_names_are_folded() -> None:
    config, devices = keys.fold({"limits.disk": "5GiB", "user.a": "b"}, {"eth0": {"network": "default"}})
    assert config == {"user.a": "b"}
    assert devices == {"root": {"type": "disk", "size": "5GiB"}, "eth0": {"type": "nic", "network": "default"}}


def test_a_jail_has_no_more_keys_and_devices_than_a_list_can_tell() -> None:
    text = {f"user.{number}": "x" * 1000 for number in range(64)}
    assert keys.fold(text, {})[0] == text
    with pytest.raises(JailmgrError, match="characters"):
        keys.fold(text | {"user.more": "x" * 2000}, {})
    with pytest.raises(JailmgrError, match="257"):
        keys.fold({}, {f"p{number}": {"type": "proxy"} for number in range(257)})


def test_two_sizes_of_root_that_differ_are_refused() -> None:
    assert keys.fold({"limits.disk": "1GiB"}, {"root": {"size": "1024MiB"}})[1]["root"]["size"] == "1GiB"
    with pytest.raises(JailmgrError):
        keys.fold({"limits.disk": "1GiB"}, {"root": {"size": "2GiB"}})


@pytest.mark.parametrize(
    "devices",
    [
        {"rot": {"size": "1GiB"}},
        {"root": {"sise": "1GiB"}},
        {"root": {"type": "nic"}},
        {"root": {"path": "/home"}},
        {"data": {"type": "disk", "path": "/", "size": "1GiB"}},
        {"eth1": {"type": "nic"}},
        {"eth0": {"ipv4.address": "10.0.0.300"}},
        {"eth0": {"network": "../x"}},
        {"gpu": {"type": "gpu"}},
        {"web": {"type": "proxy", "listen": "tcp:0.0.0.0:80"}},
        {"web": {"type": "proxy", "listen": "tcp:0.0.0.0:80", "connect": "udp:127.0.0.1:80"}},
        {"web": {"type": "proxy", "listen": "tcp:0.0.0.0:0", "connect": "tcp:127.0.0.1:80"}},
        {"web": {"type": "proxy", "listen": "tcp:example.org:80", "connect": "tcp:127.0.0.1:80"}},
        {"web": {"type": "proxy", "listen": "tcp:0.0.0.0:80", "connect": "tcp:127.0.0.1:80", "nat": "false"}},
    ],
)
def test_bad_devices(devices: dict[str, dict[str, str]]) -> None:
    with pytest.raises(JailmgrError) as caught:
        keys.check_devices(devices)
    assert caught.value.code == "invalid"


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp:0.0.0.0:8080", key_checks.Endpoint("tcp", "", 8080)),
        ("tcp:[::]:8080", key_checks.Endpoint("tcp", "", 8080)),
        ("udp:[FD00:0::1]:53", key_checks.Endpoint("udp", "fd00::1", 53)),
        ("tcp:127.0.0.1:1", key_checks.Endpoint("tcp", "127.0.0.1", 1)),
    ],
)
def test_endpoints(text: str, endpoint: key_checks.Endpoint) -> None:
    assert key_checks.parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({}, Limits()),
        ({"limits.memory": "64MiB", "limits.memory.swap": "false"}, Limits(memory=64 << 20, swap=0)),
        ({"limits.memory": "64MiB", "limits.memory.swap": "true"}, Limits(memory=64 << 20)),
        ({"limits.cpu": "2"}, Limits(cpu_quota=200_000, cpu_period=100_000)),
        ({"limits.cpu": "2", "limits.cpu.allowance": "25ms/50ms"}, Limits(cpu_quota=25_000, cpu_period=50_000)),
        ({"limits.cpu": "1", "limits.cpu.allowance": "300ms/100ms"}, Limits(cpu_quota=100_000, cpu_period=100_000)),
        ({"limits.cpu.allowance": "50%"}, Limits(cpu_weight=50)),
        ({"limits.cpu.allowance": "5%", "limits.cpu.priority": "0"}, Limits(cpu_weight=1)),
        ({"limits.cpu.priority": "7"}, Limits(cpu_weight=97)),
        ({"limits.processes": "50"}, Limits(processes=50)),
    ],
)
def test_limits(config: dict[str, str], limits: Limits) -> None:
    keys.check_config(config)
    assert limits_of(config) == limits


def test_number_of_cpus() -> None:
    assert cpus_of(limits_of({"limits.cpu.allowance": "150ms/100ms"})) == 1.5
    assert cpus_of(limits_of({"limits.cpu.allowance": "50%"})) is None


NODE = {"type": "unix-char", "source": "/dev/kmsg", "path": "/dev/x"}


@pytest.mark.parametrize(
    ("keys_", "why"),
    [
        ({"path": None, "source": "/dev/zero"}, "/dev/zero is the jail's own"),
        ({"path": "/dev/pts/3"}, "/dev/pts is the jail's own"),
        ({"path": "/etc/x"}, "is not a path below /dev"),
        ({"path": "/dev/../x"}, "is not a path below /dev"),
        ({"path": "/dev/x/"}, "is not a path below /dev"),
        ({"path": "/dev//x"}, "is not a path below /dev"),
        ({"path": "/dev/"}, "is not a path below /dev"),
        ({"path": "/dev"}, "is not a path below /dev"),
        ({"source": "kmsg"}, "is not an absolute path"),
        ({"source": None, "path": None}, "neither 'source' nor 'path' is given"),
        ({"major": "1"}, "one of 'major' and 'minor' is given"),
        ({"mode": "7777"}, "is not an octal mode"),
        ({"mode": "rw"}, "is not an octal mode"),
        ({"uid": "-1"}, "is not a whole number"),
        ({"required": "maybe"}, "is neither true nor false"),
        ({"vendorid": "1"}, "'vendorid' is no key of a unix-char device"),
        ({"type": "usb"}, "there is no device type 'usb'"),
    ],
)
def test_devices_of_the_host_that_are_refused(keys_: dict[str, str | None], why: str) -> None:
    device = {key: value for key, value in (NODE | keys_).items() if value is not None}
    with pytest.raises(JailmgrError) as caught:
        keys.check_devices({"knob": device})
    assert why in str(caught.value)
    assert caught.value.code == "invalid"


def test_two_devices_of_one_path_are_refused() -> None:
    keys.check_devices({"knob": NODE, "other": NODE | {"path": "/dev/y"}})
    with pytest.raises(JailmgrError, match="/dev/x is device knob already"):
        keys.check_devices({"knob": NODE, "other": {"type": "unix-block", "path": "/dev/x"}})


@pytest.mark.parametrize("kind", [kind for kind, type_ in keys.TYPES.items() if type_.only])
def test_a_jail_has_one_root_and_one_eth0(kind: str) -> None:
    keys.check_devices({keys.TYPES[kind].only: {"type": kind}})
    with pytest.raises(JailmgrError, match=f"a jail has one {kind} device"):
        keys.check_devices({"more": {"type": kind}})
    with pytest.raises(JailmgrError, match=f"is a {kind} device"):
        keys.check_devices({keys.TYPES[kind].only: {"type": "unix-char", "path": "/dev/x"}})
