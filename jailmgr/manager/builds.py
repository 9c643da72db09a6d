"""Builds in progress: one for all who want the same image at the same time."""

from __future__ import annotations

import threading

from jailmgr.errors import JailmgrError
from jailmgr.model import Image
from jailmgr.progress import Cancelled, CancelledError, Progress

_POLL = 0.5
"""Seconds between two looks at whether a caller that waits for somebody else's build has given up."""


class Building:
    """A build in progress, and all who wait for it. It is given up only when each of them has."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.wanted: list[Cancelled] = []
        self.step: tuple[str, int, int] = ("building", 0, 0)
        self.ended = False
        self.image: Image | None = None
        self.error: JailmgrError | None = None

    def cancelled(self) -> bool:
        with self.changed:
            wanted = list(self.wanted)
        return all(gave_up() for gave_up in wanted)

    def report(self, step: str, done: int, total: int) -> None:
        with self.changed:
            self.step = (step, done, total)
            self.changed.notify_all()

    def end(self, image: Image | None, error: JailmgrError | None) -> None:
        with self.changed:
            self.image, self.error, self.ended = image, error, True
            self.changed.notify_all()

    def wait(self, source: str, progress: Progress, cancelled: Cancelled) -> Image:
        """Return the image once it is built; pass progress on. Raises what the build raised, or CancelledError."""
        reported: tuple[str, int, int] | None = None
        while True:
            with self.changed:
                if self.step == reported and not self.ended:
                    self.changed.wait(_POLL)
                ended, step = self.ended, self.step
            if cancelled():
                raise CancelledError(f"image of {source}")
            if ended:
                break
            if step != reported:
                reported = step
                progress(*step)
        if self.error is not None:
            raise JailmgrError(self.error.what, self.error.why, self.error.hint, self.error.code)
        assert self.image is not None
        return self.image


class Builds:
    """Each has the key of what is built (template/recipe.py)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[str, Building] = {}

    def join(self, key: str, cancelled: Cancelled) -> tuple[Building, bool]:
        """Return the build of that key, and whether the caller has to carry it out. All who wait must give it up."""
        with self._lock:
            building = self._by_key.get(key)
            leads = building is None
            if building is None:
                building = self._by_key[key] = Building()
            with building.changed:
                building.wanted.append(cancelled)
        return building, leads

    def end(self, key: str, building: Building, image: Image | None, error: JailmgrError | None) -> None:
        with self._lock:
            self._by_key.pop(key, None)
        building.end(image, error)
