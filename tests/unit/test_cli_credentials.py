"""Credentials on the command line: read from stdin, where no other user of the host sees them."""

from __future__ import annotations

import io
import sys

import pytest

from jailmgr.cli.request import split_keys
from jailmgr.errors import JailmgrError


def given(monkeypatch: pytest.MonkeyPatch, stdin: bytes, *pairs: str) -> dict[str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    return split_keys(list(pairs))[0]


@pytest.mark.parametrize("key", ["systemd.credential.a", "systemd.credential-binary.a"])
def test_a_dash_reads_stdin(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    assert given(monkeypatch, "päss\n".encode(), f"{key}=-", "user.x=-") == {key: "päss\n", "user.x": "-"}


@pytest.mark.parametrize(
    ("stdin", "pairs", "why"),
    [
        (b"x", ("systemd.credential.a=-", "systemd.credential.b=-"), "systemd.credential.a is read from stdin already"),
        (b"\xff", ("systemd.credential.a=-",), "what stdin has is not UTF-8"),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, stdin: bytes, pairs: tuple[str, ...], why: str) -> None:
    with pytest.raises(JailmgrError) as raised:
        given(monkeypatch, stdin, *pairs)
    assert raised.value.why == why
