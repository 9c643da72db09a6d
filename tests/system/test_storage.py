"""Pool, volumes, quotas and images, in each of the ways to count that the host has; kill -9 at every step."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from jailmgr.config import Root, find_root
from jailmgr.errors import JailmgrError
from jailmgr.image import store
from jailmgr.image.fingerprint import fingerprint
from jailmgr.model import Image, Recipe
from jailmgr.runtime import capabilities
from jailmgr.runtime.mount_namespace import enter_own
from jailmgr.storage import btrfs, loop, project_pool, project_quota, volume
from jailmgr.storage.pool import MIN_SIZE, Pool, close_pool, host_headroom, open_pool, pool_usage
from tests.system.instance import until

MIB = 1 << 20
SLACK = MIB
"""What a volume holds besides its files: tree blocks, the reservation of the next write."""

OPEN = """
import sys
from jailmgr.config import find_root
from jailmgr.storage.pool import open_pool
print("ready", flush=True)
open_pool(find_root(sys.argv[1]), 512 << 20)
print("open", flush=True)
"""
CHURN = """
import itertools, sys
from jailmgr.config import find_root
from jailmgr.storage.pool import open_pool
from jailmgr.storage.volume import create_volume, delete_volume
pool = open_pool(find_root(sys.argv[1]))
print("ready", flush=True)
for number in itertools.count(int(sys.argv[2])):
    create_volume(pool, "churn", 9, f"j{number}", number, 64 << 20)
    delete_volume(pool, "churn", f"j{number}", number)
"""
SEAL = """
import itertools, sys
from jailmgr.config import find_root
from jailmgr.image.store import remove_image, seal
from jailmgr.model import Image, Recipe
from jailmgr.storage.pool import open_pool
from jailmgr.storage.volume import create_build, delete_build
pool = open_pool(find_root(sys.argv[1]))
print("ready", flush=True)
for number in itertools.count():
    rootfs = create_build(pool, f"{sys.argv[2]}{number}")
    for name in "abcdefgh":
        with open(f"{rootfs}/{name}", "w") as file:
            file.write(name * 1000)
    image = seal(pool, f"{sys.argv[2]}{number}", Image("", "test/one", [], 0, 1.0, "x86_64", Recipe()))
    delete_build(pool, f"{sys.argv[2]}{number}")
    remove_image(pool, image.fingerprint)
"""
BTRFS = pytest.mark.parametrize("pool", ["squota", "qgroup"], indirect=True)
"""Of what only a btrfs has."""

pytestmark = pytest.mark.xdist_group("debian")
"""Where Debian is built: a build's own mount namespace would hold the pools made here meanwhile, if it ran beside."""

DRAFT = Image("", "test/one", ["one"], 0, 1000.0, "x86_64", Recipe(), key="first")


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    """An instance's directories, with no pool yet. After the test there is neither a mount nor a loop device of it."""
    found = find_root(str(tmp_path / "root"))
    yield found
    close_pool(found)
    assert not os.path.ismount(found.pool)
    if os.path.exists(found.pool_file):
        until(lambda: _is_free(found.pool_file), 60, f"no loop device of {found.pool_file}")


def _is_free(file: str) -> bool:
    """Whether no loop device has it. The look itself holds one open, for no longer than it takes."""
    found = loop.find(file)
    if found is None:
        return True
    os.close(found[0])
    return False


@pytest.fixture(scope="module", params=["squota", "qgroup", "project"])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A pool that counts in one of the three ways; a btrfs of 1 GiB."""
    at = str(tmp_path_factory.mktemp("pool"))
    root = find_root(at)
    if request.param == "project" and (why := project_pool.refusal(at)):
        pytest.skip(why)
    made = open_pool(root, None if request.param == "project" else 1 << 30)
    try:
        if request.param == "qgroup" and made.mode == "squota":
            with btrfs.directory(made.path) as top:
                btrfs.disable_quota(top)
                btrfs.enable_quota(top, simple=False)
            made = open_pool(root)
        if made.mode != request.param:
            pytest.skip("this kernel has no simple quotas (Linux 6.7)")
        yield made
    finally:
        close_pool(root)


@pytest.fixture(autouse=True)
def nothing_counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test with the shared pool, nothing is counted in it."""
    yield
    if "pool" in request.fixturenames:
        shared: Pool = request.getfixturevalue("pool")
        assert volume.list_volumes(shared) == []
        assert volume.list_builds(shared) == []
        for tenant in os.listdir(f"{shared.path}/volumes"):
            volume.forget_tenant(shared, tenant, 7)
        until(lambda: reaped(shared) and not counted(shared), 10, "nothing is counted any more")


