"""Wall: processes of others, and our own processes while they enter a jail.

Mechanism: a pid namespace of the jail's own, ids that own no other process, and that our processes are not dumpable
until they exec (prctl(2), PR_SET_DUMPABLE).
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from pathlib import Path

from tests.security.guest import OK, Buffer, Guest
from tests.system.instance import Instance, alive

PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
ENTERED = 25


def strangers(guest: Guest) -> list[int]:
    """Processes of the host and of jailmgr, by their pids there."""
    info = guest.jm.info(guest.jail)
    return [1, os.getpid(), os.getppid(), info["supervisor_pid"], guest.jm.engine_pid()]


def test_no_process_of_the_host_is_there(guest: Guest) -> None:
    """Mechanism: a pid of the host's means nothing, or another process, in the jail's pid namespace."""
    vector = struct.pack("QQ", 0x1000, 16)
    there = {int(word) for word in guest.sh("ls /proc").split() if word.isdigit()}
    for pid in [pid for pid in strangers(guest)[1:] if pid not in there]:
        assert guest.ask(
            ("kill", pid, 0), ("tgkill", pid, pid, 9), ("pidfd_open", pid, 0), ("ptrace", PTRACE_ATTACH, pid, 0, 0),
            ("ptrace", PTRACE_SEIZE, pid, 0, 0), ("process_vm_readv", pid, vector, 1, vector, 1, 0),
            ("setpriority", 0, pid, 19), ("sched_setaffinity", pid, 8, b"\1" + bytes(7)),
            ("prlimit64", pid, 7, 0, Buffer(16)), ("get_robust_list", pid, Buffer(8), Buffer(8)),
        ) == ["ESRCH"] * 10, pid  # fmt: skip
    assert set(there) <= set(range(1, 10_000))


def test_a_signal_to_all_reaches_the_jails_own(guest: Guest) -> None:
    """Mechanism: kill(-1) is of the pid namespace."""
    pids = strangers(guest)
    guest.sh("trap '' TERM USR1; kill -USR1 -1; kill -TERM -1; kill -KILL -1", status=None)
    assert [pid for pid in pids if not alive(pid)] == []
    assert guest.sh("echo here") == "here\n"


def test_a_process_that_enters_is_not_taken_hold_of(guest: Guest) -> None:
    """The guest's root tries to trace and read each process that `exec` and `cp` bring in, while that is still Python.

    Mechanism: such a process has a copy of the supervisor's memory, and is not dumpable.
    """
    program = guest.install("entering")
    argv = ("exec", guest.jail, "--", program)
    with guest.jm.popen(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        assert watching.stdin is not None
        assert watching.stdout.readline() == b"ready\n"
        for _ in range(ENTERED):
            assert guest.jm.exec(guest.jail, "echo", "in").out == "in\n"
            assert guest.jm("cp", f"{guest.jail}:/etc/passwd", "-").out
        watching.stdin.close()
        said = watching.stdout.read().decode().splitlines()
    assert int(said[-1].split()[1]) >= ENTERED, "some were seen"
    assert said[:-1] == []


def test_the_guests_own_processes_can_be_traced(guest: Guest) -> None:
    """So that the tries above fail for the right reason."""
    guest.sh("sleep 100 >/dev/null 2>&1 </dev/null & echo $! >/tmp/own")
    own = int(guest.sh("cat /tmp/own"))
    assert guest.ask(("ptrace", PTRACE_SEIZE, own, 0, 0), ("kill", own, signal.SIGKILL)) == [OK, OK]


def test_ipc_of_the_host_is_not_there(guest: Guest) -> None:
    """Shared memory by key and by name. Mechanism: an ipc namespace, and a /dev/shm of the jail's own."""
    shm = Path(f"/dev/shm/jailmgr-{os.getpid()}")
    made = subprocess.run(["ipcmk", "-M", "4096"], capture_output=True, text=True, check=True).stdout.split()[-1]
    try:
        shm.touch()
        listed = subprocess.run(["ipcs", "-m"], capture_output=True, text=True, check=True).stdout.splitlines()
        (key,) = [int(line.split()[0], 16) for line in listed if line.split()[1:2] == [made]]
        assert guest.ask(("shmget", key, 0, 0)) == ["ENOENT"]
        assert guest.ask(("shmat", int(made), 0, 0))[0] in ("EINVAL", "EIDRM", "EACCES")
        assert shm.name not in guest.sh("ls /dev/shm")
    finally:
        shm.unlink()
        subprocess.run(["ipcrm", "-m", made], check=True)


def test_another_jails_processes_are_as_far_away(jm: Instance, guest: Guest, other_tenant: str) -> None:
    """Two tenants: the ids of one own nothing of the other's, should a pid namespace ever be shared."""
    jm("launch", "busybox", f"{other_tenant}/near")
    bases = {jm.exec(name, "cat", "/proc/self/uid_map").out.split()[1] for name in (guest.jail, f"{other_tenant}/near")}
    assert len(bases) == 2
    pid = jm.info(f"{other_tenant}/near")["init_pid"]
    enter = ["setpriv", f"--reuid={sorted(bases)[0]}", f"--regid={sorted(bases)[0]}", "--clear-groups", "kill", "-0"]
    mine = jm.info(guest.jail)["init_pid"]
    told = [subprocess.run([*enter, str(each)], capture_output=True).returncode for each in (mine, pid)]
    assert sorted(told) == [0, 1]
