"""What all tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may meet the host's own instance of jailmgr by the caller's environment."""
    for name in ("JAILMGR_ROOT", "JAILMGR_TENANT", "JAILMGR_READY_FD"):
        monkeypatch.delenv(name, raising=False)


def pytest_report_header() -> list[str]:
    kernel = os.uname()
    return [f"kernel {kernel.release} on {kernel.machine}, {os.cpu_count()} CPUs, uid {os.geteuid()}"]
