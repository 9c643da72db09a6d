"""Images by prefix, a refreshed build and a shown variant, with the build itself left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jailmgr.config import find_root
from jailmgr.errors import JailmgrError
from jailmgr.manager import images
from jailmgr.manager.host import Manager
from jailmgr.model import Image, Recipe
from jailmgr.template.recipe import resolve


@pytest.fixture
def m(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(find_root(str(tmp_path)))
    made.store.open()
    yield made
    made.store.close()


def put(m: Manager, digit: str, created: float) -> Image:
    build = resolve(m.root, "busybox")
    image = Image(
        fingerprint=digit * 64,
        template=build.source,
        aliases=["busybox", build.source],
        size_bytes=0,
        created_at=created,
        architecture=build.architecture,
        recipe=Recipe(),
        files=[],
        packages={},
        key=build.key,
    )
    m.store.put_image(image)
    return image


def test_refresh_builds_though_there_is_an_image(m: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    put(m, "a", 1.0)
    monkeypatch.setattr(images, "_build", lambda m, *_rest: put(m, "b", 2.0))
    assert images.ensure_image(m, "busybox").fingerprint[0] == "a"
    assert images.ensure_image(m, "busybox", refresh=True).fingerprint[0] == "b"
    assert images.find_image(m, "busybox").fingerprint[0] == "b"
    assert images.ensure_image(m, "busybox").fingerprint[0] == "b"
    assert images.find_image(m, "aaaa").aliases == []


def test_plan_names_the_image_that_is_there(m: Manager) -> None:
    assert images.plan_image(m, "busybox")["image"] is None
    put(m, "a", 1.0)
    plan = images.plan_image(m, "busybox")
    assert plan["image"] == {"fingerprint": "a" * 64, "created_at": 1.0}
    assert plan["steps"][0] == "fill the tree by busybox"


def test_a_prefix_that_is_too_short_is_explained(m: Manager) -> None:
    put(m, "a", 1.0)
    with pytest.raises(JailmgrError, match=r"4 digits or more \(1 match: aaaaaaaaaaaa\)"):
        images.find_image(m, "aaa")
    with pytest.raises(JailmgrError, match="none matches"):
        images.find_image(m, "bbb")


def test_show_of_a_release(m: Manager) -> None:
    assert "build" not in images.show_template(m, "debian")
    shown = images.show_template(m, "debian/trixie")["build"]
    assert shown["release"] == "trixie"
    assert "systemd" in shown["packages"]
    with pytest.raises(JailmgrError, match="no variant"):
        images.show_template(m, "debian/trixie/none")
