"""Waiting for what the engine does in the background: progress as it comes, ctrl-c cancels."""

from __future__ import annotations

import sys

from jailmgr.cli.client import Connection, ensure_engine
from jailmgr.cli.output import remark
from jailmgr.cli.settings import Cancelled, Settings
from jailmgr.errors import JailmgrError, from_dict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ROUND = 1
"""Seconds of one wait: how often progress is looked at. An operation that ends answers at once."""
SLACK = 30.0
"""Seconds past a round after which the engine counts as hung."""
CANCELLED = 401
"""LXD's status code of a cancelled operation."""
RUNNING = range(100, 200)


def wait(
    settings: Settings, connection: Connection, operation: dict[str, Any], label: str, idle: str = ""
) -> dict[str, Any]:
    """The operation once it has ended well; raises the JailmgrError it ended with.

    `idle`: what to show after a round in which the operation has neither ended nor reported a step.
    Ctrl-c cancels it, waits until it is undone and raises Cancelled. A second ctrl-c leaves at once.
    """
    progress = _Progress(settings, label)
    try:
        while operation["status_code"] in RUNNING:
            operation = _next(connection, operation)
            step = (operation.get("metadata") or {}).get("progress")
            if idle and step is None and operation["status_code"] in RUNNING:
                step = {"step": idle}
            progress.update(step)
    except KeyboardInterrupt:
        progress.close()
        raise _cancel(settings, connection, operation, label) from None
    finally:
        progress.close()
    if operation["status_code"] == 200:
        return operation
    raise failure(operation, label)


def result(operation: dict[str, Any]) -> dict[str, Any]:
    """What a finished operation made."""
    made = (operation.get("metadata") or {}).get("result")
    return made if isinstance(made, dict) else {}


def failure(operation: dict[str, Any], label: str) -> JailmgrError:
    """The error an operation ended with."""
    told = operation.get("error")
    if isinstance(told, dict) and told.get("what"):
        return from_dict(told)
    if operation["status_code"] == CANCELLED:
        return JailmgrError(label, "it was cancelled")
    return JailmgrError(label, operation.get("err") or "failed")


def _next(connection: Connection, operation: dict[str, Any]) -> dict[str, Any]:
    answer = connection.call("GET", f"/1.0/operations/{operation['id']}/wait?timeout={ROUND}", within=ROUND + SLACK)
    return answer if isinstance(answer, dict) else operation


def _cancel(settings: Settings, broken: Connection, operation: dict[str, Any], label: str) -> Cancelled:
    """Cancel over a connection of its own: the interrupted one may hold half an answer."""
    broken.close()
    remark(settings, f"{label}: cancelling, ctrl-c again leaves it to the engine")
    try:
        connection = ensure_engine(settings.root)
        connection.call("DELETE", f"/1.0/operations/{operation['id']}")
        while operation["status_code"] in RUNNING:
            operation = _next(connection, operation)
    except JailmgrError as error:
        return Cancelled(error.what, error.why, error.hint)
    except KeyboardInterrupt:
        return Cancelled(label, "cancelled")
    if operation["status_code"] == 200:
        return Cancelled(label, "it was done before it could be cancelled")
    return Cancelled(label, "cancelled")


class _Progress:
    """A bar on a terminal, a line for each step elsewhere; nothing with --quiet."""

    def __init__(self, settings: Settings, label: str) -> None:
        self._quiet = settings.quiet
        self._label = label
        self._bar: Any = None
        self._task: Any = None
        self._step: str | None = None

    def update(self, progress: dict[str, Any] | None) -> None:
        """Show where the operation is: {step, done, total}; total 0 where it isn't known."""
        if self._quiet or not progress or not progress.get("step"):
            return
        step, done, total = str(progress["step"]), int(progress.get("done") or 0), int(progress.get("total") or 0)
        if sys.stderr.isatty():
            self._draw(step, done, total)
        elif step != self._step:
            print(f"{self._label}: {step}", file=sys.stderr, flush=True)
        self._step = step

    def _draw(self, step: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._label, total=None)
            self._bar.start()
        self._bar.update(self._task, description=f"{self._label}: {step}", completed=done, total=total or None)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
