"""The command line against a small engine of canned answers: output, errors, exit status, cancelling."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jailmgr.cli.main import main

TOP = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "jailmgr.cli.main"]

WEB = {
    "name": "web",
    "tenant": "default",
    "status": "Running",
    "init_pid": 4242,
    "ipv4": "10.83.7.2",
    "ipv6": "fd00::2",
    "image": "ab" * 32,
    "created_at": "2026-01-31T08:15:02Z",
    "limits": {"memory_bytes": 512 << 20, "cpu": 1.5, "processes": 500, "disk_bytes": None},
    "usage": {"memory_bytes": 22334668, "cpu_ns": 3_200_000_000, "processes": 12, "disk_bytes": 1 << 20},
    "config": {"limits.memory": "512MiB", "user.note": "\x1b[31mred"},
    "devices": {"root": {"type": "disk", "size": "5GiB"}},
    "project": "default",
    "source": "debian/bookworm",
    "ports": [],
    "type": "container",
}
INFO = WEB | {
    "supervisor_pid": 77,
    "netns": "/proc/4242/ns/net",
    "cgroups": {"memory": "/sys/fs/cgroup/memory/x", "pids": "/sys/fs/cgroup/pids/x"},
    "rootfs": "/proc/4242/root",
    "log": "/x/console.log",
    "pool": "/x/pool",
    "idmap": "1879113728:65536",
    "started_at": "2026-01-31T08:15:03Z",
    "last_ended": {"kind": "poweroff", "at": 1769847303.0, "by": "guest", "status": 0},
    "restarts": 1,
}
MISSING = {"what": "jail db", "why": "there is none", "hint": "See jailmgr list.", "code": "missing"}

Answer = tuple[int, Any]
Request = tuple[str, str, Any]


class FakeEngine:
    """HTTP on a unix socket. `routes`: method and path without query to the answers, in turn; the last one stays."""

    def __init__(self, root: Path) -> None:
        self.routes: dict[tuple[str, str], list[Answer | Callable[[], Answer]]] = {}
        self.requests: list[Request] = []
        (root / "run").mkdir(parents=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(root / "run" / "engine.sock"))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def on(self, method: str, path: str, *answers: Answer | Callable[[], Answer]) -> None:
        self.routes[method, path] = list(answers)

    def operation(self, *views: dict[str, Any]) -> Answer:
        """The answer that an operation has begun, which `views` then tell of."""
        self.on("GET", "/1.0/operations/op/wait", *[(200, operation(**view)) for view in views or ({},)])
        return 202, operation(status_code=103)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rb") as stream:
                while line := stream.readline():
                    method, path, _ = line.decode().split(" ")
                    length = 0
                    while (header := stream.readline().strip()) != b"":
                        name, _, value = header.partition(b":")
                        length = int(value) if name.lower() == b"content-length" else length
                    sock.sendall(self._answer(method, path, json.loads(stream.read(length)) if length else None))
        except (BrokenPipeError, ConnectionResetError):
            return

    def _answer(self, method: str, path: str, body: Any) -> bytes:
        self.requests.append((method, path, body))
        answers = self.routes.get((method, path.partition("?")[0]), [(404, MISSING)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        status, metadata = answer() if callable(answer) else answer
        content = json.dumps({"type": "error" if status >= 400 else "sync", "metadata": metadata}).encode()
        return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(content)) + content


def operation(status_code: int = 200, **more: Any) -> dict[str, Any]:
    return {"id": "op", "status_code": status_code, "metadata": {}, "err": "", "error": None} | more


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of the test's own, with no engine: one that would be started is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("a unit test would have started an engine")

    monkeypatch.setenv("JAILMGR_ROOT", str(tmp_path / "r"))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr("jailmgr.cli.engine_start.start_engine", refuse)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return tmp_path / "r"


@pytest.fixture
def engine(root: Path) -> Iterator[FakeEngine]:
    engine = FakeEngine(root)
    yield engine
    engine.close()


Streams = pytest.CaptureFixture[str]


def test_list_shows_limits_beside_usage(engine: FakeEngine, capsys: Streams) -> None:
    engine.on("GET", "/1.0/instances", (200, [WEB]))
    assert main(["list"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "STATUS", "IPV4", "IPV6", "IMAGE", "MEMORY", "CPU", "PROCS", "DISK"]
    assert row.split()[4:] == ["debian/bookworm", "21.3MiB/512MiB", "3.2s/1.5cpu", "12/500", "1.0MiB"]
    assert engine.requests == [("GET", "/1.0/instances?recursion=2&project=default", None)]


@pytest.mark.parametrize(
    "argv", [["list", "--format", "json"], ["--format=json", "list"], ["list", "--format=json", "-A"]]
)
def test_list_json_is_one_document(argv: list[str], engine: FakeEngine, capsys: Streams) -> None:
    engine.on("GET", "/1.0/instances", (200, [WEB]))
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out) == [WEB]


def test_yaml_and_csv(engine: FakeEngine, capsys: Streams) -> None:
    engine.on("GET", "/1.0/instances", (200, [WEB, WEB | {"name": "db", "config": {}}]))
    assert main(["list", "--format", "yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)[0] == WEB
    assert main(["list", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == ["web", "db"]
    assert rows[0]["usage.memory_bytes"] == "22334668"
    assert json.loads(rows[0]["config"]) == WEB["config"]


def test_the_tenant_of_option_environment_and_name(
    engine: FakeEngine, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.on("GET", "/1.0/instances", (200, []))
    engine.on("GET", "/1.0/instances/web", (200, INFO))
    monkeypatch.setenv("JAILMGR_TENANT", "acme")
    assert main(["list"]) == main(["list", "--tenant", "blue"]) == main(["info", "red/web"]) == 0
    assert [path.rpartition("=")[2] for _, path, _ in engine.requests] == ["acme", "blue", "red"]


def test_info_page(engine: FakeEngine, capsys: Streams) -> None:
    engine.on("GET", "/1.0/instances/web", (200, INFO))
    assert main(["info", "web"]) == 0
    page = capsys.readouterr().out
    assert "Last ended:  poweroff by guest at 2026-01-31 08:15:03 +0000" in page
    assert "21.3MiB of 512MiB" in page
    assert "\x1b" not in page, "what a guest or a user wrote must not steer the terminal"


def test_errors_in_words_and_as_json(engine: FakeEngine, capsys: Streams) -> None:
    assert main(["info", "db"]) == 1
    assert capsys.readouterr() == ("", "Error: jail db: there is none\nHint: See jailmgr list.\n")
    assert main(["info", "db", "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {"error": "jail db: there is none", "error_code": 404, "hint": "See jailmgr list."}


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["lisst"], 2, "Hint: Did you mean list?"),
        (["snapshot", "list", "web"], 2, "no such command 'snapshot'"),
        (["apply"], 2, "no such command 'apply'"),
        (["list", "--remote", "x"], 2, "no such option: --remote"),
        (["start"], 2, "no jail was named"),
        (["start", "web", "--all"], 2, "exclude each other"),
        (["start", "We_b"], 2, "not a DNS label"),
        (["launch"], 2, "missing argument 'SOURCE'"),
        (["launch", "debian", "-p", "80"], 2, "a port is missing"),
        (["launch", "debian", "--cpus", "many"], 2, "not a number of CPUs"),
        (["set", "web", "limits.memory"], 2, "Write KEY=VALUE"),
        (["list", "--format", "xml"], 2, "none of table, json, yaml, csv"),
        (["list", "--tenant", "../x"], 2, "not a DNS label"),
        (["cp", "a", "b"], 2, "one of the two sides must be in a jail"),
        (["image"], 2, "a command is missing"),
        (["image", "delete", "../x"], 2, "not an alias"),
        (["exec"], 125, "missing argument"),
        (["exec", "web", "ls", "-l"], 125, "Put -- before the command"),
        (["exec", "web", "--", "true"], 125, "jail web: there is none"),
        (["exec", "We_b", "--", "true"], 125, "not a DNS label"),
    ],
)
def test_wrong_usage(argv: list[str], status: int, says: str, root: Path, capsys: Streams) -> None:
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert says in err
    assert "Traceback" not in err


def test_several_names_go_on_after_a_failure(engine: FakeEngine, capsys: Streams) -> None:
    engine.on("PUT", "/1.0/instances/web/state", engine.operation())
    assert main(["start", "db", "web", "--wait", "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == [{"name": "web", "tenant": "default", "action": "start"}]
    assert json.loads(err)["errors"][0]["error"] == "jail db: there is none"
    assert ("PUT", "/1.0/instances/web/state?project=default", {"action": "start", "wait": True}) in engine.requests


def test_all_means_those_that_it_fits(engine: FakeEngine, capsys: Streams) -> None:
    engine.on("GET", "/1.0/instances", (200, [WEB, WEB | {"name": "db", "status": "Stopped"}]))
    engine.on("PUT", "/1.0/instances/web/state", engine.operation())
    assert main(["stop", "--all", "--timeout", "3"]) == 0
    assert [request for request in engine.requests if request[0] == "PUT"] == [
        ("PUT", "/1.0/instances/web/state?project=default", {"action": "stop", "force": False, "timeout": 3})
    ]


def test_launch_sends_keys_and_prints_the_name(engine: FakeEngine, capsys: Streams) -> None:
    steps = [{"status_code": 103, "metadata": {"progress": {"step": step, "done": 1, "total": 4}}} for step in "aab"]
    done = {"metadata": {"result": {"name": "frank-finch", "tenant": "default"}}}
    engine.on("POST", "/1.0/instances", engine.operation(*steps, done))
    argv = "launch debian --memory 64MiB --cpus 1.5 --disk 1GiB --processes 50 --ip 10.0.0.9 -e A=1 -c user.x=y"
    more = ["-c", "root.size=1GiB", "-p", "8080:80", "-p", "[::1]:53:53/udp", "--wait"]
    assert main([*argv.split(), *more]) == 0
    out, err = capsys.readouterr()
    assert out == "frank-finch\n"
    assert err == "launch debian: a\nlaunch debian: b\n", "a plain line for each step where there is no terminal"
    assert engine.requests[0][2] == {
        "source": {"type": "template", "alias": "debian"},
        "config": {
            "user.x": "y",
            "limits.memory": "64MiB",
            "limits.cpu.allowance": "150ms/100ms",
            "limits.processes": "50",
            "environment.A": "1",
        },
        "devices": {
            "root": {"size": "1GiB"},
            "eth0": {"ipv4.address": "10.0.0.9"},
            "port-8080-tcp": {
                "type": "proxy",
                "listen": "tcp:0.0.0.0:8080",
                "connect": "tcp:127.0.0.1:80",
                "nat": "true",
            },
            "port-__1-53-udp": {
                "type": "proxy",
                "listen": "udp:[::1]:53",
                "connect": "udp:127.0.0.1:53",
                "nat": "true",
            },
        },
        "start": True,
        "wait": True,
    }


def test_a_failed_operation_tells_its_error(engine: FakeEngine, capsys: Streams) -> None:
    failed = {"status_code": 400, "error": {"what": "build", "why": "no network", "hint": "Look.", "code": "failed"}}
    engine.on("POST", "/1.0/instances", engine.operation(failed))
    assert main(["launch", "debian", "-q"]) == 1
    assert capsys.readouterr() == ("", "Error: build: no network\nHint: Look.\n")


def test_set_says_where_a_restart_is_needed(engine: FakeEngine, capsys: Streams) -> None:
    engine.on("PATCH", "/1.0/instances/web", (200, {"restart_needed": ["environment.A"]}))
    assert main(["set", "web", "environment.A=b=c", "root.size=6GiB"]) == 0
    assert "environment.A: takes effect at the next start" in capsys.readouterr().err
    assert main(["unset", "web", "limits.memory", "eth0.ipv4.address"]) == 0
    assert [body for _, _, body in engine.requests] == [
        {"config": {"environment.A": "b=c"}, "devices": {"root": {"size": "6GiB"}}},
        {"config": {"limits.memory": None}, "devices": {"eth0": {"ipv4.address": None}}},
    ]


def test_get_and_show(engine: FakeEngine, capsys: Streams) -> None:
    engine.on("GET", "/1.0/instances/web", (200, WEB))
    assert main(["get", "web", "limits.disk"]) == main(["get", "web", "limits.processes"]) == 0
    assert capsys.readouterr().out == "5GiB\n\n"
    assert main(["get", "web", "limits.memroy"]) == 2
    assert "limits.memory" in capsys.readouterr().err
    assert main(["show", "web"]) == 0
    assert "root.size:" in capsys.readouterr().out


def test_ports(engine: FakeEngine, capsys: Streams) -> None:
    engine.on("POST", "/1.0/ports", (200, {}))
    engine.on("DELETE", "/1.0/ports", (200, {}))
    assert main(["port", "publish", "web", "127.0.0.1:8080:80"]) == 0
    assert main(["port", "unpublish", "web", "8080/udp"]) == 0
    assert engine.requests[0][2] == {
        "tenant": "default",
        "jail": "web",
        "host_address": "127.0.0.1",
        "host_port": 8080,
        "port": 80,
        "protocol": "tcp",
    }
    assert engine.requests[1][2] == {"tenant": "default", "jail": "web", "host_port": 8080, "protocol": "udp"}


def test_engine_status_starts_nothing(root: Path, capsys: Streams) -> None:
    assert main(["engine", "status", "--format", "json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["running"] is False
    assert set(status) == {"running", "pid", "version", "root", "socket", "started_at"}


def test_an_engine_that_talks_nonsense_is_an_error(root: Path, capsys: Streams) -> None:
    (root / "run").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "run" / "engine.sock"))
        listener.listen(1)

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        assert main(["list"]) == 1
        thread.join()
    assert "the connection was lost" in capsys.readouterr().err


def test_only_root_may(root: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["list"]) == main(["launch", "debian"]) == 1
    assert capsys.readouterr().err.count("Hint: Run it with sudo.") == 2
    assert main(["exec", "web", "--", "true"]) == 125
    assert main(["version"]) == main(["--help"]) == main(["start", "--help"]) == 0


def test_every_help_ends_with_an_example(root: Path, capsys: Streams) -> None:
    from typer.main import get_command

    from jailmgr.cli.app import app

    top: Any = get_command(app)
    for name, command in top.commands.items():
        for path in [[name, inner] for inner in getattr(command, "commands", {})] or [[name]]:
            assert main([*path, "--help"]) == 0
            lines = capsys.readouterr().out.rstrip().splitlines()
            assert lines[-2].strip() == "Example:", path
            assert lines[-1].strip().startswith(f"jailmgr {' '.join(path)}"), path


def test_a_fault_shows_no_traceback_but_with_debug(
    root: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise ZeroDivisionError("oops")

    root.mkdir()
    monkeypatch.setattr("jailmgr.cli.client.connect", fault)
    assert main(["list"]) == 1
    assert capsys.readouterr().err.startswith("Error: jailmgr: unexpected ZeroDivisionError: oops\nHint: ")
    assert main(["list", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the command refuses others, and a child cannot be patched")


@needs_root
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_broken_pipe_is_quiet(
    unbuffered: str, engine: FakeEngine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    engine.on("GET", "/1.0/instances", (200, [WEB] * 5000))
    with subprocess.Popen([*RUN, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=TOP) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.read(10)
        command.stdout.close()
        assert command.stderr.read() == b""
        assert command.wait(30) == 141


@needs_root
def test_interrupt_cancels_a_launch(engine: FakeEngine, root: Path) -> None:
    waiting, cancelled = threading.Event(), threading.Event()

    def wait() -> Answer:
        waiting.set()
        cancelled.wait(1)
        return 200, operation(401 if cancelled.is_set() else 103)

    def cancel() -> Answer:
        cancelled.set()
        return 200, {}

    engine.on("POST", "/1.0/instances", (202, operation(103)))
    engine.on("GET", "/1.0/operations/op/wait", wait)
    engine.on("DELETE", "/1.0/operations/op", cancel)
    with subprocess.Popen(
        [*RUN, "launch", "debian"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=TOP, text=True
    ) as command:
        assert waiting.wait(30)
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=30)
    assert command.returncode == 130
    assert cancelled.is_set()
    assert out == ""
    assert err.endswith("Error: launch debian: cancelled\n")
