"""Jinja2 for templates nobody vouches for: a part of the language whose cost can be read off the text.

Of Jinja2's statements only output, `if` and `for` are taken, of its filters a few; no assignment, macro, call,
include or arithmetic. So the output can't outgrow source × items of the loops, and nothing can run for long: no
clock, process or memory limit is needed, and what isn't taken is told with its line before anything is built. The
sandbox (ImmutableSandboxedEnvironment, StrictUndefined, no loader) stands behind that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jailmgr.errors import JailmgrError
from jailmgr.model import CreateFile

SOURCE_MAX = 64 * 1024
"""Bytes of a file's source."""
OUTPUT_MAX = 1024 * 1024
"""Bytes of a rendered file."""
LOOP_DEPTH = 2
DEPTH = 60
"""Of nested expressions and blocks; what CPython's compiler takes is the wall behind it."""
FILTERS = frozenset({"default", "first", "join", "last", "length", "lower", "trim", "upper"})
LISTS = frozenset({"mirror.components", "network.dns"})
"""The only things a loop goes over."""
_TAKEN = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.If, nodes.For, nodes.Getattr,
    nodes.Getitem, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Filter,
    nodes.Test, nodes.List, nodes.Tuple,
)  # fmt: skip

BUILD_NAMES = {
    "template.name", "template.release", "template.variant", "template.architecture", "mirror.url",
    "mirror.security_url", "mirror.components",
}  # fmt: skip
"""What a file rendered when the image is built may ask for."""
CREATE_NAMES = {
    "jail.name", "jail.tenant", "network.name", "network.ipv4", "network.ipv6", "network.gateway4",
    "network.gateway6", "network.dns",
}  # fmt: skip
"""What a file rendered when a jail is created may ask for; `network.dns` is a list, all else text, empty for none."""

Context = Mapping[str, str | Sequence[str]]
"""Dotted names to values."""


class Flaw(NamedTuple):
    """Something in a file's source that won't do."""

    line: int
    key: str
    """The name or construct."""
    what: str


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True, cache_size=0
    )
    made.globals.clear()
    made.filters = {name: made.filters[name] for name in FILTERS}
    return made


def find_flaws(source: str, names: set[str]) -> list[Flaw]:
    """What keeps `source` from being rendered with values for `names`."""
    if len(source.encode()) > SOURCE_MAX:
        return [Flaw(1, "", f"larger than {SOURCE_MAX} bytes")]
    try:
        tree = environment().parse(source)
    except TemplateSyntaxError as error:
        return [Flaw(error.lineno, "", error.message or "not Jinja2")]
    except RecursionError:
        return [Flaw(1, "", "nested too deeply")]
    return sorted(flaw._replace(line=flaw.line or 1) for flaw in _walk(tree, _Scope(frozenset(names))))


class _Scope(NamedTuple):
    names: frozenset[str]
    locals: frozenset[str] = frozenset()
    loops: int = 0
    depth: int = 0


def _walk(node: nodes.Node, scope: _Scope) -> Iterator[Flaw]:
    if scope.depth > DEPTH:
        yield Flaw(node.lineno, "", "nested too deeply")
        return
    if not isinstance(node, _TAKEN):
        word = type(node).__name__.lower()
        yield Flaw(node.lineno, word, f"`{word}` is not taken in a template's files")
        return
    scope = scope._replace(depth=scope.depth + 1)
    if isinstance(node, nodes.For):
        yield from _walk_loop(node, scope)
        return
    dotted = _dotted(node)
    if dotted is not None:
        if dotted.split(".")[0] not in scope.locals and dotted not in scope.names:
            there = ", ".join(sorted(scope.names))
            yield Flaw(node.lineno, dotted, f"no variable {dotted!r} here (there are {there})")
        return
    if isinstance(node, nodes.Filter):
        if node.name not in FILTERS:
            yield Flaw(node.lineno, node.name, f"no filter {node.name!r} (there are {', '.join(sorted(FILTERS))})")
        elif node.name == "join" and not _joins_list(node):
            yield Flaw(node.lineno, "join", f"`join` takes a list ({', '.join(sorted(LISTS))}) and a text written out")
    if isinstance(node, nodes.Test) and node.name != "defined":
        yield Flaw(node.lineno, node.name, f"no test {node.name!r} (there is `defined`)")
    for child in node.iter_child_nodes():
        yield from _walk(child, scope)


