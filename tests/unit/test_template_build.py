"""Builds: the plan, debootstrap's stream and command line, a busybox image, and what happens when one fails."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.template import build as building
from jailmgr.template import debootstrap, recipe, tree
from jailmgr.template.build import Bootstrap, Empty, Inside, Place, Remove, Settle, build_image, plan_build
from jailmgr.template.log import LOG_MAX, BuildLog


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(f"{tmp_path}/lib", f"{tmp_path}/run", f"{tmp_path}/etc", "aaaaa", str(tmp_path))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[BuildLog]:
    made = BuildLog(f"{tmp_path}/log")
    yield made
    made.close()


Told = list[tuple[str, int, int]]


def no_runner(_argv: list[str], _env: dict[str, str], _output: Callable[[bytes], None]) -> int:
    raise AssertionError("ran something")


def never() -> bool:
    return False


def test_plan_of_debian(root: Root) -> None:
    steps = plan_build(recipe.resolve(root, "debian/trixie"))
    kinds = [type(step) for step in steps]
    assert kinds[:3] == [Bootstrap, Settle, Inside]
    assert kinds == sorted(kinds, key=[Bootstrap, Settle, Inside, Place, Remove, Empty].index)
    assert steps[-1] == Empty("/etc/machine-id")
    assert Remove("/var/lib/dbus/machine-id") in steps
    placed = {step.file.path for step in steps if isinstance(step, Place)}
    assert {"/etc/apt/sources.list", "/etc/locale.conf"} <= placed
    assert not {"/etc/hostname", "/etc/resolv.conf"} & placed


def test_progress_of_a_stage(log: BuildLog) -> None:
    told: Told = []
    reader = debootstrap.Interaction(log, lambda *step: told.append(step))
    stream = b"""\
I: RETRIEVING
IA: InRelease
IF: Retrieving %s %s
P: 2 2 SIZEDEBS
PF: Finding package sizes
P: 0 900 DOWNDEBS
PF: Downloading packages
I: VALIDATING
IA: less
IA: 590
IF: Validating %s %s
I: VALIDATING
IF: Validating %s %s
P: 900 900 DOWNDEBS
P: 1 3 EXTRACTPKGS
PF: Extracting packages
Selecting previously unselected package less.
P: 5 3 UNPACKREQ
P: x 3 UNPACKREQ
P: 99999999999999999999 3 UNPACKREQ
P: 50 100
"""
    for byte in stream:
        reader.feed(bytes([byte]))
    reader.finish()
    assert told == [
        ("Fetching packages", 1, 2),
        ("Fetching packages", 2, 2),
        ("Unpacking the base", 1, 3),
        ("Unpacking required packages", 3, 3),
    ]
    log.close()
    assert Path(log.path).read_text().splitlines() == [
        "I: Retrieving InRelease ",
        "I: Validating less 590",
        "I: Validating  ",
        "Selecting previously unselected package less.",
    ]


def test_error_of_a_stage(log: BuildLog) -> None:
    reader = debootstrap.Interaction(log, lambda *_step: None)
    reader.feed(b"E: NOGETREL\nEA: http://m.example/Release\nEF: Failed getting release file %s, 100%%\nE: X")
    reader.finish()
    assert reader.error == "Failed getting release file http://m.example/Release, 100%"
    assert reader.no_network


def test_a_line_without_end_does_not_fill_memory(log: BuildLog) -> None:
    reader = debootstrap.Interaction(log, lambda *_step: None)
    for _ in range(100):
        reader.feed(b"x" * 60000)
    assert len(reader._rest) <= 2 * 64 * 1024


def test_log_is_bounded(log: BuildLog) -> None:
    for _ in range(LOG_MAX // 100_000 + 10):
        log.line(b"x" * 100_000)
    log.line(b"\x1b[2Jlast")
    log.close()
    assert os.path.getsize(log.path) <= LOG_MAX + 1000
    assert os.stat(log.path).st_mode & 0o777 == 0o600
    assert log.tail[-1] == "?[2Jlast"


@pytest.mark.parametrize("words", ["No space left on device", "Disk quota exceeded"])
def test_full_disk_is_told_as_such(log: BuildLog, words: str) -> None:
    log.line(f"tar: ./usr: Cannot write: {words}".encode())
    for _ in range(100):
        log.line(b"later")
    error = debootstrap.failure("build debian/bookworm", log, "Tried to extract package, but file already exists.")
    assert (error.code, error.why) == ("full", f"the disk is full ({words})")


def test_wgets_reason_is_told(log: BuildLog) -> None:
    log.line(b"wget: unable to resolve host address 'm.example'")
    error = debootstrap.failure("build x", log, "Failed getting release file")
    assert "unable to resolve" in error.why
    assert log.path in error.hint


def debian(tmp_path: Path, root: Root) -> recipe.Build:
    """The template, with a keyring that is there."""
    build = recipe.resolve(root, "debian")
    keyring = tmp_path / "debian-archive-keyring.gpg"
    keyring.write_bytes(b"")
    assert build.debootstrap is not None
    changed = recipe.Debootstrap(str(keyring), script=build.debootstrap.script)
    return msgspec.structs.replace(build, debootstrap=changed, architecture="x86_64")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with debootstrap's programs and a script for bookworm and sid."""
    for program in ("debootstrap", "wget", "gpgv"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "scripts").mkdir()
    for script in ("bookworm", "sid"):
        (tmp_path / "scripts" / script).touch()
    monkeypatch.setattr(debootstrap, "PATH", str(tmp_path))
    monkeypatch.setattr(debootstrap, "SCRIPTS", f"{tmp_path}/scripts")
    return tmp_path


