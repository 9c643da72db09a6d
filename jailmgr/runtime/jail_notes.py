"""What a supervisor writes down about a jail: that it runs or waits, how it ended, what it has used.

Nothing of this is worth a failure: where a disk is full or a directory gone, the console's log gets a line instead, and
those who wait for the jail get their answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jailmgr.errors import JailmgrError
from jailmgr.runtime import runs
from jailmgr.runtime.cgroups import Hierarchies
from jailmgr.runtime.console import Log
from jailmgr.runtime.jsonfile import write_json
from jailmgr.runtime.state import LAST, State, Wait, remove_wait, set_runs, write_wait


class Notes(NamedTuple):
    """Of one jail: its name, its tenant's runtime directory, its own directory, its console's log."""

    name: str
    run: str
    lib: str
    log: Log

    def last(self, ending: dict[str, Any]) -> None:
        """How it ended (model.Ending)."""
        with self._or_a_line("how it ended"):
            write_json(f"{self.lib}/{LAST}", ending)

    def waits(self, wait: Wait | None) -> None:
        """That it is about to be started again, or is no more: for the engine, and the next supervisor."""
        with self._or_a_line("whether it waits"):
            if wait is not None:
                write_wait(self.run, self.name, wait)
            else:
                remove_wait(self.run, self.name)

    def runs(self, on: bool) -> None:
        """That it runs, or has ended for good: for the host's next boot."""
        with self._or_a_line("whether it runs"):
            set_runs(self.lib, on)

    def used(self, hierarchies: Hierarchies, state: State, veths: list[str], seen: bool) -> None:
        """What an ended run has used, while its cgroup and interfaces are there. `seen`: its end was watched."""
        with self._or_a_line("what it has used"):
            runs.note_run(self.lib, runs.measure(hierarchies, state, veths, seen))

    @contextmanager
    def _or_a_line(self, what: str) -> Iterator[None]:
        try:
            yield
        except (JailmgrError, OSError) as error:
            self.log.note(f"could not write down {what}: {error}")
