"""Bootstrapping from the host's busybox-static: a system of one program, built in a blink and booted in another."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess

from jailmgr.errors import JailmgrError, from_os

_HINT = "Install it: apt-get install busybox-static"
_DIRECTORIES = {
    "bin": 0o755, "sbin": 0o755, "usr/bin": 0o755, "usr/sbin": 0o755, "etc": 0o755, "dev": 0o755, "proc": 0o555,
    "sys": 0o555, "run": 0o755, "var/log": 0o755, "var/tmp": 0o1777, "tmp": 0o1777, "root": 0o700, "home": 0o755,
    "mnt": 0o755,
}  # fmt: skip
_PT_INTERP = 3


def find_busybox() -> str:
    """Path of the host's busybox; JailmgrError `unavailable` where there is none, or one that needs libraries."""
    path = shutil.which("busybox", path="/bin:/usr/bin:/sbin:/usr/sbin:/usr/local/bin")
    if path is None:
        raise JailmgrError("template busybox", "the host has no busybox", _HINT, "unavailable")
    if not _is_static(path):
        raise JailmgrError("template busybox", f"{path} is not linked statically", _HINT, "unavailable")
    return path


def _is_static(path: str) -> bool:
    """No program header asks for an interpreter (elf(5))."""
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:4] != b"\x7fELF" or len(head) < 64:
            return False
        order = "<" if head[5] == 1 else ">"
        place, count_place = ("Q", 54) if head[4] == 2 else ("I", 42)
        (offset,) = struct.unpack_from(f"{order}{place}", head, 32 if place == "Q" else 28)
        size, count = struct.unpack_from(f"{order}HH", head, count_place)
        file.seek(offset)
        headers = file.read(size * count)
    kinds = [struct.unpack_from(f"{order}I", headers, size * index)[0] for index in range(count)]
    return _PT_INTERP not in kinds


def bootstrap(target: str) -> None:
    """Fill the empty directory `target`: directories, the program, a link for each applet.

    No guest has touched `target` yet, so plain paths will do.
    """
    busybox = find_busybox()
    try:
        listed = subprocess.run([busybox, "--list-full"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise JailmgrError("template busybox", f"{busybox} --list-full: {error}", _HINT) from error
    try:
        for path, mode in _DIRECTORIES.items():
            os.makedirs(f"{target}/{path}", exist_ok=True)
            os.chmod(f"{target}/{path}", mode)
        shutil.copyfile(busybox, f"{target}/bin/busybox")
        os.chmod(f"{target}/bin/busybox", 0o755)
        for applet in listed.split():
            place, _, name = applet.rpartition("/")
            if place in ("bin", "sbin", "usr/bin", "usr/sbin") and name not in ("busybox", "init", "linuxrc"):
                os.symlink("/bin/busybox", f"{target}/{applet}")
    except OSError as error:
        raise from_os("template busybox", error) from error
