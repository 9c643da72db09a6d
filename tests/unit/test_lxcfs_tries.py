"""Whom the files of another lxcfs are given once more, and when."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jailmgr.config import Root, find_root
from jailmgr.manager import lxcfs
from jailmgr.manager.lxcfs import Lxcfs


class Trial:
    """An lxcfs that runs, jails of two tenants that lack its files, and supervisors that answer as told."""

    def __init__(self, at: Path, monkeypatch: pytest.MonkeyPatch, **answers: list[bool]) -> None:
        root = find_root(str(at))
        self.asked: list[str] = []
        self.pauses: list[float] = []
        self.stale = Path(root.lxcfs).with_name("stale")
        self.stale.parent.mkdir(parents=True)
        self.stale.touch()
        for tenant in answers:
            os.makedirs(root.tenant_run(tenant))

        def renew(_root: Root, tenant: str) -> bool:
            self.asked.append(tenant)
            return answers[tenant].pop(0)

        watcher: Any = SimpleNamespace(is_open=True, after=lambda seconds, _: self.pauses.append(seconds))
        self.lxcfs = Lxcfs(root, watcher)
        self.lxcfs._watched = True
        monkeypatch.setattr(lxcfs, "_renew", renew)


def test_only_those_where_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(tmp_path, monkeypatch, one=[True], two=[False, True])
    trial.lxcfs.again()
    assert trial.stale.exists()
    trial.lxcfs.again()
    assert sorted(trial.asked[:2]) == ["one", "two"]
    assert trial.asked[2:] == ["two"]
    assert not trial.stale.exists()
    assert trial.pauses == [1.0]
    trial.lxcfs.again()
    assert len(trial.asked) == 3


def test_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(tmp_path, monkeypatch, one=[False] * 9)
    for _ in range(9):
        trial.lxcfs.again()
    assert trial.pauses == list(lxcfs.PAUSES_S)
    assert trial.stale.exists()
