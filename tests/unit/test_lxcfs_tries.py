"""Whom the files of another lxcfs are given once more, and when."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jailmgr.config import Root, find_root
from jailmgr.manager import lxcfs
from jailmgr.manager.host import Manager


class Trial:
    """An lxcfs that runs, jails of two tenants that lack its files, and supervisors that answer as told."""

    def __init__(self, at: Path, monkeypatch: pytest.MonkeyPatch, **answers: list[bool]) -> None:
        self.m = Manager(find_root(str(at)))
        self.asked: list[str] = []
        self.pauses: list[float] = []
        self.stale = Path(self.m.root.lxcfs).with_name("stale")
        self.stale.parent.mkdir(parents=True)
        self.stale.touch()
        for tenant in answers:
            os.makedirs(self.m.root.tenant_run(tenant))

        def renew(_root: Root, tenant: str) -> bool:
            self.asked.append(tenant)
            return answers[tenant].pop(0)

        watcher: Any = SimpleNamespace(watches_lxcfs=True, lxcfs_again=self.pauses.append)
        self.m.watcher = watcher
        monkeypatch.setattr(lxcfs, "_renew", renew)


def test_only_those_where_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(tmp_path, monkeypatch, one=[True], two=[False, True])
    lxcfs.again(trial.m)
    assert trial.stale.exists()
    lxcfs.again(trial.m)
    assert sorted(trial.asked[:2]) == ["one", "two"]
    assert trial.asked[2:] == ["two"]
    assert not trial.stale.exists()
    assert trial.pauses == [1.0]
    lxcfs.again(trial.m)
    assert len(trial.asked) == 3


def test_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(tmp_path, monkeypatch, one=[False] * 9)
    for _ in range(9):
        lxcfs.again(trial.m)
    assert trial.pauses == list(lxcfs.PAUSES_S)
    assert trial.stale.exists()