def reaped(pool: Pool) -> bool:
    volume.sync_pool(pool)
    volume.reap(pool)
    return os.listdir(f"{pool.path}/{'trash' if pool.mode == 'project' else 'reap'}") == []


def counted(pool: Pool) -> set[tuple[int, int]]:
    """Level and number of what is counted in the pool by itself, but seeds; a jail's are 1 and its id."""
    if pool.mode == "project":
        first = pool.first_project
        with btrfs.directory(pool.path) as top:
            return {(1, found.project - first) for found in project_quota.uses(top, first + 1, first + (1 << 24))}
    names = (name for name in os.listdir(f"/sys/fs/btrfs/{pool.uuid}/qgroups") if name[0].isdigit())
    found = {(int(level), int(number)) for level, _, number in (name.partition("_") for name in names)}
    return found - {(0, 5), *((0, number) for number in made_ahead(pool))}


def made_ahead(pool: Pool) -> list[int]:
    """Ids of the subvolumes that volumes are made from."""
    found = []
    for name in os.listdir(f"{pool.path}/seeds"):
        with btrfs.directory(f"{pool.path}/seeds/{name}") as seed:
            found.append(btrfs.subvolume_id(seed))
    return found


def fill(path: str, most: int) -> tuple[int, int]:
    """Append up to `most` bytes that can't be compressed; how many went in, and the error number that ended it or 0.

    Without CAP_SYS_RESOURCE, as in a jail: project quotas don't hold the host's root.
    """
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_fill, path, most).result()


def _fill(path: str, most: int) -> tuple[int, int]:
    capabilities.drop([name for name in capabilities.NAMES if name != "CAP_SYS_RESOURCE"])
    block, written = os.urandom(MIB), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        while written < most:
            written += os.write(fd, block[: most - written])
        os.fsync(fd)
    except OSError as error:
        return written, error.errno or -1
    finally:
        os.close(fd)
    return written, 0


def over_limit(pool: Pool) -> int:
    """What a write past a limit ends with: xfs says of a project that no space is left."""
    with btrfs.directory(pool.path) as top:
        return errno.ENOSPC if project_quota.file_system(top) == "xfs" else errno.EDQUOT


def killed_after(script: str, seconds: float, *argv: str) -> bytes:
    """Run Python until it says that it is ready, and some seconds more; then SIGKILL. What else it said."""
    command = [sys.executable, "-c", script, *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(seconds)  # the moment of the kill is what is tried
        process.kill()
        return process.stdout.read()


def refused(act: Callable[[], object]) -> JailmgrError:
    with pytest.raises(JailmgrError) as raised:
        act()
    return raised.value


def test_pool_is_made_mounted_and_left_without_a_trace(root: Root) -> None:
    pool = open_pool(root, MIN_SIZE)
    mode = os.stat(os.path.dirname(root.pool)).st_mode & 0o777
    flags = os.statvfs(root.pool).f_flag
    assert mode == 0o700
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    assert os.stat(root.pool_file).st_size == MIN_SIZE
    assert os.stat(root.pool_file).st_blocks * 512 < 64 * MIB
    total, free = pool_usage(pool)
    assert total == MIN_SIZE
    assert free < total
    assert host_headroom(root) > 0
    assert open_pool(root) == pool
    found = loop.find(root.pool_file)
    assert found is not None
    os.close(found[0])
    with open(f"/sys/block/{os.path.basename(found[1])}/loop/dio") as direct:
        assert direct.read() == "1\n"
    (Path(pool.path) / "volumes" / "kept").mkdir()
    close_pool(root)
    close_pool(root)
    assert open_pool(root) == pool
    assert os.listdir(f"{pool.path}/volumes") == ["kept"]


@pytest.mark.parametrize("after_ms", range(0, 36, 3))
def test_kill_while_the_pool_is_made(root: Root, after_ms: int) -> None:
    killed_after(OPEN, after_ms / 1000, root.at)
    pool = open_pool(root, MIN_SIZE)
    assert pool.mode in ("squota", "qgroup")
    assert sorted(os.listdir(os.path.dirname(root.pool))) == ["default", "default.img"]
    volume.create_volume(pool, "t", 1, "j", 1, 16 * MIB)
    assert fill(f"{root.volume('t', 'j')}/upper/file", 32 * MIB)[1] == errno.EDQUOT


def test_many_open_it_at_once(root: Root) -> None:
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: open_pool(root, MIN_SIZE), range(8)))
    assert len(set(opened)) == 1
    with open("/proc/self/mounts") as mounts:
        assert sum(root.pool in line for line in mounts) == 1


