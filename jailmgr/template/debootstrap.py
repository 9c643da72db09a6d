"""debootstrap(8), in its two stages: the host checks signatures and unpacks, a jail runs the packages' scripts.

Both stages tell how far they are by the lines meant for debian-installer (`P:`, `I:`, `W:`, `E:` with arguments and
format apart): they know of totals, which the plain output doesn't. They come mixed with the log, on one stream.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from jailmgr.errors import JailmgrError
from jailmgr.progress import Cancelled, CancelledError, Progress
from jailmgr.runtime.mount_namespace import enter_own
from jailmgr.template import tree
from jailmgr.template.log import BuildLog
from jailmgr.template.recipe import Build

SCRIPTS = "/usr/share/debootstrap/scripts"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
ARCHITECTURES = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "armhf", "i686": "i386", "ppc64le": "ppc64el",
    "riscv64": "riscv64", "s390x": "s390x",
}  # fmt: skip
"""uname(2)'s word to dpkg's."""

_TITLES = {
    "DOWNPKGS": "Fetching package lists",
    "EXTRACTPKGS": "Unpacking the base",
    "INSTCORE": "Installing core packages",
    "UNPACKREQ": "Unpacking required packages",
    "CONFREQ": "Configuring required packages",
    "UNPACKBASE": "Unpacking packages",
    "CONFBASE": "Configuring packages",
}
_NO_NETWORK = {"NOGETREL", "NOGETRELSIG", "COULDNTDL", "COULDNTDLPKGS"}
"""debootstrap's names of the errors that come of a mirror that can't be reached."""
_ERROR_MAX = 300
_MESSAGE = re.compile(rb"([IWEP])(A|F)?: (.*)\Z", re.DOTALL)
_FIGURES = re.compile(r"(\d{1,18}) (\d{1,18}) (\S+)", re.ASCII)
_POLL_MS = 200
_LINE_MAX = 64 * 1024
_WGETRC = "tries = 3\ntimeout = 15\nwaitretry = 1\nverbose = off\nlogfile = /dev/fd/3\n"
"""wget's own patience is 20 tries with no limit on connecting; and its words belong in the log."""

_CONTAIN = (
    "setpriv", "--pdeathsig", "KILL", "--bounding-set", "-sys_resource",
    "unshare", "--pid", "--fork", "--kill-child=KILL",
)  # fmt: skip
"""In a pid namespace all of it ends with its first process, which ends with the thread that started it. Who has
CAP_SYS_RESOURCE is held by no project quota."""
_NEEDED = ("/dev", "/etc", "/proc", "/tmp", "/usr/bin", "/usr/lib", "/usr/share", "/var/lib")
"""Of the host's, beside where it builds; no mount of it reaches the host."""
_ONE_STREAM = ("/bin/sh", "-c", 'exec "$@" 3>&1 2>&1', "sh")

_SECOND = (
    "container=lxc; export container; exec /debootstrap/debootstrap --second-stage --debian-installer 3>&1 2>&1 9</proc"
)
SECOND_STAGE = ["/bin/sh", "-c", _SECOND]
"""Run as root of a jail on the unpacked tree. `container=lxc` spares device nodes, which can't be made there; fd 9
keeps /proc busy, for debootstrap would unmount it, and a user namespace that has none to show can't mount another."""
SECOND_STAGE_ENV = {
    "PATH": PATH, "HOME": "/root", "LANG": "C", "DEBIAN_FRONTEND": "noninteractive", "TERM": "dumb",
}  # fmt: skip


