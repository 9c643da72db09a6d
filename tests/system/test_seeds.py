"""Volumes are made from seeds: their numbers are above those of all layers, and nobody's group counts the seeds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jailmgr.config import find_root
from jailmgr.image import store
from jailmgr.image.fingerprint import canonical_tar
from jailmgr.storage import btrfs, btrfs_seeds, volume
from jailmgr.storage.pool import Pool, close_pool, open_pool
from tests.system.test_renumber import old_volume, once
from tests.system.test_storage import BTRFS, DRAFT, MIB, made_ahead, make_build, nothing_counted, pool
from tests.unit.crash import killed_at

__all__ = ["nothing_counted", "pool"]

pytestmark = [pytest.mark.xdist_group("debian"), BTRFS]


@pytest.fixture
def layers(pool: Pool) -> Iterator[list[str]]:
    """Two layers, of which the first has the higher numbers."""
    made = [volume.create_build(pool, "upper"), volume.create_build(pool, "lower")]
    for number in range(3000):
        Path(made[0], str(number)).touch()
    yield made
    volume.delete_volume(pool, "acme", "a", 1)
    for name in ("upper", "lower"):
        volume.delete_build(pool, name)


def test_above_all_layers_also_after_a_mount(pool: Pool, layers: list[str]) -> None:
    highest = max(os.stat(f"{layer}/{name}").st_ino for layer in layers for name in os.listdir(layer))
    path = volume.create_volume(pool, "acme", 7, "a", 1, 64 * MIB, layers)
    assert os.stat(f"{path}/upper").st_ino > highest
    assert not volume.overlaps(pool, "acme", "a", layers)
    root = find_root(pool.path.removesuffix("/lib/pool/default"))
    close_pool(root)
    open_pool(root)
    Path(path, "upper/new").touch()
    assert os.stat(f"{path}/upper/new").st_ino > highest


def test_nobody_pays_for_what_lies_ready(pool: Pool, layers: list[str]) -> None:
    volume.keep_ready(pool, layers)
    with btrfs.directory(pool.path) as top:
        assert [group for number in made_ahead(pool) for group in btrfs.parents(top, number)] == []
        path = volume.create_volume(pool, "acme", 7, "a", 1, 64 * MIB, layers)
        with btrfs.directory(path) as made:
            assert btrfs.parents(top, btrfs.subvolume_id(made)) == [btrfs.group(1, 1)]
    assert volume.volume_usage(pool, 1) == volume.tenant_usage(pool, "acme", 7) == 16384, "one block of its tree"


def test_many_at_once_get_one_each(pool: Pool, layers: list[str]) -> None:
    """More than lie ready, by threads that look for the same ones."""
    floor = btrfs_seeds.floor_above(layers)
    with ThreadPoolExecutor(8) as threads:
        paths = [*threads.map(lambda number: _taken(pool, floor, number), range(2 * btrfs_seeds.READY))]
    assert len({os.stat(path).st_dev for path in paths}) == len(paths)
    for path in paths:
        with btrfs.directory(path) as made:
            btrfs.destroy_subvolume(made, btrfs.subvolume_id(made))


def _taken(pool: Pool, floor: int, number: int) -> str:
    path = f"{pool.path}/builds/taken-{number}"
    btrfs_seeds.take(pool, floor, path)
    return path


def test_a_place_in_use_is_not_taken(pool: Pool, layers: list[str]) -> None:
    os.mkdir(f"{pool.path}/builds/there")
    with pytest.raises(FileExistsError):
        btrfs_seeds.take(pool, btrfs_seeds.floor_above(layers), f"{pool.path}/builds/there")
    os.rmdir(f"{pool.path}/builds/there")


def test_kill_while_seeds_are_made(pool: Pool, layers: list[str]) -> None:
    """What was cut off is found and deleted, and what is whole is used."""
    once(pool)
    floor, line, cut_off = btrfs_seeds.floor_above(layers), 1, 0
    for path in btrfs_seeds.all_but(pool, []):
        _destroy(path)
    while killed_at(line, ("btrfs_seeds.py",), lambda: btrfs_seeds.keep_ready(pool, floor)):
        cut_off += len(volume.half_made(pool))
        volume.discard_half_made(pool)
        assert volume.half_made(pool) == []
        assert all(_is_whole(f"{pool.path}/seeds/{name}", floor) for name in os.listdir(f"{pool.path}/seeds"))
        line += max(37, line // 4)
    assert cut_off > 1, "no kill came while the seed was made"
    assert len(os.listdir(f"{pool.path}/seeds")) == 1 + btrfs_seeds.READY


def _is_whole(path: str, floor: int) -> bool:
    return len(os.listdir(path)) == 2 and os.stat(f"{path}/upper").st_ino >= floor


def _destroy(path: str) -> None:
    with btrfs.directory(path) as made:
        btrfs.destroy_subvolume(made, btrfs.subvolume_id(made))


def test_seeds_go_with_the_last_image_that_needs_them(pool: Pool) -> None:
    once(pool)
    images = []
    for name, files in (("small", 1), ("large", 2500), ("other", 2600)):
        rootfs = make_build(pool, name, name.encode())
        for number in range(files):
            Path(rootfs, str(number)).touch()
        images.append(store.seal(pool, name, DRAFT).fingerprint)
        volume.delete_build(pool, name)
        volume.keep_ready(pool, [f"{pool.path}/images/{images[-1]}/rootfs"])
    small, large, other = images
    store.remove_image(pool, large)
    assert {name.split("-")[1] for name in os.listdir(f"{pool.path}/seeds")} == {"1024", "4096"}
    store.remove_image(pool, other)
    assert {name.split("-")[1] for name in os.listdir(f"{pool.path}/seeds")} == {"1024"}
    store.remove_image(pool, small)
    assert os.listdir(f"{pool.path}/seeds") == []


def test_equal_numbers_are_no_hard_links(pool: Pool, layers: list[str], tmp_path: Path) -> None:
    """In an archive of what overlayfs shows of two subvolumes, by which images are named."""
    path = old_volume(pool, "a", 1)
    for top, content in ((layers[1], b"below"), (f"{path}/upper", b"above")):
        Path(top, content.decode()).write_bytes(content)
        os.link(f"{top}/{content.decode()}", f"{top}/{content.decode()}-link")
    while os.stat(f"{path}/upper/above").st_ino != os.stat(f"{layers[1]}/below").st_ino:
        at, low = (f"{path}/upper", "above") if _low(path, layers[1]) else (layers[1], "below")
        os.unlink(f"{at}/{low}")
        os.unlink(f"{at}/{low}-link")
        Path(at, low).write_bytes(low.encode())
        os.link(f"{at}/{low}", f"{at}/{low}-link")
    os.mkdir(f"{path}/scratch")
    options = f"lowerdir={layers[1]},upperdir={path}/upper,workdir={path}/scratch"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(tmp_path)], check=True)
    try:
        assert os.stat(tmp_path / "above").st_ino == os.stat(tmp_path / "below").st_ino
        archive = b"".join(canonical_tar(str(tmp_path)))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (archive.count(b"above".ljust(512, b"\0")), archive.count(b"below".ljust(512, b"\0"))) == (1, 1)


def _low(path: str, layer: str) -> bool:
    return os.stat(f"{path}/upper/above").st_ino < os.stat(f"{layer}/below").st_ino
