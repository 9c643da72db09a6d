"""Users of the host who are not root, as they come to an instance."""

from __future__ import annotations

import _socket
import contextlib
import json
import os
import pwd
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

from jailmgr.runtime import protocol
from tests.system.conftest import numbers
from tests.system.instance import COMMAND, Instance, Result

ALICE, BOB, GROUP = "daemon", "games", "mail"
"""Users and a group that every Debian has."""
READS = "+dac_read_search"
"""The one capability the command keeps: the interpreter may lie where only root can read."""


@contextlib.contextmanager
def alices_tenant(jm: Instance) -> Iterator[str]:
    """A tenant that names Alice, with one jail `web` in it."""
    os.chmod(jm.root.at, 0o711)
    name = f"t{next(numbers)}"
    jm("tenant", "create", name, "-c", f"users={ALICE}", "--jails", "3")
    jm("launch", "busybox", f"{name}/web")
    yield name
    for jail in jm.json("--tenant", name, "list"):
        jm("delete", "--force", f"{name}/{jail['name']}")
    jm("tenant", "delete", name)


def become(user: str, groups: str = "") -> list[str]:
    """The command to run `jailmgr` as that user."""
    supplementary = ["--groups", groups] if groups else ["--init-groups"]
    ids = ["--reuid", user, "--regid", str(pwd.getpwnam(user).pw_gid), *supplementary]
    return ["setpriv", *ids, f"--inh-caps=-all,{READS}", f"--ambient-caps=-all,{READS}", "--", COMMAND]


def run_as(jm: Instance, user: str, *argv: str, groups: str = "", status: int | None = 0, stdin: bytes = b"") -> Result:
    """`jailmgr ARGV` as that user."""
    done = subprocess.run(
        [*become(user, groups), *argv],
        input=stdin,
        capture_output=True,
        timeout=120,
        env=jm.environment(),
        check=False,
    )
    result = Result(list(argv), done.returncode, done.stdout.decode(), done.stderr.decode())
    assert "Traceback" not in result.err, result.told()
    if status is not None:
        assert result.status == status, result.told()
    return result


@contextlib.contextmanager
def as_user(user: str) -> Iterator[None]:
    """Be that user, with no capability, while it lasts: what the kernel tells of a peer is as of connect(2)."""
    account = pwd.getpwnam(user)
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(account.pw_gid)
    os.seteuid(account.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def connected(jm: Instance, user: str) -> socket.socket:
    """To the API."""
    sock = socket.socket(socket.AF_UNIX)
    with as_user(user):
        sock.connect(jm.root.user_socket)
    sock.settimeout(30)
    return sock


def ask(sock: socket.socket, method: str, path: str, body: object = None) -> Any:
    """The engine's answer over a connection that stays."""
    content = b"" if body is None else json.dumps(body).encode()
    sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = sock.recv(65536)
        assert part, "it hung up"
        answer += part
    head, _, rest = answer.partition(b"\r\n\r\n")
    (length,) = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while len(rest) < length:
        rest += sock.recv(65536)
    return json.loads(rest)


def session(jm: Instance, user: str, tenant: str, jail: str) -> tuple[_socket.socket, dict[str, Any]]:
    """A session as its protocol begins it, and the first answer."""
    with as_user(user):
        sock = protocol.connect(jm.root.users, protocol.SESSIONS)
    protocol.send(sock, {"v": protocol.VERSION, "tenant": tenant, "jail": jail})
    message = protocol.receive(sock)
    assert message is not None
    return sock, message.body
