"""Sockets in the network namespaces of jails and of the outside world."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.system.instance import Instance
from tests.system.netns import inside

WITHIN = 5.0
"""Seconds for what should come."""
MEASURED = 1.0
"""Seconds for which what comes is counted."""
NOTHING_WITHIN = 1.0
"""Seconds after which nothing will come."""


@contextmanager
def jail_netns(instance: Instance, jail: str) -> Iterator[int]:
    """An fd of a running jail's network namespace."""
    fd = os.open(instance.info(jail)["netns"], os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def bound(netns: int, kind: socket.SocketKind, port: int, address: str = "") -> Iterator[socket.socket]:
    """A socket in `netns` bound to a port, listening if it is TCP: on both families where no address is given."""
    family = socket.AF_INET6 if not address or ":" in address else socket.AF_INET
    with inside(netns):
        sock = socket.socket(family, kind)
    with sock:
        sock.settimeout(WITHIN)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not address else 1)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield sock


def source_of(listener: socket.socket, netns: int, address: str, port: int) -> str:
    """Connect from `netns` to where `listener` should be reached; gives the address it sees, checked by a greeting."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(netns):
        client = socket.socket(family, listener.type)
    with client:
        client.settimeout(WITHIN)
        client.connect((address, port))
        client.sendall(b"hello")
        if listener.type == socket.SOCK_DGRAM:
            said, peer = listener.recvfrom(16)
            listener.sendto(b"welcome", peer)
        else:
            taken, peer = listener.accept()
            with taken:
                taken.settimeout(WITHIN)
                said = taken.recv(16)
                taken.sendall(b"welcome")
        assert said == b"hello"
        assert client.recv(16) == b"welcome"
    return str(peer[0]).removeprefix("::ffff:")


def refuses(netns: int, address: str, port: int) -> bool:
    """Whether a TCP connection from `netns` fails, at once or by silence."""
    with inside(netns):
        client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    with client:
        client.settimeout(NOTHING_WITHIN)
        try:
            client.connect((address, port))
        except OSError:
            return True
    return False


def megabits(
    asker: int, answerer: int, address: str, port: int = 5001, *, receives: bool = False, priority: int | None = None
) -> float:
    """Megabits a second of payload that TCP brings from one network namespace to another; with `receives`, back.

    `priority`: the sender's SO_PRIORITY.
    """
    with bound(answerer, socket.SOCK_STREAM, port) as listener:
        with inside(asker):
            asking = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        with asking:
            asking.settimeout(WITHIN)
            asking.connect((address, port))
            answering, _ = listener.accept()
            with answering:
                sender, receiver = (answering, asking) if receives else (asking, answering)
                if priority is not None:
                    sender.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
                return _received(sender, receiver)


def _received(sender: socket.socket, receiver: socket.socket) -> float:
    sending = threading.Thread(target=_send, args=(sender,))
    sending.start()
    try:
        receiver.settimeout(WITHIN)
        began, count = time.monotonic(), 0
        while (taken := time.monotonic() - began) < MEASURED:
            count += len(receiver.recv(1 << 20))
        return count * 8 / taken / 1e6
    finally:
        # Sends that wait for room fail at once, and so does the next one.
        sender.shutdown(socket.SHUT_RDWR)
        receiver.shutdown(socket.SHUT_RDWR)
        sending.join()


def _send(sender: socket.socket) -> None:
    sender.settimeout(WITHIN)
    block = bytes(65536)
    try:
        while True:
            sender.sendall(block)
    except OSError:
        return
