"""The package's files, laid out in a folder as they are to lie on a host."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from debbuild.commands import read_commands
from debbuild.completions import SHELLS, completion
from debbuild.control import Package, changelog, copyright_
from debbuild.manual import pages
from labvm.tree import TREE, names

VENV = "usr/lib/jailmgr"
SOURCES = ("jailmgr/", "templates/", "packaging/apparmor/", "pyproject.toml", "README.md", "LICENSE")
"""What the wheel is made of."""
COPIED = {
    "usr/lib/systemd/system": "packaging/systemd/*",
    "usr/lib/sysctl.d/50-jailmgr.conf": "packaging/sysctl/jailmgr.conf",
    "usr/lib/tmpfiles.d/jailmgr.conf": "packaging/tmpfiles/jailmgr.conf",
    "etc/apparmor.d/jailmgr": "packaging/apparmor/jailmgr",
    "etc/apparmor.d/abi/jailmgr": "packaging/apparmor/abi/jailmgr",
    "usr/share/lintian/overrides/jailmgr": "packaging/debian/lintian-overrides",
}
"""Path in the package (a folder where there is a *) and in the tree."""
DOCS = ("README.md", "docs/architecture.md", "docs/configuration.md", "docs/install.md")
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/jailmgr",
    "zsh": "usr/share/zsh/vendor-completions/_jailmgr",
    "fish": "usr/share/fish/vendor_completions.d/jailmgr.fish",
}
LAUNCHER = """\
#!/usr/lib/jailmgr/bin/python3 -I
import sys

from jailmgr.cli.main import entry

sys.exit(entry())
"""


def stage(root: Path, shop: Path, package: Package, upstream: str) -> None:
    """All but DEBIAN/. `shop` is a folder for what is made on the way; `upstream`: the version that jailmgr tells."""
    _install_modules(root, shop, package, upstream)
    venv = root / VENV
    (venv / "bin").mkdir()
    # Of this minor version, whatever `python3` becomes in the middle of an upgrade to the next release of Debian.
    (venv / "bin" / "python3").symlink_to(f"../../../bin/python{package.python}")
    home = "home = /usr/bin\ninclude-system-site-packages = false\n"
    _write(venv / "pyvenv.cfg", f"{home}version = {package.python}\nexecutable = /usr/bin/python{package.python}\n")
    _write(root / "usr/bin/jailmgr", LAUNCHER, 0o755)
    for target, source in COPIED.items():
        _copy(root / target, source)
    _document(root, package, upstream)


def _install_modules(root: Path, shop: Path, package: Package, upstream: str) -> None:
    """jailmgr and what it needs from PyPI, for the release's Python; nothing is run of what is unpacked."""
    tree, wheels, site = shop / "tree", shop / "wheels", root / package.site
    for name in names():
        if name.startswith(SOURCES):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TREE / name, tree / name, follow_symlinks=False)
    told = tree / "jailmgr" / "__init__.py"
    told.write_text(re.sub(r'(?m)^__version__ = ".*"$', f'__version__ = "{upstream}"', told.read_text()))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # A killed pip leaves its scratch files behind.
    environment = {**os.environ, "TMPDIR": str(shop), "SOURCE_DATE_EPOCH": str(package.epoch)}
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(tree)], env=environment, check=True)
    options = ["--no-compile", "--only-binary=:all:", "--implementation=cp", f"--python-version={package.python}"]
    found = [str(wheel) for wheel in wheels.iterdir()]
    subprocess.run([*pip, "install", f"--target={site}", *options, *found], env=environment, check=True)
    shutil.rmtree(site / "bin")
    # It holds the path of the wheel on this machine.
    told = site / f"jailmgr-{upstream}.dist-info"
    (told / "direct_url.json").unlink()
    record = (told / "RECORD").read_text().splitlines(keepends=True)
    (told / "RECORD").write_text("".join(line for line in record if "/direct_url.json," not in line))


def _document(root: Path, package: Package, upstream: str) -> None:
    docs, commands = root / "usr/share/doc/jailmgr", read_commands()
    for name in DOCS:
        _write(docs / Path(name).name, (TREE / name).read_text())
    _write_gzip(docs / "changelog.gz", (TREE / "CHANGELOG.md").read_text())
    _write_gzip(docs / "changelog.Debian.gz", changelog(package))
    _write(docs / "copyright", copyright_(root, package))
    for name, text in pages(commands, upstream, package.epoch).items():
        _write_gzip(root / "usr/share/man/man1" / f"{name}.gz", text)
    for shell in SHELLS:
        path = root / COMPLETIONS[shell]
        _write(path, completion(shell, commands))
        subprocess.run([shell, "-n", str(path)], check=True)


def conffiles(root: Path) -> str:
    return "".join(f"/{path.relative_to(root)}\n" for path in sorted(root.glob("etc/**/*")) if path.is_file())


def set_modes(root: Path) -> None:
    """What is no script may be executed by nobody, whatever the wheels say."""
    for path in root.rglob("*"):
        if not path.is_symlink():
            script = path.is_dir() or (path.parent.name in ("bin", "DEBIAN") and path.read_bytes()[:2] == b"#!")
            path.chmod(0o755 if script else 0o644)


def _copy(target: Path, source: str) -> None:
    if not source.endswith("*"):
        _write(target, (TREE / source).read_text())
        return
    for path in sorted(TREE.glob(source)):
        _write(target / path.name, path.read_text())


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _write_gzip(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