def _joins_list(node: nodes.Filter) -> bool:
    return (
        node.node is not None
        and _dotted(node.node) in LISTS
        and all(isinstance(arg, nodes.Const) for arg in node.args)
        and not (node.kwargs or node.dyn_args or node.dyn_kwargs)
    )


def _walk_loop(node: nodes.For, scope: _Scope) -> Iterator[Flaw]:
    if _dotted(node.iter) not in LISTS or node.recursive:
        yield Flaw(node.lineno, "for", f"loops go over a list ({', '.join(sorted(LISTS))})")
        return
    if scope.loops == LOOP_DEPTH:
        yield Flaw(node.lineno, "for", f"loops nest no deeper than {LOOP_DEPTH}")
        return
    yield from _walk(node.iter, scope)
    if not isinstance(node.target, nodes.Name):
        yield Flaw(node.lineno, "for", "a loop has one variable")
        return
    inner = scope._replace(locals=scope.locals | {"loop", node.target.name}, loops=scope.loops + 1)
    for child in (*node.body, *([node.test] if node.test else [])):
        yield from _walk(child, inner)
    for child in node.else_:
        yield from _walk(child, scope)


def _dotted(node: nodes.Node) -> str | None:
    """`a.b` for the expression a.b, None for another kind of node."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr):
        above = _dotted(node.node)
        return None if above is None else f"{above}.{node.attr}"
    return None


def render(source: str, context: Context, what: str) -> bytes:
    """The file's text with the values of `context`; JailmgrError `invalid` with the line of what won't do."""
    flaws = find_flaws(source, set(context))
    if flaws:
        raise JailmgrError(what, f"line {flaws[0].line}: {flaws[0].what}", "", "invalid")
    values: dict[str, Any] = {}
    for name, value in context.items():
        *above, last = name.split(".")
        place = values
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value if isinstance(value, str) else list(value)
    chunks, size = [], 0
    try:
        for chunk in environment().from_string(source).generate(values):
            raw = chunk.encode()
            size += len(raw)
            if size > OUTPUT_MAX:
                raise JailmgrError(what, f"renders to more than {OUTPUT_MAX} bytes", "", "invalid")
            chunks.append(raw)
    except (TemplateError, SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise JailmgrError(what, str(error) or type(error).__name__, "", "invalid") from error
    return b"".join(chunks)


def render_create_files(files: Sequence[CreateFile], context: Context) -> list[tuple[str, bytes, int]]:
    """Path, content and mode of each file an image wants in a new jail; `context` has all of CREATE_NAMES.

    The image may come from anywhere: its paths are checked as well. Raises JailmgrError `invalid`.
    """
    rendered = []
    for file in files:
        wrong = path_flaw(file.path)
        if wrong or not 0 <= file.mode <= 0o7777:
            raise JailmgrError(f"file {file.path!r} of the image", wrong or "its mode is out of range", "", "invalid")
        rendered.append((file.path, render(file.source, context, f"file {file.path} of the image"), file.mode))
    return rendered


def path_flaw(path: str) -> str:
    """Why `path` can't be a file's place in a jail; empty where it can."""
    parts = path.split("/")
    if not path.startswith("/") or path == "/" or "\0" in path or len(path) > 4000:
        return "is not an absolute path of a file"
    if any(part in ("", ".", "..") or len(part.encode()) > 240 for part in parts[1:]):
        return "is not a plain path (`..`, `.`, `//` or a part too long)"
    if parts[1] in ("proc", "sys", "dev", "run"):
        return "lies where the kernel's file systems are mounted"
    return ""
