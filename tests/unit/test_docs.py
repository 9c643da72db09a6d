"""What is generated is as its source has it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "script"
CLAUSES = {
    "Execution environment": 7, "Environment variables": 5, "Advanced integration": 6, "Networking": 3,
    "`/run/host`": 11, "What you shouldn't do": 8,
}  # fmt: skip
"""Sections of systemd's Container Interface and their numbered clauses."""


@pytest.mark.parametrize("script", ["key-docs", "hot-commands"])
def test_generated_files_are_fresh(script: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT / script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"script/{script} has not been run: {done.stdout}{done.stderr}"


def test_container_interface_has_all_clauses_and_tests() -> None:
    page = (ROOT / "docs" / "container-interface.md").read_text()
    found: dict[str, list[int]] = {}
    for row in re.findall(r"^\| (.+?) \|.*\|$", page, re.MULTILINE):
        if title := re.fullmatch(r"\*\*(.+)\*\*", row):
            found[title[1]] = []
        elif numbers := re.match(r"[0-9, ]+", row):
            list(found.values())[-1].extend(int(number) for number in numbers[0].split(","))
    assert found == {title: list(range(1, count + 1)) for title, count in CLAUSES.items()}
    tests = (ROOT / "tests" / "system" / "test_container_interface.py").read_text()
    assert set(re.findall(r"`(test_\w+)`", page)) == set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
