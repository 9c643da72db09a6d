"""Walls: what /proc and /sys show of the host, and file systems that would show more.

Mechanism: the kernel lets a guest write sysctls of its own namespaces only, and mount types with FS_USERNS_MOUNT only.
The masks over /proc and /sys are no wall: the guest's root can unmount them where the host has no AppArmor
(docs/security.md). So the masks are off in these tests.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.guest import OK, Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance

OWN = (
    "/proc/sys/net/", "/proc/sys/user/max_", "/proc/sys/fs/mqueue/", "/proc/sys/fs/inotify/", "/proc/sys/fs/fanotify/",
)  # fmt: skip
"""Sysctls of a network, ipc or user namespace; the last two are the user's counts of it (ucounts)."""
OWN_KERNEL = {
    "hostname", "domainname", "msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced",
    "auto_msgmni", "msg_next_id", "sem_next_id", "shm_next_id", "ns_last_pid", "pid_max",
}  # fmt: skip
"""Of /proc/sys/kernel: uts, ipc, and (ns_last_pid, since 6.14 pid_max) pid namespaces."""
ANYBODYS = "/proc/pressure/"
"""Mode 0666 (psi.rst): what bounds its triggers is read-only mounts and AppArmor, not an owner."""
VICTIM = "nameserver 192.0.2.53\n"
HARMLESS_TYPES = {
    "sysfs", "tmpfs", "proc", "cgroup2", "cgroup", "ramfs", "devpts", "mqueue", "overlay", "fuse", "fuseblk", "bpf",
    "binder", "nfsd", "rpc_pipefs", "virtiofs", "autofs", "binfmt_misc", "cpuset",
}  # fmt: skip
"""Types that a user namespace may mount, where the kernel has them: each shows its mounter's namespaces."""
UNMASK = (
    "for point in $(cut -d' ' -f2 /proc/mounts | grep '^/proc/\\|^/sys/'); do umount -l $point; done;"
    " mount -o remount,rw /sys"
)
SYSCTLS = ("kernel", "vm", "fs", "dev", "debug", "abi", "crypto")


@pytest.fixture(scope="module", autouse=True)
def masks_off(guest: Guest) -> None:
    """Take off all that lies over /proc and /sys: as far as the host lets it."""
    guest.sh(f"({UNMASK}) >/dev/null 2>&1 || true")
    left = guest.sh("cut -d' ' -f2 /proc/mounts | grep -c '^/proc/\\|^/sys/' || true").strip()
    assert left == "0" or guest.jm.info(guest.jail)["apparmor"], "some stay, where AppArmor holds them"


def is_own(path: str) -> bool:
    folder, name = os.path.split(path)
    return path.startswith(OWN) or (folder == "/proc/sys/kernel" and name in OWN_KERNEL)


def test_nothing_of_the_hosts_in_proc_opens_for_writing(guest: Guest) -> None:
    """Each file of /proc that isn't a process's is opened for writing. Mechanism: their owner is the host's root."""
    opened = guest.run("walk", "/proc").split()
    assert [path for path in opened if not is_own(path) and not path.startswith(ANYBODYS)] == []


def test_nothing_of_the_hosts_in_sys_opens_for_writing(guest: Guest) -> None:
    """Mechanism: as in /proc. Of a network device of the jail's own, some do."""
    opened = guest.run("walk", "/sys").split()
    assert [path for path in opened if "/net/" not in path and not path.startswith("/sys/fs/cgroup/")] == []


def test_no_sysctl_of_the_host_changes(guest: Guest) -> None:
    """The jail's root writes to all that it can open; on the host, all is as it was."""

    def values() -> dict[str, str]:
        found = {}
        for top in SYSCTLS:
            for folder, _, names in os.walk(f"/proc/sys/{top}"):
                for name in set(names) - {"ns_last_pid", "pty", "nr"}:
                    if folder.endswith(("/random", "/sys/fs")) or name.startswith(("uuid", "boot_id")):
                        continue  # they change by themselves
                    try:
                        found[f"{folder}/{name}"] = Path(folder, name).read_text(errors="replace")
                    except OSError:
                        continue
        return found

    before = values()
    own = guest.run("walk", "/proc/sys/kernel", "/proc/sys/fs", "/proc/sys/vm").split()
    assert own, "those of its own namespaces"
    guest.sh("for file in " + " ".join(own) + "; do echo 7 2>/dev/null >$file; done; hostname guests-own", status=None)
    after = values()
    assert {name: after.get(name) for name in before if after.get(name) != before[name]} == {}
    assert len(before) > 100


def test_only_types_that_a_namespace_may_mount_are_mounted(guest: Guest) -> None:
    """Each type that the kernel knows. Mechanism: FS_USERNS_MOUNT."""
    kinds = [line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()]
    mounted = []
    for kind in kinds:
        if guest.ask(("mount", "none", "/mnt", kind, 0, 0)) == [OK]:
            mounted.append(kind)
            guest.sh("umount -l /mnt")
    assert "tmpfs" in mounted
    assert set(mounted) <= HARMLESS_TYPES
    assert not set(mounted) & {"debugfs", "tracefs", "securityfs", "devtmpfs", "pstore", "configfs", "efivarfs"}


def test_memory_of_the_kernel_and_keys_of_others_are_not_read(guest: Guest) -> None:
    """Mechanism: kcore and kallsyms' addresses are the host's root's; /proc/keys shows keys that one may view."""
    assert guest.sh("head -c 1 /proc/kcore 2>/dev/null | wc -c").strip() == "0"
    assert guest.sh("head -c 1 /proc/kmsg 2>/dev/null | wc -c").strip() == "0"
    addresses = {
        line.split()[0] for line in guest.sh("head -n 50 /proc/kallsyms 2>/dev/null", status=None).splitlines()
    }
    assert addresses <= {"0" * 16}
    assert guest.sh("echo b 2>/dev/null >/proc/sysrq-trigger || echo refused") == "refused\n"


def test_the_image_is_read_only_and_shared(jm: Instance, busybox_jail: MakeJail) -> None:
    """What one jail does to a file of the image no other sees. Mechanism: an overlay over a read-only clone."""
    one, other = busybox_jail(), busybox_jail()
    before = jm.sh(other, "md5sum /bin/busybox; ls -l /etc; stat -c %a /bin").out
    jm.sh(
        one, "cp /bin/busybox /tmp/b; echo x >>/bin/busybox; rm -rf /etc; chmod 700 /bin; mount -o remount,rw /", None
    )
    assert jm.sh(other, "md5sum /bin/busybox; ls -l /etc; stat -c %a /bin").out == before
    fresh = busybox_jail()
    assert jm.sh(fresh, "stat -c %a /bin").out == "755\n"


def test_links_in_place_of_the_systems_folders(jm: Instance, busybox_jail: MakeJail) -> None:
    """A tree whose /dev, /sys, /run and /proc are links to the host's. Mechanism: openat2(2) with RESOLVE_IN_ROOT."""
    jail = busybox_jail()
    jm("stop", "--force", jail)
    upper = f"{jm.root.volume('default', jail)}/upper"
    for name, target in (("sys", "/sys"), ("run", "/tmp"), ("dev", f"{jm.root.at}/run")):
        folder = Path(upper, name)
        if folder.is_dir():
            for entry in folder.iterdir():
                entry.unlink()
            folder.rmdir()
        folder.unlink(missing_ok=True)
        folder.symlink_to(target)
    before = set(os.listdir("/tmp")) | set(os.listdir(jm.root.run))
    started = jm("start", jail, status=None)
    assert started.status == 0 or "Error: " in started.err
    new = (set(os.listdir("/tmp")) | set(os.listdir(jm.root.run))) - before
    assert not {name for name in new if name in ("null", "pts", "host", "shm")}
    if started.status == 0:
        jm.sh(jail, f"test ! -e {jm.root.at}/lib")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A file of the host which any uid may write to, alone in a directory which any uid may write to."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="jmt-") as place:
        victim = Path(place, "resolv.conf")
        victim.write_text(VICTIM)
        victim.chmod(0o666)
        os.chmod(place, 0o777)
        yield victim


@pytest.mark.parametrize("link", ["etc", "etc/resolv.conf", "etc/.resolv.conf.jailmgr"])
def test_links_at_resolv_conf(jm: Instance, busybox_jail: MakeJail, open_to_all: Path, link: str) -> None:
    """A tree whose resolv.conf, or the file that replaces it, leads to the host's. Mechanism: as above, and O_EXCL.

    If the host's file were read, it would count as the guest's own, and resolvconf would get nothing.
    """
    jail = busybox_jail()
    jm("stop", "--force", jail)
    upper = Path(f"{jm.root.volume('default', jail)}/upper")
    (upper / "etc/resolv.conf").unlink()
    if link == "etc":
        shutil.rmtree(upper / link)
    (upper / link).symlink_to(open_to_all.parent if link == "etc" else open_to_all)
    jm("start", jail)
    assert os.listdir(open_to_all.parent) == ["resolv.conf"]
    assert open_to_all.read_text() == VICTIM
    assert "nameserver 10." in jm.sh(jail, "cat /run/resolvconf/interface/jailmgr").out
