"""How many connections jails and tenants may have, and the rules that hold them to it."""

from __future__ import annotations

import pytest

from jailmgr.config import find_root
from jailmgr.keys import CONNECTIONS, CONNECTIONS_MAX
from jailmgr.manager.networks import total_connections
from jailmgr.model import Tenant
from jailmgr.network import rules

ROOT = find_root("/tmp/none")


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({}, None),
        ({"limits.connections": "60"}, 60),
        ({"users": "alice"}, CONNECTIONS_MAX),
        ({"groups": "class-a"}, CONNECTIONS_MAX),
        ({"users": ""}, None),
        ({"users": "alice", "limits.connections": "60"}, 60),
    ],
)
def test_total_of_a_tenant(config: dict[str, str], total: int | None) -> None:
    assert total_connections(Tenant(1, "acme", 0.0, 1, config)) == total


def test_what_counts_is_declared_and_never_flushed() -> None:
    declared = rules.declarations(ROOT)
    flushed = [command["flush"]["set"]["name"] for command in rules.frame(ROOT) if "set" in command.get("flush", {})]
    for name, kind in rules.COUNTED.items():
        assert f"add set inet {ROOT.table} {name} {{ type {kind}; ct count over {CONNECTIONS}; }}" in declared
        assert f"add set inet {ROOT.table} {name}{rules.FULL} " in declared
        assert name not in flushed
    assert set(flushed) == {name for _, name in rules.SETS}


@pytest.mark.parametrize("name", rules.COUNTED)
def test_a_key_at_its_limit_is_dropped_before_the_count(name: str) -> None:
    """Each look at the count adds to it."""
    added = [command["add"]["rule"] for command in rules.frame(ROOT) if "rule" in command.get("add", {})]
    of_chain = [rule["expr"] for rule in added if rule["chain"] == ("opened" if "opened" in name else "taken")]
    looks = [expr[0]["match"]["right"] for expr in of_chain]
    assert looks.index(f"@{name}{rules.FULL}") == looks.index(f"@{name}") - 1
    assert all(expr[-1] == {"drop": None} for expr in of_chain)


@pytest.mark.parametrize("chain", ["input", "forward"])
def test_connections_are_counted_before_anything_is_accepted(chain: str) -> None:
    """Only other interfaces' packets are accepted before."""
    added = [command["add"]["rule"] for command in rules.frame(ROOT) if "rule" in command.get("add", {})]
    of_chain = [rule["expr"] for rule in added if (rule["family"], rule["chain"]) == ("inet", chain)]
    accepting = [place for place, expr in enumerate(of_chain) if expr[-1] == {"accept": None}]
    jumping = [place for place, expr in enumerate(of_chain) if "jump" in expr[-1]]
    assert jumping
    assert [place for place in accepting if place < max(jumping)] == [0]
