"""The small reader of the hot commands' options, so that these don't wait for Typer.

It reads what hot_table.py says, which script/hot-commands makes from the Typer app. What it isn't sure of it leaves to
Typer (help, every error, unusual spellings), so there is one place that words mistakes. tests/unit/test_cli_hot.py
holds the two against each other. Imports nothing but the table.
"""

from __future__ import annotations

from jailmgr.cli.hot_table import COMMANDS, GLOBALS, Argument, Option

Given = dict[str, object]


class _Unsure(Exception):
    """Typer must look at this."""


def read(argv: list[str]) -> tuple[str, Given, Given] | None:
    """Command, global options and the action's arguments; None where Typer must look."""
    try:
        chosen: Given = {}
        at = 0
        while at < len(argv) and argv[at][:1] == "-":
            at = _take_option(argv, at, GLOBALS, chosen)
        if at == len(argv) or argv[at] not in COMMANDS:
            return None
        command = argv[at]
        options, arguments = COMMANDS[command]
        given, words = _take_all(argv[at + 1 :], GLOBALS | options)
        _place(words, arguments, given)
    except _Unsure:
        return None
    chosen.update({key: given.pop(key) for key in _GLOBAL_NAMES if key in given})
    return command, chosen, given


_GLOBAL_NAMES = {option[0] for option in GLOBALS.values()}


def _take_all(argv: list[str], options: dict[str, Option]) -> tuple[Given, list[str]]:
    """Options anywhere before `--`, and the words that are none."""
    given: Given = {}
    words: list[str] = []
    at = 0
    while at < len(argv):
        word = argv[at]
        if word == "--":
            words += argv[at + 1 :]
            break
        if word[:1] == "-" and len(word) > 1:
            at = _take_option(argv, at, options, given)
        else:
            words.append(word)
            at += 1
    return given, words


def _take_option(argv: list[str], at: int, options: dict[str, Option], given: Given) -> int:
    """Read the option at `at` (`--name`, `--name=value`, `-n value`, `-nvalue`, `-abc`) and return what comes next."""
    word = argv[at]
    if word[:2] == "--":
        name, equals, value = word.partition("=")
        if name not in options:
            raise _Unsure
        kind = options[name][1]
        if kind == "flag":
            if equals:
                raise _Unsure
            given[options[name][0]] = options[name][2]
            return at + 1
        if not equals:
            at += 1
            value = _value(argv, at)
        _store(options[name], value, given)
        return at + 1
    for index, letter in enumerate(word[1:], 2):
        option = options.get("-" + letter)
        if option is None:
            raise _Unsure
        if option[1] == "flag":
            given[option[0]] = option[2]
            continue
        value = word[index:]
        if not value:
            at += 1
            value = _value(argv, at)
        _store(option, value, given)
        break
    else:
        if len(word) == 1:
            raise _Unsure
    return at + 1


def _value(argv: list[str], at: int) -> str:
    if at >= len(argv) or argv[at][:1] == "-":
        raise _Unsure
    return argv[at]


def _store(option: Option, value: str, given: Given) -> None:
    name, kind, choices = option
    if kind == "list":
        kept = given.setdefault(name, [])
        assert isinstance(kept, list)
        kept.append(value)
    elif kind == "int":
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            raise _Unsure
        given[name] = int(value)
    else:
        if isinstance(choices, tuple) and value not in choices:
            raise _Unsure
        given[name] = value


def _place(words: list[str], arguments: tuple[Argument, ...], given: Given) -> None:
    """Give the words to the command's arguments in turn; the last may take all that are left."""
    for name, many, required in arguments:
        if many:
            if words:
                given[name] = words
            elif required:
                raise _Unsure
            words = []
        elif words:
            given[name], words = words[0], words[1:]
        elif required:
            raise _Unsure
    if words:
        raise _Unsure


def glance(argv: list[str]) -> tuple[str, bool, bool]:
    """Of any command line, right or wrong: the command, whether errors are wanted as JSON, whether with tracebacks."""
    command, as_json, debug = "", False, False
    at = 0
    while at < len(argv) and argv[at] != "--":
        word = argv[at]
        name, equals, value = word.partition("=")
        if word == "--debug":
            debug = True
        elif name in GLOBALS and GLOBALS[name][1] != "flag":
            if not equals:
                at += 1
                value = argv[at] if at < len(argv) else ""
            if name == "--format":
                as_json = value == "json"
        elif word[:1] != "-" and not command:
            command = word
        at += 1
    return command, as_json, debug
