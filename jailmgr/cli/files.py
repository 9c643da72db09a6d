"""cp: files and folders into and out of a jail, as a tar stream to and from a process inside of it."""

from __future__ import annotations

import lzma
import os
import resource
import shutil
import stat
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Self

import typer

from jailmgr.cli.client import existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.settings import Settings, name_of, split_name, wrong_usage
from jailmgr.errors import JailmgrError

if TYPE_CHECKING:
    from jailmgr.runtime import archive, pax

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

    As cp -a does, with owners, modes, times, ACLs and extended attributes. What can't be kept is named, and the exit
    status is 1. Other file systems that are mounted below a folder of a jail are not copied. One side is NAME:PATH; a
    path of the host with a colon in it is written ./PATH. With - a file's content is read from stdin or written to
    stdout: an existing file keeps its owner and mode. A folder is written to stdout as a tar, and a tar is unpacked
    into a PATH that ends in /.
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
    missed: list[str] = []

    def send(fd: int) -> None:
        if source == "-" and path.endswith("/"):
            _convert(fd)
        elif source == "-":
            _send_stdin(os.path.basename(path), fd)
        else:
            missed.extend(archive.write_tree(source, fd, False))

    check_jail(settings, tenant, jail)
    with _reported(missed):
        transfer(send, lambda end: copy.copy_in(settings.root, tenant, jail, path, end), BrokenPipeError)


def copy_out(settings: Settings, source: Jailed, target: str) -> None:
    """Copy a path of a jail to the host, or to stdout."""
    from jailmgr.cli.unpack import unpack
    from jailmgr.runtime import archive, copy, pax

    tenant, jail, path = source
    missed: list[str] = []

    def take(fd: int) -> None:
        archive.widen(fd)
        reader = pax.Reader(fd)
        missed.extend(_to_stdout(reader) if target == "-" else unpack(reader, target))
        reader.drain()

    check_jail(settings, tenant, jail)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        with _reported(missed):
            transfer(take, lambda end: copy.copy_out(settings.root, tenant, jail, path, end), pax.BrokenStreamError)
    except MemoryError as error:
        raise JailmgrError(f"cp {name_of(tenant, jail)}:{path}", "the archive has sizes beyond reason") from error


@contextmanager
def _reported(missed: list[str]) -> Iterator[None]:
    """Add what our side missed to the error of the jail's side."""
    from jailmgr.runtime import archive

    try:
        yield
    except JailmgrError as error:
        if not missed:
            raise
        raise JailmgrError(error.what, "; ".join([error.why, *missed[:20]]), error.hint, error.code) from error
    archive.complain(missed)


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


def _send_stdin(name: str, fd: int) -> None:
    """Send stdin as one file; its length stands before it, so it is kept in a file until its end is known."""
    from jailmgr.runtime import archive, pax

    with tempfile.SpooledTemporaryFile(max_size=1 << 20) as kept:
        source: BinaryIO | Any = sys.stdin.buffer
        status = os.fstat(source.fileno())
        size = status.st_size - source.tell() if stat.S_ISREG(status.st_mode) else -1
        if size < 0:
            shutil.copyfileobj(source, kept, CHUNK)
            size = kept.tell()
            kept.seek(0)
            source = kept
        out = archive.Writer(fd)
        out.put(pax.header(pax.Member(os.fsencode(name), pax.FILE, size=size, content=True)))
        _put_content(out, source, size)
        out.put(bytes(-size % pax.BLOCK))
        out.put(pax.end())
        out.flush()


def _put_content(out: archive.Writer, source: BinaryIO | Any, size: int) -> None:
    left = size
    while left:
        part = source.read(min(CHUNK, left))
        if not part:
            raise JailmgrError("cp", "stdin ended early")
        out.put(part)
        left -= len(part)


def _put_stored(out: archive.Writer, source: BinaryIO | Any, member: pax.Member) -> None:
    """Send a file of a tar, without the holes of a sparse one.

    In a tar on a pipe only the unbuffered file can be moved to a later offset.
    """
    from jailmgr.runtime import pax

    for offset, length in pax.parts(member):
        if member.extents is not None:
            source.seek(offset)
        _put_content(out, source, length)
    out.put(bytes(-pax.stored(member) % pax.BLOCK))


class _Whole(tarfile.TarInfo):
    """A member of a tar that ends where it says: tarfile takes a later header that is cut off for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


def _convert(fd: int) -> None:
    """Send a tar on stdin, of any kind that tarfile reads. JailmgrError where it can't be read to its end."""
    from jailmgr.runtime import archive

    out = archive.Writer(fd)
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|*", tarinfo=_Whole) as tar:
            _convert_members(tar, out)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        why = f"what comes in is no tar that can be read to its end ({error})"
        hint = "A target that ends in `/` takes a tar; name a file to write what comes in as it is."
        raise JailmgrError("cp -", why, hint) from error
    out.flush()


def _convert_members(tar: tarfile.TarFile, out: archive.Writer) -> None:
    from jailmgr.runtime import pax

    prefix = "SCHILY.xattr."
    for item in tar:
        kind = pax.FILE if item.isreg() else item.type
        sparse: Any = item.sparse
        member = pax.Member(
            os.fsencode("/".join(part for part in item.name.split("/") if part not in ("", ".")) or "."),
            kind,
            item.mode,
            item.uid,
            item.gid,
            item.size if kind == pax.FILE else 0,
            _nanoseconds(item),
            None,
            os.fsencode(item.linkname),
            (item.devmajor, item.devminor),
            tuple(
                (os.fsencode(key.removeprefix(prefix)), value.encode("utf-8", "surrogateescape"))
                for key, value in item.pax_headers.items()
                if key.startswith(prefix)
            ),
            extents=None if sparse is None else tuple((offset, length) for offset, length in sparse if length),
        )
        out.put(pax.header(member))
        if kind == pax.FILE:
            source: Any = tar.extractfile(item)
            _put_stored(out, source.raw, member)
    out.put(pax.end())


def _nanoseconds(item: tarfile.TarInfo) -> int:
    return int(Decimal(item.pax_headers.get("mtime", str(int(item.mtime)))) * 10**9)


def _to_stdout(reader: pax.Reader) -> list[str]:
    """Write a single file's content, or a folder as a tar; a tar that breaks off ends so that tar reports it."""
    from jailmgr.runtime import archive, pax

    sys.stdout.flush()
    out = archive.Writer(sys.stdout.fileno())
    member = reader.next()
    if member is None:
        return []
    single = member.kind == pax.FILE
    try:
        while member is not None:
            if not single:
                out.put(pax.header(member))
            for part in reader.content() if single else iter(reader.stored, b""):
                out.put(part)
            if not single and member.kind == pax.FILE:
                out.put(bytes(-pax.stored(member) % pax.BLOCK))
            member = reader.next()
        if not single:
            out.put(pax.end())
    except BaseException:
        if not single:
            out.put(pax.broken_end())
        raise
    finally:
        out.flush()
    return []
