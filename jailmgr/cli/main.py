"""The command `jailmgr`: hot commands go straight to their action, the others through Typer. No traceback leaves here.

Imports almost nothing before the command is known.
"""

from __future__ import annotations

import gc
import os
import sys

from jailmgr.errors import JailmgrError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

DONE, FAILED, WRONG_USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
EXEC_FAILED = 125
"""Exit status of `exec` where jailmgr, and not the command, failed."""


def entry() -> NoReturn:
    """The console script: `main`, and out, without taking the interpreter apart first (some 3 ms).

    Nor is garbage collected on the way: a command makes little of it and ends.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        from jailmgr.runtime.standard_fds import open_closed

        open_closed()
    gc.disable()
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run the command line (sys.argv's without one) and return the exit status that cli.md gives it."""
    words = sys.argv[1:] if argv is None else argv
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        from jailmgr.cli.output import silence_stdout

        silence_stdout()
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - no traceback may reach a user
        return _explain(error, words)


def _run(words: list[str]) -> int:
    from jailmgr.cli import hot

    read = hot.read(words)
    if read is None:
        return _run_typer(words)
    from jailmgr.cli import actions
    from jailmgr.cli.settings import require_door, settle

    command, chosen, given = read
    settings = settle(chosen)
    require_door(settings.root)
    action = {"exec": actions.exec_, "start": actions.start, "stop": actions.stop, "list": actions.list_}[command]
    return action(settings, **given)  # type: ignore[operator,no-any-return]


def _run_typer(words: list[str]) -> int:
    from jailmgr.cli.app import app

    status = app(words, prog_name="jailmgr", standalone_mode=False)
    return status if isinstance(status, int) else DONE


def _explain(error: Exception, words: list[str]) -> int:
    """Tell the error on stderr and return the exit status."""
    from jailmgr.cli import hot
    from jailmgr.cli.output import silence_stdout, tell
    from jailmgr.cli.settings import Cancelled

    command, as_json, debug = hot.glance(words)
    if debug:
        import traceback

        traceback.print_exception(error)
    known, others = _known(error), getattr(error, "errors", ())
    try:
        tell(known, as_json, others)
    except OSError:
        silence_stdout()
    if isinstance(error, Cancelled):
        return INTERRUPTED
    if command == "exec":
        return int(getattr(error, "exit_status", EXEC_FAILED))
    return WRONG_USAGE if known.code == "invalid" else FAILED


def _known(error: Exception) -> JailmgrError:
    """Any exception, told as users are told."""
    if isinstance(error, JailmgrError):
        return error
    if isinstance(error, OSError):
        from jailmgr.errors import from_os

        return from_os("jailmgr", error)
    typer_errors = sys.modules.get("typer")
    if typer_errors is not None and isinstance(error, typer_errors.TyperException):
        from jailmgr.cli.usage import usage_error

        return usage_error(error)
    return JailmgrError(
        "jailmgr",
        f"unexpected {type(error).__name__}: {error}",
        "This is a fault of jailmgr. Run it again with --debug, and report what that shows.",
    )


if __name__ == "__main__":
    entry()
