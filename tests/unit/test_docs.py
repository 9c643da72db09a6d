"""What is generated is as its source has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "script"


@pytest.mark.parametrize("script", ["key-docs", "hot-commands"])
def test_generated_files_are_fresh(script: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT / script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"script/{script} has not been run: {done.stdout}{done.stderr}"
