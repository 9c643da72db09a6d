"""FUSE connections are aborted by the ids of a jail, never by the host's."""

from __future__ import annotations

import pytest

from jailmgr.runtime import fuse


@pytest.mark.parametrize("base", [0, -1])
def test_connections_of_the_hosts_root_are_never_aborted(base: int) -> None:
    """lxcfs of every installation on the host is among them."""
    with pytest.raises(ValueError, match="not a jail's"):
        fuse.abort(base, 65536)
