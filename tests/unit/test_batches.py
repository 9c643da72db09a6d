"""Work in batches: what comes in a row is done as one, and later work waits for no failure of earlier work."""

from __future__ import annotations

from queue import Empty, SimpleQueue

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.manager.batches import LATEST, Batches


def test_what_comes_in_a_row_is_done_as_one() -> None:
    done = SimpleQueue[set[int]]()
    batches = Batches("test", 0.3, done.put)
    batches.start()
    for number in (1, 2, 2, 3):
        batches.add(number)
    assert done.get(timeout=10) == {1, 2, 3}
    batches.add(4)
    assert done.get(timeout=10) == {4}
    batches.stop()
    batches.stop()


def test_the_first_waits_no_longer_however_many_come() -> None:
    done = SimpleQueue[set[int]]()
    batches = Batches("test", 0.05, done.put)
    batches.start()
    number, first = 0, set[int]()
    while not first:
        batches.add(number)
        number += 1
        try:
            first = done.get(timeout=0.001)
        except Empty:
            assert number < 1000 * LATEST
    assert 0 in first
    batches.stop()


def test_a_failure_keeps_nothing_from_being_done() -> None:
    done = SimpleQueue[set[int]]()

    def fail(items: set[int]) -> None:
        done.put(items)
        raise JailmgrError("work", "failed", "", "failed")

    batches = Batches("test", 0.01, fail)
    batches.start()
    batches.add(1)
    assert done.get(timeout=10) == {1}
    batches.add(2)
    assert done.get(timeout=10) == {2}
    batches.stop()


def test_what_waits_is_dropped_at_the_end() -> None:
    done = SimpleQueue[set[int]]()
    batches = Batches("test", 60, done.put)
    batches.start()
    batches.add(1)
    batches.stop()
    with pytest.raises(Empty):
        done.get_nowait()
