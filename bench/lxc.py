"""lxc's side: unprivileged containers over one root file system, as close to ours as its configuration goes.

Overlay over one lower directory, a veth with an address set by lxc, console and cgroups by Debian's own defaults. The
veth is in no bridge, which spares lxc a little: it looks for bridges in /sys, and that is the host's, not of the
network namespace the bench runs in. lxc mounts the overlay inside of the user namespace and has no idmapped overlay,
so the root file system is copied once with its owners shifted.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from bench.host import outside, pss, run

BASE = 0x60000000
"""First host id of the containers: not in the range jailmgr takes from."""
PREFIX = "198.19.64"
"""RFC 2544."""
CONFIG = """\
lxc.include = /usr/share/lxc/config/debian.common.conf
lxc.include = /usr/share/lxc/config/userns.conf
lxc.uts.name = base
lxc.arch = linux64
lxc.rootfs.path = dir:{path}/base/rootfs
lxc.idmap = u 0 {base} 65536
lxc.idmap = g 0 {base} 65536
lxc.signal.halt = SIGRTMIN+3
lxc.cap.drop = mac_admin mac_override sys_time sys_module sys_rawio
lxc.mount.auto = cgroup:mixed proc:mixed sys:mixed
lxc.pty.max = 1024
lxc.tty.max = 0
lxc.hook.mount =
lxc.hook.post-stop =
"""
"""Without the hooks that Debian's lxcfs adds: its service isn't what the bench starts, and they cost a shell each."""
NETWORK = """\
lxc.net.0.type = veth
lxc.net.0.flags = up
lxc.net.0.name = eth0
lxc.net.0.ipv4.address = {prefix}.{number}/24
lxc.net.0.ipv4.gateway = {prefix}.1
"""
ENVIRONMENT = {"PATH": "/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
"""Without newuidmap, which would look our range up in /etc/subuid; lxc run by root then writes the map itself."""


class Lxc:
    """Containers by lxc below the directory `path`."""

    name = "lxc"

    def __init__(self, path: str) -> None:
        self.path = path
        self.made = 1

    def _run(self, tool: str, name: str, *argv: str) -> str:
        return run([f"/usr/bin/lxc-{tool}", "-P", self.path, "-n", name, *argv], ENVIRONMENT)

    def create(self, name: str) -> None:
        self._run("copy", "base", "-N", name, "-s", "-B", "overlay")

    def connect(self, name: str) -> None:
        """Give a container a network interface and an address of its own; not part of what is measured."""
        self.made += 1
        with open(f"{self.path}/{name}/config", "a", encoding="ascii") as file:
            file.write(NETWORK.format(prefix=PREFIX, number=2 + self.made % 250))

    def start(self, name: str) -> None:
        self._run("start", name)

    def start_all(self, names: list[str]) -> None:
        for name in names:
            self.start(name)

    def exec(self, name: str, *argv: str) -> str:
        return self._run("attach", name, "--", *argv)

    def stop(self, name: str) -> None:
        self._run("stop", name, "-k")

    def delete(self, name: str) -> None:
        self._run("destroy", name)

    def pss_outside(self) -> dict[str, int]:
        """Bytes of its monitors, a process for each container."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and self.path in _argv(name)]
        return {"monitors": sum(pss(pid) for pid in outside(pids))}


def _argv(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def shift(top: str) -> None:
    """Move every owner below `top` up by BASE, keeping set-id bits, which chown(2) clears."""
    for directory, directories, files in os.walk(top, topdown=False):
        for path in (f"{directory}/{name}" for name in [*directories, *files]):
            _shift(path)
    _shift(top)


def _shift(path: str) -> None:
    status = os.lstat(path)
    if status.st_uid >= BASE:
        return  # a second name of a file
    os.lchown(path, BASE + status.st_uid, BASE + status.st_gid)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(path, stat.S_IMODE(status.st_mode))


@contextmanager
def lxc(rootfs: str) -> Iterator[Lxc]:
    """A directory for lxc with a copy of `rootfs`, on a btrfs of its own as the pool is; removed at the end."""
    top = tempfile.mkdtemp(prefix="jb-lxc-", dir="/tmp")
    path = f"{top}/mount"
    groups = set(_groups())
    try:
        os.chmod(top, 0o755)
        os.mkdir(path)
        with open(f"{top}/disk", "wb") as file:
            file.truncate(8 << 30)
        run(["mkfs.btrfs", "--quiet", f"{top}/disk"])
        run(["mount", "-o", "loop,noatime", f"{top}/disk", path])
        os.mkdir(f"{path}/base")
        run(["cp", "-a", rootfs, f"{path}/base/rootfs"])
        shift(f"{path}/base/rootfs")
        for directory in (path, f"{path}/base"):
            os.chown(directory, BASE, BASE)
        with open(f"{path}/base/config", "w", encoding="ascii") as file:
            file.write(CONFIG.format(path=path, base=BASE))
        side = Lxc(path)
        yield side
    finally:
        _clean(top, path, groups)


def _clean(top: str, path: str, groups: set[str]) -> None:
    """Stop and remove all that this run made, whatever state it is in."""
    names = [name for name in os.listdir(path) if name != "base" and os.path.exists(f"{path}/{name}/config")]
    for name in names:
        for argv in (["/usr/bin/lxc-stop", "-k"], ["/usr/bin/lxc-destroy"]):
            try:
                run([argv[0], "-P", path, "-n", name, *argv[1:]], ENVIRONMENT)
            except RuntimeError:
                continue  # stopped or destroyed already
    if os.path.ismount(path):
        run(["umount", "--lazy", path])
    shutil.rmtree(top, ignore_errors=True)
    for group in sorted(set(_groups()) - groups, reverse=True):
        for directory, _, _ in os.walk(group, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                continue  # in use: not of this run


def _groups() -> list[str]:
    """Control groups that lxc makes at the top of each hierarchy, and doesn't always remove."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [line.split()[4] for line in file if line.split(" - ")[1].split()[0] in ("cgroup", "cgroup2")]
    return [f"{mount}/{name}" for mount in mounts for name in os.listdir(mount) if name.startswith("lxc.")]
