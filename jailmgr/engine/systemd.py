"""What systemd gives a service and wants to hear of it: the sockets it listens on, and that it is ready.

Sources: sd_listen_fds(3), sd_notify(3). Both are a few lines of a documented protocol, for which no library is needed.
"""

from __future__ import annotations

import os
import socket

_FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


def take_socket() -> socket.socket | None:
    """The socket that a .socket unit listens on in our stead, close-on-exec; None where there is none.

    What told us of it leaves the environment: our children have no part in it.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count != "1":
        return None
    os.set_inheritable(_FIRST_FD, False)
    return socket.socket(fileno=_FIRST_FD)


def take_notify() -> str:
    """Where systemd hears what we say (NOTIFY_SOCKET), which leaves the environment; empty where nobody listens."""
    return os.environ.pop("NOTIFY_SOCKET", "")


def notify(address: str, state: str) -> None:
    """Say a line such as READY=1 at `take_notify`'s address."""
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
