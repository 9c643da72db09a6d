"""The supervisor's event loop: fds, and times of CLOCK_MONOTONIC. One thread, no more than epoll(7) gives."""

from __future__ import annotations

import heapq
import select
import sys
from collections.abc import Callable
from time import monotonic

READ = select.EPOLLIN
WRITE = select.EPOLLOUT


class Timer:
    """A callback to come; `cancel` keeps it from running."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due


class Loop:
    """`watch` fds and `at` times, then `run` until `stop`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._going = True
        self.idle: Callable[[], None] | None = None
        """Called after each round of events, while it is set."""

    def watch(self, fd: int, callback: Callable[[int], None], events: int = READ) -> None:
        """Call `callback(events)` while `fd` is ready; HUP and ERR come along (epoll_ctl(2))."""
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = callback

    def forget(self, fd: int) -> None:
        """No more of `fd`, before it is closed; fine when it isn't watched."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call once, that much later."""
        timer = Timer(monotonic() + seconds, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def stop(self) -> None:
        self._going = False

    def close(self) -> None:
        """Give back the descriptor. Nothing is watched any more."""
        self._epoll.close()

    def run(self) -> None:
        while self._going:
            timeout = max(0.0, self._timers[0].due - monotonic()) if self._timers else -1
            ready = [(fd, events, self._watched.get(fd)) for fd, events in self._epoll.poll(timeout)]
            for fd, events, callback in ready:
                # One called before may have closed this fd, and the number be another's by now.
                if callback is not None and self._watched.get(fd) is callback:
                    try:
                        callback(events)
                    except Exception:  # noqa: BLE001 - one jail's trouble must not end the watch over the others
                        sys.excepthook(*sys.exc_info())
            now = monotonic()
            while self._timers and self._timers[0].due <= now:
                timer = heapq.heappop(self._timers)
                if timer.callback is not None:
                    try:
                        timer.callback()
                    except Exception:  # noqa: BLE001
                        sys.excepthook(*sys.exc_info())
            if self.idle is not None:
                self.idle()
