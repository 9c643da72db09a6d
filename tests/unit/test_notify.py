"""The notify socket's reading end against a guest that sends fds and floods."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
import time

import pytest

from jailmgr.runtime.loop import Loop
from jailmgr.runtime.notify import Notify, refuse_fds


def _lingering() -> tuple[socket.socket, list[socket.socket]]:
    """A TCP socket whose last close waits a minute, and the others it needs for that."""
    listener = socket.create_server(("127.0.0.1", 0))
    sock = socket.create_connection(listener.getsockname())
    peer, _ = listener.accept()
    sock.setblocking(False)
    try:
        while True:
            sock.send(bytes(65536))
    except BlockingIOError:
        pass
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    return sock, [listener, peer]


@pytest.mark.parametrize("kernel_refuses", [True, False])
def test_a_lingering_socket_is_not_ours_to_close(kernel_refuses: bool) -> None:
    loop, told = Loop(), list[bool]()
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    if kernel_refuses:
        refuse_fds(ours)
    with tempfile.TemporaryDirectory() as folder:
        ours.bind(f"{folder}/notify")
        guest = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        guest.connect(f"{folder}/notify")
        sock, others = _lingering()
        sent = True
        try:
            socket.send_fds(guest, [b"READY=1"], [sock.fileno()])
            sock.close()
        except PermissionError:
            sent = False
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
            sock.close()
        assert sent or kernel_refuses
        notify = Notify(loop, ours.detach(), lambda: told.append(True))
        loop.after(0.2, loop.stop)
        at = time.monotonic()
        alarm = threading.Timer(5, others[1].close)
        alarm.start()
        loop.run()
        notify.close()
        took = time.monotonic() - at
        alarm.cancel()
        for other in (guest, *others):
            other.close()
        assert took < 3
        assert not told


def test_ready_is_told_once() -> None:
    loop, told = Loop(), list[bool]()
    ours, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    fd = ours.detach()
    Notify(loop, fd, lambda: told.append(True))
    guest.send(b"STATUS=x\nREADY=1")
    loop.after(0.1, loop.stop)
    loop.run()
    assert told == [True]
    assert not os.path.exists(f"/proc/self/fd/{fd}")
    guest.close()
