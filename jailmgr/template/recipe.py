"""Templates: found, read, checked, and resolved into the build of one release (and variant)."""

from __future__ import annotations

import difflib
import hashlib
import os
from typing import Any

import msgspec
import tomli

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.model import CreateFile, Recipe
from jailmgr.template import tree
from jailmgr.template.apt_sources import DEBIAN, Mirrors, configured_mirrors
from jailmgr.template.busybox import find_busybox
from jailmgr.template.render import SOURCE_MAX
from jailmgr.template.schema import FILE, NAME, TOML_MAX, Mistake, find_mistakes

FORMAT = 1
"""Counted up when the same template would be built into something else."""
FILES_MAX = 200


class File(msgspec.Struct, frozen=True):
    """A file or (with `link`) symbolic link of the image, or (`create`) a file of each jail."""

    path: str
    source: str = ""
    """Its name in the folder `files`; rendered where it ends in `.j2`."""
    link: str = ""
    create: bool = False
    mode: int = 0o644


class Debootstrap(msgspec.Struct, frozen=True):
    """How debootstrap(8) is called."""

    keyring: str
    variant: str = "minbase"
    components: list[str] = msgspec.field(default_factory=lambda: ["main"])
    script: str = ""
    """Taken where the host's debootstrap has none for the release."""
    security: bool = True
    """The archive has a suite RELEASE-security."""
    distribution: str = ""
    """Whose archive it is; derived from the keyring's name where empty."""


class Body(msgspec.Struct, frozen=True):
    """What a template says at its top and in a variant alike."""

    packages: dict[str, str] = {}
    """Name to what it is for."""
    init: dict[str, Any] = {}
    environment: dict[str, str] = {}
    files: list[File] = []
    run: list[list[str]] = []
    """Commands run as root of the jail that the image is built in."""
    remove: list[str] = []
    empty: list[str] = []
    without: list[str] = []
    description: str = ""


class Template(msgspec.Struct, frozen=True):
    """A template as read. `releases`: the first is meant where none is named."""

    name: str
    folder: str
    description: str
    method: str
    releases: list[str]
    body: Body
    variants: dict[str, Body]
    debootstrap: Debootstrap | None
    mirrors: Mirrors
    """The template's own [mirror]."""
    sources: dict[str, str]
    """The text of each file in `files`."""
    digest: str
    """SHA-256 (hex) of all that was read."""


class Build(msgspec.Struct, frozen=True):
    """One image to be built: a template's release and variant, with all that goes into it."""

    template: str
    release: str
    variant: str
    method: str
    architecture: str
    """As uname(2) says it."""
    packages: list[str]
    recipe: Recipe
    files: list[File]
    run: list[list[str]]
    remove: list[str]
    empty: list[str]
    releases: list[str]
    debootstrap: Debootstrap | None
    own_mirrors: Mirrors
    sources: dict[str, str]
    key: str
    """Same key, same image: a hash of the inputs (not of the archive's state)."""
    unset: list[str] = []
    """Fields of `recipe` that the template leaves to the init (template/inits.py)."""

    @property
    def distribution(self) -> str:
        """Whose archive the image is built from: `debian`, `devuan`."""
        return _distribution(self.debootstrap)

    @property
    def source(self) -> str:
        """TEMPLATE/RELEASE[/VARIANT]."""
        return "/".join(part for part in (self.template, self.release, self.variant) if part)

    @property
    def create_files(self) -> list[CreateFile]:
        return [CreateFile(file.path, self.sources[file.source], file.mode) for file in self.files if file.create]


def find_templates(root: Root) -> dict[str, str]:
    """Name to folder: the admin's own (etc/templates) before those that came with jailmgr."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found: dict[str, str] = {}
    for place in (f"{root.etc}/templates", f"{package}/_templates", f"{os.path.dirname(package)}/templates"):
        try:
            names = sorted(os.listdir(place))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            if NAME.match(name) and os.path.isfile(f"{place}/{name}/{FILE}"):
                found.setdefault(name, f"{place}/{name}")
    return found


def validate(folder: str) -> list[Mistake]:
    """The mistakes in a template's folder; JailmgrError `missing` where there is no template.toml in it."""
    text, sources, mistakes = _read(folder)
    return mistakes or find_mistakes(text, sources)


def load_template(folder: str) -> Template:
    """The template in `folder`; JailmgrError `missing` or `invalid` (with the first mistake)."""
    name = os.path.basename(os.path.realpath(folder))
    text, sources, mistakes = _read(folder)
    mistakes = mistakes or find_mistakes(text, sources)
    if mistakes:
        count = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        hint = f"`jailmgr template validate {folder}` shows all of its mistakes."
        raise JailmgrError(f"template {name!r}", f"{mistakes[0]}{count}", hint, "invalid")
    content = tomli.loads(text)
    digest = hashlib.sha256(text.encode())
    for source, source_text in sorted(sources.items()):
        digest.update(f"\0{source}\0{source_text}".encode())
    return Template(
        name=name,
        folder=folder,
        description=content["description"],
        method=content["method"],
        releases=content["releases"],
        body=_body(content),
        variants={variant: _body(table) for variant, table in content.get("variants", {}).items()},
        debootstrap=msgspec.convert(content["debootstrap"], Debootstrap) if "debootstrap" in content else None,
        mirrors=Mirrors(*(content.get("mirror", {}).get(key, "").rstrip("/") for key in ("url", "security_url"))),
        sources=sources,
        digest=digest.hexdigest(),
    )


