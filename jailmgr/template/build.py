"""An image's root file system, from a resolved template: the steps as data, then carried out one after another.

What is fetched is run as root of a jail only (`Runner`); what the host does to the tree, it does by fd (tree.py).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.model import CreateFile, Recipe
from jailmgr.progress import Cancelled, CancelledError, Progress
from jailmgr.template import busybox, debootstrap, inits, tree
from jailmgr.template.apt_sources import (
    Mirrors,
    choose_mirrors,
    configured_mirrors,
    parse_one_line,
    read_sources,
    without_credentials,
)
from jailmgr.template.debootstrap import ARCHITECTURES, Interaction
from jailmgr.template.log import BuildLog
from jailmgr.template.recipe import Build, File
from jailmgr.template.render import Context, render

Runner = Callable[[list[str], dict[str, str], Callable[[bytes], None]], int]
"""Runs a command as root of a jail whose (writable) root is the target, gives its output, returns its exit status.

An exception out of the output callback (a build was cancelled) must end the jail and come out of the Runner.
"""

REACH_TIMEOUT = 10
"""Seconds."""
_STATUS_MAX = 32 * 1024 * 1024
_RUN_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:" + debootstrap.PATH, "HOME": "/root", "LANG": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive", "TERM": "dumb"}  # fmt: skip
_MADE_BY_RUNTIME = ("/dev/*", "/run/*", "/tmp/*")


class Built(msgspec.Struct, frozen=True):
    """What the image's manifest takes from its build."""

    recipe: Recipe
    files: list[CreateFile]
    """Rendered when a jail is created."""
    packages: dict[str, str]
    """Name to version."""
    architecture: str


class Bootstrap(NamedTuple):
    """Fill the empty target by the build's method."""

    method: str


class Settle(NamedTuple):
    """Take away what debootstrap's first stage copied from the host or made for a real machine."""


class Inside(NamedTuple):
    """Run a command in the jail."""

    title: str
    argv: list[str]
    env: dict[str, str]


class Place(NamedTuple):
    """A file (rendered) or link of the image."""

    file: File


class Empty(NamedTuple):
    path: str


class Remove(NamedTuple):
    pattern: str


Step = Bootstrap | Settle | Inside | Place | Empty | Remove


def plan_build(build: Build) -> list[Step]:
    """All that building it takes, in order."""
    steps: list[Step] = [Bootstrap(build.method)]
    if build.method == "debootstrap":
        steps.append(Settle())
        steps.append(Inside("second stage", debootstrap.SECOND_STAGE, debootstrap.SECOND_STAGE_ENV))
    steps += [Place(file) for file in build.files if not file.create]
    steps += [Inside(f"run {' '.join(argv)}", argv, _RUN_ENV) for argv in build.run]
    steps += [Remove(pattern) for pattern in (*build.remove, *_MADE_BY_RUNTIME)]
    steps += [Empty(path) for path in build.empty]
    return steps


def describe(step: Step) -> str:
    """Return a line of text for a step of the plan."""
    if isinstance(step, Bootstrap):
        return f"fill the tree by {step.method}"
    if isinstance(step, Settle):
        return "remove what the first stage copied from the host"
    if isinstance(step, Inside):
        return step.title
    if isinstance(step, Place):
        return f"write {step.file.path}"
    return f"empty {step.path}" if isinstance(step, Empty) else f"remove {step.pattern}"


def build_image(
    root: Root,
    build: Build,
    target: str,
    run: Runner,
    cache_dir: str,
    log_path: str,
    progress: Progress,
    cancelled: Cancelled,
) -> Built:
    """Build into the empty directory `target`, which is the caller's to seal or, after an error, to remove.

    The log is kept at `log_path`, the .debs below `cache_dir`. No process is left running.
    Raises JailmgrError: `full` (disk or quota), `unavailable` (no network, or the host lacks something),
    `invalid`, `failed`; CancelledError.
    """
    log = BuildLog(log_path)
    try:
        work = _Work(root, build, target, run, cache_dir, log, progress, cancelled)
        for step in plan_build(build):
            if cancelled():
                raise CancelledError(work.what)
            work.carry_out(step)
        with tree.open_tree(target) as top:
            check_init(top, build)
            recipe = inits.complete(build.recipe, build.unset, top)
            packages = read_packages(top)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            log.full = error.strerror or "No space left on device"
            raise debootstrap.failure(f"build {build.source}", log, "") from error
        raise from_os(f"build {build.source}", error, f"The whole log: {log_path}") from error
    finally:
        log.close()
    return Built(recipe, build.create_files, packages, build.architecture)


