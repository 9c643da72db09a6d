"""`exec` where stdin, stdout and stderr are files of the host, closed, or one and the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.runtime.attach import connect
from tests.system.conftest import MakeJail
from tests.system.instance import COMMAND, Instance
from tests.system.users import ALICE, alices_tenant, become


@pytest.fixture
def jail(busybox_jail: MakeJail) -> str:
    return busybox_jail()


def shell(jm: Instance, script: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a line of the host's shell; `$j` is the command."""
    env = jm.environment(j=COMMAND, **more)
    return subprocess.run(["sh", "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize(
    ("words", "status"), [("exec $a -- true", 0), ("exec $a -- sh -c 'exit 7'", 7), ("list", 0), ("info $a", 0)]
)
def test_closed_descriptors(jm: Instance, jail: str, tmp_path: Path, words: str, status: int, closed: str) -> None:
    done = shell(jm, f"$j {words} {closed}", tmp_path, a=jail)
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr


def test_closed_stdin_is_at_its_end(jm: Instance, jail: str, tmp_path: Path) -> None:
    done = shell(jm, "$j exec $a -- cat <&-", tmp_path, a=jail)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_closed_descriptors_start_is_sound(jm: Instance, busybox_jail: MakeJail, tmp_path: Path) -> None:
    """Engine and supervisor have their log and /dev/null on fds 0 to 2, and no lock or socket."""
    name = busybox_jail(start=False)
    jm("engine", "stop")
    assert shell(jm, "$j start $a <&- >&- 2>&-", tmp_path, a=name).returncode == 0
    for pid, log in ((jm.engine_pid(), "engine.log"), (jm.info(name)["supervisor_pid"], "supervisor.log")):
        names = [os.path.basename(os.readlink(f"/proc/{pid}/fd/{fd}")) for fd in (0, 1, 2)]
        assert names == ["null", log, log]


def test_files_can_be_reopened(jm: Instance, jail: str, tmp_path: Path) -> None:
    """/dev/stdin and /dev/stderr open in the jail where they are the caller's files, of mode 0600."""
    (tmp_path / "in").write_text("SELECT 1\n")
    (tmp_path / "in").chmod(0o600)
    done = shell(jm, "umask 077; $j exec $a -- cat /dev/stdin < in > out", tmp_path, a=jail)
    assert done.returncode == 0, done
    assert (tmp_path / "out").read_text() == "SELECT 1\n"
    script = "umask 077; $j exec $a -- sh -c 'echo both | tee /dev/stderr >/dev/null' 2> log"
    assert shell(jm, script, tmp_path, a=jail).returncode == 0
    assert (tmp_path / "log").read_text() == "both\n"


def test_no_file_of_the_host_is_open_inside(jm: Instance, jail: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    held = os.open(tmp_path / "fifo", os.O_RDWR)
    try:
        look = 'seen=$(for n in 0 1 2; do readlink /proc/$$/fd/$n; done); echo "$seen" >&2'
        shell(jm, f"$j exec $a -- sh -c '{look}' < in > out 2> err", tmp_path, a=jail)
        kinds = [line.partition(":")[0] for line in (tmp_path / "err").read_text().split()]
        assert kinds == ["pipe", "pipe", "pipe"]
        shell(jm, f"$j exec $a -- sh -c '{look}' <> fifo > /dev/null 2> err", tmp_path, a=jail)
        kinds = [line.partition(":")[0] for line in (tmp_path / "err").read_text().split()]
        assert kinds == ["pipe", "/dev/null", "pipe"]
    finally:
        os.close(held)


@pytest.mark.parametrize("how", [">", ">>"])
def test_every_byte_of_a_file_comes_through(jm: Instance, jail: str, tmp_path: Path, how: str) -> None:
    content = os.urandom(1 << 20) * 5 + b"end"
    (tmp_path / "in").write_bytes(content)
    (tmp_path / "out").write_bytes(b"before")
    done = shell(jm, f"$j exec $a -- cat < in {how} out", tmp_path, a=jail)
    assert done.returncode == 0, done
    assert (tmp_path / "out").read_bytes() == (b"before" if how == ">>" else b"") + content


def test_writes_to_one_file_keep_their_order(jm: Instance, jail: str, tmp_path: Path) -> None:
    numbers = "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); echo $i >&2; i=$((i+1)); done"
    for how in ("> out 2>&1", ">> out 2>&1", ">> out 2>> out"):
        (tmp_path / "out").unlink(missing_ok=True)
        assert shell(jm, f"$j exec $a -- sh -c '{numbers}' {how}", tmp_path, a=jail).returncode == 0
        assert [int(line) for line in (tmp_path / "out").read_text().split()] == list(range(2000)), how


def test_offset_is_shared(jm: Instance, jail: str, tmp_path: Path) -> None:
    """What the caller writes before and after goes before and after."""
    script = "{ echo one; $j exec $a -- echo two; echo three; } > out"
    assert shell(jm, script, tmp_path, a=jail).returncode == 0
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"


def test_what_is_not_read_is_left_to_the_next(jm: Instance, jail: str, tmp_path: Path) -> None:
    """A loop that reads a list from a file goes on with its second line."""
    (tmp_path / "in").write_text("".join(f"line {number}\n" for number in range(5)))
    script = 'while read -r line; do $j exec $a -- echo "got $line"; done < in'
    done = shell(jm, script, tmp_path, a=jail)
    assert done.stdout.splitlines() == [f"got line {number}" for number in range(5)]
    done = shell(jm, '{ $j exec $a -- sh -c "read -r x; echo $x"; cat; } < in', tmp_path, a=jail)
    assert done.stdout.splitlines()[-4:] == [f"line {number}" for number in range(1, 5)]


def test_a_file_that_nobody_reads_keeps_nothing_waiting(jm: Instance, jail: str, tmp_path: Path) -> None:
    with open(tmp_path / "in", "wb") as file:
        file.truncate(64 << 20)
    assert shell(jm, "$j exec $a -- sh -c 'exit 3' < in > out", tmp_path, a=jail).returncode == 3
    # Both ways at once, with more than a pipe holds.
    script = "$j exec $a -- sh -c 'dd if=/dev/zero bs=1M count=4 2>/dev/null; wc -c' < in > out"
    assert shell(jm, script, tmp_path, a=jail).returncode == 0
    assert (tmp_path / "out").read_bytes()[4 << 20 :].split() == [b"67108864"]


def test_what_stays_in_the_background_is_not_waited_for(jm: Instance, jail: str, tmp_path: Path) -> None:
    script = "$j exec $a -- sh -c 'sleep 1000 & echo begun' > out 2>&1 < /dev/null; cat out"
    done = shell(jm, script, tmp_path, a=jail)
    assert (done.returncode, done.stdout) == (0, "begun\n")


@pytest.mark.parametrize(("count", "what"), [(1, "little"), (4096, "more than a pipe holds")])
def test_a_full_disk_is_reported(jm: Instance, jail: str, tmp_path: Path, count: int, what: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        (small / "fill").write_bytes(bytes(61440))
        script = f"$j exec $a -- dd if=/dev/zero bs=8k count={count} > small/out"
        done = shell(jm, script, tmp_path, a=jail)
    finally:
        subprocess.run(["umount", small], check=True)
    assert done.returncode == 125, what
    assert "Error: writing to stdout: No space left on device" in done.stderr


def test_the_supervisor_refuses_files_of_the_host(jm: Instance, jail: str, tmp_path: Path) -> None:
    """Whatever the command line passes, the supervisor lets only anonymous pipes and /dev/null into a jail."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    null = os.open(os.devnull, os.O_RDWR)
    try:
        for path in (tmp_path / "fifo", tmp_path / "file"):
            fd = os.open(path, os.O_RDWR)
            try:
                with connect(jm.root, "default", start=False) as supervisor, pytest.raises(JailmgrError) as caught:
                    supervisor.ask("exec", [fd, null, null], jail=jail, args=["true"], env={}, within=20.0)
            finally:
                os.close(fd)
            assert caught.value.code == "invalid"
            assert "only pipes and /dev/null" in caught.value.why
    finally:
        os.close(null)


def test_files_of_a_user(jm: Instance, tmp_path: Path) -> None:
    """Who isn't root has pipes of the supervisor's: every byte, one order, and no file inside."""
    content = os.urandom(1 << 20) + b"end"
    (tmp_path / "in").write_bytes(content)
    numbers = "i=0; while [ $i -lt 1000 ]; do echo $i; i=$((i+1)); echo $i >&2; i=$((i+1)); done"
    with alices_tenant(jm) as tenant:
        command = " ".join(become(ALICE))
        done = shell(jm, f"{command} exec $t/web -- cat < in > out", tmp_path, t=tenant)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "out").read_bytes() == content
        done = shell(jm, f"{command} exec $t/web -- sh -c '{numbers}' > out 2>&1", tmp_path, t=tenant)
        assert done.returncode == 0
        assert [int(line) for line in (tmp_path / "out").read_text().split()] == list(range(1000))
