"""The command line as plain values, read from the Typer app: what manual pages and completions are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from typer.main import get_command

from jailmgr.cli.app import app


class Option(NamedTuple):
    """`metavar` is empty for a flag. `hidden`: a global option, told of in the help of `jailmgr` alone."""

    names: tuple[str, ...]
    metavar: str
    help: str
    hidden: bool


HELP = Option(("-h", "--help"), "", "Show a summary and exit.", False)


class Argument(NamedTuple):
    metavar: str
    help: str
    required: bool
    many: bool


class Command(NamedTuple):
    """`words`: what is typed, without `jailmgr`. A noun has `commands` and no arguments."""

    words: tuple[str, ...]
    short: str
    help: str
    example: str
    options: tuple[Option, ...]
    arguments: tuple[Argument, ...]
    commands: tuple[Command, ...]


def read_commands() -> Command:
    """`jailmgr` itself, with all its commands."""
    root: Any = get_command(app)
    return _command(root, (), root.make_context("jailmgr", [], resilient_parsing=True))


def walk(command: Command) -> Iterator[Command]:
    """The command and all below it, each before its own."""
    yield command
    for below in command.commands:
        yield from walk(below)


def _command(found: Any, words: tuple[str, ...], context: Any) -> Command:
    options = tuple(_option(param, context) for param in found.params if param.param_type_name == "option")
    arguments = tuple(
        Argument(param.metavar, param.help or "", param.required, param.nargs == -1)
        for param in found.params
        if param.param_type_name == "argument"
    )
    below = tuple(_command(one, (*words, name), context) for name, one in getattr(found, "commands", {}).items())
    _, _, example = (found.epilog or "").partition("Example:\n")
    short = found.get_short_help_str(limit=200)
    return Command(words, short, found.help or "", example.strip(), (*options, HELP), arguments, below)


def _option(param: Any, context: Any) -> Option:
    hidden, param.hidden = param.hidden, False
    record = param.get_help_record(context)
    param.hidden = hidden
    names = (*param.opts, *param.secondary_opts)
    metavar = "" if param.is_flag else param.metavar or param.name.upper()
    return Option(tuple(sorted(names, key=len)), metavar, " ".join(record[1].split()), hidden)
