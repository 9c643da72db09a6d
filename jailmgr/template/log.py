"""The log of a build: kept whole up to a size, its last lines at hand for an error."""

from __future__ import annotations

import os
import re
from collections import deque

LOG_MAX = 16 * 1024 * 1024
"""Bytes; package scripts write into it, and must not fill the host's disk."""
_FULL = re.compile(r"No space left on device|Disk quota exceeded")


class BuildLog:
    """`path`: the file, made anew. Close it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tail: deque[str] = deque(maxlen=40)
        self.full = ""
        """The kernel's words for a full disk, once a line had them."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = open(os.open(path, flags, 0o600), "wb")  # noqa: SIM115
        self._left = LOG_MAX

    def line(self, raw: bytes) -> None:
        """Keep a line (without its end)."""
        text = "".join(char if char.isprintable() else "?" for char in raw.decode(errors="replace").expandtabs())
        self.tail.append(text[:500])
        found = _FULL.search(text)
        if found:
            self.full = found[0]
        if self._left > 0:
            self._file.write(raw[: self._left] + b"\n")
            self._file.flush()
            self._left -= len(raw) + 1

    def close(self) -> None:
        self._file.close()