def test_a_jail_may_hold_the_old_mount(root: Root) -> None:
    """Mounted again while a clone of it lives on elsewhere, it is by the same loop device: never two over one file."""
    first = open_pool(root, MIN_SIZE)
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", "echo held; exec sleep 60"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        close_pool(root)
        found = loop.find(root.pool_file)
        assert found is not None, "the clone should keep the device"
        os.close(found[0])
        (Path(open_pool(root).path) / "volumes" / "t").mkdir()
        again = loop.find(root.pool_file)
        assert again is not None
        os.close(again[0])
        assert (again[1], open_pool(root)) == (found[1], first)
    finally:
        holder.kill()
        holder.communicate()


def test_a_program_apart_keeps_no_pool_busy(root: Root) -> None:
    """A build's debootstrap and a network's dnsmasq have mount namespaces of their own, for as long as they run."""
    open_pool(root, MIN_SIZE)
    with ThreadPoolExecutor(1) as apart:
        apart.submit(enter_own, ["/usr/lib", root.run]).result()
        assert apart.submit(os.path.isdir, "/usr/lib").result()
        assert not apart.submit(os.path.ismount, root.pool).result()
        close_pool(root)
        until(lambda: _is_free(root.pool_file), 5, "the loop device is freed")


def test_pool_in_use_is_not_unmounted(root: Root) -> None:
    pool = open_pool(root, MIN_SIZE)
    with btrfs.directory(pool.path):
        assert refused(lambda: close_pool(root)).code == "conflict"
    assert open_pool(root) == pool


def test_what_is_not_ours_is_left_alone(root: Root) -> None:
    open_pool(root, MIN_SIZE)
    close_pool(root)
    subprocess.run(["mount", "-t", "tmpfs", "none", root.pool], check=True)
    try:
        assert refused(lambda: open_pool(root)).code == "conflict"
        assert refused(lambda: close_pool(root)).code == "conflict"
        assert os.path.ismount(root.pool)
        assert os.listdir(root.pool) == []
    finally:
        subprocess.run(["umount", root.pool], check=True)


def test_deleted_file_under_the_mount_is_told(root: Root) -> None:
    open_pool(root, MIN_SIZE)
    away = f"{root.pool_file}.away"
    os.rename(root.pool_file, away)
    for act in (open_pool, close_pool):
        assert "deleted" in refused(lambda act=act: act(root)).why  # type: ignore[misc]
    assert os.path.ismount(root.pool)
    os.rename(away, root.pool_file)


def test_read_only_pool_is_told(root: Root) -> None:
    open_pool(root, MIN_SIZE)
    subprocess.run(["mount", "-o", "remount,ro", root.pool], check=True)
    error = refused(lambda: open_pool(root))
    assert error.code == "unavailable"
    assert "read-only" in error.why


def test_full_pool_refuses_and_deletes(root: Root) -> None:
    pool = open_pool(root, MIN_SIZE)
    path = volume.create_volume(pool, "t", 1, "j", 1, None)
    written, error = fill(f"{path}/upper/file", 2 * MIN_SIZE)
    assert error == errno.ENOSPC
    assert written > MIN_SIZE // 2
    with pytest.raises(JailmgrError, match="no space") as raised:
        for number in range(2, 20_000):
            volume.create_volume(pool, "t", 1, f"j{number}", number, None)
    assert raised.value.code == "full"
    assert not os.path.exists(f"{pool.path}/volumes/t/j{number}")
    volume.delete_volume(pool, "t", "j", 1)

    def given_back() -> bool:
        volume.sync_pool(pool)  # the kernel frees a deleted volume's space by and by, and counts it at a commit
        return pool_usage(pool)[1] > MIN_SIZE // 2

    until(given_back, 10, "the space comes back")
    volume.create_volume(pool, "t", 1, "again", 20_000, None)