class _Work:
    """A build under way."""

    def __init__(
        self,
        root: Root,
        build: Build,
        target: str,
        run: Runner,
        cache_dir: str,
        log: BuildLog,
        progress: Progress,
        cancelled: Cancelled,
    ) -> None:
        self.root, self.build, self.target, self.run = root, build, target, run
        self.cache_dir, self.log, self.progress, self.cancelled = cache_dir, log, progress, cancelled
        self.what = f"build {build.source}"
        self.mirrors = Mirrors()

    def carry_out(self, step: Step) -> None:
        if isinstance(step, Bootstrap):
            self.bootstrap()
            return
        if isinstance(step, Inside):
            self.inside(step)
            return
        with tree.open_tree(self.target) as top:
            if isinstance(step, Settle):
                for path in ("/proc", "/dev/*", "/etc/hostname", "/etc/resolv.conf"):
                    tree.remove(top, path)
                os.close(tree.make_directories(top, "/proc", 0o555))
            elif isinstance(step, Place):
                self.place(top, step.file)
            elif isinstance(step, Empty):
                tree.write(top, step.path, b"", 0o644)
            else:
                tree.remove(top, step.pattern)

    def bootstrap(self) -> None:
        if self.build.method == "busybox":
            busybox.bootstrap(self.target)
            return
        self.progress("Looking for a mirror", 0, 0)
        mirrors = self.find_mirrors()
        debootstrap.first_stage(
            self.build, self.target, mirrors.url, self.cache_dir, self.log, self.progress, self.cancelled
        )
        with tree.open_tree(self.target) as top:
            written = (tree.read(top, "/etc/apt/sources.list", 65536) or b"").decode(errors="replace")
        url = mirrors.url or next((entry.url for entry in parse_one_line(written)), "")
        self.mirrors = Mirrors(without_credentials(url), without_credentials(mirrors.security_url))

    def find_mirrors(self) -> Mirrors:
        """Chosen, and known to answer."""
        build = self.build
        architecture = ARCHITECTURES.get(build.architecture, "")
        configured, entries = configured_mirrors(self.root, build.distribution, build.own_mirrors), read_sources()
        mirrors = choose_mirrors(configured, entries, build.release, build.releases, architecture, reach)
        why = reach(mirrors.url, build.release) if mirrors.url else ""
        if why:
            place = f"[mirrors.{build.distribution}] url in {self.root.etc}/config.toml"
            hint = f"Check the network, or name another mirror: {place}."
            raise JailmgrError(self.what, f"{without_credentials(mirrors.url)}: {why}", hint, "unavailable")
        return mirrors if build.debootstrap and build.debootstrap.security else mirrors._replace(security_url="")

    def inside(self, step: Inside) -> None:
        reader = Interaction(self.log, self.progress)

        def output(data: bytes) -> None:
            reader.feed(data)
            if self.cancelled():
                raise CancelledError(self.what)

        if step.argv is not debootstrap.SECOND_STAGE:
            self.progress("Running the template's steps", 0, 0)
        status = self.run(step.argv, step.env, output)
        reader.finish()
        if self.cancelled():
            raise CancelledError(self.what)
        if status != 0:
            why = reader.error or (self.log.tail[-1] if self.log.tail else "")
            if step.argv is debootstrap.SECOND_STAGE:
                with tree.open_tree(self.target) as top:
                    why = debootstrap.second_stage_reason(top, self.log) or why
            told = f"{step.title} ended with status {status}" + (f": {why}" if why else "")
            raise debootstrap.failure(self.what, self.log, told)

    def place(self, top: int, file: File) -> None:
        if file.link:
            tree.link(top, file.path, file.link)
            return
        source = self.build.sources[file.source]
        content = source.encode()
        if file.source.endswith(".j2"):
            content = render(source, self.context(), f"files/{file.source} of template {self.build.template}")
        tree.write(top, file.path, content, file.mode)

    def context(self) -> Context:
        build = self.build
        return {
            "template.name": build.template,
            "template.release": build.release,
            "template.variant": build.variant,
            "template.architecture": build.architecture,
            "mirror.url": self.mirrors.url,
            "mirror.security_url": self.mirrors.security_url,
            "mirror.components": build.debootstrap.components if build.debootstrap else [],
        }


def check_init(top: int, build: Build) -> None:
    """Check that the tree has the template's init as an executable file. Raises JailmgrError `invalid`."""
    command = build.recipe.init[0]
    if not tree.is_executable(top, command):
        why = f"its init {command} is not found in the image, or not executable"
        hint = f"Add the package that has it to [packages] of template {build.template}, or set [init] command."
        raise JailmgrError(f"build {build.source}", why, hint, "invalid")


def reach(url: str, suite: str) -> str:
    """Why the mirror's Release file of `suite` can't be had; empty when it can. Waits REACH_TIMEOUT at most a try."""
    # urllib costs 60 ms to import, which only a build should pay.
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    last = ""
    for name in ("InRelease", "Release"):
        address = f"{without_credentials(url)}/dists/{suite}/{name}"
        try:
            with urlopen(Request(address, headers=_authorization(url)), timeout=REACH_TIMEOUT) as answer:
                answer.read(64)
            return ""
        except HTTPError as error:
            last = f"it has no {suite}" if error.code == 404 else f"it answers {error.code} {error.reason}"
        except URLError as error:
            reason = error.reason
            return f"can't be reached ({reason.strerror or reason if isinstance(reason, OSError) else reason})"
        except (OSError, HTTPException) as error:
            return f"can't be reached ({error})"
    return last


def _authorization(url: str) -> dict[str, str]:
    """Basic authentication (RFC 7617) where the URL has a user name."""
    from base64 import b64encode
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(url)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def read_packages(top: int) -> dict[str, str]:
    """Installed packages and versions, of dpkg's status file; none where there isn't one."""
    raw = tree.read(top, "/var/lib/dpkg/status", _STATUS_MAX)
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\n+", (raw or b"").decode(errors="replace")):
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed") and "Package" in fields:
            found[fields["Package"]] = fields.get("Version", "")
    return dict(sorted(found.items()))
