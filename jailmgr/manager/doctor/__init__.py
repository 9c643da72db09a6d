"""Whether the host has what jails need: a list of checks, each with its remedy. Changes nothing, needs no engine."""

from __future__ import annotations

import os
from collections.abc import Callable

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.manager import leftovers
from jailmgr.manager.disk_guard import space_left
from jailmgr.manager.doctor import host
from jailmgr.manager.doctor.bounds import bounds_checks
from jailmgr.manager.doctor.check import Check, check
from jailmgr.manager.doctor.firewall import firewall_checks
from jailmgr.manager.doctor.kernel import cgroup_checks, kernel_checks
from jailmgr.manager.doctor.volumes import volume_checks
from jailmgr.manager.strangers import refuse_blank_store, refuse_store_without_jails
from jailmgr.storage.pool import MIN_SIZE, host_headroom, is_made
from jailmgr.store import Store
from jailmgr.units import format_size


def doctor(root: Root) -> list[Check]:
    """All checks, in the order a host is set up."""
    groups: list[tuple[str, Callable[[], list[Check]]]] = [
        ("root", host.rights_checks),
        ("kernel", kernel_checks),
        ("cgroups", cgroup_checks),
        ("nftables", lambda: firewall_checks(root)),
        ("tools", host.tool_checks),
        ("security", host.security_checks),
        ("sysctl", host.sysctl_checks),
        ("bounds", bounds_checks),
        ("id ranges", host.id_checks),
        ("resolver", host.name_checks),
        ("disk", lambda: _disk(root)),
        ("store", lambda: _store(root)),
        ("volumes", lambda: volume_checks(root)),
        ("leftovers", lambda: _leftovers(root)),
    ]
    found = []
    for name, look in groups:
        try:
            found += look()
        except JailmgrError as error:
            found.append(Check(name, False, "error", str(error), error.hint))
        except OSError as error:
            found.append(Check(name, False, "error", str(error)))
    return found


def fix(root: Root, adopt: bool = False) -> list[str]:
    """Mend what is safe to: what a crash left, and sysctls that are too low; a line for each. Raises JailmgrError.

    `adopt`: take jails back into the store that it does not know.
    """
    try:
        return [*leftovers.fix(root, adopt), *host.raise_sysctls()]
    except OSError as error:
        raise JailmgrError("doctor --fix", str(error)) from error


def _disk(root: Root) -> list[Check]:
    if is_made(root):
        writable = space_left(root)
        if writable is not None and writable <= 0:
            remedy = "Free some space on the host's disk: jails are held still until there is some."
            return [check("disk", False, "the host's disk is nearly full", remedy)]
        left = host_headroom(root)
        if left > 0:
            detail = f"the host's disk has room for all that jails can write, and {format_size(left)} more"
        else:
            detail = f"jails can write {format_size(-left)} more than the host's disk has free"
        remedy = (
            "Free that much, or give jails less (limits.disk). While the disk is nearly full, jails are held still."
        )
        return [check("disk", left > 0, detail, remedy, "warning")]
    at = root.lib
    while not os.path.isdir(at):
        at = os.path.dirname(at)
    found = os.statvfs(at)
    free = found.f_bavail * found.f_frsize
    enough = free > 4 * MIN_SIZE
    return [check("disk", enough, f"{format_size(free)} free at {at}", f"{format_size(4 * MIN_SIZE)} are needed.")]


def _store(root: Root) -> list[Check]:
    store = Store(root.store)
    refuse_blank_store(root, store)
    if not os.path.exists(root.store):
        return [check("store", True, "none yet")]
    store.open_to_read()
    try:
        refuse_store_without_jails(root, store)
        return [check("store", True, f"{len(store.rows())} jails, {len(store.images())} images")]
    finally:
        store.close()


def _leftovers(root: Root) -> list[Check]:
    found = leftovers.find_leftovers(root)
    names = [leftover.what for leftover in found]
    detail = "none" if not found else f"{len(found)}: {', '.join(names[:8])}" + (", …" if len(found) > 8 else "")
    remedies = ["jailmgr doctor --fix removes what a crash left."] if any(not one.kept for one in found) else []
    if any(one.kept for one in found):
        remedies.append(
            "A jail that the store does not know may be one whose row was lost: jailmgr engine stop, then"
            " jailmgr doctor --fix --adopt takes it back. To remove it is for you to decide."
        )
    return [check("leftovers", not found, detail, " ".join(remedies))]
