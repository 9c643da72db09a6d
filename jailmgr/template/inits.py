"""What an init does on signals: defaults of `[init]` by the program that the image's init is.

An init is known by the file that `[init] command` leads to, by links (`/sbin/init` to `/lib/systemd/systemd`). A file
that is called `init` itself shows nothing: sysvinit's halts on no signal unless its inittab says so (inittab(5)), and
other inits are scripts. A template with one of these says its `stop_signal` itself.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import msgspec

from jailmgr.model import Recipe
from jailmgr.template import tree


class Init(NamedTuple):
    """An init program. `stop_signal`: the one on which it stops all services and then ends, or powers off."""

    stop_signal: str
    notify: bool = False
    """It reports by sd_notify(3) that the system is up."""


INITS = {
    "systemd": Init("SIGRTMIN+3", notify=True),
    "busybox": Init("SIGUSR2"),
    "openrc-init": Init("SIGTERM"),
    "runit-init": Init("SIGPWR"),
    "runit": Init("SIGPWR"),
    "s6-svscan": Init("SIGTERM"),
}
"""By the program's name. systemd: systemd(1), "Signals". busybox: init/init.c, halt_reboot_pwoff. openrc-init reboots
on SIGINT. Debian's runit halts on SIGPWR at once, on SIGINT after 14 s, and ignores SIGTERM. s6-svscan stops its
services and exits with 0 (s6-svscan's page, "Signals").
"""
UNKNOWN = Init("SIGRTMIN+3")
"""Of a program that is none of these: what LXC's containers get unless they say otherwise."""


def find(top: int, command: str) -> Init:
    """The init that `command` is in the tree. Raises OSError where it leads nowhere."""
    return INITS.get(os.path.basename(tree.resolve(top, command)), UNKNOWN)


def complete(recipe: Recipe, unset: list[str], top: int) -> Recipe:
    """The recipe with what the template left unset, `stop_signal` or `notify`, as its init in the tree has it."""
    known = find(top, recipe.init[0])
    return msgspec.structs.replace(recipe, **{name: getattr(known, name) for name in unset})
