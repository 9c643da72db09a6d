"""Supervisors of another release than the engine's go over to its own, in place, with their jails running."""

from __future__ import annotations

import logging
import subprocess

from jailmgr import __version__
from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.runtime import attach, protocol

CHECK_SECONDS = 30.0

log = logging.getLogger(__name__)


def renew_supervisor(root: Root, tenant: str) -> None:
    """Ask a supervisor of another release to become one of ours, once one of ours is seen to begin.

    It does so when nothing of its is half done. One from before there was a way to ask goes on as it is, and ends with
    its last jail. Raises JailmgrError, OSError where it doesn't answer.
    """
    sock = protocol.connect(root.tenant_run(tenant), protocol.SOCKET, attach.ANSWER_SECONDS)
    with attach.Supervisor(root, tenant, sock) as supervisor:
        hello = supervisor.ask("hello", within=attach.ANSWER_SECONDS).body
        release = hello.get("release")
        if release == __version__:
            return
        if hello.get("snapshot", 1) not in protocol.SNAPSHOTS:
            log.error("tenant %s keeps its supervisor of release %s: ours can't read what that leaves", tenant, release)
            return
        argv = attach.successor(root, tenant)
        checked = subprocess.run(
            [*argv, "-1"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=CHECK_SECONDS
        )
        if checked.returncode != 0:
            last = checked.stderr.strip().rpartition("\n")[2]
            log.error("tenant %s keeps its supervisor of release %s: ours does not begin (%s)", tenant, release, last)
            return
        try:
            supervisor.ask("reexec", within=attach.ANSWER_SECONDS, argv=argv)
        except JailmgrError as error:
            log.warning("tenant %s keeps its supervisor of release %s: %s", tenant, release, error)
        else:
            log.info("the supervisor of tenant %s goes over from release %s to %s", tenant, release, __version__)
