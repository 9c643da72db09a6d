"""What a template.toml may say, and the mistakes in one: file, line, key and what is wrong."""

from __future__ import annotations

import difflib
import os
import re
import signal
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tomli

from jailmgr.template.apt_sources import is_url
from jailmgr.template.positions import Path, find_keys, line_of
from jailmgr.template.render import BUILD_NAMES, CREATE_NAMES, find_flaws, path_flaw

FILE = "template.toml"
TOML_MAX = 256 * 1024
"""Bytes."""
METHODS = ("debootstrap", "busybox")
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\Z", re.ASCII)
"""Of a template, release or variant."""
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+\Z", re.ASCII)
"""Debian Policy 5.6.7."""
_REALTIME = re.compile(r"SIGRTM(IN\+|AX-)\d\d?\Z", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z", re.ASCII)

Check = Callable[[Any], str]
"""What is wrong with a value, empty when nothing is."""


class Mistake(NamedTuple):
    """`line` counts from 1; `key` is dotted, empty where the fault is the file's."""

    file: str
    line: int
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.key + ': ' if self.key else ''}{self.what}"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() and value.isprintable() else "must be a line of text"


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "must be true or false"


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if fits else f"must be a whole number from {low} to {high}"

    return check


def _one_of(*words: str) -> Check:
    return lambda value: "" if value in words else f"must be one of {', '.join(words)}"


def _matches(pattern: re.Pattern[str], what: str) -> Check:
    return lambda value: "" if isinstance(value, str) and pattern.match(value) else f"must be {what}"


def _url(value: Any) -> str:
    return "" if is_url(value) else "must be an http or https URL"


def _mode(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"(0o)?[0-7]{1,4}", value):
        return f"must be an octal number without quotes: write 0o{int(value.removeprefix('0o'), 8):o}"
    return "must be an octal number from 0o0 to 0o7777, such as 0o644" if _whole(0, 0o7777)(value) else ""


def _list_of(check: Check, least: int = 0) -> Check:
    def check_all(value: Any) -> str:
        if not isinstance(value, list) or len(value) < least:
            return "must be a list" + (f" of at least {least}" if least else "")
        return next((f"{entry!r} {wrong}" for entry in value if (wrong := check(entry))), "")

    return check_all


def _argument(value: Any) -> str:
    return "" if isinstance(value, str) and "\0" not in value else "must be text"


def _command(value: Any) -> str:
    if isinstance(value, str):
        return 'must be a list of a program and its arguments, such as ["/bin/sh", "-c", "…"]'
    wrong = _list_of(_argument, 1)(value)
    return wrong or ("" if value[0].startswith("/") else "must begin with the absolute path of a program")


def _signal(value: Any) -> str:
    known = isinstance(value, str) and (
        value in signal.Signals.__members__ or re.match(r"SIGRTM(IN\+|AX-)\d\d?\Z", value)
    )
    return "" if known else "must be the name of a signal, such as SIGTERM or SIGRTMIN+3"


def _place(value: Any) -> str:
    return path_flaw(value) if isinstance(value, str) else "must be a path"


def _pattern(value: Any) -> str:
    if not isinstance(value, str):
        return "must be a path"
    if re.search(r"[*?\[]", value.rpartition("/")[0]):
        return "may hold `*`, `?` or `[` in its last part only"
    return path_flaw(value)


