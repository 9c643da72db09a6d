"""The form of a check's outcome."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["error", "warning"]
SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
"""Where a host's tools are looked for, whatever the caller's PATH."""


class Check(msgspec.Struct, frozen=True):
    """One check's outcome. `remedy` is empty where there is nothing to do."""

    check: str
    ok: bool
    severity: Severity
    detail: str
    remedy: str = ""


def check(name: str, ok: bool, detail: str, remedy: str = "", severity: Severity = "error") -> Check:
    """An outcome whose remedy is told only where it is needed."""
    return Check(name, ok, severity, detail, "" if ok else remedy)


def read(path: str) -> str:
    """A small file's text without white space at its ends; empty where it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