def test_command_line(host: Path, root: Root) -> None:
    build = debian(host, root)
    argv = debootstrap.first_stage_argv(build, "/target", "http://m.example/debian", "/cache")
    assert {"--foreign", "--force-check-gpg", "--arch=amd64", "--variant=minbase", "--cache-dir=/cache"} <= {*argv}
    assert argv[-3:] == ["bookworm", "/target", "http://m.example/debian"]
    assert f"--include={','.join(build.packages)}" in argv
    assert debootstrap.first_stage_argv(build, "/target", "")[-2:] == ["bookworm", "/target"]
    newer = msgspec.structs.replace(build, release="trixie")
    assert debootstrap.first_stage_argv(newer, "/target", "")[-4:] == ["trixie", "/target", "", "sid"]


@pytest.mark.parametrize("lacks", ["debootstrap", "wget", "gpgv", "debian-archive-keyring.gpg"])
def test_what_the_host_lacks(host: Path, root: Root, lacks: str) -> None:
    build = debian(host, root)
    (host / lacks).unlink()
    with pytest.raises(JailmgrError) as refused:
        debootstrap.first_stage_argv(build, "/target", "")
    assert refused.value.code == "unavailable"
    assert f"apt-get install {lacks.removesuffix('.gpg')}" in refused.value.hint


def test_unknown_architecture(host: Path, root: Root) -> None:
    build = msgspec.structs.replace(debian(host, root), architecture="vax")
    with pytest.raises(JailmgrError, match="vax"):
        debootstrap.first_stage_argv(build, "/target", "")


def test_cache_drops_what_was_superseded(tmp_path: Path) -> None:
    cache, archives = tmp_path / "cache", tmp_path / "archives"
    cache.mkdir()
    archives.mkdir()
    for name in ("less_1_amd64.deb", "less_2_amd64.deb", "nano_1_amd64.deb", "vim_1_amd64.deb", "partial"):
        (cache / name).touch()
    os.utime(cache / "vim_1_amd64.deb", (0, 0))
    (archives / "less_2_amd64.deb").touch()
    debootstrap._prune(str(cache), str(archives))
    assert sorted(os.listdir(cache)) == ["less_2_amd64.deb", "nano_1_amd64.deb", "partial"]


def test_two_builds_share_no_cache_at_once(tmp_path: Path, root: Root) -> None:
    build = recipe.resolve(root, "debian")
    with debootstrap._cache(str(tmp_path), build) as first, debootstrap._cache(str(tmp_path), build) as second:
        assert os.path.isdir(f"{first}/partial")
        assert second == ""


def build_busybox(root: Root, target: Path, cancelled: Callable[[], bool] = never) -> building.Built:
    target.mkdir()
    log_path = f"{target}.log"
    build = recipe.resolve(root, "busybox")
    return build_image(root, build, str(target), no_runner, f"{target}.cache", log_path, lambda *_step: None, cancelled)


