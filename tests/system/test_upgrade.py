"""Another release's engine comes: supervisors go over to it in place, and nothing in their jails notices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import jailmgr
from jailmgr.runtime import attach, protocol
from tests.system.instance import Instance, alive, terminal, until
from tests.system.test_back_off import gets_up, in_back_off
from tests.system.test_supervision import set_init, stopped

ENGINE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from jailmgr.engine.main import main; sys.exit(main())"
RELEASE = "99.0"
STUBBORN = "trap '' TERM USR1 USR2 INT PWR; mount -t proc proc /proc 2>/dev/null; while :; do sleep 1; done"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the package that says it is of another release."""
    package = Path(jailmgr.__file__).parent
    shutil.copytree(package, tmp_path / "jailmgr", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package.parent / "templates", tmp_path / "templates")
    shutil.copytree(package.parent / "packaging" / "apparmor", tmp_path / "packaging" / "apparmor")
    (tmp_path / "jailmgr" / "__init__.py").write_text(f'__version__ = "{RELEASE}"\n')
    return tmp_path


@contextmanager
def engine_of(release: Path, instance: Instance) -> Iterator[None]:
    """The release's engine, until the block ends."""
    instance("engine", "stop")
    argv = [sys.executable, "-I", "-c", ENGINE, str(release)]
    with subprocess.Popen(argv, env=instance.environment(), stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: instance.json("engine", "status")["version"] == RELEASE, 30, "the new engine serves")
            yield
        finally:
            process.terminate()


def said(instance: Instance) -> dict[str, object]:
    with attach.connect(instance.root, "default", start=False) as supervisor:
        return dict(supervisor.ask("hello").body)


def test_ten_jails_and_an_open_exec(new_instance: Callable[[], Instance], release: Path) -> None:
    instance = new_instance()
    names = [f"j{number}" for number in range(10)]
    for name in names:
        instance("launch", "busybox", name)
    set_init(instance, names[9], STUBBORN)
    instance("start", names[9])
    before = {row["name"]: row["init_pid"] for row in instance.json("list")}
    supervisor = instance.info(names[0])["supervisor_pid"]
    assert said(instance)["release"] == jailmgr.__version__

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    echo = instance.popen("exec", names[0], "--", "sh", "-c", "while read word; do echo $word; done; exit 7", **pipes)
    signalled = instance.popen("exec", names[1], "--", "sleep", "600", **pipes)
    instance.sh(names[2], "while :; do echo tick; sleep 1; done >/dev/console 2>&1 </dev/null &")
    follower = instance.popen("logs", "-f", "-n", "0", names[2], stdout=subprocess.PIPE)
    stopping = instance.popen("stop", "--timeout", "20", names[9])
    assert echo.stdin is not None
    assert echo.stdout is not None
    assert follower.stdout is not None
    echo.stdin.write(b"one\n")
    echo.stdin.flush()
    assert echo.stdout.readline() == b"one\n"
    assert follower.stdout.readline() == b"tick\r\n"
    with terminal(instance, "shell", names[3]) as shell:
        shell.prompt()
        # The stop is asked for by the engine, which would wait for it before it ends.
        os.kill(instance.engine_pid(), 9)
        with engine_of(release, instance):
            until(lambda: said(instance)["release"] == RELEASE, 20, "the supervisor goes over")
            assert said(instance)["pid"] == supervisor
            after = {row["name"]: row["init_pid"] for row in instance.json("list") if row["name"] != names[9]}
            assert after == {name: before[name] for name in names[:9]}

            echo.stdin.write(b"two\n")
            echo.stdin.flush()
            assert echo.stdout.readline() == b"two\n"
            echo.stdin.close()
            assert echo.wait(20) == 7
            signalled.terminate()
            assert signalled.wait(20) == 128 + 15
            shell.write(b"echo still-$((40 + 2))\n")
            shell.expect(b"still-42")
            shell.write(b"exit 5\n")
            assert shell.wait() == 5
            instance.sh(names[2], "echo shown > /dev/console")
            while b"shown" not in (line := follower.stdout.readline()):
                assert b"tick" in line

            instance.sh(names[4], "poweroff", status=None)
            assert stopped(instance, names[4])["kind"] == "poweroff", "told apart by the inits' parent alone"
            instance.sh(names[5], "reboot", status=None)
            until(lambda: instance.info(names[5])["init_pid"] not in (None, before[names[5]]), 20, "it reboots")
            instance("restart", "--force", names[6])
            assert instance.exec(names[6], "echo", "here").out == "here\n"
            assert stopped(instance, names[9])["by"] == "admin", "the stop that was asked for before goes on"
            assert not alive(before[names[9]])
            assert instance.info(names[0])["supervisor_pid"] == supervisor
    for process in (echo, signalled, follower, stopping):
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def test_a_jail_in_its_back_off(new_instance: Callable[[], Instance], release: Path) -> None:
    """The only one of its tenant: its supervisor goes over all the same, and knows when to start it."""
    instance = new_instance()
    instance("launch", "busybox", "one", "-c", "restart=always")
    in_back_off(instance, "one")
    supervisor = said(instance)["pid"]
    with engine_of(release, instance):
        until(lambda: said(instance)["release"] == RELEASE, 20, "the supervisor goes over")
        assert said(instance)["pid"] == supervisor
        gets_up(instance, "one")
        assert instance.info("one")["restarts"] == 4


