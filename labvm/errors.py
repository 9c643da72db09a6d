"""What keeps a command from having a status of its own."""

from __future__ import annotations

FAILED = 125
TIMED_OUT = 124
"""As timeout(1) has it."""


class LabError(Exception):
    """`why` and `hint` as the user sees them; `status` is the exit status."""

    def __init__(self, why: str, hint: str = "", status: int = FAILED) -> None:
        super().__init__(why)
        self.hint = hint
        self.status = status