def test_busybox(root: Root, tmp_path: Path) -> None:
    target = tmp_path / "rootfs"
    built = build_busybox(root, target)
    assert built.recipe.stop_signal == "SIGUSR2"
    assert {file.path for file in built.files} == {"/etc/hostname", "/etc/hosts"}
    assert built.packages == {}
    assert os.access(target / "sbin/init", os.X_OK)
    assert not os.path.islink(target / "sbin/init")
    assert os.readlink(target / "bin/sh") == "/bin/busybox"
    assert (target / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert os.listdir(target / "dev") == []
    checked = subprocess.run(
        [target / "bin/busybox", "sh", "-n", target / "sbin/init"], capture_output=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_cancelled_at_once(root: Root, tmp_path: Path) -> None:
    with pytest.raises(JailmgrError, match="cancelled") as given_up:
        build_busybox(root, tmp_path / "rootfs", lambda: True)
    assert given_up.value.code == "conflict"
    assert os.listdir(tmp_path / "rootfs") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_while_the_host_writes(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def write(*_args: object) -> None:
        raise OSError(number, os.strerror(number), "/etc/passwd")

    monkeypatch.setattr(tree, "write", write)
    with pytest.raises(JailmgrError) as failed:
        build_busybox(root, tmp_path / "rootfs")
    assert failed.value.code == "full"
    assert os.strerror(number) in failed.value.why


def test_step_in_the_jail_that_fails(root: Root, tmp_path: Path) -> None:
    folder = Path(root.etc, "templates", "trial")
    folder.mkdir(parents=True)
    text = 'description = "x"\nmethod = "busybox"\nreleases = ["x"]\n[[run]]\ncommand = ["/bin/false", "a"]\n'
    (folder / "template.toml").write_text(text)
    target = tmp_path / "rootfs"
    target.mkdir()
    ran: list[list[str]] = []

    def run(argv: list[str], _env: dict[str, str], output: Callable[[bytes], None]) -> int:
        ran.append(argv)
        output(b"some words\nlast wo")
        output(b"rds")
        return 3

    build = recipe.resolve(root, "trial")
    with pytest.raises(JailmgrError, match="ended with status 3: last words"):
        build_image(root, build, str(target), run, f"{target}.cache", f"{target}.log", lambda *_step: None, never)
    assert ran == [["/bin/false", "a"]]
    assert Path(f"{target}.log").read_text() == "some words\nlast words\n"


def test_cancelled_in_the_jail(root: Root, log: BuildLog, tmp_path: Path) -> None:
    stop: list[bool] = []

    def run(_argv: list[str], _env: dict[str, str], output: Callable[[bytes], None]) -> int:
        stop.append(True)
        output(b"x\n")
        raise AssertionError("went on")

    work = building._Work(
        root, recipe.resolve(root, "busybox"), str(tmp_path), run, "", log, lambda *_step: None, lambda: bool(stop)
    )
    with pytest.raises(JailmgrError, match="cancelled"):
        work.carry_out(Inside("x", ["/x"], {}))


def test_packages_of_dpkgs_status(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "Package: b\nStatus: install ok installed\nDescription: x\n Version: no\nVersion: 1:2-3\n\n"
        "Package: a\nStatus: install ok installed\nVersion: 1\n\n"
        "Package: c\nStatus: deinstall ok config-files\nVersion: 1\n"
    )
    with tree.open_tree(str(tmp_path)) as top:
        assert building.read_packages(top) == {"a": "1", "b": "1:2-3"}


def test_mirror_that_cannot_be_reached() -> None:
    assert "can't be reached" in building.reach("http://127.0.0.1:1/debian", "bookworm")


def test_failing_second_stage_names_the_package(root: Root, log: BuildLog, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "debootstrap").mkdir(parents=True)
    (target / "debootstrap/debootstrap.log").write_text(
        "Setting up nginx (1.2)\ncannot bind\ndpkg: error processing package nginx (--configure):\n"
        " installed nginx package post-installation script subprocess returned error exit status 3\n"
        "Errors were encountered while processing:\n nginx\n"
    )

    def run(_argv: list[str], _env: dict[str, str], output: Callable[[bytes], None]) -> int:
        output(b"W: See the log for details\n")
        return 1

    build = recipe.resolve(root, "debian")
    work = building._Work(root, build, str(target), run, "", log, lambda *_step: None, never)
    with pytest.raises(JailmgrError) as refused:
        work.carry_out(Inside("second stage", debootstrap.SECOND_STAGE, {}))
    assert "package nginx failed" in refused.value.why
    assert "cannot bind" in refused.value.why
    assert "exit status 3" in refused.value.why


@pytest.mark.parametrize(("mode", "there"), [(0o755, True), (0o644, True), (0o755, False)])
def test_image_without_an_init_is_refused(root: Root, tmp_path: Path, mode: int, there: bool) -> None:
    build = recipe.resolve(root, "debian")
    (tmp_path / "sbin").mkdir()
    if there:
        # As in Debian: an absolute link, resolved inside the tree.
        (tmp_path / "real").touch()
        (tmp_path / "real").chmod(mode)
        (tmp_path / "sbin/init").symlink_to("/real")
    with tree.open_tree(str(tmp_path)) as top:
        if there and mode == 0o755:
            building.check_init(top, build)
            return
        with pytest.raises(JailmgrError, match=r"init /sbin/init") as refused:
            building.check_init(top, build)
    assert refused.value.code == "invalid"


def test_templates_of_a_distribution_share_the_debs(root: Root, tmp_path: Path) -> None:
    build = recipe.resolve(root, "debian")
    with debootstrap._cache(str(tmp_path), build) as first:
        pass
    with debootstrap._cache(str(tmp_path), msgspec.structs.replace(build, template="mine")) as second:
        assert first == second != ""
