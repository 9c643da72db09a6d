"""`logs`: what a jail's console has shown, from its two files, and what it shows from now on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.runtime.attach import connect
from jailmgr.runtime.console import LOG, OLD_LOG
from jailmgr.runtime.state import running_jails


def logs(root: Root, tenant: str, jail: str, lines: int | None = None, follow: bool = False) -> Iterator[bytes]:
    """The console log, or its last `lines`; with `follow` also what comes, until the jail ends."""
    if not follow or jail not in running_jails(root, tenant):
        yield _shown(root, tenant, jail, lines, None, None)
        return
    with connect(root, tenant) as supervisor:
        try:
            answer = supervisor.ask("console", jail=jail, typed=False)
        except JailmgrError as error:
            if error.code != "conflict":
                raise
            yield _shown(root, tenant, jail, lines, None, None)
            return
        with socket.socket(fileno=answer.fds[0]) as stream:
            yield _shown(root, tenant, jail, lines, answer.body["inode"], answer.body["size"])
            while data := stream.recv(65536):
                yield data


def _shown(root: Root, tenant: str, jail: str, lines: int | None, inode: int | None, size: int | None) -> bytes:
    """Both files up to where following began: `size` bytes of the file `inode`, whichever it is by now."""
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
    if lines is not None:
        if lines < 0:
            raise JailmgrError("logs", "the number of lines can't be negative", "", "invalid")
        text = b"".join(text.splitlines(keepends=True)[-lines:]) if lines else b""
    return text
