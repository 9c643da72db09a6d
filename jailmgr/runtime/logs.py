"""`logs`: what a jail's console has shown, from its two files, and what it shows from now on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.runtime.attach import Supervisor, connect
from jailmgr.runtime.console import LOG, OLD_LOG
from jailmgr.runtime.state import running_jails


def logs(root: Root, tenant: str, jail: str, lines: int | None = None, follow: bool = False) -> Iterator[bytes]:
    """The console log, or its last `lines`; with `follow` also what comes, until the jail ends."""
    if not follow or jail not in running_jails(root, tenant):
        yield last_lines(shown(root, tenant, jail), lines)
        return
    with connect(root, tenant) as supervisor:
        try:
            answer = supervisor.ask("console", jail=jail, typed=False)
        except JailmgrError as error:
            if error.code != "conflict":
                raise
            yield last_lines(shown(root, tenant, jail), lines)
            return
        yield last_lines(shown(root, tenant, jail, answer.body["inode"], answer.body["size"]), lines)
        yield from _comes(answer.fds[0])


def follow(supervisor: Supervisor, jail: str) -> Iterator[bytes]:
    """What the console of a running jail shows from now on, until it ends; nothing where it doesn't run."""
    try:
        answer = supervisor.ask("console", jail=jail, typed=False)
    except JailmgrError as error:
        if error.code != "conflict":
            raise
        return
    yield from _comes(answer.fds[0])


def _comes(fd: int) -> Iterator[bytes]:
    with socket.socket(fileno=fd) as stream:
        while data := stream.recv(65536):
            yield data


def shown(root: Root, tenant: str, jail: str, inode: int | None = None, size: int | None = None) -> bytes:
    """Both files, up to where following began: `size` bytes of the file `inode`, whichever it is by now."""
    text = b""
    for name in (OLD_LOG, LOG):
        try:
            with open(f"{root.jail_lib(tenant, jail)}/{name}", "rb") as file:
                is_last = os.fstat(file.fileno()).st_ino == inode
                text += file.read(size if is_last else -1)
        except FileNotFoundError:
            continue
        if is_last:
            break
    return text


def last_lines(text: bytes, lines: int | None) -> bytes:
    """The last `lines`; all for None. JailmgrError `invalid`."""
    if lines is None:
        return text
    if lines < 0:
        raise JailmgrError("logs", "the number of lines can't be negative", "", "invalid")
    return b"".join(text.splitlines(keepends=True)[-lines:]) if lines else b""
