"""`exec`: whose status, which streams, what of the caller gets in, and what does not."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import termios

import pytest

from jailmgr.keys import IDS
from tests.system.conftest import MakeJail
from tests.system.instance import COMMAND, Instance, Terminal, terminal


@pytest.fixture
def jail(busybox_jail: MakeJail) -> str:
    return busybox_jail()


@pytest.mark.parametrize(
    ("script", "status"), [("true", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -15 $$", 143)]
)
def test_the_status_is_the_commands(jm: Instance, jail: str, script: str, status: int) -> None:
    jm.sh(jail, script, status=status)


def test_statuses_of_our_own(jm: Instance, jail: str) -> None:
    jm.refused("exec", "nowhere", "--", "true", status=125)
    jm("exec", status=125)
    jm("exec", "--no-such-option", jail, "--", "true", status=125)
    jm.exec(jail, "/etc/passwd", status=126)
    jm.exec(jail, "no-such-command", status=127)
    jm.exec(jail, "/no/such/command", status=127)


def test_of_a_stopped_jail(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail(start=False)
    assert "not running" in jm.refused("exec", name, "--", "true", status=125).err


def test_streams_are_separate(jm: Instance, jail: str) -> None:
    said = jm.sh(jail, "echo out; echo err >&2")
    assert (said.out, said.err) == ("out\n", "err\n")


def test_every_byte_comes_through(jm: Instance, jail: str) -> None:
    content = os.urandom(1 << 20) * 4
    done = subprocess.run(
        [COMMAND, "exec", jail, "--", "cat"],
        input=content,
        capture_output=True,
        env=jm.environment(),
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout == content


def test_user_directory_environment(jm: Instance, jail: str) -> None:
    assert jm("exec", jail, "-u", "nobody", "--", "id", "-un").out == "nobody\n"
    assert jm("exec", jail, "-w", "/var/log", "--", "pwd").out == "/var/log\n"
    assert jm("exec", jail, "-e", "A=b c", "--", "sh", "-c", 'echo "$A"').out == "b c\n"
    jm.refused("exec", jail, "-u", "nosuchuser", "--", "true", status=125)
    jm("exec", jail, "-w", "/no/such/directory", "--", "true", status=None)
    assert "JAILMGR_ROOT" not in jm.exec(jail, "env").out


def test_root_is_root_of_the_jail_only(jm: Instance, jail: str) -> None:
    assert jm.exec(jail, "id", "-u").out == "0\n"
    base, mapped, count = jm.exec(jail, "cat", "/proc/self/uid_map").out.split()
    assert (base, count) == ("0", str(IDS))
    assert int(mapped) >= 0x70000000


def test_only_three_descriptors_get_in(jm: Instance, jail: str) -> None:
    held = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        process = jm.popen("exec", jail, "--", "ls", "/proc/self/fd", stdout=subprocess.PIPE, close_fds=False)
        out, _ = process.communicate(timeout=30)
    finally:
        os.close(held)
    assert out.split() == [b"0", b"1", b"2", b"3"], "the last is ls's own"


@pytest.mark.parametrize(("path", "kind"), [("/", "directory"), ("/dev/zero", "character special file 1:5")])
def test_neither_directory_nor_device_gets_in(jm: Instance, jail: str, path: str, kind: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        argv = ["stat", "-L", "-c", "%F %t:%T", "/proc/self/fd/0"]
        process = jm.popen("exec", jail, "--", *argv, stdin=fd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=30)
    finally:
        os.close(fd)
    assert process.returncode != 0 or not out.decode().startswith(kind), (out, err)


def test_the_callers_terminal_never_gets_in(jm: Instance, jail: str) -> None:
    with terminal(jm, "exec", "-T", jail, "--", "sh", "-c", "test -t 0 || test -t 1 || echo none") as term:
        term.expect(b"none")
        assert term.wait() == 0
    with terminal(jm, "exec", "-t", jail, "--", "sh", "-c", "tty; stat -L -c %d:%i /proc/self/fd/0") as term:
        seen = term.expect(b"/dev/pts/")
        assert seen
        assert term.wait() == 0
        ours = os.fstat(term.master)
        assert f"{ours.st_dev}:{ours.st_ino}".encode() not in term.seen


def test_window_size(jm: Instance, jail: str) -> None:
    script = "echo ready; read x; stty size; until [ \"$(stty size)\" = '40 120' ]; do sleep 0.1; done; echo changed"
    with terminal(jm, "exec", "-t", jail, "--", "sh", "-c", script) as term:
        _resize(term, 31, 97)
        term.expect(b"ready")
        term.write(b"\n")
        term.expect(b"31 97")
        _resize(term, 40, 120)
        term.expect(b"changed")
        assert term.wait() == 0


def _resize(term: Terminal, rows: int, columns: int) -> None:
    fcntl.ioctl(term.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def test_control_c_reaches_the_command(jm: Instance, jail: str) -> None:
    with terminal(jm, "exec", "-t", jail, "--", "sh", "-c", "trap 'exit 42' INT; echo ready; sleep 60 & wait") as term:
        term.expect(b"ready")
        term.write(b"\x03")
        assert term.wait() == 42


def test_signals_are_passed_on(jm: Instance, jail: str) -> None:
    script = "trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    process = jm.popen("exec", jail, "--", "sh", "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == (b"got\n", 3)


def test_what_runs_has_what_init_has(jm: Instance, jail: str) -> None:
    for kind in ("user", "mnt", "pid", "net", "uts", "ipc", "cgroup", "time"):
        inside = jm.exec(jail, "readlink", f"/proc/self/ns/{kind}").out.strip()
        pid = jm.info(jail)["init_pid"]
        assert inside == os.readlink(f"/proc/{pid}/ns/{kind}"), kind
    script = "grep -h -E '^(CapBnd|Seccomp|NoNewPrivs):' /proc/1/status; echo --; "
    init, _, own = jm.sh(jail, script + "grep -h -E '^(CapBnd|Seccomp|NoNewPrivs):' /proc/self/status").out.partition(
        "--\n"
    )
    assert init == own
    assert "Seccomp:\t2" in init


def test_what_runs_is_in_the_leaf(jm: Instance, jail: str) -> None:
    told = jm.exec(jail, "cat", "/proc/self/cgroup").out.splitlines()
    assert [line for line in told if line.startswith("0::")] == ["0::/.exec"]
    assert "0::/" in jm.exec(jail, "cat", "/proc/1/cgroup").out.splitlines()


def test_many_at_once(jm: Instance, jail: str) -> None:
    running = [
        jm.popen(
            "exec", jail, "--", "sh", "-c", f"echo {n}; exit {n}", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        for n in range(20)
    ]
    for n, process in enumerate(running):
        out, _ = process.communicate(timeout=60)
        assert (out, process.returncode) == (f"{n}\n".encode(), n)


def test_shell_is_a_login_shell(jm: Instance, jail: str) -> None:
    with terminal(jm, "shell", jail) as term:
        term.prompt()
        term.write(b"echo $((6 * 7)) $0; exit 5\n")
        term.expect(b"42 -")
        assert term.wait() == 5
