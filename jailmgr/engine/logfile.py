"""The engine's log when nobody looks: run/engine.log and one older file beside it, each of a bounded size.

Descriptors 1 and 2 are the log as well, so that a fault of the interpreter or of a child ends up in it.
"""

from __future__ import annotations

import logging
import os

SIZE_MAX = 1024 * 1024
"""Bytes after which the file becomes `.1` and a new one is begun."""
FORMAT = "%(asctime)s %(levelname)s %(message)s"


class LogFile(logging.Handler):
    """Appends to descriptor 2, which it points at the file, and turns the file over when it is full."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(2, (self.format(record) + "\n").encode(errors="backslashreplace"))
            if os.fstat(2).st_size > SIZE_MAX:
                os.replace(self._path, f"{self._path}.1")
                self._open()
        except OSError:
            self.handleError(record)

    def _open(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)


def log_to(path: str | None) -> None:
    """Log from now on to the file at `path`, or to stderr where somebody is there to read it (None)."""
    handler = LogFile(path) if path else logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
