"""exec, shell, console, logs: from the terminal into a jail, by way of its tenant's supervisor."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from jailmgr.cli import actions
from jailmgr.cli.client import ensure_engine
from jailmgr.cli.command import command
from jailmgr.cli.jails import Name
from jailmgr.cli.output import remark
from jailmgr.cli.settings import Settings, split_name
from jailmgr.errors import JailmgrError

_HELD_BACK = 64
_STEERING = re.compile(rb"\x1b\[[0-9;]*m|(?:[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f\xc2]|\xc2(?![\x80-\x9f]))+")
"""What of a log may reach a terminal: text, tabs, line ends, colours; not the C1 controls, which UTF-8 has too."""

User = Annotated[str | None, typer.Option("-u", "--user", metavar="USER", help="The jail's user; else root.")]


def add(app: typer.Typer) -> None:
    """Add the commands to the app."""
    command(app, "exec", example="jailmgr exec web -- systemctl status")(exec_)
    command(app, example="jailmgr shell web")(shell)
    command(app, example="jailmgr console web")(console)
    command(app, example="jailmgr logs web -f -n 50")(logs)


def exec_(
    settings: Settings,
    name: Name,
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="The command and its arguments, after --.")],
    tty: Annotated[
        bool | None,
        typer.Option("-t/-T", help="With a terminal, or without; else with one where stdin and stdout are terminals."),
    ] = None,
    user: User = None,
    workdir: Annotated[
        str | None, typer.Option("-w", "--workdir", metavar="DIR", help="The directory to run in.")
    ] = None,
    environment: Annotated[
        list[str] | None, typer.Option("-e", metavar="K=V", help="A variable of its environment; may be given again.")
    ] = None,
) -> int:
    """Run a command in a jail. The exit status is the command's.

    125 where jailmgr failed, 126 where the command can't be run, 127 where there is none, 128+N where signal N ended
    it.
    """
    return actions.exec_(settings, name, command, tty, user, workdir, environment)


def shell(settings: Settings, name: Name, user: User = None) -> int:
    """Open a login shell in a jail."""
    return actions.enter(settings, name, [], user=user, login=True)


def console(settings: Settings, name: Name) -> int:
    """Attach to a jail's console. Ctrl-] three times detaches."""
    from jailmgr.runtime import relay

    tenant, jail = split_name(settings, name)
    try:
        relay.console(settings.root, tenant, jail, lambda text: remark(settings, text))
    except JailmgrError:
        actions.check_known(settings, tenant, jail)
        raise
    return 0


def logs(
    settings: Settings,
    name: Name,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes, until ctrl-c.")] = False,
    lines: Annotated[
        int | None, typer.Option("-n", "--lines", metavar="N", min=0, help="The last N lines; else all that is kept.")
    ] = None,
) -> int:
    """Show what a jail's console has shown."""
    tenant, jail = split_name(settings, name)
    actions.check_known(settings, tenant, jail)
    terminal, rest = os.isatty(1), b""
    sys.stdout.flush()
    for part in _parts(settings, tenant, jail, lines, follow):
        if terminal:
            part, rest = tame(rest + part)
        _write(part)
    _write(tame(rest + b"\n")[0] if rest else b"")
    return 0


def _parts(settings: Settings, tenant: str, jail: str, lines: int | None, follow: bool) -> Iterator[bytes]:
    """Of the log. Its files are root's: others get what they hold from the engine, then what comes."""
    from jailmgr.runtime import attach, logs

    if os.geteuid() == 0:
        yield from logs.logs(settings.root, tenant, jail, lines, follow)
        return
    connection = ensure_engine(settings.root)
    kept = connection.fetch("GET", f"/1.0/instances/{jail}/console?project={tenant}")
    yield logs.last_lines(kept, lines)
    if follow:
        with attach.connect_user(settings.root, tenant, jail) as supervisor:
            yield from logs.follow(supervisor, jail)


def tame(text: bytes) -> tuple[bytes, bytes]:
    """A log's text for a terminal, and its unfinished end: the guest wrote it, so nothing but colours steers."""
    start = text.rfind(b"\x1b", max(0, len(text) - _HELD_BACK))
    cut = len(text)
    if text.endswith(b"\xc2"):
        cut -= 1
    elif start >= 0 and re.fullmatch(rb"\x1b(\[[0-9;]*)?", text[start:]):
        cut = start
    return b"".join(_STEERING.findall(text[:cut])), text[cut:]


def _write(text: bytes) -> None:
    while text:
        text = text[os.write(1, text) :]
