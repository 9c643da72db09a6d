"""What is measured on the host, what must be raised on it for the while, and put back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

RAISED = {"fs/inotify/max_user_instances": 8192, "kernel/keys/maxkeys": 20_000, "kernel/keys/maxbytes": 4_000_000}
"""Below /proc/sys. Forty systems with systemd take some 300 inotify instances and more keyrings than one user may have;
lxc's containers share one id map, so that theirs all count as one user's."""
COMMAND_WITHIN = 120
"""Seconds a single command may take."""
KIB = 1024


def run(argv: list[str], environment: dict[str, str] | None = None, within: float = COMMAND_WITHIN) -> str:
    """A command's stdout. Raises RuntimeError with its stderr where it fails."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=within
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def milliseconds(step: Callable[[], object]) -> float:
    """Wall time of `step`."""
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1000


@contextmanager
def raised_limits() -> Iterator[None]:
    """`RAISED`, for every container of the run; what was there before is put back."""
    before: dict[str, int] = {}
    try:
        for name, wanted in RAISED.items():
            with open(f"/proc/sys/{name}", encoding="ascii") as file:
                before[name] = int(file.read())
            _set(name, max(before[name], wanted))
        yield
    finally:
        for name, value in before.items():
            _set(name, value)


def _set(name: str, value: int) -> None:
    with open(f"/proc/sys/{name}", "w", encoding="ascii") as file:
        file.write(str(value))


@contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """TimeoutError in the middle of whatever runs after `seconds`, KeyboardInterrupt at SIGTERM: all is cleaned up."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the bench took longer than {seconds} s")

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, expire)
    signal.signal(signal.SIGTERM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def available() -> int:
    """MemAvailable in bytes (proc(5)), once it has settled: what ended a moment ago is freed by and by."""
    last = _meminfo("MemAvailable")
    for _ in range(20):
        time.sleep(1)
        now = _meminfo("MemAvailable")
        if abs(now - last) < 1024 * KIB:
            return now
        last = now
    return last


def _meminfo(key: str) -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * KIB
    raise RuntimeError(f"/proc/meminfo has no {key}")


def pss(pid: int) -> int:
    """Proportional set size of a process in bytes; 0 for one that has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * KIB
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def outside(pids: list[int]) -> list[int]:
    """Those of the processes that are in our own pid namespace, thus not in a container."""
    ours = os.readlink("/proc/self/ns/pid")
    found = []
    for pid in pids:
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == ours:
                found.append(pid)
        except FileNotFoundError:
            continue
    return found
