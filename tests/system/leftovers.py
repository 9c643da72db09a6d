"""What an instance of jailmgr has on the host right now, each thing as a line that names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator

from jailmgr.config import Root
from jailmgr.runtime.cgroup_hierarchies import relative
from tests.system.instance import alive, kill

QUIET_FILES = ("store.db", "usage.db", "engine.log", "down.json")
"""Files whose companions (-wal, -shm, .1) come and go, and what `engine shutdown` leaves until the next boot."""


def leftovers(root: Root) -> set[str]:
    """Mounts, links, nft tables, cgroups, loop devices, processes and files of the instance at `root`.

    Links and tables are those of the calling thread's network namespace. A process is told by its argv, not its pid,
    so that an engine started anew counts as the same thing.
    """
    return {
        *_mounts(root),
        *_links(root),
        *_tables(root),
        *_cgroups(root),
        *_loops(root),
        *(f"process {argv}" for _, argv in processes(root)),
        *_files(root),
    }


def running(found: set[str]) -> set[str]:
    """Of what was found, that which isn't a file."""
    return {line for line in found if not line.startswith("file ")}


def _mounts(root: Root) -> Iterator[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            point = line.split()[4]
            if point.startswith(f"{root.at}/"):
                yield f"mount {point}"


def _links(root: Root) -> Iterator[str]:
    said = subprocess.run(["ip", "-json", "link", "show"], check=True, capture_output=True).stdout
    for link in json.loads(said or "[]"):
        if link["ifname"].startswith(root.link_prefix):
            yield f"link {link['ifname']}"


def _tables(root: Root) -> Iterator[str]:
    said = subprocess.run(["nft", "--json", "list", "tables"], check=True, capture_output=True).stdout
    for entry in json.loads(said)["nftables"]:
        table = entry.get("table", {})
        if table.get("name", "").startswith(root.table):
            yield f"table {table['family']} {table['name']}"


def _cgroups(root: Root) -> Iterator[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [line.split()[4] for line in file if line.split(" - ")[1].split()[0] in ("cgroup", "cgroup2")]
    for mount in mounts:
        for directory, _, _ in os.walk(f"{mount}/{relative(root.cgroup)}"):
            # A leaf for a second command stays as long as its jail (runtime/cgroup_exec.py).
            if "/payload/.exec-" not in directory:
                yield f"cgroup {directory}"


def _loops(root: Root) -> Iterator[str]:
    for device in os.listdir("/sys/block"):
        try:
            with open(f"/sys/block/{device}/loop/backing_file", encoding="utf-8", errors="replace") as file:
                backing = file.read().strip()
        except OSError:
            continue
        if backing.startswith(f"{root.at}/"):
            yield f"loop device of {backing}"


def processes(root: Root) -> list[tuple[int, str]]:
    """Pid and argv of every process that has the root in its environment or argv, or is in one of its cgroups."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            argv, environment, groups = (_read(f"/proc/{name}/{what}") for what in ("cmdline", "environ", "cgroup"))
        except OSError:
            continue
        words = argv.rstrip(b"\0").split(b"\0")
        at = os.fsencode(root.at)
        ours = (
            b"JAILMGR_ROOT=" + at in environment.split(b"\0")
            or any(word == at or at + b"/" in word for word in words)
            or any(f"/{root.cgroup}".encode() in b"/" + line.partition(b"/")[2] for line in groups.splitlines())
        )
        if ours and alive(int(name)):
            found.append((int(name), b" ".join(words).decode(errors="replace")))
    return found


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _files(root: Root) -> Iterator[str]:
    """Paths below lib and run: of images, seeds and caches nothing, of a volume or a build only its top directory.

    Nor what `reap` notes: a deleted volume's quota group goes once btrfs has freed its extents, at a later delete.
    A pool that is a directory is looked at where it is mounted.
    """
    for top in (root.lib, root.run):
        for directory, directories, files in os.walk(top):
            apart = {f"{root.pool}/{name}" for name in ("images", "seeds", "reap")}
            if directory in {root.cache, root.pool_tree, root.lxcfs, *apart}:
                directories.clear()
                continue
            yield f"file {directory}"
            volume = directory.startswith(f"{root.pool}/volumes/") and directory.count("/") == root.pool.count("/") + 3
            if volume or os.path.dirname(directory) == f"{root.pool}/builds":
                directories.clear()
                continue
            yield from (f"file {directory}/{name}" for name in files if not name.startswith(QUIET_FILES))


def scrap(root: Root) -> None:
    """Take away by force what an instance that failed a test has left, so that the next test starts clean."""
    for pid, _ in processes(root):
        if alive(pid):
            kill(pid)
    for line in sorted(_mounts(root), reverse=True):
        subprocess.run(["umount", "--lazy", line.removeprefix("mount ")], check=False)
    for line in sorted(_links(root)):
        subprocess.run(["ip", "link", "delete", line.removeprefix("link ")], check=False)
    for line in _tables(root):
        subprocess.run(["nft", "delete", *line.split()], check=False)
    for line in sorted(_cgroups(root), reverse=True):
        try:
            os.rmdir(line.removeprefix("cgroup "))
        except OSError as error:
            print(f"left behind: {line}: {error.strerror}")
    shutil.rmtree(root.at, ignore_errors=True)
