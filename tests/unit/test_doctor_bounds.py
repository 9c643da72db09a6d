"""doctor's look at what is in use of the host's bounds, on files of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from jailmgr.manager.doctor import bounds
from jailmgr.manager.doctor.check import Check
from jailmgr.runtime import apparmor, cgroups
from jailmgr.runtime.cgroup_hierarchies import Hierarchies

FILES = {
    "sys/kernel/pty/nr": "10",
    "sys/kernel/pty/max": "4096",
    "sys/kernel/pty/reserve": "1024",
    "sys/kernel/pid_max": "32768",
    "sys/kernel/threads-max": "100000",
    "loadavg": "0.10 0.20 0.30 1/500 12345",
    "key-users": "    0:    20 19/19 18/1000000 400/25000000\n100000:     5 5/5 20/200 300/20000",
    "pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0",
    "cgroup/cgroup.stat": "nr_descendants 20\nnr_dying_descendants 5",
}


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(bounds, "PROC", str(tmp_path))
    monkeypatch.setattr(cgroups, "discover", lambda: Hierarchies(str(tmp_path / "cgroup"), ("memory",), {}, ()))
    monkeypatch.setattr(apparmor, "enabled", lambda: False)
    return tmp_path


def found() -> dict[str, Check]:
    return {each.check: each for each in bounds.bounds_checks()}


def test_what_is_little_used_is_well(proc: Path) -> None:
    checks = found()
    assert {name for name, each in checks.items() if not each.ok} == {"pressure"}
    assert checks["terminals"].detail == "10 of 3072 for all jails in use"
    assert checks["processes"].detail == "500 of 32768 on the host in use"
    assert checks["memory groups"].detail == "25 of 65535 on the host in use"


@pytest.mark.parametrize(
    ("name", "file", "text", "remedy"),
    [
        ("terminals", "sys/kernel/pty/nr", "2304", "sysctl -w kernel.pty.max=8192"),
        ("processes", "loadavg", "0 0 0 2/24576 1", "sysctl -w kernel.pid_max=65536"),
        ("keys", "key-users", "100000: 5 5/5 150/200 300/20000", "kernel.keys.maxkeys"),
        ("keys", "key-users", "100000: 5 5/5 1/200 15000/20000", "kernel.keys.maxbytes"),
        ("memory groups", "cgroup/cgroup.stat", "nr_descendants 40000\nnr_dying_descendants 9152", "Stop jails"),
        ("memory groups", "cgroup/cgroup.stat", "nr_descendants 1\nnr_subsys_memory 49152", "Stop jails"),
    ],
)
def test_three_quarters_are_a_warning(proc: Path, name: str, file: str, text: str, remedy: str) -> None:
    (proc / file).write_text(f"{text}\n")
    warned = found()[name]
    assert (warned.ok, warned.severity) == (False, "warning")
    assert remedy in warned.remedy


def test_pressure_is_well_where_it_is_off_or_denied(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "psi=0" in found()["pressure"].remedy
    monkeypatch.setattr(apparmor, "enabled", lambda: True)
    assert found()["pressure"].ok
    monkeypatch.setattr(apparmor, "enabled", lambda: False)
    (proc / "pressure/cpu").unlink()
    assert found()["pressure"].ok


def test_what_the_host_does_not_have_is_not_checked(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "discover", lambda: Hierarchies("", (), {"memory": "/x"}, ("/x",)))
    (proc / "sys/kernel/pty/max").unlink()
    (proc / "loadavg").unlink()
    assert found().keys() == {"pressure", "keys"}
