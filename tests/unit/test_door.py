"""HTTP for users who are not root, as the doorkeeper hands them on."""

from __future__ import annotations

import asyncio
import socket

import pytest
from starlette.types import Receive, Scope, Send

from jailmgr.engine import door
from jailmgr.engine.protocol import Server
from jailmgr.manager.access import Caller

ALICE = Caller(1000, (1000, 1001))
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def whoami(scope: Scope, receive: Receive, send: Send) -> None:
    """Takes longer than a connection may be idle."""
    await asyncio.sleep(0.5)
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": repr(scope["jailmgr.caller"]).encode()})


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"", b""),
        (REQUEST[:20], b""),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf", b""),
        (REQUEST, b"HTTP/1.1 200"),
    ],
)
def test_a_connection_that_waits_for_its_user_is_closed(
    monkeypatch: pytest.MonkeyPatch, said: bytes, answer: bytes
) -> None:
    """One that waits for an answer is not; who asks is who the doorkeeper says."""
    monkeypatch.setattr(door, "IDLE_SECONDS", 0.2)

    async def ask() -> bytes:
        loop = asyncio.get_running_loop()
        server = Server(whoami, lambda: None, door.UserProtocol)
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            await loop.connect_accepted_socket(lambda: door.UserProtocol.of(ALICE, server), theirs)
            await loop.sock_sendall(ours, said)
            got = b""
            while part := await asyncio.wait_for(loop.sock_recv(ours, 65536), 20):
                got += part
            return got

    got = asyncio.run(ask())
    assert got.startswith(answer)
    assert not answer or repr(ALICE).encode() in got
    assert answer or not got