class Interaction:
    """Reads a stage's stream: progress to `progress`, all else to `log`, the last error to `error`."""

    def __init__(self, log: BuildLog, progress: Progress) -> None:
        self.log = log
        self.progress = progress
        self.error = ""
        self.no_network = False
        self._rest = b""
        self._kind = ""
        self._name = ""
        self._args: list[str] = []
        self._packages = 0
        self._fetched: int | None = None

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_MAX:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._line(line)

    def finish(self) -> None:
        if self._rest:
            self._line(self._rest)
            self._rest = b""

    def _line(self, line: bytes) -> None:
        match = _MESSAGE.match(line)
        if match is None:
            if line.strip():
                self.log.line(line)
            return
        kind, part, text = match[1].decode(), (match[2] or b"").decode(), match[3].decode(errors="replace")
        if not part:
            self._kind, self._name, self._args = kind, text, []
            if kind == "P":
                self._progress(text)
            elif kind == "I" and text == "VALIDATING" and self._fetched is not None:
                self._fetched += 1
                self.progress("Fetching packages", min(self._fetched, self._packages), self._packages)
        elif part == "A":
            self._args.append(text)
        elif kind != "P":
            told = self._format(text)
            self.log.line(f"{kind}: {told}".encode())
            if kind == "E":
                self.error = told[:_ERROR_MAX]
                self.no_network = self._name in _NO_NETWORK

    def _format(self, text: str) -> str:
        """printf's %s, each with the next argument."""
        args = iter(self._args)
        told = re.sub(r"%(.)", lambda match: next(args, "") if match[1] == "s" else match[1], text)
        return told.replace("\\n", " ")

    def _progress(self, text: str) -> None:
        match = _FIGURES.match(text)
        if match is None:
            return
        done, total, name = int(match[1]), int(match[2]), match[3]
        if name == "SIZEDEBS":
            self._packages = total
        elif name == "DOWNDEBS":
            self._fetched = 0 if done < total else None
        elif name in _TITLES:
            self._fetched = None
            self.progress(_TITLES[name], min(done, total), total)


def first_stage(
    build: Build, target: str, mirror: str, cache_dir: str, log: BuildLog, progress: Progress, cancelled: Cancelled
) -> None:
    """Fetch (signatures checked) and unpack into `target`, running nothing of what was fetched.

    `mirror` may be empty: debootstrap's default. The .debs, those that the second stage installs as well, are kept
    below `cache_dir`/debs. However it ends, no process and no mount of it is left; `target` is the caller's to remove.
    Raises JailmgrError: `unavailable` without debootstrap or its keyring, `full`, `failed`; CancelledError.
    """
    what = f"build {build.source}"
    with _cache(cache_dir, build) as cache:
        wgetrc = f"{cache_dir}/wgetrc"
        _write_once(wgetrc, _WGETRC)
        argv = [*_CONTAIN, *_ONE_STREAM, *first_stage_argv(build, target, mirror, cache)]
        reader = Interaction(log, progress)

        def run() -> int:
            enter_own([*_NEEDED, target, cache_dir])
            return _run(argv, _environment(wgetrc), reader, cancelled, what)

        with ThreadPoolExecutor(1) as thread:
            status = thread.submit(run).result()
        if status != 0:
            error = failure(what, log, reader.error or f"debootstrap ended with status {status}")
            if reader.no_network and error.code == "failed":
                error.code = "unavailable"
            raise error
        if cache:
            _prune(cache, f"{target}/var/cache/apt/archives")


def first_stage_argv(build: Build, target: str, mirror: str, cache: str = "") -> list[str]:
    """debootstrap's command line; JailmgrError `unavailable` naming what the host lacks."""
    what, told = f"build {build.source}", build.debootstrap
    if told is None:
        raise JailmgrError(what, f"template {build.template} has no [debootstrap]", "", "invalid")
    for program in ("debootstrap", "wget", "gpgv"):
        if shutil.which(program, path=PATH) is None:
            raise JailmgrError(
                what, f"the host has no {program}", f"Install it: apt-get install {program}", "unavailable"
            )
    if not os.path.isfile(told.keyring):
        package = os.path.basename(told.keyring).removesuffix(".gpg")
        why = f"the keyring that its signatures are checked with is missing ({told.keyring})"
        raise JailmgrError(what, why, f"Install it: apt-get install {package}", "unavailable")
    if build.architecture not in ARCHITECTURES:
        raise JailmgrError(what, f"no Debian architecture is known for {build.architecture}", "", "unavailable")
    script = []
    if not os.path.exists(f"{SCRIPTS}/{build.release}"):
        if not told.script or not os.path.exists(f"{SCRIPTS}/{told.script}"):
            why = f"the host's debootstrap doesn't know {build.release}"
            raise JailmgrError(what, why, "Install a newer debootstrap.", "unavailable")
        script = [told.script]
    options = [
        "--foreign",
        "--debian-installer",
        "--force-check-gpg",
        f"--keyring={told.keyring}",
        f"--arch={ARCHITECTURES[build.architecture]}",
        f"--components={','.join(told.components)}",
    ]
    if told.variant != "-":
        options.append(f"--variant={told.variant}")
    if build.packages:
        options.append(f"--include={','.join(build.packages)}")
    if cache:
        options.append(f"--cache-dir={cache}")
    return ["debootstrap", *options, build.release, target, *([mirror, *script] if mirror or script else [])]


