"""Which processes take a signal, as the kernel reports it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial

import pytest

from jailmgr.runtime.stop_signal import takes

USR2, RTMIN3 = signal.SIGUSR2, signal.SIGRTMIN + 3


def block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [USR2, RTMIN3])


@pytest.mark.parametrize(
    ("before", "script", "taken"),
    [
        (None, "", False),
        (partial(signal.signal, USR2, signal.SIG_IGN), "", False),
        (block, "", True),
        (None, "trap : USR2 37;", True),
    ],
)
def test_a_handler_or_a_mask_takes_a_signal(before: Callable[[], object] | None, script: str, taken: bool) -> None:
    """Number 37 is SIGRTMIN+3, systemd's; an ignored signal is dropped."""
    argv = ["bash", "-c", f"{script} echo; read -r"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=before) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        assert {takes(process.pid, number) for number in (USR2, RTMIN3)} == {taken}
        assert takes(process.pid, signal.SIGKILL)
        process.communicate(b"\n", timeout=20)


def test_what_can_not_be_read_takes_it() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert takes(pid, USR2)
