"""cp: files and folders into and out of a jail, as a tar stream to and from a process inside of it."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any, BinaryIO

import typer

from jailmgr.cli.client import existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.output import remark
from jailmgr.cli.settings import Settings, name_of, split_name, wrong_usage
from jailmgr.errors import JailmgrError

MEMORY = 1 << 30
"""Address space of `cp`, in bytes: a tar's header may claim any length, and is read whole."""

CHUNK = 256 * 1024

Jailed = tuple[str, str, str]
"""Tenant, jail and path."""


def add(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(app, example="jailmgr cp ./site web:/var/www")(cp)


def cp(
    settings: Settings,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A path, NAME:PATH, or - for stdin.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A path, NAME:PATH, or - for stdout.")],
) -> int:
    """Copy files and folders into or out of a jail.

    As cp -a does, with owners, modes and times. One side is NAME:PATH; a path of the host with a colon in it is
    written ./PATH. With - a file's content is read from stdin or written to stdout; a folder is written to stdout as
    a tar, and a tar is unpacked into a PATH that ends in /.
    """
    outer, inner = split_side(settings, source), split_side(settings, target)
    if (outer is None) == (inner is None):
        raise wrong_usage(
            f"cp {source} {target}",
            "one of the two sides must be in a jail",
            "Write NAME:PATH: jailmgr cp ./file web:/root/",
        )
    if inner is not None:
        copy_in(settings, source, inner)
    elif outer is not None:
        copy_out(settings, outer, target)
    return 0


def split_side(settings: Settings, text: str) -> Jailed | None:
    """Tenant, jail and path of `[TENANT/]NAME:PATH`; None for a path of the host. Raises JailmgrError (invalid)."""
    name, colon, path = text.partition(":")
    if not colon or name[:1] in (".", "/") or not name:
        return None
    tenant, jail = split_name(settings, name)
    if not path.startswith("/") or "\0" in path:
        raise wrong_usage(f"cp {text}", "the path in a jail starts with /", f"Write {name}:/root/{path}")
    return tenant, jail, path


def copy_in(settings: Settings, source: str, target: Jailed) -> None:
    """Copy a path of the host, or stdin, into a jail."""
    from jailmgr.runtime import archive, copy

    tenant, jail, path = target
    if source != "-" and not os.path.lexists(source):
        raise JailmgrError(f"cp {source}", "no such file or directory", "", "missing")

    def send(fd: int) -> None:
        if source == "-" and path.endswith("/"):
            with os.fdopen(os.dup(fd), "wb") as stream:
                shutil.copyfileobj(sys.stdin.buffer, stream, CHUNK)
        elif source == "-":
            _tar_stdin(os.path.basename(path), fd)
        else:
            plain = source.rstrip("/") or "/"
            archive.write_tar(os.path.realpath(plain) if os.path.basename(plain) in (".", "..") else plain, fd)

    check_jail(settings, tenant, jail)
    transfer(send, lambda end: copy.copy_in(settings.root, tenant, jail, path, end), BrokenPipeError)


def copy_out(settings: Settings, source: Jailed, target: str) -> None:
    """Copy a path of a jail to the host, or to stdout."""
    from jailmgr.cli.unpack import unpack
    from jailmgr.runtime import copy

    tenant, jail, path = source

    def take(fd: int) -> None:
        with os.fdopen(os.dup(fd), "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            left_out = _to_stdout(tar) if target == "-" else unpack(tar, target)
            shutil.copyfileobj(stream, _Nowhere())
        for name in left_out:
            remark(settings, f"left out, neither file, folder nor link: {name}")

    check_jail(settings, tenant, jail)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        transfer(take, lambda end: copy.copy_out(settings.root, tenant, jail, path, end), tarfile.ReadError)
    except (tarfile.TarError, MemoryError) as error:
        why = f"what came out is not a tar that can be read ({str(error) or 'sizes beyond reason'})"
        raise JailmgrError(f"cp {name_of(tenant, jail)}:{path}", why) from error


def check_jail(settings: Settings, tenant: str, jail: str) -> None:
    """Ask the engine about a jail that doesn't run: it knows whether there is one, and mounts what it lies in."""
    from jailmgr.runtime.state import read_state

    if os.geteuid() != 0 or read_state(settings.root, tenant, jail) is None:
        existing_engine(settings.root).call("GET", f"/1.0/instances/{jail}?project={tenant}")


def transfer(
    here: Callable[[int], None], there: Callable[[Callable[[int], None]], None], echo: type[Exception]
) -> None:
    """Run a copy, whose jail's end is `there` and ours `here`, and raise what went wrong first.

    An error of the kind `echo` on our side only tells that the other side is gone.
    """
    failed: list[Exception] = []

    def end(fd: int) -> None:
        try:
            here(fd)
        except (OSError, JailmgrError, tarfile.TarError, MemoryError) as error:
            failed.append(error)

    try:
        there(end)
    except JailmgrError as error:
        if failed and not isinstance(failed[0], echo):
            raise failed[0] from error
        raise
    if failed:
        if isinstance(failed[0], BrokenPipeError) and echo is BrokenPipeError:
            raise JailmgrError("cp", "the jail's side ended early")
        raise failed[0]


class _Nowhere:
    def write(self, part: bytes) -> int:
        return len(part)


def _tar_stdin(name: str, fd: int) -> None:
    """Stdin as a tar of one file; its length stands before it, so it is kept in a file until its end is known."""
    with tempfile.SpooledTemporaryFile(max_size=1 << 20) as kept:
        source: BinaryIO | Any = sys.stdin.buffer
        status = os.fstat(source.fileno())
        size = status.st_size - source.tell() if stat.S_ISREG(status.st_mode) else -1
        if size < 0:
            shutil.copyfileobj(source, kept, CHUNK)
            size = kept.tell()
            kept.seek(0)
            source = kept
        with os.fdopen(os.dup(fd), "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = size, 0o644, time.time()
            tar.addfile(member, source)


def _to_stdout(tar: tarfile.TarFile) -> list[str]:
    """A single file's content, a folder as a tar."""
    sys.stdout.flush()
    out = sys.stdout.buffer
    first = tar.next()
    if first is None:
        return []
    if first.isreg():
        content = tar.extractfile(first)
        assert content is not None
        shutil.copyfileobj(content, out, CHUNK)
        out.flush()
        return []
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as copy:
        member: tarfile.TarInfo | None = first
        while member is not None:
            copy.addfile(member, tar.extractfile(member) if member.isreg() else None)
            member = tar.next()
    out.flush()
    return []
