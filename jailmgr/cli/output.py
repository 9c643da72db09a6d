"""How results, errors and questions reach the user. Without rich: that is for progress bars alone."""

from __future__ import annotations

import os
import sys

from jailmgr.cli.settings import Settings, in_context
from jailmgr.errors import STATUS, JailmgrError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

GAP = "  "
FREE = ("config", "devices")
"""Objects that may have any key."""


def show(settings: Settings, document: Any, layout: Callable[[], str]) -> None:
    """Print a result: `document` as JSON, YAML or CSV where that was asked for, else what `layout` makes of it."""
    if settings.format == "json":
        import json

        write(json.dumps(document, indent=2) + "\n")
    elif settings.format == "yaml":
        import yaml

        write(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    elif settings.format == "csv":
        write(as_csv(document if isinstance(document, list) else [document]))
    else:
        text = layout()
        if text:
            write(text if text.endswith("\n") else text + "\n")


def write(text: str) -> None:
    """To stdout, all of it; what cannot be encoded there is escaped.

    With PYTHONUNBUFFERED stdout's own write drops, without a word, what a pipe didn't take at once.
    """
    sys.stdout.flush()
    rest = memoryview(text.encode(sys.stdout.encoding or "utf-8", "backslashreplace"))
    while rest:
        rest = rest[sys.stdout.buffer.write(rest) :]


def remark(settings: Settings, text: str) -> None:
    """A line for a person, on stderr; not with --quiet."""
    if not settings.quiet:
        print(printable(in_context(text)), file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; nothing is wrapped or cut off, and the last column is not padded."""
    cells = [header, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    return "".join(
        GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells
    )


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """`Name:  value` lines with the values below each other."""
    width = max((len(name) for name, _ in pairs), default=0) + 1
    return "".join(
        f"{name + ':' if name else '':<{width}}{GAP}{printable(value)}".rstrip() + "\n" for name, value in pairs
    )


def printable(text: str) -> str:
    """The text without what would steer a terminal: control characters are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def as_csv(rows: list[Any]) -> str:
    """RFC 4180 with a header. Objects with the same keys in every row become columns `outer.inner`, others JSON.

    JSON are those, too, whose keys are the user's: a column must not depend on who has what.
    """
    import csv
    import io

    flat = [_flatten(row, rows) if isinstance(row, dict) else {"value": row} for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if columns:
        writer.writeheader()
    writer.writerows({key: _csv_cell(value) for key, value in row.items()} for row in flat)
    return text.getvalue()


def _flatten(row: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if (
            key not in FREE
            and isinstance(value, dict)
            and value
            and all(_keys(other, key) == list(value) for other in rows)
        ):
            flat.update({f"{key}.{inner}": what for inner, what in value.items()})
        else:
            flat[key] = value
    return flat


def _keys(row: Any, key: str) -> list[str] | None:
    value = row.get(key) if isinstance(row, dict) else None
    return list(value) if isinstance(value, dict) else None


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool | dict | list):
        import json

        return json.dumps(value)
    return "" if value is None else value


def tell(error: JailmgrError, as_json: bool, others: Sequence[JailmgrError] = ()) -> None:
    """An error, and those that came with it, on stderr: `Error: WHAT: WHY` and `Hint: …`, or one JSON object."""
    if as_json:
        import json

        document: dict[str, Any] = _error_document(error)
        if others:
            document["errors"] = [_error_document(other) for other in others]
        print(json.dumps(document), file=sys.stderr, flush=True)
        return
    for each in others or (error,):
        print(f"Error: {printable(in_context(f'{each.what}: {each.why}'))}", file=sys.stderr)
        if each.hint:
            print(f"Hint: {printable(in_context(each.hint))}", file=sys.stderr)
    sys.stderr.flush()


def _error_document(error: JailmgrError) -> dict[str, Any]:
    return {
        "error": in_context(f"{error.what}: {error.why}"),
        "error_code": STATUS.get(error.code, 500),
        "hint": in_context(error.hint),
    }


def agree(settings: Settings, what: str, question: str) -> None:
    """Ask the user, where stdin is a terminal; --yes, and a script, agree. JailmgrError where the answer is no."""
    if settings.yes or not sys.stdin.isatty():
        return
    text = f"{printable(question)} [y/N] ".encode(errors="replace")
    os.write(2 if sys.stderr.isatty() else sys.stdin.fileno(), text)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise JailmgrError(what, "nothing was deleted")


def silence_stdout() -> None:
    """After a broken pipe: what is still buffered goes nowhere, so that the interpreter ends without complaint."""
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)
