"""What an init's wait status is told as."""

from __future__ import annotations

import signal

import pytest

from jailmgr.runtime.ending import ending


@pytest.mark.parametrize(
    ("status", "how", "told"),
    [
        (signal.SIGINT, {}, ("poweroff", "guest", 0)),
        (signal.SIGHUP, {}, ("reboot", "guest", 0)),
        (signal.SIGINT, {"stopping": "admin"}, ("poweroff", "admin", 0)),
        (signal.SIGHUP, {"stopping": "admin"}, ("poweroff", "admin", 0)),
        (7 << 8, {}, ("exit", "guest", 7)),
        (0, {}, ("exit", "guest", 0)),
        (0, {"stopping": "admin"}, ("poweroff", "admin", 0)),
        (0, {"stopping": "host"}, ("poweroff", "host", 0)),
        (7 << 8, {"stopping": "admin"}, ("exit", "admin", 7)),
        (signal.SIGSEGV, {}, ("signal", "guest", 11)),
        (signal.SIGKILL, {}, ("signal", "host", 9)),
        (signal.SIGKILL, {"out_of_memory": True}, ("oom", "kernel", 9)),
        (signal.SIGKILL, {"stopping": "admin", "killed": True, "out_of_memory": True}, ("signal", "admin", 9)),
        (signal.SIGKILL, {"ours": False}, ("unknown", "guest", 0)),
        (signal.SIGKILL, {"ours": False, "stopping": "admin"}, ("poweroff", "admin", 0)),
        (0, {"ours": False}, ("unknown", "guest", 0)),
        (3 << 8, {"ours": False}, ("exit", "guest", 3)),
        (None, {"ours": False}, ("unknown", "host", 0)),
        (None, {"ours": False, "stopping": "host"}, ("unknown", "host", 0)),
    ],
)
def test_ending(status: int | None, how: dict[str, object], told: tuple[str, str, int]) -> None:
    given = {"stopping": "", "ours": True, "killed": False, "out_of_memory": False} | how
    found = ending(status, **given)  # type: ignore[arg-type]
    assert (found["kind"], found["by"], found["status"]) == told
