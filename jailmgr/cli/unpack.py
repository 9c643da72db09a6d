"""A tree from a jail, unpacked on the host. The jail's root may have written it, so nothing in it is believed.

Devices and FIFOs are left out. Set-user-id and set-group-id bits and file capabilities are dropped. See
runtime/extract.py for the way of writing. Only root may give files away (chown(2)); others own what they copy.
"""

from __future__ import annotations

import os

from jailmgr.runtime import extract, pax


def unpack(reader: pax.Reader, to: str) -> list[str]:
    """Put the tree at `to`, as `cp -a` does, and return what was not kept. Raises JailmgrError."""
    rules = extract.Rules(special=False, owners=os.geteuid() == 0, xattrs=(b"user.", b"system.posix_acl_"))
    return extract.extract(reader, os.fsencode(to), rules)