@pytest.mark.parametrize(
    ("size", "config", "code"),
    [
        (1 << 60, "", "full"),
        (MIN_SIZE - 1, "", "invalid"),
        (None, '[pool]\nsize = "8EiB"', "invalid"),
        (None, '[pool]\nsize = "1EiB"', "full"),
        (None, "[pool\n", "invalid"),
        (None, "pool = 3", "invalid"),
    ],
)
def test_bad_sizes_leave_nothing(root: Root, size: int | None, config: str, code: str) -> None:
    os.makedirs(root.etc)
    Path(root.etc, "config.toml").write_text(config)
    assert refused(lambda: open_pool(root, size)).code == code
    assert os.listdir(os.path.dirname(root.pool)) == ["default"]


def test_size_comes_from_the_configuration(root: Root) -> None:
    os.makedirs(root.etc)
    Path(root.etc, "config.toml").write_text('[pool]\nsize = "600MiB"\n')
    assert pool_usage(open_pool(root))[0] == 600 * MIB


def test_without_btrfs_progs(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_args, **_more: None)
    error = refused(lambda: open_pool(root, MIN_SIZE))
    assert error.code == "unavailable"
    assert "btrfs-progs" in error.hint


@BTRFS
def test_limits_hold_on_both_levels(pool: Pool) -> None:
    volume.limit_tenant(pool, "acme", 7, 150 * MIB)
    a = volume.create_volume(pool, "acme", 7, "a", 1, 100 * MIB)
    b = volume.create_volume(pool, "acme", 7, "b", 2, None)
    in_a, error = fill(f"{a}/upper/file", 200 * MIB)
    assert error == errno.EDQUOT
    assert 100 * MIB - SLACK <= in_a <= 100 * MIB
    assert 100 * MIB - SLACK <= (volume.volume_usage(pool, 1) or 0) <= 100 * MIB
    in_b, error = fill(f"{b}/upper/file", 200 * MIB)
    assert error == errno.EDQUOT
    assert 150 * MIB - 2 * SLACK <= in_a + in_b <= 150 * MIB
    assert 150 * MIB - 2 * SLACK <= (volume.tenant_usage(pool, "acme", 7) or 0) <= 150 * MIB
    other = volume.create_volume(pool, "other", 8, "c", 3, None)
    assert fill(f"{other}/upper/file", 20 * MIB) == (20 * MIB, 0)
    os.unlink(f"{a}/upper/file")
    volume.sync_pool(pool)
    assert fill(f"{b}/upper/file", 20 * MIB) == (20 * MIB, 0)
    for tenant, name, number in (("acme", "a", 1), ("acme", "b", 2), ("other", "c", 3)):
        volume.delete_volume(pool, tenant, name, number)
    volume.forget_tenant(pool, "other", 8)


@BTRFS
def test_many_small_files_count(pool: Pool) -> None:
    path = volume.create_volume(pool, "acme", 7, "small", 1, 16 * MIB)
    made = 0
    with pytest.raises(OSError, match="quota") as raised:
        for made in range(50_000):
            Path(path, "upper", str(made)).write_bytes(b"x" * 1000)
    assert raised.value.errno == errno.EDQUOT
    assert made > 5000, "what is reserved for metadata must not stand for use"
    for entry in os.listdir(f"{path}/upper"):
        os.unlink(f"{path}/upper/{entry}")
    volume.delete_volume(pool, "acme", "small", 1)


def test_usage_counts_what_is_still_in_memory(pool: Pool) -> None:
    path = volume.create_volume(pool, "acme", 7, "a", 1, None)
    Path(path, "upper", "file").write_bytes(os.urandom(20 * MIB))
    assert 20 * MIB <= (volume.volume_usage(pool, 1) or 0) <= 20 * MIB + SLACK
    volume.sync_pool(pool)
    assert 20 * MIB <= (volume.volume_usage(pool, 1) or 0) <= 20 * MIB + SLACK
    assert volume.volume_usage(pool, 2) is None
    volume.delete_volume(pool, "acme", "a", 1)


