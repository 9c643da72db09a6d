"""Imports point one way: between packages, and within the manager (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parents[2]

ORDER = {"cli": 5, "engine": 4, "manager": 3, "template": 2, "image": 2, "storage": 2, "network": 2, "runtime": 1}
"""A package imports none above it. Modules at the top, and devices/ with its keys, are for all."""

LATE = {
    "jailmgr.runtime.attach": "a supervisor is started rarely, and `exec` goes this way",
    "jailmgr.engine.main": "the engine reports to its caller why it could not be loaded",
}
"""Modules that import inside functions, and why. Commands all do: each costs more to import than to run."""

KNOTS = [
    {"jailmgr.runtime.host", "jailmgr.runtime.jail"},
    {f"jailmgr.runtime.{name}" for name in ("child", "reexec", "session", "supervisor")},
    {"jailmgr.engine.answers", "jailmgr.engine.background"},
]
"""Modules that import each other, for the sake of types."""


class Import(NamedTuple):
    module: str
    imported: str
    late: bool
    """Inside a function."""


def _modules() -> dict[str, Path]:
    paths = (TOP / "jailmgr").rglob("*.py")
    return {".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def _imports() -> Iterator[Import]:
    modules = _modules()
    for module, path in modules.items():
        for node, late in _walk(ast.parse(path.read_text()), False):
            for name in _names(node):
                while name and name not in modules:
                    name = name.rpartition(".")[0]
                if name and name != module:
                    yield Import(module, name, late)


def _walk(node: ast.AST, late: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, late
        yield from _walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def _rank(module: str) -> int:
    return ORDER.get(f"{module}.".split(".")[1], 0)


def test_no_package_imports_one_above_it() -> None:
    above = {f"{of.module} imports {of.imported}" for of in _imports() if 0 < _rank(of.module) < _rank(of.imported)}
    assert above == set()


def test_no_module_imports_itself_by_others() -> None:
    graph: dict[str, set[str]] = {}
    for of in _imports():
        if not any({of.module, of.imported} <= knot for knot in KNOTS):
            graph.setdefault(of.module, set()).add(of.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_imports_stand_at_the_top_of_their_modules() -> None:
    late = {of.module for of in _imports() if of.late and not of.module.startswith("jailmgr.cli.")}
    assert late == set(LATE)


def test_the_context_knows_no_use_case() -> None:
    known = {of.imported for of in _imports() if of.module == "jailmgr.manager.context"}
    assert {name for name in known if name.startswith("jailmgr.manager")} == set()
