"""What a run of a jail has used, noted when it ends, for an engine to count whenever there is one.

    LIB/runs.log ──take──▶ LIB/runs.taken ──counted──▶ drop

The supervisor appends a line for each run. Who counts takes the file first and drops it after: until then it is read
again. A line may be there twice, in one file or in two, and must be known by its run then. Where nobody counts for
long, runs that lie between others are added up: the file stays below LOG_MAX. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from itertools import groupby
from typing import NamedTuple

from jailmgr.runtime import cgroups, netlink
from jailmgr.runtime.cgroups import Hierarchies
from jailmgr.runtime.state import State

LOG, TAKEN = "runs.log", "runs.taken"
LOG_MAX = 64 * 1024
SPANS = (3600.0, 86400.0, 30 * 86400.0)
"""Seconds: runs that ended within the same are added up, the shortest that makes the file small enough."""
_TICKS = os.sysconf("SC_CLK_TCK")


class Run(NamedTuple):
    """One run from its start to its end; or `runs` of them, the last of which is `run`, added up."""

    run: str
    """identity()."""
    started_at: float
    ended_at: float
    """Both by the wall clock at its end; in between is what the monotonic clock says."""
    at: float
    """The end by CLOCK_MONOTONIC, in seconds; 0 where nobody saw it."""
    seconds: float
    """How long it ran."""
    cpu_ns: int
    received: int | None
    """Bytes; None where the interface was gone before it could be asked."""
    sent: int | None
    runs: int = 1


def identity(state: State) -> str:
    """BOOT/PID/STARTTIME: no two runs, of all hosts and times, have the same."""
    return f"{state.boot_id}/{state.pid}/{state.starttime}"


def measure(h: Hierarchies, state: State, veths: list[str], seen: bool) -> Run:
    """A run that has ended, by its cgroup and what is there of its interfaces; `seen`: just now.

    Raises JailmgrError, OSError.
    """
    _, cpu_ns, _ = cgroups.usage(h, state.cgroup)
    received, sent = total([netlink.find_counters(veth) for veth in veths])
    seconds = age(state) if seen else 0.0
    now = time.time()
    at = time.monotonic() if seen else 0.0
    return Run(identity(state), now - seconds, now, at, seconds, cpu_ns or 0, received, sent)


def age(state: State) -> float:
    """Seconds since the start of a run of this boot of the host, those in which it was suspended too."""
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - state.starttime / _TICKS)


def total(counted: list[tuple[int, int] | None]) -> tuple[int | None, int | None]:
    """Bytes received and sent by a jail's interfaces together (netlink.find_counters); None where none is there."""
    there = [each for each in counted if each is not None]
    return (sum(received for received, _ in there), sum(sent for _, sent in there)) if there else (None, None)


def note_run(lib: str, run: Run) -> None:
    """Append a line to the log of the jail with this directory. Raises OSError.

    Again, where the file was taken meanwhile: who took it may have read it before the line was there.
    """
    path, line = f"{lib}/{LOG}", b"\n" + _line(run)
    while True:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            size = os.fstat(fd).st_size
            if _is_at(fd, path):
                break
        finally:
            os.close(fd)
    if size > LOG_MAX:
        _shorten(path)


def take(lib: str) -> list[Run] | None:
    """The runs noted since the last `drop`, in order; None where there are none. They are there again until `drop`.

    Raises OSError, BlockingIOError where the supervisor is about to shorten the file.
    """
    taken, path = f"{lib}/{TAKEN}", f"{lib}/{LOG}"
    try:
        return _read(os.open(taken, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except FileNotFoundError:
        pass
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(fd, path):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        os.rename(path, taken)
    except BaseException:
        os.close(fd)
        raise
    return _read(fd)


def drop(lib: str, lasting: bool = True) -> None:
    """Remove what was taken; with `lasting` not even a power cut brings it back. Raises OSError."""
    try:
        os.unlink(f"{lib}/{TAKEN}")
        if not lasting:
            return
        fd = os.open(lib, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def shortened(runs: list[Run], span: float) -> list[Run]:
    """Each run once, and those that ended in the same `span` (seconds) added up; the first stays alone.

    Of the first, a part may have been counted while it ran. A run may be noted again behind a sum that it is in.
    """
    same = (list(noted) for _, noted in groupby(runs, key=lambda run: run.run))
    once = [max(noted, key=lambda run: (run.runs, run.cpu_ns)) for noted in same]
    groups = groupby(once[1:], key=lambda run: run.ended_at // span)
    return once[:1] + [_sum(list(group)) for _, group in groups]


def _sum(runs: list[Run]) -> Run:
    last = runs[-1]
    return last._replace(
        started_at=min(run.started_at for run in runs),
        seconds=sum(run.seconds for run in runs),
        cpu_ns=sum(run.cpu_ns for run in runs),
        received=sum(run.received or 0 for run in runs),
        sent=sum(run.sent or 0 for run in runs),
        runs=sum(run.runs for run in runs),
    )


def _shorten(path: str) -> None:
    """A taker holds the lock while it renames, we while we replace; who finds it held lets the other."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not _is_at(fd, path):
            return
        runs, text = _parse(file.read()), b""
        for span in SPANS:
            text = b"".join(_line(run) for run in shortened(runs, span))
            if len(text) <= LOG_MAX // 2:
                break
        new = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(new, "wb") as shorter:
            shorter.write(text)
        os.rename(f"{path}.new", path)


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _line(run: Run) -> bytes:
    return json.dumps(run._asdict(), separators=(",", ":")).encode() + b"\n"


def _read(fd: int) -> list[Run]:
    with open(fd, "rb") as file:
        return _parse(file.read())


def _parse(text: bytes) -> list[Run]:
    """Lines that a crash cut off, or that a newer release wrote, are left out."""
    found = []
    for line in text.split(b"\n"):
        try:
            told = json.loads(line)
            run = Run(**told)
        except (ValueError, TypeError):
            continue
        numbers = [value for name, value in told.items() if name != "run" and value is not None]
        if isinstance(told["run"], str) and all(isinstance(value, int | float) for value in numbers):
            found.append(run)
    return found
