"""An instance of jailmgr under a JAILMGR_ROOT of its own, driven as a user drives it: by the command."""

from __future__ import annotations

import http.client
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from jailmgr.config import Root, find_root

COMMAND = os.path.join(os.path.dirname(sys.executable), "jailmgr")
INSTANCE = ("JAILMGR_ROOT", "JAILMGR_TENANT")


class Result(NamedTuple):
    """How a command ended; `status` is negative for the signal that killed it."""

    argv: list[str]
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    def told(self) -> str:
        return f"{' '.join(self.argv)}\nstatus {self.status}\nstdout: {self.out[-2000:]}\nstderr: {self.err[-4000:]}"


class Instance(NamedTuple):
    """One JAILMGR_ROOT. Commands run in the network namespace of the calling thread."""

    root: Root

    def environment(self, **more: str) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if key not in INSTANCE}
        return inherited | {"JAILMGR_ROOT": self.root.at, "TERM": "xterm"} | more

    def __call__(
        self,
        *argv: str,
        status: int | None = 0,
        stdin: bytes | None = None,
        within: float = 120,
        env: dict[str, str] | None = None,
    ) -> Result:
        """Run `jailmgr ARGV` and check its exit status; None takes any."""
        done = subprocess.run(
            [COMMAND, *argv],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=within,
            env=self.environment(**(env or {})),
        )
        result = Result(
            ["jailmgr", *argv],
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
        assert "Traceback (most recent call last)" not in result.err, result.told()
        if status is not None:
            assert result.status == status, result.told()
        return result

    def json(self, *argv: str, within: float = 120) -> Any:
        """What `jailmgr ARGV --format json` says."""
        words = list(argv)
        words[words.index("--") if "--" in words else len(words) :] = ["--format", "json"]
        return self(*words, within=within).json

    def refused(self, *argv: str, status: int = 1, within: float = 120, env: dict[str, str] | None = None) -> Result:
        """Run what must fail: the error in its form is on stderr, besides progress; nothing is on stdout."""
        result = self(*argv, status=status, within=within, env=env)
        told = [line.removeprefix("Error: ") for line in result.err.splitlines() if line.startswith("Error: ")]
        assert len(told) == 1, result.told()
        assert ": " in told[0], result.told()
        assert result.out == "", result.told()
        return result

    def exec(
        self, jail: str, *argv: str, status: int | None = 0, stdin: bytes | None = None, within: float = 60
    ) -> Result:
        return self("exec", jail, "--", *argv, status=status, stdin=stdin, within=within)

    def sh(self, jail: str, script: str, status: int | None = 0) -> Result:
        """Run a line of shell in the jail."""
        return self.exec(jail, "/bin/sh", "-c", script, status=status)

    def popen(self, *argv: str, **more: Any) -> subprocess.Popen[bytes]:
        """A command left running; who asked for it ends it."""
        return subprocess.Popen([COMMAND, *argv], env=self.environment(), **more)

    def info(self, jail: str) -> dict[str, Any]:
        found = self.json("info", jail)
        assert isinstance(found, dict)
        return found

    def status(self, jail: str) -> str:
        return str(self.info(jail)["status"])

    def engine_pid(self) -> int:
        return int(self.json("engine", "status")["pid"])

    def gone(self, jail: str) -> bool:
        return jail not in [row["name"] for row in self.json("list")]

    def api(self, method: str, path: str, body: object = None) -> Any:
        """The engine's whole answer to a request; what no command can ask for yet."""
        connection = http.client.HTTPConnection("jailmgr", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        with closing(connection):
            connection.sock.connect(self.root.socket)
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())

    def ok(self, method: str, path: str, body: object = None) -> Any:
        """The `metadata` of an answer that isn't an error, of an operation once it has succeeded."""
        answer = self.api(method, path, body)
        assert answer["type"] in ("sync", "async"), answer
        if answer["type"] == "async":
            answer = self.api("GET", f"{answer['operation']}/wait?timeout=60")
            assert answer["metadata"]["status_code"] == 200, answer
        return answer["metadata"]


def instance_at(path: str) -> Instance:
    return Instance(find_root(path))


def until(met: Callable[[], object], within: float = 20, what: object = "") -> Any:
    """What `met` returns once it is true; AssertionError when it isn't in time.

    For what has no event to wait for from out here: the command line is asked again and again.
    """
    deadline = time.monotonic() + within
    while True:
        found = met()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within} s: {what or met}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process exists and isn't a zombie (proc(5): state, behind the name in brackets)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> None:
    """SIGKILL, and wait for the end: of a process that need not be our child, by its pidfd."""
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        assert select.select([fd], [], [], 10)[0], f"process {pid} outlives SIGKILL"
    finally:
        os.close(fd)


class Terminal(NamedTuple):
    """A command on a terminal of its own."""

    process: subprocess.Popen[bytes]
    master: int
    seen: bytearray

    def write(self, text: bytes) -> None:
        os.write(self.master, text)

    def expect(self, text: bytes, within: float = 15) -> bytes:
        """Read until `text` has come; gives all up to its end and forgets it."""
        deadline = time.monotonic() + within
        while text not in self.seen:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self.master], [], [], left)[0]
            assert ready, f"{text!r} did not come in {within} s: {bytes(self.seen)!r}"
            try:
                part = os.read(self.master, 65536)
            except OSError:
                part = b""
            assert part, f"{text!r} did not come before the end: {bytes(self.seen)!r}"
            self.seen.extend(part)
        end = self.seen.index(text) + len(text)
        found = bytes(self.seen[:end])
        del self.seen[:end]
        return found

    def prompt(self, within: float = 15) -> None:
        """Press Enter until a shell shows its prompt: one that has just begun throws away what was typed before."""
        until(lambda: self._answers(b"# "), within, "a shell's prompt")

    def _answers(self, text: bytes) -> bool:
        self.write(b"\n")
        try:
            self.expect(text, 0.5)
        except AssertionError:
            return False
        return True

    def wait(self, within: float = 15) -> int:
        """The exit status; what it still writes is thrown away, so that it never waits for a reader."""
        deadline = time.monotonic() + within
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"{self.process.args!r} still runs: {bytes(self.seen)!r}"
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.seen.extend(os.read(self.master, 65536))
                except OSError:
                    self.process.wait(max(0.1, deadline - time.monotonic()))
        return self.process.returncode


@contextmanager
def terminal(instance: Instance, *argv: str, command: Sequence[str] = ()) -> Iterator[Terminal]:
    """Run `jailmgr ARGV` with a new pty as its controlling terminal (setsid(1) -c); `command` in place of `jailmgr`."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *(command or (COMMAND,)), *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=instance.environment(),
        )
    finally:
        os.close(slave)
    try:
        yield Terminal(process, master, bytearray())
    finally:
        os.close(master)
        if process.poll() is None:
            process.kill()
        process.wait()
