"""Which code of ours may make one extent two files': a clone is charged to the tenant that wrote it first, for ever."""

from __future__ import annotations

import re
from pathlib import Path

import jailmgr

SHARES = re.compile(r"FICLONE|copy_file_range|reflink|shutil\.(?:copy|move)\w*|btrfs\.snapshot")
ALLOWED = {
    "runtime/seccomp.py": {"FICLONE"},  # what guests may call, within their own files
    "storage/btrfs_seeds.py": {"btrfs.snapshot"},  # of an empty volume
    "storage/btrfs_volume.py": {"btrfs.snapshot"},  # of a build, which is an image's and no tenant's
    "storage/btrfs_renumber.py": {"btrfs.snapshot", "FICLONE"},  # a volume of itself, in one jail's group
    "cli/files.py": {"shutil.copyfileobj"},  # read(2) and write(2), into a file without a name on the host
    "template/busybox.py": {"shutil.copyfile"},  # from the host's file system, before there is a tenant
}


def test_no_other_code_of_ours_clones() -> None:
    """`cp` goes through pipes: read(2), splice(2) and write(2), which share nothing (tests/system)."""
    top = Path(jailmgr.__file__).parent
    found = {
        str(path.relative_to(top)): names
        for path in top.rglob("*.py")
        if (names := set(SHARES.findall(path.read_text(encoding="utf-8"))))
    }
    assert found == ALLOWED
