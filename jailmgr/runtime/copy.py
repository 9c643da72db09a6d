"""`cp` from the caller's side: a tar stream on a pipe, to or from the jail's end of it (archive.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_dict
from jailmgr.runtime.attach import connect, connect_user


def copy_out(root: Root, tenant: str, jail: str, path: str, taker: Callable[[int], None]) -> None:
    """Give `taker` the reading end of a tar stream of `path` in the jail, running or not. Raises JailmgrError."""
    _copy(root, tenant, jail, path, True, taker)


def copy_in(root: Root, tenant: str, jail: str, path: str, giver: Callable[[int], None]) -> None:
    """Put the one tree of the tar stream that `giver` writes to its fd at `path` in the jail. Raises JailmgrError."""
    _copy(root, tenant, jail, path, False, giver)


def _copy(root: Root, tenant: str, jail: str, path: str, out: bool, other: Callable[[int], None]) -> None:
    broken: BaseException | None = None
    with connect(root, tenant) if os.geteuid() == 0 else connect_user(root, tenant, jail) as supervisor:
        request: dict[str, Any] = {"jail": jail, "lib": root.jail_lib(tenant, jail), "path": path, "out": out}
        if supervisor.admitted:
            (ours,) = supervisor.ask("archive", **request).fds
        else:
            ear, mouth = os.pipe()
            theirs, ours = (mouth, ear) if out else (ear, mouth)
            try:
                supervisor.tell("archive", [theirs], **request)
            finally:
                os.close(theirs)
        try:
            other(ours)
        except Exception as error:  # noqa: BLE001 - raised below, unless the jail's side says why it went
            broken = error
        finally:
            os.close(ours)
        done = supervisor.hear_any().body
    if "error" in done:
        raise from_dict(done["error"])
    if broken is not None:
        raise broken
    if done["exit"].get("code") != 0:
        raise JailmgrError("cp", "the jail's side was ended")
