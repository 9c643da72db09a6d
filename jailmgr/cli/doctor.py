"""doctor: what the host lacks, and what a crash left behind."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jailmgr.cli.command import command
from jailmgr.cli.output import printable, remark, show, table
from jailmgr.cli.settings import Settings
from jailmgr.errors import JailmgrError


def add(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(app, example="jailmgr doctor", who="root")(doctor)


def doctor(
    settings: Settings,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended, then check again.")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="With --fix: take jails back that the store does not know.")
    ] = False,
) -> int:
    """Check the host. Exit status 1 where something that matters is not in order."""
    import msgspec

    from jailmgr.manager import doctor as checks

    if adopt and not fix:
        raise JailmgrError("doctor --adopt", "it goes with --fix", "Use: jailmgr doctor --fix --adopt", "invalid")
    if fix:
        for line in checks.fix(settings.root, adopt):
            remark(settings, line)
    found: list[dict[str, Any]] = msgspec.to_builtins(checks.doctor(settings.root))
    show(settings, found, lambda: _page(found))
    return 1 if any(check["severity"] == "error" and not check["ok"] for check in found) else 0


def _page(found: list[dict[str, Any]]) -> str:
    rows = [[check["check"], "ok" if check["ok"] else check["severity"], check["detail"]] for check in found]
    page = table(["CHECK", "STATE", "DETAIL"], rows)
    remedies = [(check["check"], check["remedy"]) for check in found if not check["ok"] and check["remedy"]]
    if remedies:
        page += "\n" + "".join(f"{name}: {printable(remedy)}\n" for name, remedy in remedies)
    return page
