"""What dpkg reads of a package: control, changelog, copyright (Debian Policy, chapters 5, 4.4 and 12.5)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from email.utils import formatdate
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import NamedTuple

from labvm.tree import TREE

MAINTAINER = "jailmgr maintainers <jailmgr@packages.example.org>"
DESCRIPTION = """\
System containers for Linux, carved into tenants
 jailmgr carves one host into tenants. A tenant owns jails: system containers,
 each a full distribution booted by its own init, that feel like lightweight
 virtual machines. User namespaces, seccomp, cgroup limits, disk quotas and
 firewall sets keep them apart.
 .
 There is nothing to set up: "jailmgr launch debian" makes what is missing."""


class Package(NamedTuple):
    """`version` is Debian's own; `python` the release's Python, as 3.11; `epoch` seconds since 1970."""

    version: str
    release: str
    python: str
    epoch: int

    @property
    def architecture(self) -> str:
        return _output("dpkg", "--print-architecture")

    @property
    def site(self) -> str:
        """Where the modules lie, below the package's root."""
        return f"usr/lib/jailmgr/lib/python{self.python}/site-packages"


def maintainer() -> str:
    """By DEBFULLNAME and DEBEMAIL, as dpkg's own tools have it."""
    address = os.environ.get("DEBEMAIL")
    return f"{os.environ.get('DEBFULLNAME', 'jailmgr maintainers')} <{address}>" if address else MAINTAINER


def control(package: Package, installed_kib: int) -> str:
    """The control file of the binary package."""
    fields = {
        "Package": "jailmgr",
        "Version": package.version,
        "Architecture": package.architecture,
        "Maintainer": maintainer(),
        "Installed-Size": str(installed_kib),
        "Depends": ", ".join(depends(package.python)),
        "Recommends": ", ".join(["apparmor", *packages("recommended")]),
        "Section": "admin",
        "Priority": "optional",
        "Description": DESCRIPTION,
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items())


def packages(group: str) -> list[str]:
    """Names of a group of script/apt-packages."""
    return _output(str(TREE / "script" / "apt-packages"), group).split()


def depends(python: str) -> list[str]:
    """`script/apt-packages run`, and the one Python that the modules are for.

    Of python3-venv nothing is left in the package. Wheels need a C library alone (PEP 600).
    """
    major, minor = map(int, python.split("."))
    needed = [name for name in packages("run") if name not in ("python3", "python3-venv")]
    interpreter = [f"python3 (>= {major}.{minor})", f"python3 (<< {major}.{minor + 1})"]
    return sorted([*needed, *interpreter, "libc6 (>= 2.28)", "libgcc-s1"])


def changelog(package: Package) -> str:
    """debian/changelog; what changed is told in the project's own."""
    date = formatdate(package.epoch)
    entry = "  * Built from the working tree; changelog.gz tells what changed."
    return f"jailmgr ({package.version}) {package.release}; urgency=medium\n\n{entry}\n\n -- {maintainer()}  {date}\n"


def copyright_(root: Path, package: Package) -> str:
    """Of jailmgr, and of each distribution that came along with it from PyPI."""
    year = time.gmtime(package.epoch).tm_year
    stanzas = [
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: jailmgr",
        f"Files: *\nCopyright: {year} the authors of jailmgr\nLicense: Apache-2.0",
        "License: Apache-2.0\n The text is in /usr/share/common-licenses/Apache-2.0.",
    ]
    found = sorted(distributions(path=[str(root / package.site)]), key=lambda one: one.name.lower())
    stanzas += ["\n".join(_stanza(one, root, package)) for one in found if one.name != "jailmgr"]
    return "\n\n".join(stanzas) + "\n"


def _stanza(one: Distribution, root: Path, package: Package) -> Iterator[str]:
    folder = f"{one.name.replace('-', '_').lower()}-{one.version}.dist-info"
    paths = [path for path in one.files or [] if path.parts[0] != ".."]
    top = sorted({path.parts[0] for path in paths if path.parts[0] != folder})
    texts = sorted(f" /{package.site}/{path}" for path in paths if "licen" in path.name.lower())
    told = one.metadata.json
    author = told.get("author") or told.get("author_email") or told.get("maintainer_email")
    yield f"Files: {' '.join(f'/{package.site}/{name}' + ('' if '.' in name else '/*') for name in top)}"
    yield f"Copyright: {' '.join(str(author or f'the authors of {one.name}').split())}"
    yield f"License: {_license(one)}"
    yield "\n".join((f" {one.name} {one.version}, from PyPI.", *texts))


def _license(one: Distribution) -> str:
    told = one.metadata.json
    if expression := told.get("license_expression"):
        return str(expression).replace(" AND ", " and ").replace(" OR ", " or ")
    classifiers = [text for text in told.get("classifier", []) if text.startswith("License :: OSI")]
    named = classifiers[0].rpartition(" :: ")[2] if classifiers else str(told.get("license", "unknown"))
    return named.split("\n")[0].removesuffix(" License").replace(" ", "-")


def _output(*argv: str) -> str:
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
