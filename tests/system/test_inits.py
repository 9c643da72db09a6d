"""An init that exits with 0 on its stop signal, as s6-svscan does; its template leaves the signal to the init."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.system.instance import Instance, until

TEMPLATE = """\
description = "an init that exits"
method = "busybox"
releases = ["static"]
[init]
command = ["/sbin/init"]
[[file]]
path = "/usr/bin/s6-svscan"
source = "init"
mode = 0o755
[[file]]
path = "/sbin/init"
link = "/usr/bin/s6-svscan"
"""
INIT = """\
#!/bin/busybox sh
trap 'exit 0' TERM
echo 'up'
while :; do
    sleep 3600 &
    wait $!
done
"""


def test_an_exit_that_was_asked_for_is_no_crash(new_instance: Callable[[], Instance]) -> None:
    jm = new_instance()
    folder = Path(jm.root.etc, "templates", "exiting")
    (folder / "files").mkdir(parents=True)
    (folder / "template.toml").write_text(TEMPLATE)
    (folder / "files" / "init").write_text(INIT)
    jm("launch", "exiting", "a", "--wait", "-c", "restart=always")

    def ended() -> tuple[object, ...]:
        info = jm.info("a")
        last = info["last_ended"] or {}
        return info["status"], last.get("kind"), last.get("by"), last.get("status"), last.get("timed_out")

    until(lambda: "up" in jm("logs", "a").out)
    begin = time.monotonic()
    jm("stop", "a")
    assert time.monotonic() - begin < 5
    assert ended() == ("Stopped", "poweroff", "admin", 0, False)
    jm("start", "--wait", "a")
    assert jm.info("a")["restarts"] == 0
    # Nobody asked for this end: `always` starts it again, `on-failure` doesn't.
    jm.sh("a", "kill -TERM 1", None)
    until(lambda: jm.info("a")["restarts"] == 1 and jm.status("a") == "Running")
    assert ended() == ("Running", "exit", "guest", 0, False)
    jm("set", "a", "restart=on-failure")
    jm("restart", "a")
    jm.sh("a", "kill -TERM 1", None)
    until(lambda: ended() == ("Stopped", "exit", "guest", 0, False))
