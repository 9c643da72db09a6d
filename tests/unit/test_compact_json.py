"""The C halves of json say what json says, and refuse what it refuses."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jailmgr.runtime import compact_json

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_writes_and_reads_as_json_does(value: Any) -> None:
    text = compact_json.dumps(value)
    assert text == json.dumps(value, separators=(",", ":"))
    assert compact_json.loads(text) == value
    assert compact_json.loads(f" {text}\r\n".encode()) == value


@given(st.text() | st.from_regex(r'[\[\]{}",:0-9a-z \\-]{0,12}', fullmatch=True))
def test_refuses_what_json_refuses(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            compact_json.loads(text)
        return
    if isinstance(expected, float) and math.isnan(expected):
        return
    assert compact_json.loads(text) == expected


@pytest.mark.parametrize(
    "text", ["", "NaN", "[Infinity]", "-Infinity", '{"a":1} {"b":2}', '{"a":1', b"\xff\xfe", "'a'"]
)
def test_refuses(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        compact_json.loads(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, b"bytes"])
def test_writes_no_more_than_json_has(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        compact_json.dumps(value)
