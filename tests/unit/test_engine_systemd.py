"""The engine as a systemd service with a socket unit: it serves the socket it is given, and leaves it where it is."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jailmgr.config import Root, find_root
from tests.unit.test_engine_process import ENGINE

BEGIN = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid()); "
EXEC = "os.execv(sys.executable, [sys.executable, '-c', sys.argv[2]])"


class Unit:
    """A listening socket and a service for it, in place of systemd's."""

    def __init__(self, root: Root) -> None:
        self.root = root
        os.makedirs(root.run)
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(root.socket)
        self.listening.listen()
        self.heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.heard.bind(f"{root.at}/notify")
        self.heard.settimeout(20)
        self.service: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        given = {"JAILMGR_ROOT": self.root.at, "LISTEN_FDS": "1", "NOTIFY_SOCKET": f"{self.root.at}/notify"}
        fd = self.listening.fileno()
        self.service = subprocess.Popen(
            [sys.executable, "-c", BEGIN + EXEC, str(fd), ENGINE],
            env=os.environ | given | environment,
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return self.service

    def ask(self) -> http.client.HTTPConnection:
        """A request that nobody may have answered yet."""
        connection = http.client.HTTPConnection("jailmgr", timeout=20)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(20)
        connection.sock.connect(self.root.socket)
        connection.request("GET", "/1.0")
        return connection

    def close(self) -> None:
        if self.service is not None:
            self.service.kill()
            self.service.wait()
        self.listening.close()
        self.heard.close()


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Unit]:
    made = Unit(find_root(str(tmp_path)))
    yield made
    made.close()


def answer(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    try:
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_who_came_before_the_engine_is_served(unit: Unit) -> None:
    early = unit.ask()
    service = unit.start()
    assert unit.heard.recv(100) == b"READY=1"
    status, told = answer(early)
    assert status == 200
    assert told["metadata"]["environment"]["server_pid"] == service.pid
    service.send_signal(signal.SIGTERM)
    assert service.wait(20) == 0
    assert os.path.exists(unit.root.socket)
    late = unit.ask()
    again = unit.start()
    assert answer(late)[1]["metadata"]["environment"]["server_pid"] == again.pid


def test_its_children_are_told_nothing(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    from jailmgr.engine import systemd

    for name, value in {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "NOTIFY_SOCKET": "/n"}.items():
        monkeypatch.setenv(name, value)
    assert systemd.take_sockets() == {}  # meant for process 1
    assert systemd.take_notify() == "/n"
    assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET"} & set(os.environ)


def test_why_there_is_no_engine_is_told_to_who_waits(unit: Unit) -> None:
    waiting = [unit.ask(), unit.ask()]
    service = unit.start(BROKEN="1")
    assert service.wait(20) == 1
    for connection in waiting:
        status, told = answer(connection)
        assert status == 503
        assert told["metadata"] == {
            "what": "store", "why": "it can't be read", "hint": "Put a copy in its place.", "code": "failed",
        }  # fmt: skip
