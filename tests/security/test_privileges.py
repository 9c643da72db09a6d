"""Capabilities and the filter as a jail's processes get them, in user namespaces of the test's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from jailmgr.runtime import capabilities, seccomp
from jailmgr.runtime import syscalls as kernel


def status_after(work: Callable[[], object], program: list[str]) -> tuple[int, dict[str, str]]:
    """Exit status and /proc/self/status, as fields, of a child that does `work` and execs `program` to show it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(write_end, 1)
            work()
            os.execv(program[0], program)
        finally:
            os._exit(99)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        told = [line.partition(":") for line in file]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), {name: value.strip() for name, _, value in told}


SHOW = ["/bin/cat", "/proc/self/status"]


def sets(fields: dict[str, str]) -> dict[str, int]:
    return {name: int(value, 16) for name, value in fields.items() if name.startswith("Cap")}


def test_capabilities_are_given_up_for_good() -> None:
    keep = ["CAP_CHOWN", "CAP_SETPCAP"]
    status, fields = status_after(lambda: capabilities.drop(keep), SHOW)
    assert status == 0
    kept = capabilities.mask(keep)
    assert sets(fields) == {"CapInh": 0, "CapAmb": 0, "CapPrm": kept, "CapEff": kept, "CapBnd": kept}


def test_the_bounding_set_in_a_user_namespace() -> None:
    def work() -> None:
        kernel.unshare(kernel.CLONE_NEWUSER)
        capabilities.drop(capabilities.BOUNDING)

    status, fields = status_after(work, SHOW)
    assert status == 0
    assert sets(fields)["CapBnd"] == capabilities.mask(capabilities.BOUNDING)


def test_the_filter_does_without_no_new_privs_in_a_user_namespace() -> None:
    bpf = seccomp.compile(seccomp.default_section())

    def work() -> None:
        kernel.unshare(kernel.CLONE_NEWUSER)
        capabilities.drop(capabilities.BOUNDING)
        seccomp.load(bpf)

    status, fields = status_after(work, SHOW)
    assert status == 0
    assert (fields["Seccomp"], fields["Seccomp_filters"], fields["NoNewPrivs"]) == ("2", "1", "0")


def test_the_filter_is_refused_to_who_has_no_right_to_it() -> None:
    bpf = seccomp.compile(seccomp.default_section())
    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            capabilities.drop([])
            seccomp.load(bpf)
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EACCES


def test_another_effective_uid_keeps_capabilities_and_is_given_back() -> None:
    uid = 0x7000_0001

    def shown() -> tuple[tuple[int, int, int], tuple[int, int, int], str]:
        with open("/proc/self/status", encoding="ascii") as status:
            (effective,) = (line.split()[1] for line in status if line.startswith("CapEff:"))
        return os.getresuid(), os.getresgid(), effective

    before = shown()
    with capabilities.effective_uid(uid):
        meanwhile = shown()
    assert meanwhile == ((0, uid, 0), (0, uid, 0), before[2])
    assert shown() == before
