"""What a lab VM boots from: a Debian in an ext4 file, its kernel, and the wheels of what the tree needs.

Each is built once, in a folder of the cache that no one else looks at, and renamed to a name that holds a hash of all
that went in. What a killed build left is removed by the next one.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from labvm import guest, tree
from labvm.errors import LabError
from labvm.tree import TREE

PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
"""The Python of each release that can be booted."""
PACKAGES = (
    "apparmor", "dbus", "e2fsprogs", "iproute2", "kmod", "linux-image-cloud-amd64", "nftables", "procps", "python3",
    "python3-venv", "quota", "systemd", "systemd-sysv", "udev",
)  # fmt: skip
UNUSED_DAYS = 14
"""What no run has asked for since goes with the next build."""

FILES = {
    "etc/hostname": "lab\n",
    "etc/machine-id": "6a61696c6d67722d6c61622d766d2d30\n",  # or each boot is a first one, which presets all units
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 lab\n::1 localhost\n",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",  # qemu's own, in front of the host's
    "etc/fstab": "/dev/disk/by-id/virtio-wheelhouse /wheelhouse ext4 ro 0 0\n",
    "etc/systemd/network/lab.network": "[Match]\nDriver=virtio_net\n\n[Network]\nDHCP=ipv4\n",
    # All that a root disk on virtio takes, instead of all there is: 6 MiB to unpack by an emulated processor, not 30.
    # The quota format is asked for when the root is mounted, where initramfs-tools doesn't expect it.
    "etc/initramfs-tools/conf.d/lab": "MODULES=list\nCOMPRESS=gzip\n",
    "etc/initramfs-tools/hooks/lab": (
        '#!/bin/sh\n[ "$1" = prereqs ] && exit\n. /usr/share/initramfs-tools/hook-functions\n'
        "manual_add_modules virtio_pci virtio_blk ext4 crc32c_generic quota_v2\n"
    ),
    # The unit's job is done once it runs, so that it doesn't hold up the boot that it is part of. A jail's process that
    # the kernel kills for want of memory must not end the command that started the jail.
    "etc/systemd/system/lab.service": """\
[Unit]
Description=The command that this machine was booted for
After=multi-user.target network-online.target
Wants=network-online.target

[Service]
Type=exec
ExecStartPre=/bin/sh -c 'test -e /lab || tar --extract --file /dev/disk/by-id/virtio-tree --directory /'
ExecStart=/usr/bin/python3 /lab/guest.py
OOMPolicy=continue
TasksMax=infinity

[Install]
WantedBy=multi-user.target
""",
}
"""Path in the image, text. Hooks are made executable."""
ENABLED = "lab.service systemd-networkd.service"
MASKED = "apt-daily.timer apt-daily-upgrade.timer"
"""apt's own timers would hold its lock whenever they like."""


class Recipe(NamedTuple):
    """All that decides what is in an image. `size`: bytes of the file system; `venv`: what script/venv depends on."""

    release: str
    sources: tuple[str, ...]
    packages: tuple[str, ...]
    files: tuple[tuple[str, str], ...]
    enabled: str
    masked: str
    size: int
    venv: str


class Image(NamedTuple):
    root: Path
    kernel: Path
    initrd: Path


class Wheelhouse(NamedTuple):
    """The same wheels in an ext4 file and in a folder."""

    file: Path
    folder: Path


def recipe(release: str, entries: str, packages: list[str], size: int) -> Recipe:
    """`entries`: a line `URL SUITE COMPONENT` for each source of the host's apt, as `host_entries` gives them.

    A suite that none of them has is taken from where another release has the same. LabError where there is none.
    """
    sources = []
    for suffix in ("", "-security"):
        found = _mirror(entries, release, suffix)
        if found:
            sources.append(f"deb {found} {release}{suffix} main")
        elif not suffix:
            raise LabError(f"no entry of this host's apt sources has {release} or another Debian release")
    everything = tuple(sorted({*PACKAGES, *packages}))
    venv = "".join((TREE / name).read_text() for name in ("pyproject.toml", "script/venv"))
    return Recipe(release, tuple(sources), everything, tuple(FILES.items()), ENABLED, MASKED, size, venv)


def _mirror(entries: str, release: str, suffix: str) -> str:
    urls: dict[str, str] = {}
    for words in map(str.split, entries.splitlines()):
        if len(words) == 3 and words[2] == "main":
            urls.setdefault(words[1], words[0])
    return next((urls[name + suffix] for name in (release, *PYTHONS) if name + suffix in urls), "")


def host_entries() -> str:
    """What apt itself makes of its configuration; a mirror's address is this host's affair and in no file of ours."""
    entry = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    return _output(["apt-get", "indextargets", "--format", entry, "Created-By: Packages"])


def tree_packages() -> list[str]:
    return _output([str(TREE / "script" / "apt-packages"), "run", "recommended", "test"]).split()


