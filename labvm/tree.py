"""The working tree as it is now, and how it comes into the VM."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import IO

from labvm import guest
from labvm.errors import LabError

TREE = Path(__file__).resolve().parent.parent


def names() -> list[str]:
    """Paths in the tree of all files but those git ignores. LabError where it is no checkout."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise LabError("git can't tell which files are part of the working tree")
    found = sorted({*filter(None, done.stdout.split("\0"))})
    return [name for name in found if os.path.lexists(TREE / name)]


def pack(output: IO[bytes], commands: list[str], carried: list[str]) -> None:
    """A tar to unpack at the VM's root: the tree, and what runs the commands. All is root's.

    `carried`: paths of files and folders in the tree that come along although git ignores them. LabError: not there.
    """
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names():
            tar.add(TREE / name, f"{guest.TREE}/{name}", recursive=False, filter=_of_root)
        for path in map(Path, carried):
            found = (TREE / path).resolve()
            if not (found.exists() and found.is_relative_to(TREE)):
                raise LabError(f"--carry {path}: it is not in the working tree")
            tar.add(found, f"{guest.TREE}/{found.relative_to(TREE)}", filter=_of_root)
        for path, text in {guest.COMMANDS: json.dumps(commands), guest.SELF: Path(guest.__file__).read_text()}.items():
            entry = tarfile.TarInfo(str(path.relative_to("/")))
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    output.flush()


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry
