"""The hot commands' options and arguments. Made from the Typer app by script/hot-commands: don't edit."""

from __future__ import annotations

Option = tuple[str, str, object]
"""Parameter, kind (flag, text, int, list), and a flag's value or a text's choices."""
Argument = tuple[str, bool, bool]
"""Parameter, whether it takes many words, whether it is required."""

GLOBALS: dict[str, Option] = {
    "--tenant": ("tenant", "text", None),
    "--format": ("format", "text", ("table", "json", "yaml", "csv")),
    "--root": ("root", "text", None),
    "--quiet": ("quiet", "flag", True),
    "-q": ("quiet", "flag", True),
    "--yes": ("yes", "flag", True),
    "-y": ("yes", "flag", True),
    "--debug": ("debug", "flag", True),
}

COMMANDS: dict[str, tuple[dict[str, Option], tuple[Argument, ...]]] = {
    "exec": (
        {
            "-t": ("tty", "flag", True),
            "-T": ("tty", "flag", False),
            "-u": ("user", "text", None),
            "--user": ("user", "text", None),
            "-w": ("workdir", "text", None),
            "--workdir": ("workdir", "text", None),
            "-e": ("environment", "list", None),
        },
        (("name", False, True), ("command", True, True)),
    ),
    "start": (
        {
            "--all": ("all_", "flag", True),
            "--wait": ("wait", "flag", True),
        },
        (("names", True, False),),
    ),
    "stop": (
        {
            "--all": ("all_", "flag", True),
            "--force": ("force", "flag", True),
            "--timeout": ("timeout", "int", None),
        },
        (("names", True, False),),
    ),
    "list": (
        {
            "--all-tenants": ("all_tenants", "flag", True),
            "-A": ("all_tenants", "flag", True),
        },
        (),
    ),
}