def key(what: object) -> str:
    """Of a tuple of texts and numbers, however deep: sixteen hexadecimal digits that change with it."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def image(cache: Path, wanted: Recipe, wheels: Wheelhouse) -> Image:
    """The image of the recipe. LabError: a command failed; the hint says where what it said is."""
    folder = cache / f"{wanted.release}-{key((wanted, inspect.getsource(_bootstrap), inspect.getsource(_install)))}"
    with _locked(cache):
        if not folder.exists():
            _say(f"building Debian {wanted.release}, which takes minutes and is done once")
            with _workshop(cache) as shop:
                _bootstrap(shop, wanted, wheels)
                os.rename(shop / "image", folder)
        os.utime(folder)
    return Image(folder / "root.ext4", folder / "vmlinuz", folder / "initrd.img")


def _bootstrap(shop: Path, wanted: Recipe, wheels: Wheelhouse) -> None:
    root, files, made = shop / "root", shop / "files", shop / "image"
    made.mkdir()
    for name, text in wanted.files:
        path = files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if "hooks" in path.parts else 0o644)
    # In namespaces of its own: whenever it is killed, its mounts and its children go with it.
    _run(
        shop,
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "mmdebstrap", "--variant=apt"],
        [f"--include={','.join(wanted.packages)}", "--dpkgopt=path-exclude=/usr/share/man/*"],
        ["--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/doc/*"],
        # Before the kernel's package, which makes the initramfs.
        [f"--essential-hook=sync-in {files} /"],
        [f'--customize-hook=chroot "$1" systemctl enable {wanted.enabled}'],
        [f'--customize-hook=chroot "$1" systemctl mask {wanted.masked}'],
        [wanted.release, str(root), *wanted.sources],
    )
    # Once more, over what packages and mmdebstrap made of them.
    shutil.copytree(files, root, dirs_exist_ok=True)
    _install(shop, root, wheels)
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(root / name, made / name)
    _run(
        shop,
        ["mke2fs", "-q", "-t", "ext4", "-L", "lab", "-m", "0", "-O", "quota,project", "-E", "quotatype=prjquota"],
        ["-d", str(root), str(made / "root.ext4"), f"{wanted.size >> 10}k"],
    )


def _install(shop: Path, root: Path, wheels: Wheelhouse) -> None:
    """Leave a virtual environment where script/venv finds it up to date: in the VM pip would take four minutes."""
    inside, wheelhouse, names = root / guest.TREE.lstrip("/"), root / "wheelhouse", tree.names()
    for name in names:
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TREE / name, inside / name, follow_symlinks=False)
    shutil.copytree(wheels.folder, wheelhouse)
    environment = [f"{name}={value}" for name, value in guest.ENVIRONMENT.items()]
    enter = 'mount --bind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    _run(
        shop,
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", enter, str(root)],
        ["env", "-i", *environment, "sh", "-c", f"cd {guest.TREE} && script/venv && script/venv dev"],
    )
    shutil.rmtree(wheelhouse)
    wheelhouse.mkdir()
    # A file that the tree no longer has must not be there; what was compiled is tied to its source's time.
    for name in names:
        (inside / name).unlink()


def requirements() -> list[str]:
    """What script/venv asks pip for: the dependencies with those of `dev`, and what an editable build is built with."""
    project = tomllib.loads((TREE / "pyproject.toml").read_text())
    table = project["project"]
    ours = [*table["dependencies"], *table["optional-dependencies"]["dev"]]
    return [*project["build-system"]["requires"], "editables", "pip>=26,<27", *ours]


def wheelhouse(cache: Path, release: str, wanted: list[str]) -> Wheelhouse:
    """The wheels of `wanted` and all that they need, for the release's Python."""
    house = cache / f"wheelhouse-{release}-{key(wanted)}"
    with _locked(cache):
        if not house.exists():
            _say(f"fetching the wheels for Python {PYTHONS[release]}")
            with _workshop(cache) as shop:
                (shop / "house").mkdir()
                _run(shop, [sys.executable, "-m", "venv", str(shop / "venv")])
                python, wheels = str(shop / "venv/bin/python"), shop / "house/wheels"
                _run(
                    shop,
                    # A killed pip leaves its scratch files behind.
                    ["env", f"TMPDIR={shop}", python, "-m", "pip", "download", "--quiet", "--dest", str(wheels)],
                    ["--only-binary=:all:", "--implementation=cp", "--python-version", PYTHONS[release], *wanted],
                )
                size = sum(wheel.stat().st_size for wheel in wheels.iterdir()) * 5 // 4 + (8 << 20)
                _run(
                    shop,
                    ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(wheels)],
                    [str(shop / "house/ext4"), f"{size >> 10}k"],
                )
                os.rename(shop / "house", house)
        os.utime(house)
    return Wheelhouse(house / "ext4", house / "wheels")


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One builds at a time; who comes second finds it built."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another build to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _workshop(cache: Path) -> Iterator[Path]:
    """A folder to build in; needs the lock."""
    for left in cache.glob("building-*"):
        shutil.rmtree(left)
    oldest = time.time() - UNUSED_DAYS * 86_400
    for unused in (path for path in cache.glob("*-*") if path.stat().st_mtime < oldest):
        shutil.rmtree(unused) if unused.is_dir() else unused.unlink()
    shop = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    # The image's root would be closed to its own users.
    (shop / "root").mkdir(mode=0o755)
    try:
        yield shop
    finally:
        shutil.rmtree(shop)


def _run(shop: Path, *argv: list[str]) -> None:
    """LabError where it fails; all that was said by then is in build.log of the cache."""
    words = [word for part in argv for word in part]
    log = shop.parent / "build.log"
    with open(log, "wb") as output:
        done = subprocess.run(
            ["setpriv", "--pdeathsig", "KILL", "--", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        name = next((word for word in words if word in ("mmdebstrap", "pip", "mke2fs", "venv")), words[0])
        raise LabError(f"{name} failed with status {done.returncode}", f"What it said is in {log}.")


def _output(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv[:2])} failed with status {done.returncode}")
    return done.stdout


def _say(what: str) -> None:
    print(f"lab-vm: {what}", file=sys.stderr, flush=True)