def resolve(root: Root, source: str) -> Build:
    """The build meant by `TEMPLATE[/RELEASE[/VARIANT]]`; JailmgrError with a near miss where there is none."""
    name, _, rest = source.partition("/")
    release, _, variant = rest.partition("/")
    found = find_templates(root)
    if name not in found:
        raise _unknown("template", source, name, list(found), "`jailmgr template list` shows all there are.")
    template = load_template(found[name])
    release = release or template.releases[0]
    if release not in template.releases:
        raise _unknown("release", source, release, template.releases, f"{name} has {', '.join(template.releases)}.")
    if variant and variant not in template.variants:
        have = ", ".join(template.variants) or "none"
        raise _unknown("variant", source, variant, list(template.variants), f"{name} has {have}.")
    body, extra = template.body, template.variants.get(variant, Body())
    paths = {file.path for file in extra.files}
    packages = sorted({*body.packages, *extra.packages} - {*extra.without})
    init = body.init | extra.init
    environment = body.environment | extra.environment
    recipe = Recipe(
        init=init.get("command", ["/sbin/init"]),
        stop_signal=init.get("stop_signal", "SIGRTMIN+3"),
        stop_timeout=init.get("stop_timeout", 30),
        oom_score_adj=-init.get("spared", 0),
        notify=init.get("notify", False),
        environment=environment,
    )
    machine = os.uname().machine
    outside = (
        _identity(find_busybox())
        if template.method == "busybox"
        else list(configured_mirrors(root, _distribution(template.debootstrap), template.mirrors))
    )
    inputs = [FORMAT, template.digest, name, release, variant, machine, outside]
    return Build(
        template=name,
        release=release,
        variant=variant,
        method=template.method,
        architecture=machine,
        packages=packages,
        recipe=recipe,
        unset=[name for name in ("stop_signal", "notify") if name not in init],
        files=[*(file for file in body.files if file.path not in paths), *extra.files],
        run=[*body.run, *extra.run],
        remove=[*body.remove, *extra.remove],
        empty=[*body.empty, *extra.empty],
        releases=template.releases,
        debootstrap=template.debootstrap,
        own_mirrors=template.mirrors,
        sources=template.sources,
        key=hashlib.sha256(msgspec.json.encode(inputs)).hexdigest(),
    )


def _distribution(told: Debootstrap | None) -> str:
    """Return the distribution of a template: the one it names, else its keyring's (NAME-archive-keyring.gpg)."""
    if told is None:
        return DEBIAN
    name = os.path.basename(told.keyring).partition("-")[0].removesuffix(".gpg")
    return told.distribution or (name if NAME.match(name) else DEBIAN)


def _unknown(kind: str, source: str, word: str, known: list[str], otherwise: str) -> JailmgrError:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    hint = f"Did you mean {near[0]!r}? {otherwise}" if near else otherwise
    return JailmgrError(f"source {source!r}", f"there is no {kind} {word!r}", hint, "missing")


def _identity(path: str) -> str:
    """Changes when the file does."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def _body(table: dict[str, Any]) -> Body:
    clean = table.get("clean", {})
    files = [
        File(
            path=entry["path"],
            source=entry.get("source", ""),
            link=entry.get("link", ""),
            create=entry.get("when") == "create",
            mode=entry.get("mode", 0o644),
        )
        for entry in table.get("file", [])
    ]
    return Body(
        packages=table.get("packages", {}),
        init=table.get("init", {}),
        environment=table.get("environment", {}),
        files=files,
        run=[entry["command"] for entry in table.get("run", [])],
        remove=clean.get("remove", []),
        empty=clean.get("empty", []),
        without=table.get("without", []),
        description=table.get("description", ""),
    )


def _read(folder: str) -> tuple[str, dict[str, str], list[Mistake]]:
    """The texts of template.toml and of each file in `files`, and what can't be read as text. No link leads out."""
    try:
        with tree.open_tree(os.path.realpath(folder)) as top:
            raw = tree.read(top, FILE, TOML_MAX + 1)
            if raw is None:
                raise JailmgrError(f"template {folder!r}", f"there is no {FILE} in it", "", "missing")
            files = {name: tree.read(top, f"files/{name}", SOURCE_MAX + 1) for name in _names(folder)}
    except OSError as error:
        code = from_os(f"template {folder!r}", error)
        code.code = "missing" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else "failed"
        raise code from error
    mistakes = [] if len(raw) <= TOML_MAX else [Mistake(FILE, 1, "", f"larger than {TOML_MAX} bytes")]
    text, sources = "", {}
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        mistakes.append(Mistake(FILE, raw.count(b"\n", 0, error.start) + 1, "", "not UTF-8"))
    for name, content in files.items():
        if content is None:
            continue
        if len(content) > SOURCE_MAX:
            mistakes.append(Mistake(f"files/{name}", 1, "", f"larger than {SOURCE_MAX} bytes"))
            continue
        try:
            sources[name] = content.decode()
        except UnicodeDecodeError as error:
            mistakes.append(Mistake(f"files/{name}", content.count(b"\n", 0, error.start) + 1, "", "not UTF-8"))
    return text, sources, mistakes


def _names(folder: str) -> list[str]:
    try:
        entries = [entry for entry in os.scandir(f"{folder}/files") if entry.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    if len(entries) > FILES_MAX:
        raise JailmgrError(f"template {folder!r}", f"more than {FILES_MAX} files", "", "invalid")
    return sorted(entry.name for entry in entries)
