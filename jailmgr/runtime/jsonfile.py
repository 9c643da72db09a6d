"""Small JSON files of ours, replaced in one piece. On the way of `exec`, so it imports little."""

from __future__ import annotations

import json
import os
from typing import Any

from jailmgr.runtime.plainfile import read_bytes


def write_json(path: str, content: dict[str, Any]) -> None:
    """Replace a JSON file atomically, mode 0600 (rename(2)): what is there is either the old or the new."""
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(content, file, separators=(",", ":"))
    os.rename(new, path)


def read_json(path: str) -> dict[str, Any] | None:
    """A JSON object from a file of ours; None when there is none or a crash left half of one."""
    try:
        content = json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