def _source(value: Any) -> str:
    plain = isinstance(value, str) and re.match(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z", value, re.ASCII)
    return "" if plain else "must be the name of a file in the template's folder `files`"


_name = _matches(NAME, "a name of lower-case letters, digits, `.`, `_` and `-`")
_absolute = _matches(re.compile(r"/[^\0]+\Z"), "an absolute path")
_INIT: dict[str, Check] = {
    "command": _command,
    "stop_signal": _signal,
    "stop_timeout": _whole(1, 3600),
    "notify": _flag,
    "spared": _whole(0, 500),
}
_FILE: dict[str, Check] = {
    "path": _place,
    "source": _source,
    "link": _argument,
    "when": _one_of("build", "create"),
    "mode": _mode,
}
_DEBOOTSTRAP: dict[str, Check] = {
    "variant": _one_of("minbase", "buildd", "-"),
    "components": _list_of(_name, 1),
    "keyring": _absolute,
    "script": _name,
    "security": _flag,
    "distribution": _name,
}
_MIRROR: dict[str, Check] = {"url": _url, "security_url": _url}
_CLEAN: dict[str, Check] = {"remove": _list_of(_pattern), "empty": _list_of(_place)}
_RUN: dict[str, Check] = {"command": _command}
_TOP: dict[str, Check] = {"description": _text, "method": _one_of(*METHODS), "releases": _list_of(_name, 1)}
_VARIANT: dict[str, Check] = {"description": _text, "without": _list_of(_matches(_PACKAGE, "a package's name"))}
_BODY = ("packages", "init", "environment", "file", "run", "clean")
"""Tables that stand at the top and in a variant alike."""


class Checker:
    """The mistakes of one template.toml, gathered. `sources`: the text of each file in `files`."""

    def __init__(self, file: str, text: str, sources: Mapping[str, str]) -> None:
        self.file = file
        self.sources = sources
        self.text = text
        self.keys = find_keys(text)
        self.mistakes: list[Mistake] = []

    def tell(self, path: Path, what: str) -> None:
        dotted = ".".join(str(part) for part in path)
        self.mistakes.append(Mistake(self.file, line_of(self.keys, path), dotted, what))

    def table(
        self, value: Any, path: Path, checks: dict[str, Check], needed: tuple[str, ...] = (), more: tuple[str, ...] = ()
    ) -> None:
        """`value` has only the keys of `checks` and `more`, all of `needed`, and its values stand the checks."""
        if not isinstance(value, dict):
            self.tell(path, "must be a table")
            return
        for key in needed:
            if key not in value:
                self.tell(path, f"`{key}` is missing")
        for key, entry in value.items():
            if key in checks:
                wrong = checks[key](entry)
                if wrong:
                    self.tell((*path, key), wrong)
            elif key not in more:
                near = difflib.get_close_matches(key, [*checks, *more], 1)
                self.tell((*path, key), "unknown key" + (f", did you mean `{near[0]}`?" if near else ""))

    def mapping(self, value: Any, path: Path, key_check: Check, value_check: Check) -> None:
        """A table whose keys are the user's own."""
        if not isinstance(value, dict):
            self.tell(path, "must be a table")
            return
        for key, entry in value.items():
            wrong = key_check(key) or value_check(entry)
            if wrong:
                self.tell((*path, key), wrong)

    def array(self, value: Any, path: Path, check: Callable[[Any, Path], None]) -> None:
        """An array of tables."""
        if not isinstance(value, list):
            self.tell(path, "must be an array of tables ([[…]])")
            return
        for index, entry in enumerate(value):
            check(entry, (*path, index))

    def body(self, value: dict[str, Any], path: Path) -> None:
        if "packages" in value:
            name = _matches(_PACKAGE, "a package's name")
            self.mapping(
                value["packages"], (*path, "packages"), name, lambda why: _text(why) and "must say what it is for"
            )
        if "environment" in value:
            variable = _matches(_VARIABLE, "a variable's name")
            self.mapping(value["environment"], (*path, "environment"), variable, _argument)
        if "init" in value:
            self.table(value["init"], (*path, "init"), _INIT)
        if "clean" in value:
            self.table(value["clean"], (*path, "clean"), _CLEAN)
        if "file" in value:
            self.array(value["file"], (*path, "file"), self.file_entry)
            self.paths_are_unique(value["file"], (*path, "file"))
        if "run" in value:
            self.array(value["run"], (*path, "run"), lambda entry, at: self.table(entry, at, _RUN, ("command",)))

    def paths_are_unique(self, entries: Any, path: Path) -> None:
        """Report each file whose path an earlier entry of the same table has."""
        seen: dict[str, int] = {}
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            name = entry.get("path") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                continue
            place = os.path.normpath(name)
            if place in seen:
                first = line_of(self.keys, (*path, seen[place], "path"))
                self.tell((*path, index, "path"), f"{name} already exists: an entry at line {first} has this path")
            seen.setdefault(place, index)

    def is_decimal(self, value: int, path: Path) -> bool:
        """Report whether the key at `path` spells `value` in decimal. tomli returns the number only."""
        lines = self.text.splitlines()[line_of(self.keys, path) - 1 :]
        # A key of an inline table has no line of its own.
        lines = lines[:1] if path in self.keys else lines
        return any(re.search(rf"\bmode[\"']?\s*=\s*\+?{value}(?![\w.])", line) for line in lines)

    def file_entry(self, value: Any, path: Path) -> None:
        before = len(self.mistakes)
        self.table(value, path, _FILE, ("path",))
        mode = value.get("mode") if isinstance(value, dict) else None
        # Below 8 both spellings are the same number.
        if isinstance(mode, int) and mode > 7 and self.is_decimal(mode, (*path, "mode")):
            octal = f"0o{mode}" if re.fullmatch("[0-7]{1,4}", str(mode)) else f"0o{mode:o}"
            self.tell((*path, "mode"), f"{mode} is decimal, and means 0o{mode:o}: write {octal}")
        if len(self.mistakes) > before:
            return
        if ("source" in value) == ("link" in value):
            self.tell(path, "needs either `source` or `link`")
            return
        create = value.get("when", "build") == "create"
        if "link" in value:
            if create or "mode" in value:
                self.tell(path, "a link is made when the image is built, and has no mode")
            return
        source = value["source"]
        if source not in self.sources:
            self.tell((*path, "source"), f"no file `{source}` in the folder `files`")
        elif source.endswith(".j2"):
            for flaw in find_flaws(self.sources[source], CREATE_NAMES if create else BUILD_NAMES):
                self.mistakes.append(Mistake(f"files/{source}", flaw.line, flaw.key, flaw.what))
        elif create:
            self.tell((*path, "source"), "a file rendered when a jail is created must end in `.j2`")


def find_mistakes(text: str, sources: Mapping[str, str]) -> list[Mistake]:
    """All mistakes in a template.toml and the files it names, in order of file and line."""
    try:
        content = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        return [Mistake(FILE, error.lineno, "", f"{error.msg} (column {error.colno})")]
    except RecursionError:
        return [Mistake(FILE, 1, "", "nested too deeply")]
    checker = Checker(FILE, text, sources)
    checker.table(
        content, (), _TOP, ("description", "method", "releases"), (*_BODY, "debootstrap", "mirror", "variants")
    )
    checker.body(content, ())
    if "mirror" in content:
        checker.table(content["mirror"], ("mirror",), _MIRROR)
    if "debootstrap" in content:
        checker.table(content["debootstrap"], ("debootstrap",), _DEBOOTSTRAP, ("keyring",))
        if content.get("method") != "debootstrap":
            checker.tell(("debootstrap",), 'is for `method = "debootstrap"` only')
    elif content.get("method") == "debootstrap":
        checker.tell(("method",), "needs a table [debootstrap] with a `keyring`")
    variants = content.get("variants", {})
    if not isinstance(variants, dict):
        checker.tell(("variants",), "must be a table")
        variants = {}
    for name, variant in variants.items():
        path = ("variants", name)
        if _name(name):
            checker.tell(path, _name(name))
        checker.table(variant, path, _VARIANT, ("description",), _BODY)
        if isinstance(variant, dict):
            checker.body(variant, path)
    return sorted(
        set(checker.mistakes), key=lambda mistake: (mistake.file != FILE, mistake.file, mistake.line, mistake.key)
    )
