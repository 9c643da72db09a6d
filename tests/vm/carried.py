"""A Debian with systemd for the lab VM, built outside of it: an emulated processor takes twenty minutes for a build.

`python -m tests.vm.carried FOLDER` builds one by the template, on this host, and adds sudo and libpam-systemd. In the
VM `take` makes an image of what that left in FOLDER.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from jailmgr.image.store import seal
from jailmgr.model import Image
from jailmgr.storage.pool import open_pool
from jailmgr.storage.volume import create_build, delete_build
from tests.system.instance import Instance, instance_at
from tests.system.netns import session_namespace

FOLDER = Path("dist/debian")
ROOTFS, IMAGE = "rootfs.tar", "image.json"
ADD = (
    "apt-get -q update && apt-get -q -y --no-install-recommends install libpam-systemd sudo && apt-get clean"
    " && rm -rf /var/lib/apt/lists/* /var/log/journal/*"
)
CHANGING = ("dev", "proc", "run", "sys", "tmp", "var/log/journal", "var/tmp")
CHANGED = 1
"""tar(1)'s status where a file changed while it was read: of a Debian that runs, one may."""
TAR = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*")


def make(folder: Path) -> None:
    """Leave the root file system as a tar, and what is told of the image, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with session_namespace(), ExitStack() as undo:
        at = tempfile.mkdtemp(prefix="jm-", dir="/tmp")
        undo.callback(shutil.rmtree, at)
        instance = instance_at(at)
        undo.callback(lambda: instance("engine", "stop"))
        undo.callback(lambda: instance("delete", "--force", "--all"))
        instance("launch", "debian", "guest", "--wait", within=900)
        instance("exec", "guest", "-e", "DEBIAN_FRONTEND=noninteractive", "--", "sh", "-c", ADD, within=300)
        (told,) = Path(instance.root.pool, "images").glob("*.json")
        shutil.copy(told, folder / IMAGE)
        with (folder / ROOTFS).open("wb") as file:
            but = [f"--exclude=./{name}/*" for name in CHANGING]
            argv = [*TAR, "--one-file-system", *but, "-C", "/", "-cf", "-", "."]
            with instance.popen("exec", "guest", "--", *argv, stdout=file) as process:
                assert process.wait(300) in (0, CHANGED)


def take(host: Instance, folder: Path = FOLDER) -> str:
    """The fingerprint of the image that is made of `folder` in the pool of `host`, of which a jail was made before."""
    host("engine", "stop")
    pool = open_pool(host.root)
    target = create_build(pool, "carried")
    try:
        subprocess.run([*TAR, "-C", target, "-xpf", str(folder / ROOTFS)], check=True, timeout=900)
        Path(target, "etc/machine-id").write_text("")
        told = msgspec.json.decode((folder / IMAGE).read_bytes(), type=Image)
        image = msgspec.structs.replace(told, aliases=["carried"], key="", created_at=time.time())
        return seal(pool, "carried", image).fingerprint
    finally:
        delete_build(pool, "carried")


if __name__ == "__main__":
    assert os.geteuid() == 0, "it boots a jail, so it must run as root"
    make(Path(sys.argv[1]))
