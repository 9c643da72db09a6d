"""Volumes of earlier releases, whose files may have inode numbers of their image's: renewed at the next start."""

from __future__ import annotations

import logging
from functools import partial

from jailmgr.errors import JailmgrError
from jailmgr.manager.host import Manager
from jailmgr.model import Jail
from jailmgr.runtime.state import may_run, waits
from jailmgr.storage.volume import overlaps, renumber

log = logging.getLogger(__name__)


def layers_of(m: Manager, jail: Jail) -> list[str]:
    """Return the directories that the jail's volume lies over."""
    return [f"{m.root.image(jail.image)}/rootfs"]


def renumber_if_old(m: Manager, jail: Jail) -> None:
    """Give the volume of a stopped, locked jail new inode numbers where it may have its image's.

    One that fails is logged, and the jail starts as it did before; `doctor` names it. Costs 0.1 ms where there is
    nothing to do.
    """
    try:
        if overlaps(m.pool, jail.tenant, jail.name, layers_of(m, jail)):
            log.info("jail %s: its volume is of an earlier release, and gets new inode numbers", jail.full_name)
            renumber(m.pool, jail.tenant, jail.name, jail.id, layers_of(m, jail), partial(_in_use, m, jail))
    except JailmgrError as error:
        log.warning("%s", error)


def _in_use(m: Manager, jail: Jail) -> bool:
    """Whether anything may have the volume mounted: a jail about to be started again, or a visit of `cp`, too."""
    return may_run(m.root, jail.tenant, jail.name) or waits(m.root, jail.tenant, jail.name)
