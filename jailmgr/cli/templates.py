"""template list, show, validate, build."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from jailmgr.cli.client import Nothing, ensure_engine, existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.jails import wait_interruptible
from jailmgr.cli.operations import result
from jailmgr.cli.output import fields, printable, show, table
from jailmgr.cli.settings import Settings, check_label
from jailmgr.errors import JailmgrError

Template = Annotated[str, typer.Argument(metavar="TEMPLATE", help="A template's name, such as debian.")]


def add(app: typer.Typer) -> None:
    """Add the commands to the noun's app."""
    command(app, "list", example="jailmgr template list")(list_)
    command(app, "show", example="jailmgr template show debian")(show_)
    command(app, example="jailmgr template validate ./my-template", who="anyone")(validate)
    command(app, example="jailmgr template build debian/bookworm")(build)


def list_(settings: Settings) -> int:
    """List the templates, with their releases and variants."""
    connection = existing_engine(settings.root)
    found = _bundled(settings) if isinstance(connection, Nothing) else connection.call("GET", "/1.0/templates")
    header = ["TEMPLATE", "RELEASES", "VARIANTS", "DESCRIPTION"]
    show(settings, found, lambda: table(header, [_row(template) for template in found]))
    return 0


def _bundled(settings: Settings) -> list[dict[str, Any]]:
    """The templates where the root does not exist, so that there is no engine to ask."""
    from jailmgr.manager.host import Manager
    from jailmgr.manager.images import list_templates

    return list_templates(Manager(settings.root))


def _row(template: dict[str, Any]) -> list[str]:
    return [
        template["name"],
        ", ".join(template.get("releases") or []) or "-",
        ", ".join(template.get("variants") or {}) or "-",
        str(template.get("error") or template.get("description") or ""),
    ]


def show_(settings: Settings, name: Template) -> int:
    """Show what a template is made of."""
    check_label("template", name)
    connection = existing_engine(settings.root)
    here = {template["name"]: template for template in _bundled(settings)} if isinstance(connection, Nothing) else {}
    found = here[name] if name in here else connection.call("GET", f"/1.0/templates/{name}")
    show(settings, found, lambda: _page(found))
    return 0


def _page(template: dict[str, Any]) -> str:
    body = template.get("body") or template
    packages = body.get("packages") or {}
    page = fields(
        [
            ("Template", template["name"]),
            ("Description", str(template.get("description") or "-")),
            ("Folder", str(template.get("folder") or "-")),
            ("Method", str(template.get("method") or "-")),
            ("Releases", ", ".join(template.get("releases") or []) or "-"),
            ("Variants", ", ".join(template.get("variants") or {}) or "-"),
        ]
    )
    if packages:
        page += "\n" + table(["PACKAGE", "WHAT FOR"], [[name, str(why)] for name, why in packages.items()])
    return page


def validate(
    settings: Settings,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A template's folder, or the name of one.")],
) -> int:
    """Check a template: file, line and key of each mistake. Exit status 1 where there are any."""
    from jailmgr.template.recipe import find_templates
    from jailmgr.template.recipe import validate as find_mistakes

    if not os.path.isdir(folder) and "/" not in folder:
        folder = find_templates(settings.root).get(folder, folder)
    mistakes = find_mistakes(folder)
    if not mistakes:
        show(settings, [], lambda: f"{printable(folder)}: no mistakes")
        return 0
    if settings.format != "table":
        show(settings, [mistake._asdict() for mistake in mistakes], str)
    told = [JailmgrError(f"{mistake.file}:{mistake.line}", _what(mistake.key, mistake.what)) for mistake in mistakes]
    raise Mistakes(told, folder)


def _what(key: str, what: str) -> str:
    return f"{key}: {what}" if key else what


class Mistakes(JailmgrError):
    """The mistakes of a template, each an error of its own."""

    def __init__(self, errors: list[JailmgrError], folder: str) -> None:
        super().__init__(f"template {folder}", f"{len(errors)} mistakes")
        self.errors = errors


def build(
    settings: Settings,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="TEMPLATE[/RELEASE[/VARIANT]], such as debian/bookworm.")
    ],
) -> int:
    """Build an image from a template, unless there is one already."""
    connection = ensure_engine(settings.root)
    operation = connection.call("POST", "/1.0/images", {"source": {"type": "template", "alias": source}})
    made = result(wait_interruptible(settings, connection, operation, f"build {source}"))
    show(settings, made, lambda: str(made.get("fingerprint", "")))
    return 0
