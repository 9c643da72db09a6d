"""The part of Jinja2 that a template's files may use, and that nothing else gets through."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jailmgr.errors import JailmgrError
from jailmgr.model import CreateFile
from jailmgr.template.render import (
    BUILD_NAMES,
    CREATE_NAMES,
    OUTPUT_MAX,
    SOURCE_MAX,
    find_flaws,
    path_flaw,
    render,
    render_create_files,
)

CONTEXT: dict[str, str | list[str]] = {
    **dict.fromkeys(CREATE_NAMES, ""),
    "jail.name": "web",
    "network.ipv4": "192.0.2.7",
    "network.dns": ["192.0.2.1", "2001:db8::1"],
}


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("{{ jail.name }}\n", "web\n"),
        (
            "{% for a in network.dns %}\nnameserver {{ a }}\n{% endfor %}\n",
            "nameserver 192.0.2.1\nnameserver 2001:db8::1\n",
        ),
        ("{% for a in network.dns %}{{ a }}{% if not loop.last %},{% endif %}{% endfor %}", "192.0.2.1,2001:db8::1"),
        ("{{ network.dns | join(' ') }}", "192.0.2.1 2001:db8::1"),
        ("{% if network.gateway4 %}way{% else %}none{% endif %}", "none"),
        ("{{ jail.name | upper }}{{ network.dns | length }}", "WEB2"),
        ("{{ network.dns[0] }}", "192.0.2.1"),
        ("plain % $ \\ text", "plain % $ \\ text"),
    ],
)
def test_renders(source: str, output: str) -> None:
    assert render(source, CONTEXT, "file").decode() == output


@pytest.mark.parametrize(
    ("source", "line", "word"),
    [
        ("\n{{ jail.nme }}", 2, "jail.nme"),
        ("{{ jail }}", 1, "'jail'"),
        ("{% set x = 1 %}", 1, "assign"),
        ("a\n\n{% include '/etc/passwd' %}", 3, "include"),
        ("{% import 'x' as x %}", 1, "import"),
        ("{% macro f() %}{% endmacro %}", 1, "macro"),
        ("{{ jail.name.upper() }}", 1, "call"),
        ("{{ range(10) }}", 1, "call"),
        ("{{ 'a' * 1000000000 }}", 1, "mul"),
        ("{{ jail.name ~ jail.name }}", 1, "concat"),
        ("{{ jail.name | center(1000000000) }}", 1, "center"),
        ("{{ network.dns | map('upper') }}", 1, "map"),
        ("{{ network.dns | join(jail.name) }}", 1, "join"),
        ("{{ network.dns | join(attribute='x') }}", 1, "join"),
        ("{{ (network.dns | join('aaaa')) | join('bbbb') }}", 1, "join"),
        ("{% for c in jail.name %}{% endfor %}", 1, "loops go over a list"),
        ("{% for c in 'abc' %}{% endfor %}", 1, "loops go over a list"),
        ("{% for a in network.dns %}" * 3 + "{% endfor %}" * 3, 1, "no deeper"),
        ("{% for a in network.dns recursive %}{{ loop(a) }}{% endfor %}", 1, "loops go over a list"),
        ("{% if jail.name is odd %}{% endif %}", 1, "odd"),
        ("{% if jail.name %}", 1, "end of template"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", 1, "deeply"),
        ("{{ " + "not " * 500 + "jail.name }}", 1, "deeply"),
        ("x" * (SOURCE_MAX + 1), 1, "larger"),
    ],
)
def test_refuses(source: str, line: int, word: str) -> None:
    flaws = find_flaws(source, CREATE_NAMES)
    assert flaws
    assert flaws[0].line == line
    assert word in flaws[0].what
    with pytest.raises(JailmgrError) as refused:
        render(source, CONTEXT, "file")
    assert refused.value.code == "invalid"


@pytest.mark.parametrize("source", ["{{ ().__class__ }}", "{% for a in network.dns %}{{ a.__class__ }}{% endfor %}"])
def test_sandbox_stands_behind(source: str) -> None:
    with pytest.raises(JailmgrError, match="unsafe") as refused:
        render(source, CONTEXT, "file")
    assert refused.value.code == "invalid"


def test_output_is_bounded() -> None:
    body = "{% for a in network.dns %}" + "x" * 60000 + "{% endfor %}"
    with pytest.raises(JailmgrError, match="renders to more") as refused:
        render(body, {**CONTEXT, "network.dns": ["a"] * (OUTPUT_MAX // 60000 + 1)}, "file")
    assert refused.value.code == "invalid"


@given(st.text(alphabet="{}%#-_.|()[] \n'\"abcifornetworkdnsjailname012", max_size=80))
def test_flaws_are_refused(source: str) -> None:
    if not find_flaws(source, CREATE_NAMES):
        return
    with pytest.raises(JailmgrError) as refused:
        render(source, CONTEXT, "file")
    assert refused.value.code == "invalid"


@given(st.text(alphabet="{}%#-_.|()[] \n'\"abcifornetworkdnsjailname012", max_size=80))
def test_only_our_own_error_comes_out(source: str) -> None:
    with suppress(JailmgrError):
        render(source, CONTEXT, "file")


@pytest.mark.parametrize(
    "path", ["etc/x", "/", "/etc/", "/etc/../x", "/etc//x", "/./x", "/dev/x", "/run/x", "/a\0", "/" + "x" * 300]
)
def test_paths_that_are_no_file_in_a_jail(path: str) -> None:
    assert path_flaw(path)
    with pytest.raises(JailmgrError):
        render_create_files([CreateFile(path, "")], CONTEXT)


def test_create_files() -> None:
    files = [CreateFile("/etc/hostname", "{{ jail.name }}\n"), CreateFile("/etc/up", "#!/bin/sh\n", 0o755)]
    assert render_create_files(files, CONTEXT) == [
        ("/etc/hostname", b"web\n", 0o644),
        ("/etc/up", b"#!/bin/sh\n", 0o755),
    ]
    with pytest.raises(JailmgrError, match="mode"):
        render_create_files([CreateFile("/etc/x", "", 0o100644)], CONTEXT)


def test_names_of_build_and_create_are_apart() -> None:
    assert not BUILD_NAMES & CREATE_NAMES
