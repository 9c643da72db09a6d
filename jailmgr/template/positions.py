"""Where the keys of a TOML text stand, which its parsers don't tell (TOML 1.0). For texts that have been parsed."""

from __future__ import annotations

import re
from collections.abc import Iterator

Path = tuple[str | int, ...]
"""Table names, keys, and the index of a table in an array of tables."""

_PART = r"(?:[A-Za-z0-9_-]+|\"[^\"\n]*\"|'[^'\n]*')"
_DOTTED = re.compile(rf"\s*({_PART}(?:[ \t]*\.[ \t]*{_PART})*)")
_EACH = re.compile(_PART)
_STRING = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL)


def find_keys(text: str) -> dict[Path, int]:
    """The line, from 1 on, of each table's header and each key. Keys of inline tables are not in it."""
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    for line, statement in _statements(text):
        opening = re.match(r"\[\[?", statement)
        match = _DOTTED.match(statement, opening.end() if opening else 0)
        if match is None:
            continue
        names = [part.strip("\"'") for part in _EACH.findall(match[1])]
        if opening is None:
            for end in range(1, len(names) + 1):
                found.setdefault((*table, *names[:end]), line)
            continue
        table = ()
        for position, name in enumerate(names):
            table = (*table, name)
            found.setdefault(table, line)
            last = position == len(names) - 1
            if last and opening[0] == "[[":
                counts[table] = counts.get(table, -1) + 1
            if table in counts:
                table = (*table, counts[table])
                found.setdefault(table, line)
    return found


def line_of(keys: dict[Path, int], path: Path) -> int:
    """The line of `path`, else of the nearest above it that is known."""
    while path and path not in keys:
        path = path[:-1]
    return keys.get(path, 1)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each header or `key = value`, strings and comments blanked out but for quoted keys."""
    text = text.replace("\r\n", "\n")
    blank = _STRING.sub(lambda match: "_" * len(match[0]), text)
    start, depth, valued = 0, 0, False
    for position, char in enumerate(blank + "\n"):
        if char == "=":
            valued = True
        elif valued and char in "[{":
            depth += 1
        elif valued and char in "]}":
            depth -= 1
        elif char == "\n" and depth == 0:
            statement = text[start:position]
            if statement.strip() and not statement.lstrip().startswith("#"):
                skipped = len(statement) - len(statement.lstrip())
                yield text.count("\n", 0, start + skipped) + 1, statement.strip()
            start, valued = position + 1, False