def failure(what: str, log: BuildLog, why: str) -> JailmgrError:
    """The error of a build that ended badly; a full disk is told as such, whatever debootstrap made of it."""
    if log.full:
        hint = "Free some space (`jailmgr image list` shows images no jail uses), then try again."
        return JailmgrError(what, f"the disk is full ({log.full})", hint, "full")
    wget = [line for line in log.tail if re.search(r"ERROR \d|failed: |unable to resolve|timed out", line)]
    reason = f" ({wget[-1].strip()})" if wget else ""
    return JailmgrError(what, f"{why}{reason}", f"The whole log: {log.path}")


_DPKG_ERROR = re.compile(r"dpkg: error processing (?:package|archive) (\S+)")
_DEBOOTSTRAP_LOG = "/debootstrap/debootstrap.log"
_LOG_MAX = 4 * 1024 * 1024
_LAST_LINES = 5


def second_stage_reason(top: int, log: BuildLog) -> str:
    """Return which packages failed and the last lines of the reason; empty where no log has any.

    debootstrap keeps dpkg's words in its own log in the tree at `top`, which the caller removes: they go into `log`.
    """
    raw = tree.read(top, _DEBOOTSTRAP_LOG, _LOG_MAX) or b""
    own = [line for line in raw.decode(errors="replace").splitlines() if line.strip()]
    for line in own[-200:]:
        log.line(line.encode())
    lines = own or list(log.tail)
    failed = [match[1] for line in lines if (match := _DPKG_ERROR.search(line))]
    names = ", ".join(dict.fromkeys(name.rpartition("/")[2].removesuffix(":") for name in failed))
    first = next((index for index, line in enumerate(lines) if _DPKG_ERROR.search(line)), len(lines))
    # dpkg's reason is in the line after its error; what the package's script wrote is before it.
    shown = lines[max(0, first - _LAST_LINES + 2) : first + 2] if failed else lines[-_LAST_LINES:]
    words = "; ".join("".join(char if char.isprintable() else "?" for char in line.strip())[:200] for line in shown)
    return f"package {names} failed: {words}" if names else words


def _write_once(path: str, text: str) -> None:
    """A file that any number of builds may write at the same time, for they write the same."""
    new = f"{path}.{threading.get_native_id()}"
    with open(new, "w", encoding="ascii") as file:
        file.write(text)
    os.replace(new, path)


def _environment(wgetrc: str) -> dict[str, str]:
    """`container=lxc` spares debootstrap's trial of a device node: the pool is mounted nodev."""
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    return {"PATH": PATH, "HOME": "/", "LANG": "C", "WGETRC": wgetrc, "container": "lxc", **proxies}


def _run(argv: list[str], env: dict[str, str], reader: Interaction, cancelled: Cancelled, what: str) -> int:
    process = subprocess.Popen(
        argv,
        env=env,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    stream = process.stdout.fileno()
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    try:
        while True:
            if cancelled():
                raise CancelledError(what)
            if not poll.poll(_POLL_MS):
                continue
            data = os.read(stream, 65536)
            if not data:
                break
            reader.feed(data)
        reader.finish()
        return process.wait()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        while os.read(stream, 65536):
            pass
        process.stdout.close()


@contextmanager
def _cache(cache_dir: str, build: Build) -> Iterator[str]:
    """Return the locked directory of .debs of a distribution's release; empty while another build has it locked.

    Templates of one distribution share the directory: debootstrap checks each .deb by its hash in the signed list.
    """
    path = f"{cache_dir}/debs/{build.distribution}-{build.release}-{build.architecture}"
    os.makedirs(f"{path}/partial", mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            path = ""
        yield path
    finally:
        os.close(fd)


def _prune(cache: str, archives: str) -> None:
    """Drop the .debs that newer ones of the same package have taken the place of, and others not used for a month."""
    used = set(os.listdir(archives))
    packages = {name.split("_")[0] for name in used}
    for name in os.listdir(cache):
        if not name.endswith(".deb"):
            continue
        path = f"{cache}/{name}"
        if name in used:
            os.utime(path)
        elif name.split("_")[0] in packages or os.stat(path).st_mtime < time.time() - 30 * 86400:
            os.unlink(path)
