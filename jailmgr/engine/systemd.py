"""What systemd gives a service and wants to hear of it: the sockets it listens on, and that it is ready.

Sources: sd_listen_fds(3), sd_notify(3). Both are a few lines of a documented protocol, for which no library is needed.
"""

from __future__ import annotations

import os
import socket

_FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

ENGINE = "engine.sock"
"""The name of the engine's own."""


def take_sockets() -> dict[str, socket.socket]:
    """The sockets that .socket units listen on in our stead, close-on-exec, by the name of their file.

    What told us of them leaves the environment: our children have no part in it. All for users who are not root lie in
    a directory of their own, and are named after it as well: `users/engine.sock`.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found = {}
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        directory, name = os.path.split(str(sock.getsockname()))
        found[f"users/{name}" if os.path.basename(directory).endswith("users") else name] = sock
    return found


def take_notify() -> str:
    """Where systemd hears what we say (NOTIFY_SOCKET), which leaves the environment; empty where nobody listens."""
    return os.environ.pop("NOTIFY_SOCKET", "")


def notify(address: str, state: str) -> None:
    """Say a line such as READY=1 at `take_notify`'s address."""
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
