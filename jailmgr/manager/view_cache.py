"""The last view of each jail that didn't run: it changes with its row and what its disk holds only."""

from __future__ import annotations

from jailmgr.model import JailView
from jailmgr.store import Row


class ViewCache:
    """It has one view of each jail."""

    def __init__(self) -> None:
        self._views: dict[int, tuple[Row, int | None, JailView]] = {}
        """By the jail's id: the row and the bytes of disk that the view was made from, and the view."""

    def get(self, row: Row, disk: int | None) -> JailView | None:
        known = self._views.get(row.jail.id)
        return known[2] if known is not None and known[0] is row and known[1] == disk else None

    def put(self, row: Row, disk: int | None, view: JailView) -> JailView:
        self._views[row.jail.id] = (row, disk, view)
        return view

    def forget(self, jail_id: int) -> None:
        self._views.pop(jail_id, None)
