"""qemu: what it is started with, whether KVM is of use to it, and the talk with the process inside (`labvm.guest`)."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from labvm.errors import TIMED_OUT, LabError
from labvm.guest import CHUNK, HEADER, OUTPUT, STATUS, UP
from labvm.image import Image

QEMU = "qemu-system-x86_64"
TCG = ("-accel", "tcg,thread=multi", "-cpu", "max,la57=off")
"""Each level of page tables less is a memory access less for each miss, and those are the emulator's own work."""
KVM = ("-accel", "kvm", "-cpu", "host")
BOOT_WITHIN = 300
"""Seconds from power on to the first word of `labvm.guest`; 30 without KVM on two idle processors."""
PROBE_WITHIN = 20
APPEND = (
    "root=LABEL=lab rw rootflags=prjquota,noinit_itable console=ttyS0 panic=-1 net.ifnames=0 "
    "systemd.unified_cgroup_hierarchy=1 apparmor=1 security=apparmor"
)
"""A panic boots anew, which the host sees; without it the time limit would have to run out."""


class Machine(NamedTuple):
    """Paths but for `channel`, the file descriptor of a connected socket, and `accelerator`, arguments of qemu's."""

    image: Image
    wheelhouse: str
    tree: str
    console: str
    channel: int
    accelerator: tuple[str, ...]


def command_line(machine: Machine) -> list[str]:
    """No write reaches the image: `snapshot=on` sends them to a file that qemu unlinks when it has opened it."""
    image = machine.image
    return [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", *machine.accelerator, "-smp", "2", "-m", "4096"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", APPEND),
        *("-chardev", f"file,id=console,path={machine.console}", "-serial", "chardev:console"),
        *_disk("root", str(image.root), "snapshot=on,cache=unsafe,discard=unmap"),
        *_disk("tree", machine.tree, "readonly=on"),
        *_disk("wheelhouse", machine.wheelhouse, "readonly=on"),
        *("-chardev", f"socket,id=lab,fd={machine.channel}", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=lab,name=lab", "-device", "virtio-rng-pci"),
        # Its boot ROM is in a package of its own, and nothing is booted from there.
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
    ]


def _disk(name: str, path: str, options: str) -> list[str]:
    return [
        *("-drive", f"if=none,id={name},file={path.replace(',', ',,')},format=raw,{options}"),
        *("-device", f"virtio-blk-pci,drive={name},serial={name}"),
    ]


class Frames:
    """The frames in a stream of bytes that comes in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Kind and payload of each frame that is whole by now."""
        self._rest += piece
        while len(self._rest) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._rest)
            if len(self._rest) < HEADER.size + length:
                return
            payload = self._rest[HEADER.size : HEADER.size + length]
            self._rest = self._rest[HEADER.size + length :]
            yield kind, payload


class Talk:
    """What the guest has told so far. `statuses` has one for each command that has ended."""

    def __init__(self, commands: int, output: int) -> None:
        self.up = False
        self.statuses: list[int] = []
        self._commands = commands
        self._output = output
        self._frames = Frames()

    @property
    def over(self) -> bool:
        return len(self.statuses) == self._commands

    @property
    def status(self) -> int:
        return next((status for status in self.statuses if status), 0)

    def hear(self, piece: bytes) -> bool:
        """Pass on what is output; True where the guest waits for leave to boot anew. LabError: it did so unasked."""
        leave = False
        for kind, payload in self._frames.feed(piece):
            if kind == OUTPUT:
                _write(self._output, payload)
            elif kind == STATUS:
                self.statuses.append(int(payload))
                self.up = False
                leave = not self.over
            elif kind == UP:
                if self.up or int(payload) != len(self.statuses):
                    raise LabError(
                        "the VM was booted anew while the command ran", "What is to follow a reboot goes in --then."
                    )
                self.up = True
        return leave


def converse(channel: socket.socket, talk: Talk, timeout: float) -> None:
    """Until all commands have ended. LabError: `timeout` seconds are over (status 124), or the VM failed (125)."""
    began = time.monotonic()
    boot = began
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while not talk.over:
        limit = began + timeout if talk.up else min(began + timeout, boot + BOOT_WITHIN)
        left = limit - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            if not talk.up and time.monotonic() >= boot + BOOT_WITHIN:
                raise LabError(f"the VM was not up after {BOOT_WITHIN} s")
            raise LabError(f"the time limit of {timeout:g} s is over", "--timeout SECONDS sets another.", TIMED_OUT)
        piece = channel.recv(CHUNK)
        if not piece:
            raise LabError("the VM ended before the command did")
        if talk.hear(piece):
            boot = time.monotonic()
            channel.sendall(b".")


@contextmanager
def running(argv: list[str], descriptors: tuple[int, ...], scratch: Path, errors: int | None = None) -> Iterator[int]:
    """qemu's pidfd; it ends with the block, or with this process however that ends. `errors` is its stderr."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=descriptors,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    try:
        pidfd = os.pidfd_open(process.pid)
        try:
            yield pidfd
        finally:
            os.close(pidfd)
    finally:
        process.kill()
        process.wait()


def accelerator(cache: Path, image: Image) -> tuple[str, ...]:
    """KVM's arguments where a kernel booted with it comes to an end in time, else TCG's.

    There are hosts with a /dev/kvm on which nothing ever runs. The answer is kept until the host boots.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    kept = cache / "kvm"
    answers = {f"{boot} yes\n": True, f"{boot} no\n": False}
    known = answers.get(kept.read_text() if kept.exists() else "")
    if known is None:
        known = _probe(cache, image)
        new = cache / f"kvm.{os.getpid()}"
        new.write_text(f"{boot} {'yes' if known else 'no'}\n")
        new.rename(kept)
    return KVM if known else TCG


def _probe(cache: Path, image: Image) -> bool:
    """Init is a program that ends: the kernel panics, boots anew, and -no-reboot makes an end of qemu out of that."""
    argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", *KVM, "-m", "512", "-no-reboot"]
    argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", "rdinit=/bin/true panic=-1"]
    with running(argv, (), cache, subprocess.DEVNULL) as pidfd:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(PROBE_WITHIN * 1000):
            return False
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    return ended is not None and ended.si_status == 0


def _write(fd: int, text: bytes) -> None:
    while text:
        text = text[os.write(fd, text) :]
