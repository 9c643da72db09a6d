"""`python -m debbuild`: build the Debian package of the working tree and leave it in dist/."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from debbuild.control import Package, control
from debbuild.stage import conffiles, set_modes, stage
from jailmgr import __version__
from labvm.image import PYTHONS
from labvm.tree import TREE

DEBIAN = {"bookworm": 12, "trixie": 13}
SCRIPTS = ("postinst", "prerm", "postrm")


def parse(argv: list[str]) -> argparse.Namespace:
    """`release`, `version` (jailmgr's, as PEP 440 has it), `lint`."""
    parser = argparse.ArgumentParser(prog="script/build-deb", description=__doc__, allow_abbrev=False)
    parser.add_argument("--release", choices=list(DEBIAN), default="bookworm", help="of Debian (%(default)s)")
    parser.add_argument("--version", type=_version, default=__version__, help="that it tells (%(default)s)")
    parser.add_argument("--lint", action="store_true", help="fail where lintian finds an error")
    return parser.parse_args(argv)


def _version(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*(\+[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is no version such as 1.2.3 or 1.2.3+1")
    return text


def build(release: str, upstream: str) -> Path:
    """The package's path. The same tree, wheels and SOURCE_DATE_EPOCH give the same bytes.

    Without SOURCE_DATE_EPOCH (seconds since 1970) the last commit's time counts. The release's own version is a part of
    the package's, so that one for the next Debian is an upgrade.
    """
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or _last_commit())
    package = Package(f"{upstream}-1~deb{DEBIAN[release]}", release, PYTHONS[release], epoch)
    os.umask(0o022)
    made = TREE / "dist" / f"jailmgr_{package.version}_{package.architecture}.deb"
    made.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=made.parent) as folder:
        shop = Path(folder)
        root = shop / "root"
        root.mkdir()
        stage(root, shop, package, upstream)
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
        sums = (f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n" for path in files)
        installed = sum((path.stat().st_size + 1023) // 1024 for path in files)
        write_control(root, package, "".join(sums), installed)
        set_modes(root)
        done = shop / made.name
        command = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(done)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        done.rename(made)
    return made


def write_control(root: Path, package: Package, sums: str, installed_kib: int) -> None:
    """DEBIAN/: what dpkg itself reads."""
    debian = root / "DEBIAN"
    debian.mkdir()
    (debian / "control").write_text(control(package, installed_kib))
    (debian / "md5sums").write_text(sums)
    if kept := conffiles(root):
        (debian / "conffiles").write_text(kept)
    for name in SCRIPTS:
        shutil.copyfile(TREE / "packaging" / "debian" / name, debian / name)


def _last_commit() -> str:
    command = ["git", "-c", "safe.directory=*", "log", "-1", "--format=%ct"]
    return subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        made = build(options.release, options.version)
        if options.lint:
            subprocess.run(["lintian", "--fail-on=error", "--allow-root", str(made)], check=True)
    except subprocess.CalledProcessError as error:
        print(f"Error: build-deb: {error.cmd[0]} ended with status {error.returncode}", file=sys.stderr)
        return 1
    print(made.relative_to(TREE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
