"""What runs have used, noted by the supervisor and taken by the engine: each exactly once, whoever is killed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from jailmgr.runtime import runs
from jailmgr.runtime.runs import LOG, LOG_MAX, TAKEN, Run, drop, note_run, shortened, take
from tests.unit.crash import killed_at

WALL = 1_764_066_600.0


def run(number: int, cpu_ns: int = 5, seconds: float = 2.0) -> Run:
    ended = WALL + number * 10
    return Run(f"boot/{number}/7", ended - seconds, ended, 100.0 + number * 10, seconds, cpu_ns, 3, 4)


def test_what_is_noted_is_taken_until_it_is_dropped(tmp_path: Path) -> None:
    lib = str(tmp_path)
    assert take(lib) is None
    note_run(lib, run(1))
    note_run(lib, run(2))
    assert take(lib) == [run(1), run(2)]
    note_run(lib, run(3))
    assert take(lib) == [run(1), run(2)], "what was taken comes again until it is dropped"
    drop(lib)
    assert take(lib) == [run(3)]
    drop(lib)
    drop(lib)
    assert take(lib) is None
    assert os.listdir(lib) == []


def test_lines_that_were_cut_off_or_are_foreign_are_left_out(tmp_path: Path) -> None:
    lib = str(tmp_path)
    note_run(lib, run(1))
    with open(f"{lib}/{LOG}", "ab") as file:
        file.write(b'{"run":"boot/2/7","started_at":17')
    note_run(lib, run(3))
    with open(f"{lib}/{LOG}", "ab") as file:
        file.write(b'\0\0\0\n[1]\n3\n{"run":"boot/4/7","colour":"red"}\n{"run":1}\n\xff\n')
    assert take(lib) == [run(1), run(3)]


def test_a_file_taken_while_a_line_is_written_gets_it_in_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lib, write = str(tmp_path), os.write
    found: list[Run] = []

    def taken_meanwhile(fd: int, text: bytes) -> int:
        if not found:
            found.extend(take(lib) or [])
        return write(fd, text)

    note_run(lib, run(1))
    monkeypatch.setattr("os.write", taken_meanwhile)
    note_run(lib, run(2))
    assert found == [run(1)]
    drop(lib)
    assert take(lib) == [run(2)]


def test_nothing_is_taken_while_the_file_is_shortened(tmp_path: Path) -> None:
    lib = str(tmp_path)
    note_run(lib, run(1))
    with open(f"{lib}/{LOG}", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            take(lib)
    assert take(lib) == [run(1)]


def test_a_file_is_not_shortened_while_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = str(tmp_path)
    monkeypatch.setattr(runs, "LOG_MAX", 1)
    note_run(lib, run(1))
    with open(f"{lib}/{LOG}", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        note_run(lib, run(2))
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(f"{lib}/{LOG}"))
    assert take(lib) == [run(1), run(2)]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    lib, other = tmp_path / "lib", tmp_path / "other"
    lib.mkdir()
    other.write_text("")
    (lib / LOG).symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        note_run(str(lib), run(1))
    assert other.read_text() == ""


def test_a_month_of_reboots_without_an_engine_is_all_there_in_a_small_file(tmp_path: Path) -> None:
    lib, count = str(tmp_path), 4000
    for number in range(count):
        ended = WALL + number * 600
        note_run(lib, Run(f"boot/{number}/7", ended - 9, ended, ended, 9.0, 5, None if number % 2 else 3, 4))
        assert os.stat(f"{lib}/{LOG}").st_size <= LOG_MAX
    found = take(lib)
    assert found is not None
    assert found[0].run == "boot/0/7"
    assert found[0].runs == 1
    assert found[-1].run == f"boot/{count - 1}/7"
    assert sum(each.runs for each in found) == count
    assert sum(each.cpu_ns for each in found) == count * 5
    assert sum(each.received or 0 for each in found) == count // 2 * 3
    assert sum(each.sent or 0 for each in found) == count * 4
    assert sum(each.seconds for each in found) == count * 9
    assert all(each.ended_at - each.started_at <= 86400 + 9 for each in found), "days can be told apart"
    assert [each.ended_at for each in found] == sorted(each.ended_at for each in found)


def test_a_run_noted_twice_is_added_up_once() -> None:
    noted = [run(1), run(1, cpu_ns=6), run(2), run(2, cpu_ns=7), run(3)]
    assert shortened(noted, 1.0) == [run(1, cpu_ns=6), run(2, cpu_ns=7), run(3)]
    assert [each.cpu_ns for each in shortened(noted, 86400.0)] == [6, 12]


def test_a_supervisor_killed_at_any_line_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next supervisor finds the run ended, and notes it, again as the case may be."""
    monkeypatch.setattr(runs, "LOG_MAX", 400)
    killed, line = True, 0
    while killed:
        line += 1
        lib = tmp_path / str(line)
        lib.mkdir()
        for number in range(3):
            note_run(str(lib), run(number))
        killed = killed_at(line, ("runtime/runs.py",), lambda: note_run(str(lib), run(3)))  # noqa: B023 - called at once
        note_run(str(lib), run(3))
        note_run(str(lib), run(4))
        found = take(str(lib))
        assert found is not None
        assert sum(each.cpu_ns for each in shortened(found, 1.0)) == 25, f"killed at line {line}"
        assert not (lib / TAKEN).with_suffix(".new").exists()
    assert line > 20
