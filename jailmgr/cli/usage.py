"""Typer's errors of usage, said the way ours are."""

from __future__ import annotations

import re

import typer

from jailmgr.errors import JailmgrError

_MEANT = re.compile(r"(?P<why>.*?)\.? (?:Did you mean '(?P<first>[^']*)'.*|\(Possible options: .*\))\Z", re.DOTALL)


def usage_error(error: typer.TyperException) -> JailmgrError:
    """The error as `WHAT: WHY` with a near miss, or where to read on, as its hint."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "jailmgr"
    message = error.format_message().strip()
    if message.startswith("Usage:"):
        return JailmgrError(path, "a command is missing", f"See {path} --help.", "invalid")
    hint = f"See {path} --help."
    possibilities = getattr(error, "possibilities", None)
    meant = _MEANT.match(message)
    if meant:
        message, possibilities = meant["why"], possibilities or [meant["first"]]
    if possibilities:
        hint = f"Did you mean {possibilities[0]}?"
    elif path.endswith(" exec") and getattr(error, "option_name", None):
        hint = "Put -- before the command: jailmgr exec web -- ls -l"
    message = message.rstrip(".")
    return JailmgrError(path, message[:1].lower() + message[1:], hint, "invalid")
