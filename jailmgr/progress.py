"""How far long work has come, and whether it is still wanted: what a use case, a build and an operation share."""

from __future__ import annotations

from collections.abc import Callable

from jailmgr.errors import JailmgrError

Progress = Callable[[str, int, int], None]
"""Receives a step's name (for a person), how much is done, and of how much (0: not known)."""
Cancelled = Callable[[], bool]
"""Asked now and then whether to give up."""


class CancelledError(JailmgrError):
    """The work was given up because its caller wanted so; what it had done has been undone."""

    def __init__(self, what: str) -> None:
        super().__init__(what, "cancelled", "", "conflict")


def quiet(_step: str, _done: int, _total: int) -> None:
    """A Progress that reports to nobody."""


def never() -> bool:
    """A Cancelled that doesn't."""
    return False
