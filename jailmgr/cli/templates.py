"""template list, show, validate, build."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any
from urllib.parse import quote

import typer

from jailmgr.cli.client import Nothing, ensure_engine, existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.jails import wait_interruptible
from jailmgr.cli.layout import local_time
from jailmgr.cli.operations import result
from jailmgr.cli.output import fields, printable, show, table
from jailmgr.cli.settings import Settings, check_label, wrong_usage
from jailmgr.errors import JailmgrError

Template = Annotated[str, typer.Argument(metavar="TEMPLATE", help="TEMPLATE[/RELEASE[/VARIANT]], such as debian.")]


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
    connection = existing_engine(settings.root)
    here = {template["name"]: template for template in _bundled(settings)} if isinstance(connection, Nothing) else {}
    found = here[name] if name in here else connection.call("GET", f"/1.0/templates/{_path(name)}")
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
    chosen = template.get("build") or {}
    for name, variant in (template.get("variants") or {}).items():
        if chosen and chosen.get("variant") != name:
            continue
        page += f"\nVariant {name}: {variant.get('description') or '-'}\n"
        rows = [[f"+{package}", str(why)] for package, why in (variant.get("packages") or {}).items()]
        rows += [[f"-{package}", "left out"] for package in variant.get("without") or []]
        page += table(["PACKAGE", "WHAT FOR"], rows) if rows else ""
    if chosen:
        page += f"\nPackages of {template['name']}/{chosen['release']}: {', '.join(chosen['packages']) or '-'}\n"
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
        super().__init__(f"template {folder}", f"{len(errors)} mistake{'' if len(errors) == 1 else 's'}")
        self.errors = errors


def build(
    settings: Settings,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="TEMPLATE[/RELEASE[/VARIANT]], such as debian/bookworm.")
    ],
    refresh: Annotated[bool, typer.Option("--refresh", help="Build again, with today's packages.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and build nothing.")] = False,
) -> int:
    """Build an image from a template, unless there is one already.

    With --refresh the new image takes the alias; jails that exist keep the image they are made of.
    """
    path = _path(source)
    connection = ensure_engine(settings.root)
    plan = connection.call("GET", f"/1.0/build-plans/{path}")
    if dry_run:
        show(settings, plan, lambda: _plan(plan, refresh))
        return 0
    there = plan.get("image")
    body = {"source": {"type": "template", "alias": source}, "refresh": refresh}
    operation = connection.call("POST", "/1.0/images", body)
    made = result(wait_interruptible(settings, connection, operation, f"build {source}"))
    show(settings, made, lambda: str(made.get("fingerprint", "")))
    if there and not refresh:
        when = local_time(there["created_at"])
        print(f"The image of {source} is up to date, from {when}. Build it again: --refresh", file=sys.stderr)
    return 0


def _plan(plan: dict[str, Any], refresh: bool) -> str:
    image = plan.get("image")
    page = f"Source: {plan['source']}\n"
    if image:
        page += f"Image: {image['fingerprint'][:12]}, from {local_time(image['created_at'])}\n"
        if not refresh:
            return page + "Nothing to build; --refresh builds it again.\n"
    packages = f"Packages: {', '.join(plan['packages'])}\n" if plan["packages"] else ""
    return page + packages + "".join(f"{number}. {step}\n" for number, step in enumerate(plan["steps"], 1))


def _path(source: str) -> str:
    """Return the source as part of a path of the API; a release may hold dots, but not be dots alone."""
    name, *rest = source.split("/")
    check_label("template", name or "-")
    if any(part in ("", ".", "..") for part in rest):
        raise wrong_usage(f"source {source!r}", "not TEMPLATE[/RELEASE[/VARIANT]]", "See jailmgr template list.")
    return quote(source, safe="/")