def test_resize_is_live_and_refused_below_use(pool: Pool) -> None:
    path = volume.create_volume(pool, "acme", 7, "a", 1, 20 * MIB)
    assert fill(f"{path}/upper/file", 30 * MIB)[1] == over_limit(pool)
    volume.resize_volume(pool, 1, 40 * MIB)
    assert fill(f"{path}/upper/more", 15 * MIB) == (15 * MIB, 0)
    error = refused(lambda: volume.resize_volume(pool, 1, 25 * MIB))
    assert error.code == "full"
    assert refused(lambda: volume.limit_tenant(pool, "acme", 7, 25 * MIB)).code == "full"
    assert fill(f"{path}/upper/still", 2 * MIB) == (2 * MIB, 0)
    volume.resize_volume(pool, 1, None)
    assert fill(f"{path}/upper/free", 60 * MIB) == (60 * MIB, 0)
    volume.delete_volume(pool, "acme", "a", 1)


def test_volume_is_what_overlay_wants(pool: Pool) -> None:
    path = volume.create_volume(pool, "acme", 7, "a", 1, None)
    assert sorted(os.listdir(path)) == ["upper", "workdir"]
    upper = os.stat(f"{path}/upper")
    assert (upper.st_mode & 0o7777, upper.st_uid, upper.st_gid) == (0o755, 0, 0)
    assert refused(lambda: volume.create_volume(pool, "acme", 7, "a", 2, None)).code == "exists"
    assert os.path.isdir(path), "the volume that was there is still there"
    volume.delete_volume(pool, "acme", "a", 1)
    volume.delete_volume(pool, "acme", "a", 1)
    assert not os.path.exists(path)


def test_rename_is_idempotent_and_takes_no_other_place(pool: Pool) -> None:
    for number, name in enumerate(("a", "b"), 1):
        volume.create_volume(pool, "acme", 7, name, number, None)
    assert refused(lambda: volume.rename_volume(pool, "acme", "a", "b")).code == "exists"
    volume.rename_volume(pool, "acme", "a", "c")
    volume.rename_volume(pool, "acme", "a", "c")
    assert refused(lambda: volume.rename_volume(pool, "acme", "a", "d")).code == "missing"
    assert volume.list_volumes(pool) == [("acme", "b"), ("acme", "c")]
    volume.delete_volume(pool, "acme", "c", 1)
    volume.delete_volume(pool, "acme", "b", None)


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".", "..", "a\0b", "A"])
def test_names_are_not_paths(pool: Pool, name: str) -> None:
    assert refused(lambda: volume.create_volume(pool, "acme", 7, name, 1, None)).code == "invalid"
    assert refused(lambda: volume.delete_volume(pool, name, "a", 1)).code == "invalid"
    assert refused(lambda: volume.delete_build(pool, name)).code == "invalid"
    assert refused(lambda: store.remove_image(pool, name)).code == "invalid"


def test_kill_while_volumes_come_and_go(pool: Pool) -> None:
    root = find_root(pool.path.removesuffix("/lib/pool/default"))
    for turn in range(12):
        killed_after(CHURN, 0.001 + turn * 0.0013, root.at, str(1000 * (turn + 1)))
    left = volume.list_volumes(pool)
    for tenant, jail in left:
        volume.delete_volume(pool, tenant, jail, int(jail[1:]))
    # A kill between the group's making and the volume's leaves a group alone: its jail's row names it.
    for number in {number for level, number in counted(pool) if level == 1}:
        volume.delete_volume(pool, "churn", f"j{number}", number)
    volume.forget_tenant(pool, "churn", 9)


def test_deleting_many_costs_the_same_each(pool: Pool) -> None:
    """Groups wait for the kernel's cleaner; however many wait, a deletion looks at a few of them only."""
    for number in range(100):
        volume.create_volume(pool, "acme", 7, f"j{number}", number + 1, None)
    took = []
    for number in range(100):
        begun = time.perf_counter()
        volume.delete_volume(pool, "acme", f"j{number}", number + 1)
        took.append(time.perf_counter() - begun)
    assert sorted(took[50:])[25] < 5 * sorted(took[:50])[25] + 0.002


