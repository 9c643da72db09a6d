"""The Typer app: every command of jailmgr, a module for each noun."""

from __future__ import annotations

import platform

from jailmgr import __version__
from jailmgr.cli import (
    configuration,
    devices,
    doctor,
    engine,
    files,
    images,
    jails,
    ports,
    sessions,
    templates,
    tenants,
    top,
)
from jailmgr.cli.command import command, group, new_app
from jailmgr.cli.output import show
from jailmgr.cli.settings import Settings

app = new_app("System containers, carved out of one Linux host. Start with: jailmgr launch debian")

jails.add(app)
sessions.add(app)
files.add(app)
configuration.add(app)
top.add(app)
templates.add(group(app, "template", "Recipes that images are built from."))
images.add(group(app, "image", "Built, read-only root file systems."))
tenants.add(group(app, "tenant", "Walls between those who share the host: totals over all of a tenant's jails."))
devices.add(group(app, "device", "A jail's devices: LXD's types and keys."))
ports.add(group(app, "port", "Ports of the host that lead into jails."))
engine.add(group(app, "engine", "The background process; it starts by itself."))
doctor.add(app)


@command(app, example="jailmgr version", who="anyone")
def version(settings: Settings) -> None:
    """Show the version."""
    about = {"version": __version__, "python": platform.python_version(), "kernel": platform.release()}
    show(settings, about, lambda: f"jailmgr {__version__}")
