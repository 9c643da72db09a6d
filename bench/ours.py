"""jailmgr's side: an instance of its own, by the command and by the engine's API."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from bench.host import COMMAND_WITHIN, outside, pss, run
from jailmgr.cli.client import ensure_engine
from tests.system.instance import COMMAND, Instance, instance_at
from tests.system.leftovers import processes, scrap

BUILD_WITHIN = 1200


class Ours:
    """Containers by jailmgr. `source` is what they are created from."""

    name = "jailmgr"

    def __init__(self, instance: Instance, source: str) -> None:
        self.instance = instance
        self.source = source
        self.environment = instance.environment()

    def command(self, *argv: str, within: float = COMMAND_WITHIN) -> str:
        return run([COMMAND, *argv], self.environment, within)

    def shell(self, line: str) -> str:
        """Run a line of shell with this side's environment."""
        return run(["/bin/sh", "-c", line], self.environment, COMMAND_WITHIN)

    def build(self) -> str:
        """Build the image; gives the directory of its root file system."""
        self.command("create", self.source, "built", within=BUILD_WITHIN)
        image = self.instance.info("built")["image"]
        self.command("delete", "built")
        return f"{self.instance.root.image(image)}/rootfs"

    def create(self, name: str) -> None:
        self.command("create", self.source, name)

    def start(self, name: str) -> None:
        self.command("start", name)

    def start_all(self, names: list[str]) -> None:
        self.command("start", *names)

    def start_by_engine(self, name: str) -> None:
        """As another program would: one request, and one that waits for its end."""
        self._operation("PUT", f"/1.0/instances/{name}/state?project=default", {"action": "start"})

    def exec(self, name: str, *argv: str) -> str:
        return self.command("exec", name, "--", *argv)

    def stop(self, name: str) -> None:
        self.command("stop", "--force", name)

    def delete(self, name: str) -> None:
        self.command("delete", name)

    def create_stopped(self, names: list[str], source: str) -> None:
        """Many that are never started."""
        for name in names:
            self.create_in("default", name, source, {}, start=False)

    def create_in(self, tenant: str, name: str, source: str, config: dict[str, str], *, start: bool) -> None:
        """By the engine."""
        body = {"name": name, "source": {"type": "template", "alias": source}, "config": config, "start": start}
        self._operation("POST", f"/1.0/instances?project={tenant}", body)

    def _operation(self, method: str, path: str, body: dict[str, Any]) -> None:
        with closing(ensure_engine(self.instance.root)) as connection:
            operation = connection.call(method, path, body)
            while operation["status_code"] == 103:
                operation = connection.call("GET", f"/1.0/operations/{operation['id']}/wait?timeout=60")
        if operation["status_code"] != 200:
            raise RuntimeError(f"{method} {path}: {operation.get('err')}")

    def pss_outside(self) -> dict[str, int]:
        """Bytes of each kind of process outside of the jails."""
        argvs = dict(processes(self.instance.root))
        found = {"supervisor": 0, "engine": 0, "dnsmasq": 0}
        for pid in outside(list(argvs)):
            kind = _kind(argvs[pid])
            found[kind] = found.get(kind, 0) + pss(pid)
        return found


def _kind(argv: str) -> str:
    for kind in ("dnsmasq", "supervisor", "engine"):
        if kind in argv:
            return kind
    return "other"


@contextmanager
def ours(source: str) -> Iterator[Ours]:
    """A fresh instance, thrown away whole at the end."""
    instance = instance_at(tempfile.mkdtemp(prefix="jb-", dir="/tmp"))
    try:
        side = Ours(instance, source)
        yield side
        for row in instance.json("list"):
            instance("delete", "--force", row["name"], status=None)
        instance("engine", "stop", status=None)
    finally:
        scrap(instance.root)
        shutil.rmtree(instance.root.at, ignore_errors=True)