def test_a_release_that_does_not_begin_changes_nothing(new_instance: Callable[[], Instance], release: Path) -> None:
    instance = new_instance()
    instance("launch", "busybox", "one")
    init, supervisor = instance.info("one")["init_pid"], instance.info("one")["supervisor_pid"]
    for name, old, new in (
        ("reexec", "import", "def broken(:"),
        ("protocol", "SNAPSHOTS = (1, 2)", "SNAPSHOTS = (3,)"),
    ):
        source = release / "jailmgr" / "runtime" / f"{name}.py"
        whole = source.read_text()
        source.write_text(whole.replace(old, new, 1))
        with engine_of(release, instance):
            assert said(instance) == {"v": 1, "pid": supervisor, "release": jailmgr.__version__, "snapshot": 2}
        source.write_text(whole)
    with engine_of(release, instance):
        assert instance.info("one")["init_pid"] == init
        assert instance.exec("one", "echo", "here").out == "here\n"


def test_a_users_session_stays_what_it_was(new_instance: Callable[[], Instance], release: Path) -> None:
    """Admitted to one jail for some requests by the release before, it is no more than that to the next."""
    instance = new_instance()
    instance("launch", "busybox", "one")
    instance("tenant", "set", "default", "users=root")
    sock = protocol.connect(instance.root.users, protocol.SESSIONS)
    try:
        protocol.send(sock, {"v": protocol.VERSION, "tenant": "default", "jail": "one"})
        assert (admitted := protocol.receive(sock)) is not None
        assert "error" not in admitted.body
        with engine_of(release, instance):
            until(lambda: said(instance)["release"] == RELEASE, 20, "the supervisor goes over")
            for op, known in (("hello", True), ("status", False), ("stop", False), ("reexec", False)):
                protocol.send(sock, {"v": protocol.VERSION, "op": op, "jail": "one"})
                assert (answer := protocol.receive(sock)) is not None
                assert ("error" not in answer.body) is known, answer.body
    finally:
        sock.close()


def test_what_is_half_done_is_waited_for(new_instance: Callable[[], Instance], release: Path) -> None:
    """A copy goes by a child that a snapshot can't tell of."""
    instance = new_instance()
    instance("launch", "busybox", "one")
    supervisor = instance.info("one")["supervisor_pid"]
    idle = instance.info("one")["usage"]["processes"]
    copying = instance.popen("cp", "-", "one:/root/", stdin=subprocess.PIPE)
    assert copying.stdin is not None
    content = subprocess.run(["tar", "-c", "-C", "/etc", "hostname"], capture_output=True, check=True).stdout
    copying.stdin.write(content[:512])
    copying.stdin.flush()
    until(lambda: instance.info("one")["usage"]["processes"] > idle, 20, "it is in the jail")
    with engine_of(release, instance):
        assert said(instance)["release"] == jailmgr.__version__
        copying.stdin.write(content[512:])
        copying.stdin.close()
        assert copying.wait(20) == 0
        until(lambda: said(instance)["release"] == RELEASE, 20, "it goes over once the copy is done")
        assert said(instance)["pid"] == supervisor
        assert instance.exec("one", "cat", "/root/hostname").out == Path("/etc/hostname").read_text()
