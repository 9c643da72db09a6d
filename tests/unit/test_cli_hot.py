"""The small reader against the Typer app: the same command line must mean the same to both."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from jailmgr.cli import actions, hot
from jailmgr.cli.app import app
from jailmgr.cli.hot_table import COMMANDS, GLOBALS, Option
from jailmgr.cli.settings import settle

ACTIONS = {"exec": "exec_", "start": "start", "stop": "stop", "list": "list_"}
TOP = Path(__file__).resolve().parents[2]

FORMS = [
    "list",
    "list --format json",
    "--format json list",
    "--format=json list -A",
    "--format csv list --format yaml",
    "-q list",
    "-qy list",
    "list -qA",
    "--tenant acme list --all-tenants",
    "--root /ROOT list",
    "list web",
    "list --format xml",
    "list -h",
    "list --help",
    "list -- ",
    "list --",
    "start",
    "start web",
    "start acme/web db",
    "start web --wait",
    "start --wait web db --all",
    "start --all",
    "start --wait=yes web",
    "start --wai web",
    "start -- --all",
    "start web -- --wait db",
    "start - web",
    "start --tenant",
    "start --tenant= web",
    "start -q web -y",
    "start '' web",
    "stop web --timeout 5",
    "stop web --timeout=5",
    "stop web --timeout -5",
    "stop web --timeout x",
    "stop web --timeout 5 --timeout 7",
    "stop --force --all",
    "stop web --timeout 99999999999999999999",
    "stop web --timeout 007",
    "stop web --timeout ٣",
    "exec",
    "exec web",
    "exec web --",
    "exec web -- true",
    "exec web true",
    "exec web true -x",
    "exec -t web -- top",
    "exec -T web -- cat",
    "exec -tT web -- cat",
    "exec -Tt web -- cat",
    "exec web -u root -w /tmp -e A=1 -e B=2 -- env",
    "exec web -uroot -w/tmp -eA=1 -- env",
    "exec web -turoot -- env",
    "exec web -tu root -- env",
    "exec web --user=root --workdir=/ -- env",
    "exec --user root web -- sh -c 'exit 3'",
    "exec web -- sh -- --format json",
    "exec --format json web -- true",
    "exec web -u",
    "exec web -u -- true",
    "exec -q --debug web -- -t",
    "exec web -e --format json -- true",
    "-- list",
    "- list",
    "--debug",
    "--nonsense list",
    "lisst",
    "",
]


def split(form: str) -> list[str]:
    import shlex

    return shlex.split(form)


def no_engine(*_: object) -> None:
    """These tests only read command lines: one that reaches for an engine would act on a real host."""
    raise AssertionError("a test of reading reached for an engine")


class Typed:
    """What a command line means to Typer: action, arguments, settings; None where it is refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: tuple[str, dict[str, Any], Any] | None = None
        self.originals = {name: getattr(actions, function) for name, function in ACTIONS.items()}
        for name, function in ACTIONS.items():
            monkeypatch.setattr(actions, function, self._listener(name))
        monkeypatch.setattr("jailmgr.cli.command.require_root", lambda: None)
        monkeypatch.setenv("JAILMGR_ROOT", "/nonexistent/jailmgr-test")
        monkeypatch.setattr("jailmgr.cli.client.connect", no_engine)
        monkeypatch.setattr("jailmgr.cli.engine_start.start_engine", no_engine)

    def _listener(self, name: str) -> Any:
        def listen(settings: Any, *args: Any, **kwargs: Any) -> int:
            self.heard = (name, self.bound(name, args, kwargs), settings)
            return 0

        return listen

    def bound(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, defaults filled in, an empty list as None."""
        bound = inspect.signature(self.originals[name]).bind(None, *args, **kwargs)
        bound.apply_defaults()
        del bound.arguments["settings"]
        return {key: None if value in ([], ()) else value for key, value in bound.arguments.items()}

    def read(self, argv: list[str]) -> tuple[str, dict[str, Any], Any] | None:
        self.heard = None
        try:
            app(argv, prog_name="jailmgr", standalone_mode=False)
        except typer.TyperException:
            return None
        return self.heard


@pytest.fixture(scope="module")
def typed() -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Typed(monkeypatch)


def small(typed: Typed, argv: list[str]) -> tuple[str, dict[str, Any], Any] | None:
    read = hot.read(argv)
    if read is None:
        return None
    command, chosen, given = read
    return command, typed.bound(command, (), given), settle(chosen)


@pytest.mark.parametrize("form", FORMS)
def test_forms_mean_the_same_to_both(form: str, typed: Typed) -> None:
    argv = split(form)
    by_reader, by_typer = small(typed, argv), typed.read(argv)
    if by_reader is not None:
        assert by_reader == by_typer


@pytest.mark.parametrize(
    "form",
    [
        "list --format json",
        "--format=json list -A",
        "start --wait web db --all",
        "stop web --timeout=5",
        "exec web -- true",
        "exec -tu root -w/ web -e A=1 -- sh -c x",
        "--tenant acme exec web -- true",
    ],
)
def test_usual_forms_never_reach_typer(form: str) -> None:
    assert hot.read(split(form)) is not None


@pytest.mark.parametrize("form", ["list -h", "start --help", "exec web", "list --format xml", "launch debian", ""])
def test_help_and_mistakes_are_left_to_typer(form: str) -> None:
    assert hot.read(split(form)) is None


def option_words(options: dict[str, Option]) -> st.SearchStrategy[list[str]]:
    """An option as it may be written, with a value that fits or doesn't."""
    values = st.sampled_from(
        ["web", "5", "0", "json", "A=1", "", "-", "-1", "--", "a b", "/tmp", "--wait", "7777777777"]
    )

    def spell(name: str) -> st.SearchStrategy[list[str]]:
        forms = [st.just([name]), values.map(lambda value: [name, value])]
        forms.append(values.map(lambda value: [f"{name}={value}" if name.startswith("--") else name + value]))
        return st.one_of(forms)

    return st.sampled_from(sorted(options)).flatmap(spell)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    options = GLOBALS | COMMANDS[command][0]
    words = st.sampled_from(["web", "acme/db", "--", "-", "true", "", "-x", "-tq", "-qyt", "--all=", "list", "--tenan"])
    before = draw(st.lists(option_words(GLOBALS), max_size=2))
    after = draw(st.lists(st.one_of(option_words(options), words.map(lambda word: [word])), max_size=6))
    return [*sum(before, []), command, *sum(after, [])]


@settings(max_examples=400, deadline=None)
@given(argv=command_lines())
def test_any_command_line_means_the_same_to_both(argv: list[str], typed: Typed) -> None:
    from jailmgr.errors import JailmgrError

    try:
        by_reader = small(typed, argv)
    except JailmgrError:
        return
    if by_reader is not None:
        assert by_reader == typed.read(argv)


@st.composite
def good_command_lines(draw: st.DrawFn) -> list[str]:
    """Spelled as people do: what Typer takes of these, the reader must take too."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    value = {
        "text": st.sampled_from(["web", "/srv", "a=b"]),
        "list": st.just("A=1"),
        "int": st.sampled_from(["0", "30"]),
    }

    def spell(option: tuple[str, Option]) -> st.SearchStrategy[list[str]]:
        name, (_, kind, more) = option
        if kind == "flag":
            return st.just([name])
        one = st.sampled_from(list(more)) if isinstance(more, tuple) else value[kind]
        return one.flatmap(
            lambda text: st.sampled_from([[name, text], [f"{name}={text}" if name[1] == "-" else name + text]])
        )

    options = st.sampled_from(sorted((GLOBALS | COMMANDS[command][0]).items())).flatmap(spell)
    before = draw(st.lists(st.sampled_from(sorted(GLOBALS.items())).flatmap(spell), max_size=2))
    after = draw(st.lists(options, max_size=4))
    words = {"exec": ["web", "--", "true", "-x"], "list": []}.get(command, ["web", "db"])
    at = draw(st.integers(0, len(after))) if command != "exec" else len(after)
    return [*sum(before, []), command, *sum(after[:at], []), *words, *sum(after[at:], [])]


@settings(max_examples=200, deadline=None)
@given(argv=good_command_lines())
def test_what_typer_takes_the_reader_takes(argv: list[str], typed: Typed) -> None:
    from jailmgr.errors import JailmgrError

    try:
        by_typer = typed.read(argv)
    except JailmgrError:
        return
    assert by_typer is not None
    assert small(typed, argv) == by_typer


def test_reading_cannot_reach_an_engine(typed: Typed) -> None:
    with pytest.raises(AssertionError, match="reached for an engine"):
        typed.read(["launch", "debian"])


def test_table_is_what_the_app_says() -> None:
    made = subprocess.run([sys.executable, TOP / "script" / "hot-commands", "--check"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(
    ("form", "seen"),
    [
        ("exec web -- true --debug", ("exec", False, False)),
        ("--format json nonsense --debug", ("nonsense", True, True)),
        ("--tenant exec list --format=json", ("list", True, False)),
        ("list --format json --format table", ("list", False, False)),
        ("--tenant", ("", False, False)),
        ("", ("", False, False)),
    ],
)
def test_glance_sees_how_errors_are_wanted(form: str, seen: tuple[str, bool, bool]) -> None:
    assert hot.glance(split(form)) == seen


COSTLY = (
    "asyncio", "click", "collections", "contextlib", "enum", "json", "msgspec", "pydantic", "re", "rich", "signal",
    "socket", "subprocess", "typer", "typing",
)  # fmt: skip
"""Each costs a command more than its own work; `typing` alone as much as the interpreter."""


def test_hot_commands_import_nothing_costly() -> None:
    code = (
        "import sys; import jailmgr.cli.main, jailmgr.cli.hot, jailmgr.cli.actions, jailmgr.cli.client; "
        "import jailmgr.cli.layout, jailmgr.cli.operations, jailmgr.cli.output, jailmgr.runtime.relay; "
        f"print(sorted(set({COSTLY}) & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP)
    assert ran.stdout.strip() == "[]", ran.stderr
