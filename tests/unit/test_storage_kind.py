"""Which kind of pool an instance gets, and what is told to the kernel of project quotas."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from jailmgr.config import Root, find_root
from jailmgr.errors import JailmgrError
from jailmgr.storage import btrfs_pool, pool, project_pool, project_quota, project_volume

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Root:
    found = find_root(str(tmp_path))
    os.makedirs(os.path.dirname(found.pool))
    os.makedirs(found.etc)
    return found


@pytest.fixture(params=["", "the file system has no project quotas on"])
def refusal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why the host's disk can't hold a pool of kind project; empty where it can."""
    why: str = request.param
    monkeypatch.setattr(project_pool, "refusal", lambda _directory: why)
    return why


def chosen(root: Root, config: str = "", size: int | None = None) -> object:
    if config:
        Path(root.etc, "config.toml").write_text(config)
    return pool._choose(root, pool._configured(root), size)


def refused(root: Root, config: str) -> JailmgrError:
    with pytest.raises(JailmgrError) as raised:
        chosen(root, config)
    return raised.value


def test_the_host_decides(root: Root, refusal: str) -> None:
    assert chosen(root) is (btrfs_pool if refusal else project_pool)


def test_a_size_is_a_files(root: Root, refusal: str) -> None:
    assert chosen(root, size=GIB) is btrfs_pool
    assert chosen(root, '[pool]\nsize = "1GiB"\n') is btrfs_pool


def test_what_is_there_is_kept(root: Root, refusal: str) -> None:
    Path(root.pool_file).touch()
    assert chosen(root) is btrfs_pool
    assert chosen(root, '[pool]\nkind = "btrfs"\n') is btrfs_pool
    assert refused(root, '[pool]\nkind = "project"\n').code == "conflict"
    os.unlink(root.pool_file)
    os.mkdir(root.pool_tree)
    assert chosen(root, '[pool]\nkind = "project"\n') is project_pool
    assert chosen(root, '[pool]\nsize = "1GiB"\n') is project_pool
    assert refused(root, '[pool]\nkind = "btrfs"\n').code == "conflict"


def test_two_pools_are_too_many(root: Root, refusal: str) -> None:
    Path(root.pool_file).touch()
    os.mkdir(root.pool_tree)
    assert refused(root, "[pool]\n").code == "conflict"


def test_a_kind_is_insisted_on(root: Root, refusal: str) -> None:
    assert chosen(root, '[pool]\nkind = "btrfs"\n') is btrfs_pool
    if refusal:
        error = refused(root, '[pool]\nkind = "project"\n')
        assert (error.code, error.why) == ("unavailable", refusal)
        assert "prjquota" in error.hint
    else:
        assert chosen(root, '[pool]\nkind = "project"\n') is project_pool


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ('[pool]\nkind = "zfs"\n', "[pool] kind"),
        ("[pool]\nkind = 3\n", "[pool] kind"),
        ('[pool]\nkind = ["btrfs"]\n', "[pool] kind"),
        ('[pool]\nkind = "btrfs"\nsize = "much"\n', "[pool] size"),
        ('[pool]\nkind = "project"\nsize = "1GiB"\n', "size"),
        ("pool = 3\n", ""),
    ],
)
def test_bad_configuration(root: Root, refusal: str, config: str, told: str) -> None:
    error = refused(root, config)
    assert error.code == "invalid"
    assert told in error.why


def test_project_ids_are_in_ranges_of_their_own() -> None:
    firsts = project_pool._firsts()
    assert len(firsts) == project_pool.RANGES
    assert firsts[-1] + project_pool.PROJECTS == 1 << 31
    assert 1 < project_volume.JAILS < project_pool.PROJECTS


def test_a_limit_as_the_kernel_reads_it() -> None:
    """Offsets of struct fs_disk_quota, linux/dqblk_xfs.h."""
    request = project_quota.limit_request(0x40000007, 2048, 99)
    assert len(request) == 112
    assert struct.unpack_from("=bbHI", request) == (1, 2, 0b1010, 0x40000007)
    assert struct.unpack_from("=4Q", request, 8) == (2048, 0, 99, 0)
    answer = bytearray(request)
    struct.pack_into("=QQ", answer, 40, 16, 3)
    assert project_quota.parse_record(bytes(answer)) == project_quota.Use(0x40000007, 8192, 3)


@pytest.mark.parametrize(
    ("size", "dynamic", "expected"),
    [
        (GIB, False, 65536),
        (GIB, True, 262144),
        (64 << 20, False, project_volume.MIN_INODES),
    ],
)
def test_inodes_are_a_share_of_the_stock(size: int, dynamic: bool, expected: int) -> None:
    assert project_volume.inodes_for(size, 100 * GIB, 100 * GIB // 16384, dynamic) == expected


def test_projects_an_admin_has_named(tmp_path: Path) -> None:
    projects, projid = tmp_path / "projects", tmp_path / "projid"
    projects.write_text("# 7:/never\n42:/srv/a\n1073741830: /srv/b\nbroken\n")
    projid.write_text("web:43\nmail:x\n\n")
    assert project_quota.listed(str(projects), str(projid), str(tmp_path / "none")) == {42, 43, 1073741830}
