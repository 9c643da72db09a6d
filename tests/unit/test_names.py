"""Jails in errors, hints and results: a name means the same jail in the caller's next command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jailmgr
from jailmgr.cli.settings import in_context, name_of

HINT = re.compile(r"jailmgr (?:start|stop|restart|resume|logs|delete|info|exec) \{([^}]*)\}")
SUBJECT = re.compile(r"f\"jail \{([^}]*)\}")
FULL = re.compile(r"full_name|name_of|^tenant$|^port\.tenant$")
LOCAL = ("taken", "stranger")
"""Variables that hold a full name."""


@pytest.mark.parametrize("pattern", [HINT, SUBJECT])
def test_no_source_names_a_jail_without_its_tenant(pattern: re.Pattern[str]) -> None:
    bare, seen = [], 0
    for path in sorted(Path(jailmgr.__file__).parent.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in pattern.finditer(line):
                seen += 1
                if not FULL.search(match[1]) and match[1] not in LOCAL:
                    bare.append(f"{path.name}:{number}: {line.strip()}")
    assert seen > 5
    assert bare == []


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("jail acme/web: it is running", "jail web: it is running"),
        ("Stop it first (jailmgr stop acme/web), or use --force.", "Stop it first (jailmgr stop web), or use --force."),
        ("Did you mean acme/web?", "Did you mean web?"),
        ("image acme/web: not found", "image acme/web: not found"),
        ("See: jailmgr launch acme/web", "See: jailmgr launch acme/web"),
        ("/acme/web: no such file", "/acme/web: no such file"),
        ("jail default/web: it is running", "jail default/web: it is running"),
    ],
)
def test_own_tenant_is_left_out(text: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAILMGR_TENANT", "acme")
    assert in_context(text) == own
    monkeypatch.setenv("JAILMGR_TENANT", "other")
    assert in_context(text) == text


def test_a_result_names_what_the_next_command_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAILMGR_TENANT", raising=False)
    assert (name_of("default", "web"), name_of("acme", "web")) == ("web", "acme/web")
    monkeypatch.setenv("JAILMGR_TENANT", "acme")
    assert (name_of("default", "web"), name_of("acme", "web")) == ("default/web", "web")
