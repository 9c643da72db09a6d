"""The engine as a process: one of them, ready when it says so, gone when told. Its manager is made up."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jailmgr.config import Root, find_root
from jailmgr.engine import logfile

ENGINE = """
import os, sys, threading, time
from contextlib import contextmanager
from types import SimpleNamespace
os.geteuid = lambda: 0
from jailmgr.engine import main, protocol, serve
from jailmgr.errors import JailmgrError
from jailmgr.manager import start
protocol.Protocol.allowed = frozenset({os.getuid()})
serve.GRACE_SECONDS = float(os.environ.get("GRACE", 20))

class Manager:
    def __init__(self, root):
        self.root = root
        self.store = SimpleNamespace(find_row=lambda *_: True, tenants=list)

@contextmanager
def opened(root):
    if "BROKEN" in os.environ:
        raise JailmgrError("store", "it can't be read", "Put a copy in its place.")
    yield Manager(root)
    open(f"{root.at}/closed", "w").close()

def slow(m, tenant, name, wait):
    while not os.path.exists(f"{m.root.at}/go-on"):
        time.sleep(0.01)

serve.opened, start.start = opened, slow
sys.exit(main.main())
"""


class Process:
    """An engine in the background, as the command line starts it."""

    def __init__(self, root: Root, **environment: str) -> None:
        self.root = root
        self.ready, told = os.pipe()
        self.popen = subprocess.Popen(
            [sys.executable, "-c", ENGINE],
            env=os.environ | {"JAILMGR_ROOT": root.at, "JAILMGR_READY_FD": str(told)} | environment,
            pass_fds=(told,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        os.close(told)

    def told(self, within: float = 20) -> dict[str, Any]:
        """The line on its descriptor, up to its end."""
        line = b""
        while select.select([self.ready], [], [], within)[0]:
            part = os.read(self.ready, 65536)
            line += part
            if not part:
                found = json.loads(line)
                assert isinstance(found, dict)
                return found
        raise AssertionError(f"nothing in {within} s")

    def silent(self, seconds: float) -> bool:
        return not select.select([self.ready], [], [], seconds)[0]

    def request(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("jailmgr", timeout=20)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.root.socket)
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer["metadata"]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(20)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate()
        os.close(self.ready)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return find_root(str(tmp_path))


@pytest.fixture
def engine(root: Root) -> Iterator[Callable[..., Process]]:
    begun: list[Process] = []

    def begin(**environment: str) -> Process:
        begun.append(Process(root, **environment))
        return begun[-1]

    yield begin
    for process in begun:
        process.close()


def test_ready_then_gone(engine: Callable[..., Process], root: Root) -> None:
    first = engine()
    assert first.told() == {"ready": True, "pid": first.popen.pid}
    assert first.request("GET", "/1.0")["environment"]["server_pid"] == first.popen.pid
    assert stat.S_IMODE(os.stat(root.socket).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(root.run).st_mode) == 0o700
    assert json.loads(Path(root.run, "engine.json").read_text())["pid"] == first.popen.pid
    assert first.end() == 0
    assert not os.path.exists(root.socket)
    assert not os.path.exists(f"{root.run}/engine.json")
    assert os.path.exists(f"{root.at}/closed")
    log = Path(root.run, "engine.log").read_text()
    assert "engine serves" in log
    assert "Traceback" not in log


def test_a_second_one_is_refused(engine: Callable[..., Process]) -> None:
    first = engine()
    first.told()
    second = engine()
    error = second.told()
    assert error["code"] == "conflict"
    assert f"pid {first.popen.pid}" in error["why"]
    assert error["hint"]
    assert second.popen.wait(20) == 1
    assert first.request("GET", "/")


def test_in_the_foreground_it_is_refused_on_stderr(engine: Callable[..., Process]) -> None:
    engine().told()
    second = engine(JAILMGR_READY_FD="")
    _, err = second.popen.communicate(timeout=20)
    assert second.popen.returncode == 1
    assert err.startswith(b"Error: engine at ")
    assert b"\nHint: " in err


def test_sigkill_leaves_nothing_in_the_way(engine: Callable[..., Process], root: Root) -> None:
    first = engine()
    first.told()
    first.end(signal.SIGKILL)
    assert os.path.exists(root.socket)
    second = engine()
    assert second.told()["ready"]
    assert second.request("GET", "/1.0")["environment"]["server_pid"] == second.popen.pid


def test_what_it_cannot_start_with_is_told(engine: Callable[..., Process], root: Root) -> None:
    broken = engine(BROKEN="1")
    assert broken.told() == {
        "what": "store",
        "why": "it can't be read",
        "hint": "Put a copy in its place.",
        "code": "failed",
    }
    assert broken.popen.wait(20) == 1
    assert not os.path.exists(root.socket)
    assert "it can't be read" in Path(root.run, "engine.log").read_text()


def test_the_next_one_waits_for_one_that_is_ending(engine: Callable[..., Process], root: Root) -> None:
    first = engine()
    first.told()
    operation = first.request("PUT", "/1.0/instances/web/state", {"action": "start"})
    first.popen.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while os.path.exists(root.socket):
        assert time.monotonic() < deadline
    second = engine()
    assert second.silent(1.5)
    assert first.popen.poll() is None
    Path(root.at, "go-on").touch()
    assert second.told()["ready"]
    assert first.popen.wait(20) == 0
    assert operation["status"] == "Running"
    assert os.path.exists(f"{root.at}/closed")


def test_an_operation_that_never_ends_does_not_hold_it(engine: Callable[..., Process], root: Root) -> None:
    first = engine(GRACE="0.2")
    first.told()
    first.request("PUT", "/1.0/instances/web/state", {"action": "start"})
    assert first.end() == 0
    assert not os.path.exists(f"{root.at}/closed")
    assert "the next engine mends" in Path(root.run, "engine.log").read_text()


def test_who_waits_is_told_the_end_of_the_operation(engine: Callable[..., Process], root: Root) -> None:
    first = engine()
    first.told()
    operation = first.request("PUT", "/1.0/instances/web/state", {"action": "start"})
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(root.socket)
        sock.sendall(f"GET /1.0/operations/{operation['id']}/wait HTTP/1.1\r\nHost: jailmgr\r\n\r\n".encode())
        first.request("GET", "/")
        first.popen.send_signal(signal.SIGTERM)
        Path(root.at, "go-on").touch()
        answer = b""
        while b'"status":"Success"' not in answer:
            part = sock.recv(65536)
            assert part, answer
            answer += part
    assert first.popen.wait(20) == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_idle_it_sleeps(engine: Callable[..., Process]) -> None:
    first = engine()
    first.told()
    first.request("GET", "/")

    def switches() -> int:
        status = Path(f"/proc/{first.popen.pid}/status").read_text()
        return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])

    time.sleep(0.3)
    before = switches()
    time.sleep(1)
    assert switches() - before <= 2


def test_others_than_root_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    run = "import os; from jailmgr.engine.main import main; os.getuid() or os.setuid(65534); raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", run], env=os.environ | {"JAILMGR_ROOT": str(tmp_path)}, capture_output=True, timeout=20
    )
    assert done.returncode == 1
    assert b"only root may" in done.stderr
    assert not os.listdir(tmp_path)


def test_the_log_is_bounded(tmp_path: Path) -> None:
    run = """
import logging, subprocess, sys
from jailmgr.engine import logfile
logfile.SIZE_MAX = 10_000
logfile.log_to(sys.argv[1])
for number in range(1000):
    logging.info("line %d %s", number, "x" * 80)
subprocess.run(["sh", "-c", "echo from a child >&2"])
"""
    path = tmp_path / "engine.log"
    subprocess.run([sys.executable, "-c", run, str(path)], check=True, timeout=20)
    assert sorted(os.listdir(tmp_path)) == ["engine.log", "engine.log.1"]
    assert all(file.stat().st_size < 10_300 for file in tmp_path.iterdir())
    assert "line 999 " in path.read_text()
    assert path.read_text().endswith("from a child\n")
    assert logfile.SIZE_MAX == 1024 * 1024
