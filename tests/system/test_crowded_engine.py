"""More connections to the engine's socket than it takes."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from jailmgr.engine.protocol import CONNECTIONS_MAX
from tests.system.instance import Instance, until


def test_a_command_that_is_one_too_many_ends_with_an_error_and_a_hint(jm: Instance) -> None:
    jm("list")
    with ExitStack() as held:
        for _ in range(CONNECTIONS_MAX):
            sock = held.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(jm.root.socket)
        refused = jm.refused("list")
        assert refused.err.startswith(f"Error: engine: it has {CONNECTIONS_MAX} connections already\nHint: ")
    until(lambda: jm("list", status=None).status == 0, 10, "the engine has let go of the connections")
