"""Process of the lab VM that runs the commands. It is copied there as it is, so it imports nothing of ours.

It talks with the host over one virtio-serial port, which the kernel lets nobody else open while it does. Up go frames:
a byte that says what it is, the length of what follows as 32 bits in network order, and that. Down comes one byte for
each status that is followed by a reboot: what has been sent before is with the host, so a reboot loses nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import subprocess
from pathlib import Path

HEADER = struct.Struct("!cI")
UP, OUTPUT, STATUS = b"u", b"o", b"s"
"""The system is up (payload: number of the command, from 0); output of the command; its status, in decimal."""
CHUNK = 1 << 15

PORT = "/dev/virtio-ports/lab"
SELF = Path("/lab/guest.py")
COMMANDS = Path("/lab/commands.json")
DONE = Path("/lab/done")
"""How many commands have ended, over reboots."""
TREE = "/root/jailmgr"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "/wheelhouse",
}


def main() -> None:
    commands = json.loads(COMMANDS.read_text())
    number = int(DONE.read_text()) if DONE.exists() else 0
    # Until all jobs of the boot are done the manager says `starting`, and a command may want to see how it came up.
    subprocess.run(["systemctl", "is-system-running", "--wait"], stdout=subprocess.DEVNULL, check=False)
    port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    send(port, UP, b"%d" % number)
    status = run(port, commands[number])
    DONE.write_text(str(number + 1))
    send(port, STATUS, b"%d" % status)
    os.read(port, 1)
    subprocess.run(["systemctl", "reboot"], check=False)


def run(port: int, command: str) -> int:
    """The shell command's status (128+N: ended by signal N), once all that it wrote itself has been sent.

    What it leaves behind may hold its output open for ever, so its end counts and not that of the stream.
    """
    reader, writer = os.pipe()
    process = subprocess.Popen(
        ["/bin/bash", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        cwd=TREE,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    os.close(writer)
    pidfd = os.pidfd_open(process.pid)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_NONBLOCK)
    ended = False
    while not ended:
        ended = any(fd == pidfd for fd, _ in poll.poll())
        if not drain(port, reader):
            poll.unregister(reader)
            break
    status = process.wait()
    return status if status >= 0 else 128 - status


def drain(port: int, reader: int) -> bool:
    """Send what is in the pipe; False where nobody can write to it any more."""
    try:
        while chunk := os.read(reader, CHUNK):
            send(port, OUTPUT, chunk)
    except BlockingIOError:
        return True
    return False


def send(port: int, kind: bytes, payload: bytes) -> None:
    frame = HEADER.pack(kind, len(payload)) + payload
    while frame:
        frame = frame[os.write(port, frame) :]


if __name__ == "__main__":
    main()
