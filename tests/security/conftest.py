"""The fixtures of tests/system, and a jail whose root attacks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.security.guest import Guest
from tests.system.conftest import (
    busybox_jail,
    debian,
    debian_jail,
    jm,
    netns,
    new_instance,
    nothing_left,
    other_tenant,
    pytest_itemcollected,
    pytest_runtest_makereport,
    warm,
)
from tests.system.instance import Instance

__all__ = [
    "busybox_jail",
    "debian",
    "debian_jail",
    "guest",
    "jm",
    "netns",
    "new_instance",
    "nothing_left",
    "other_tenant",
    "pytest_itemcollected",
    "pytest_runtest_makereport",
    "warm",
]

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def guest(jm: Instance, warm: frozenset[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One jail for the tests of a module, which all leave it running."""
    name = f"guest{next(_numbers)}"
    jm("launch", "busybox", name)
    jm.exec(name, "true")  # makes the group that it finds in each of the tests
    yield Guest(jm, name, tmp_path_factory.mktemp("programs"))
    jm("delete", "--force", name)
