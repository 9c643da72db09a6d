"""The engine's API: HTTP/1.1 (RFC 9112) over its unix socket, and starting the engine where none runs.

Standard library only. `_socket` is the C part of `socket`, whose Python part costs more than a request.
"""

from __future__ import annotations

import _socket
import os

from jailmgr.cli.settings import require_root
from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_dict, from_os
from jailmgr.runtime import compact_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER_WITHIN = 120.0
"""Seconds the engine has to answer a request: a request may wait for the jail's lock."""
BODY_MAX = 256 * 1024 * 1024
HEAD_MAX = 64 * 1024


class Connection:
    """A connection to the engine, used for one request after another."""

    def __init__(self, root: Root, sock: _socket.socket) -> None:
        self.root = root
        self._socket = sock
        self._buffer = b""

    def call(self, method: str, path: str, body: object = None, within: float = ANSWER_WITHIN) -> Any:
        """The `metadata` of the engine's answer: what was asked for, or the operation that was begun.

        Raises the JailmgrError that the engine tells, or one of code `unavailable` where it stops answering.
        """
        return self._loads(self.fetch(method, path, body, within)).get("metadata")

    def fetch(self, method: str, path: str, body: object = None, within: float = ANSWER_WITHIN) -> bytes:
        """The engine's answer as it is. Raises as `call`."""
        content = b"" if body is None else compact_json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: jailmgr\r\nAccept: application/json\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        try:
            self._socket.settimeout(within)
            self._socket.sendall(head.encode() + content)
            status, answer = self._read_answer()
        except TimeoutError:
            raise JailmgrError(
                f"engine at {self.root.socket}",
                f"no answer within {within:.0f} s",
                f"See {self.root.run}/engine.log; `jailmgr engine stop` ends it, and stops no jail.",
                "unavailable",
            ) from None
        except (OSError, ValueError) as error:
            raise lost(self.root, str(error)) from error
        if status < 400:
            return answer
        try:
            document = compact_json.loads(answer)
        except ValueError:
            hint = f"See {self.root.run}/engine.log."
            raise JailmgrError("engine", f"it answered with HTTP status {status} and no reason", hint) from None
        told = document.get("metadata")
        if isinstance(told, dict) and "what" in told:
            raise from_dict(told)
        what, _, why = str(document.get("error", f"HTTP status {status}")).partition(": ")
        raise JailmgrError(what if why else "engine", why or what)

    def _loads(self, answer: bytes) -> Any:
        try:
            return compact_json.loads(answer)
        except ValueError as error:
            raise lost(self.root, str(error)) from error

    def _read_answer(self) -> tuple[int, bytes]:
        while b"\r\n\r\n" not in self._buffer:
            if len(self._buffer) > HEAD_MAX:
                raise ValueError("the head of its answer is too long")
            self._receive()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = lines[0].split(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError("its answer is not HTTP")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        length = int(headers["content-length"]) if "content-length" in headers else -1
        if not 0 <= length <= BODY_MAX:
            raise ValueError("its answer has no usable length")
        parts = [self._buffer]
        missing = length - len(self._buffer)
        self._buffer = b""
        while missing > 0:
            part = self._socket.recv(min(missing, 1 << 20))
            if not part:
                raise ConnectionResetError("it closed the connection")
            parts.append(part)
            missing -= len(part)
        return int(status), b"".join(parts)

    def _receive(self) -> None:
        part = self._socket.recv(65536)
        if not part:
            raise ConnectionResetError("it closed the connection")
        self._buffer += part

    def close(self) -> None:
        self._socket.close()

    def __del__(self) -> None:
        self.close()


def lost(root: Root, why: str) -> JailmgrError:
    """The error of an engine that ended, or lost its senses, in the middle of a request."""
    return JailmgrError(
        f"engine at {root.socket}",
        f"the connection was lost ({why})",
        f"See {root.run}/engine.log. No running jail depends on it: the next command starts it again.",
        "unavailable",
    )


def connect(root: Root) -> Connection | None:
    """A connection to the engine; None where none runs."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.connect(root.socket if os.geteuid() == 0 else root.user_socket)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise from_os(f"engine at {root.socket}", error) from error
    return Connection(root, sock)


class Nothing(Connection):
    """In place of a connection where the root does not exist: no list has anything in it, and nothing is found."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def close(self) -> None:
        """Nothing is open."""

    def call(self, method: str, path: str, body: object = None, within: float = ANSWER_WITHIN) -> Any:
        """Answer like an engine that has nothing. Raises JailmgrError (missing) for everything else."""
        # After /1.0: a collection, and what is meant in it.
        noun, *names = path.partition("?")[0].split("/")[2:]
        if method == "GET" and not names:
            return []
        at = self.root.at or self.root.lib
        what = f"{_NOUNS.get(noun, noun)} {names[0]}" if names else f"root {at}"
        hint = f"{at} does not exist: check JAILMGR_ROOT and --root."
        raise JailmgrError(what, "not found", hint, "missing")


_NOUNS = {"instances": "jail", "projects": "tenant", "images": "image", "ports": "port"}


def existing_engine(root: Root) -> Connection:
    """As `ensure_engine`, for commands about what is there already: where the root does not exist, none is made."""
    if os.geteuid() == 0 and not os.path.isdir(root.at or root.lib):
        return Nothing(root)
    return ensure_engine(root)


def ensure_engine(root: Root) -> Connection:
    """A connection to the engine, which is started where none runs. Commands that come together start one.

    Raises the JailmgrError with which the engine failed to start.
    """
    connection = connect(root)
    if connection is not None:
        return connection
    if os.geteuid() != 0:
        require_root()
    import fcntl

    try:
        os.makedirs(root.run, mode=0o700, exist_ok=True)
        lock = os.open(f"{root.run}/engine.starting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_os("starting the engine", error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = connect(root)
        if connection is None:
            from jailmgr.cli.engine_start import start_engine

            try:
                start_engine(root)
            except JailmgrError:
                # One begun by a command that was killed may serve by now, and then ours gives way to it.
                connection = connect(root)
                if connection is None:
                    raise
            else:
                connection = connect(root)
    finally:
        os.close(lock)
    if connection is None:
        raise lost(root, "it ended at once")
    return connection
