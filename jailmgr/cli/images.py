"""image list, show, delete."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from jailmgr.cli.client import existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.layout import local_time
from jailmgr.cli.output import fields, show, table
from jailmgr.cli.settings import Settings, wrong_usage
from jailmgr.errors import JailmgrError
from jailmgr.units import format_size

SHORT = 12
"""Digits of a fingerprint that are shown."""

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="An alias, or a fingerprint's first digits, 4 or more.")]


def add(app: typer.Typer) -> None:
    """Add the commands to the noun's app."""
    command(app, "list", example="jailmgr image list")(list_)
    command(app, "show", example="jailmgr image show debian/bookworm")(show_)
    command(app, example="jailmgr image delete debian/bookworm")(delete)


def list_(settings: Settings) -> int:
    """List the images, with how many jails are made of each."""
    found = existing_engine(settings.root).call("GET", "/1.0/images")
    header = ["FINGERPRINT", "ALIASES", "TEMPLATE", "SIZE", "CREATED", "JAILS"]
    show(settings, found, lambda: table(header, [_row(image) for image in found]))
    return 0


def _row(image: dict[str, Any]) -> list[str]:
    return [
        image["fingerprint"][:SHORT],
        ", ".join(image.get("aliases") or []) or "-",
        image.get("template") or "-",
        format_size(image.get("size_bytes")),
        local_time(image.get("created_at")),
        str(image.get("jails", 0)),
    ]


def show_(settings: Settings, image: Image) -> int:
    """Show an image and the packages in it."""
    found = existing_engine(settings.root).call("GET", f"/1.0/images/{_reference(image)}")
    show(settings, found, lambda: _page(found))
    return 0


def _page(image: dict[str, Any]) -> str:
    recipe = image.get("recipe") or {}
    page = fields(
        [
            ("Fingerprint", image["fingerprint"]),
            ("Aliases", ", ".join(image.get("aliases") or []) or "-"),
            ("Template", image.get("template") or "-"),
            ("Architecture", image.get("architecture") or "-"),
            ("Size", format_size(image.get("size_bytes"))),
            ("Created", local_time(image.get("created_at"))),
            ("Jails", str(image.get("jails", 0))),
            ("Init", " ".join(recipe.get("init") or []) or "-"),
            ("Stop signal", str(recipe.get("stop_signal") or "-")),
        ]
    )
    packages = image.get("packages") or {}
    if packages:
        page += "\n" + table(["PACKAGE", "VERSION"], sorted([name, version] for name, version in packages.items()))
    return page


def delete(
    settings: Settings,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Aliases, or first digits of fingerprints.")],
) -> int:
    """Delete images that no jail is made of."""
    references = {image: _reference(image) for image in images}
    connection, errors, done = existing_engine(settings.root), [], []
    for image, reference in references.items():
        try:
            connection.call("DELETE", f"/1.0/images/{reference}")
            done.append({"image": image, "action": "delete"})
        except JailmgrError as error:
            errors.append(error)
    if errors and len(images) == 1:
        raise errors[0]
    show(settings, done, lambda: "")
    if errors:
        from jailmgr.cli.actions import Failures

        raise Failures(errors, len(images), "images")
    return 0


def _reference(image: str) -> str:
    """The reference as part of a path of the API; dots alone would lead elsewhere."""
    if any(part in ("", ".", "..") for part in image.split("/")):
        raise wrong_usage(f"image {image!r}", "not an alias or a fingerprint", "See jailmgr image list.")
    return quote(image, safe="/")
