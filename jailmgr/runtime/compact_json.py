"""JSON (RFC 8259) for what is on the way of a hot command: the C halves of the standard library's json, alone.

`import json` brings `re` and `enum` along, a third of the time of `exec`. Same results, held by a test; where this
Python has no such halves, json itself.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class _Rules:
    """What json.JSONDecoder would tell the scanner."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")


def _unknown(value: object) -> object:
    raise TypeError(f"{type(value).__name__} is not JSON")


def _halves() -> tuple[Callable[[Any], str], Callable[[str | bytes], Any]]:
    try:
        from _json import encode_basestring_ascii, make_encoder, make_scanner

        encode = make_encoder(None, _unknown, encode_basestring_ascii, None, ":", ",", False, False, False)
        scan = make_scanner(_Rules)  # type: ignore[arg-type]
        encode([{}], 0)
        scan("[{}]", 0)
    except (ImportError, AttributeError, TypeError):
        import json

        return (lambda value: json.dumps(value, separators=(",", ":"), allow_nan=False)), json.loads

    def dump(value: Any) -> str:
        return "".join(encode(value, 0))

    def load(text: str | bytes) -> Any:
        text = (text if isinstance(text, str) else text.decode()).strip(" \t\r\n")
        try:
            value, end = scan(text, 0)
        except StopIteration:
            raise ValueError("not JSON") from None
        if end != len(text):
            raise ValueError("more than one JSON value")
        return value

    return dump, load


dumps, loads = _halves()
