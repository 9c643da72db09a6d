"""Defaults of `[init]` by the program that an image's init is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jailmgr.config import Root
from jailmgr.model import Recipe
from jailmgr.runtime.process import signal_number
from jailmgr.template import inits, tree
from jailmgr.template.build import build_image
from jailmgr.template.recipe import resolve
from tests.unit.test_template_build import never, no_runner, root

__all__ = ["root"]

UNSET = ["stop_signal", "notify"]


def found(top: Path, command: str = "/sbin/init", unset: list[str] = UNSET) -> tuple[str, bool]:
    with tree.open_tree(str(top)) as fd:
        recipe = inits.complete(Recipe(init=[command], stop_signal="SIGINT", notify=True), unset, fd)
    return recipe.stop_signal, recipe.notify


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("lib/systemd/systemd", ("SIGRTMIN+3", True)),
        ("bin/busybox", ("SIGUSR2", False)),
        ("sbin/openrc-init", ("SIGTERM", False)),
        ("usr/lib/runit/runit-init", ("SIGPWR", False)),
        ("usr/bin/s6-svscan", ("SIGTERM", False)),
        ("opt/my-systemd", ("SIGRTMIN+3", False)),
    ],
)
def test_by_the_program_that_links_lead_to(tmp_path: Path, program: str, expected: tuple[str, bool]) -> None:
    """In the tree: an absolute link is not one of the host's."""
    for folder in ("sbin", "usr/sbin", os.path.dirname(program)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / program).touch()
    (tmp_path / "usr/sbin/init").symlink_to(f"/{program}")
    (tmp_path / "sbin/init").symlink_to("../usr/sbin/init")
    assert found(tmp_path) == expected
    assert found(tmp_path, f"/{program}") == expected
    assert found(tmp_path, unset=["notify"]) == ("SIGINT", expected[1])
    assert found(tmp_path, unset=[]) == ("SIGINT", True)
    assert signal_number(expected[0]) > 0


def test_a_file_called_init_is_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin/init").write_text("#!/bin/busybox sh\n")
    assert found(tmp_path) == ("SIGRTMIN+3", False)


@pytest.mark.parametrize(("said", "signal"), [("", "SIGUSR2"), ('stop_signal = "SIGPWR"', "SIGPWR")])
def test_a_build_takes_what_its_template_leaves_out(root: Root, tmp_path: Path, said: str, signal: str) -> None:
    folder = Path(root.etc, "templates", "trial")
    folder.mkdir(parents=True)
    (folder / "template.toml").write_text(
        f"""description = "x"
method = "busybox"
releases = ["static"]
[init]
command = ["/sbin/init"]
{said}
[[file]]
path = "/sbin/init"
link = "/bin/busybox"
"""
    )
    target = tmp_path / "rootfs"
    target.mkdir()
    build = resolve(root, "trial")
    built = build_image(root, build, str(target), no_runner, "", f"{target}.log", lambda *_step: None, never)
    assert (built.recipe.stop_signal, built.recipe.notify) == (signal, False)
