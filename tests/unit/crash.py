"""kill -9 of a process at each line it runs, one after the other."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

KILLED = 9


def killed_at(line: int, modules: tuple[str, ...], work: Callable[[], object]) -> bool:
    """Do `work` in a child that ends, with nothing closed or undone, before the so-manieth line of these files.

    False where it came to its end first.
    """
    pid = os.fork()
    if pid == 0:
        _work(line, modules, work)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), f"the child failed at line {line}"
    return code == KILLED


def _work(line: int, modules: tuple[str, ...], work: Callable[[], object]) -> None:
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(modules):
            return None
        if event == "line":
            left -= 1
            if left <= 0:
                os._exit(KILLED)
        return trace

    try:
        sys.settrace(trace)
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - a child of pytest must not go on as pytest
        sys.settrace(None)
        traceback.print_exc()
        os._exit(1)