def make_build(pool: Pool, name: str, content: bytes = b"content") -> str:
    rootfs = volume.create_build(pool, name)
    os.makedirs(f"{rootfs}/usr/bin")
    Path(rootfs, "usr/bin/tool").write_bytes(content * 1000)
    os.symlink("usr/bin", f"{rootfs}/bin")
    Path(rootfs, "..", "log").write_text(name)
    os.mkdir(f"{rootfs}/../debs")
    return rootfs


def test_seal_gives_a_read_only_image(pool: Pool) -> None:
    expected = fingerprint(make_build(pool, "one"))
    image = store.seal(pool, "one", DRAFT)
    sealed = f"{pool.path}/images/{image.fingerprint}"
    assert image.fingerprint == expected == fingerprint(f"{sealed}/rootfs")
    assert image.size_bytes > 0
    assert os.listdir(sealed) == ["rootfs"]
    if pool.mode != "project":
        with pytest.raises(OSError, match="Read-only") as raised:
            Path(sealed, "rootfs/new").write_text("")
        assert raised.value.errno == errno.EROFS
    assert store.list_images(pool) == [image]
    volume.delete_build(pool, "one")
    assert Path(sealed, "rootfs/bin/tool").read_bytes() == b"content" * 1000
    make_build(pool, "two")
    again = store.seal(pool, "two", msgspec.structs.replace(DRAFT, key="second", created_at=2000.0))
    assert again == msgspec.structs.replace(image, key="second")
    assert store.list_images(pool) == [again]
    volume.delete_build(pool, "two")
    store.remove_image(pool, image.fingerprint)
    store.remove_image(pool, image.fingerprint)
    assert store.list_images(pool) == []
    assert os.listdir(f"{pool.path}/images") == []


def test_half_made_images_are_swept(pool: Pool) -> None:
    make_build(pool, "one")
    whole = store.seal(pool, "one", DRAFT)
    volume.delete_build(pool, "one")
    at = f"{pool.path}/images"
    with btrfs.directory(at) as images:
        for name in ("a" * 64, ".sealing"):
            if pool.mode == "project":
                os.mkdir(name, dir_fd=images)
            else:
                btrfs.create_subvolume(images, name)
    Path(at, "b" * 64 + ".json").write_bytes(b"{")
    Path(at, whole.fingerprint + ".json.new").write_bytes(b"{")
    assert store.list_images(pool) == [whole]
    assert sorted(os.listdir(at)) == [whole.fingerprint, whole.fingerprint + ".json"]
    store.remove_image(pool, whole.fingerprint)


def test_kill_while_images_come_and_go(pool: Pool) -> None:
    root = find_root(pool.path.removesuffix("/lib/pool/default"))
    for turn in range(12):
        killed_after(SEAL, 0.002 + turn * 0.0031, root.at, f"t{turn}-")
        found = store.list_images(pool)
        assert len(os.listdir(f"{pool.path}/images")) == 2 * len(found)
        for image in found:
            assert fingerprint(f"{pool.path}/images/{image.fingerprint}/rootfs") == image.fingerprint
    for image in store.list_images(pool):
        store.remove_image(pool, image.fingerprint)
    for name in volume.list_builds(pool):
        volume.delete_build(pool, name)


@BTRFS
def test_nested_subvolumes_of_a_build(pool: Pool) -> None:
    """A command of a build may make subvolumes, read-only ones too: no image holds them, and they go with the build."""
    rootfs = make_build(pool, "one")
    with btrfs.directory(rootfs) as top:
        btrfs.create_subvolume(top, "outer")
        with btrfs.directory(f"{rootfs}/outer") as outer:
            btrfs.create_subvolume(outer, "inner")
            with btrfs.directory(f"{rootfs}/outer/inner") as inner:
                btrfs.create_subvolume(inner, "innermost")
                btrfs.set_read_only(inner, True)
            btrfs.set_read_only(outer, True)
    assert refused(lambda: store.seal(pool, "one", DRAFT)).code == "invalid"
    assert os.listdir(f"{pool.path}/images") == []
    volume.delete_build(pool, "one")
    volume.delete_build(pool, "one")
    assert not os.path.exists(rootfs)


def test_build_is_limited(pool: Pool) -> None:
    rootfs = volume.create_build(pool, "big", 20 * MIB)
    assert fill(f"{rootfs}/file", 40 * MIB)[1] == over_limit(pool)
    assert refused(lambda: volume.create_build(pool, "big")).code == "exists"
    volume.delete_build(pool, "big")
