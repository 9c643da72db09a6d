"""Images in the pool: images/FINGERPRINT with `rootfs` in it that nobody writes to, a FINGERPRINT.json beside each.

The JSON is the image's mark: it is written last and removed first, and what has none is swept away. Who changes
something here holds a lock (flock(2)) on the directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from jailmgr.errors import JailmgrError, from_os
from jailmgr.image.fingerprint import disk_size, fingerprint
from jailmgr.model import Image
from jailmgr.storage.btrfs import directory
from jailmgr.storage.pool import Pool
from jailmgr.storage.volume import build_path, explained, kind_of

_FINGERPRINT = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_SEALING = ".sealing"


def seal(pool: Pool, build: str, image: Image) -> Image:
    """Make an image of builds/BUILD/rootfs; `image` comes back with its fingerprint and size.

    The build is left for its maker to delete, maybe without its root file system. An image of the same content that is
    there is kept, with what is told of it replaced by `image` (but for when it was made). It is on disk when this
    returns. Raises JailmgrError `invalid` where the root file system holds what the pool's kind can't have in an image,
    `full` where the pool is.
    """
    at = _images(pool)
    scratch = f"{at}/{_SEALING}"
    try:
        with _lock(pool) as images:
            _delete(pool, scratch)
            try:
                kind_of(pool).take_build(pool, build_path(pool, build), scratch)
                _strip(scratch)
                rootfs = f"{scratch}/rootfs"
                image = msgspec.structs.replace(image, fingerprint=fingerprint(rootfs), size_bytes=disk_size(rootfs))
                kept = _read(pool, image.fingerprint)
                if kept is not None:
                    image = msgspec.structs.replace(image, created_at=kept.created_at)
                else:
                    _delete(pool, f"{at}/{image.fingerprint}")
                    kind_of(pool).settle_image(pool, scratch)
                    os.rename(scratch, f"{at}/{image.fingerprint}")
                    os.fsync(images)
                _write(pool, image)
            finally:
                _delete(pool, scratch)
        return image
    except OSError as error:
        raise explained(f"image of {image.template}", error) from error


def remove_image(pool: Pool, fp: str) -> None:
    """Remove an image. No jail may be made of it: the caller sees to that. Idempotent."""
    if not _FINGERPRINT.match(fp):
        raise JailmgrError(f"image {fp!r}", "not a fingerprint", "", "invalid")
    at = f"{_images(pool)}/{fp}"
    try:
        with _lock(pool):
            if os.path.exists(f"{at}.json"):
                os.unlink(f"{at}.json")
            _delete(pool, at)
            _drop_unneeded(pool)
    except OSError as error:
        raise from_os(f"image {fp[:12]}", error) from error


def list_images(pool: Pool) -> list[Image]:
    """Whole images, the oldest first. What a crash left half-made is removed, unless an image is just being sealed."""
    images = [image for name in os.listdir(_images(pool)) if (image := _read(pool, name.removesuffix(".json")))]
    try:
        with _lock(pool, fcntl.LOCK_NB):
            _sweep(pool)
    except BlockingIOError:
        pass
    return sorted({image.fingerprint: image for image in images}.values(), key=lambda image: image.created_at)


def _sweep(pool: Pool) -> None:
    names = set(os.listdir(_images(pool)))
    for name in names:
        fp = name.removesuffix(".json")
        path = f"{_images(pool)}/{name}"
        if _FINGERPRINT.match(fp) and {fp, f"{fp}.json"} <= names:
            continue
        if os.path.isdir(path):
            _delete(pool, path)
        else:
            os.unlink(path)


def _drop_unneeded(pool: Pool) -> None:
    """Delete what was made ahead for volumes over images that are gone."""
    left = [name for name in os.listdir(_images(pool)) if _FINGERPRINT.match(name)]
    kind_of(pool).drop_unneeded(pool, [f"{_images(pool)}/{name}" for name in left])


def _images(pool: Pool) -> str:
    return f"{pool.path}/images"


@contextmanager
def _lock(pool: Pool, flags: int = 0) -> Iterator[int]:
    with directory(_images(pool)) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
        yield fd


def _strip(scratch: str) -> None:
    """Remove what lies in a build beside its root file system: logs, packages."""
    with os.scandir(scratch) as entries:
        for entry in entries:
            if entry.name == "rootfs":
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _delete(pool: Pool, path: str) -> None:
    if os.path.lexists(path):
        kind_of(pool).delete_tree(pool, path)


def _read(pool: Pool, fp: str) -> Image | None:
    """An image that is whole, else None."""
    at = f"{_images(pool)}/{fp}"
    if not _FINGERPRINT.match(fp) or not os.path.isdir(at):
        return None
    try:
        with open(f"{at}.json", "rb") as file:
            image = msgspec.json.decode(file.read(), type=Image)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return image if image.fingerprint == fp else None


def _write(pool: Pool, image: Image) -> None:
    path = f"{_images(pool)}/{image.fingerprint}.json"
    fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(image)))
        file.flush()
        os.fsync(fd)
    os.rename(f"{path}.new", path)
    with directory(_images(pool)) as images:
        os.fsync(images)
