"""The jails' AppArmor profile: in the bundle, loaded once and again when it has changed, never left out unsaid."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jailmgr.config import Root, find_root
from jailmgr.errors import JailmgrError
from jailmgr.manager import apparmor as loading
from jailmgr.runtime import apparmor
from jailmgr.runtime.bundle import Plan, compile_bundle, read_bundle

PLAN = Plan("t", "j", "j", 1000, 100000, 65536, "jailmgr/t/j", "/lower", "/volume", ["/sbin/init"], "/lib")

PARSER = """#!/bin/sh
[ "$1" = --replace ] || exit 2
for path; do :; done
echo "$path" >> {log}
grep -q syntax-error "$path" && {{ echo "AppArmor parser error in $path" >&2; exit 1; }}
grep -q not-for-this-kernel "$path" && exit 0
mkdir -p {policy}/jailmgr.7
sha256sum < "$path" > {policy}/jailmgr.7/sha256
"""


class Host:
    """A directory in the place of securityfs, and a program in the place of apparmor_parser."""

    def __init__(self, at: Path) -> None:
        self.root: Root = find_root(str(at / "instance"))
        self.etc, self.policy, self.log = at / "etc", at / "policy", at / "log"
        self.parser = at / "sbin" / "apparmor_parser"
        for folder in (self.etc / "disable", self.policy / "lsb_release.0", self.parser.parent, Path(self.root.run)):
            folder.mkdir(parents=True)
        self.parser.write_text(PARSER.format(log=self.log, policy=self.policy))
        self.parser.chmod(0o755)

    def ensure(self) -> str:
        return loading.ensure_profile(self.root)

    def loads(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    (tmp_path / "enabled").write_text("Y\n")
    monkeypatch.setattr(apparmor, "_ENABLED", str(tmp_path / "enabled"))
    monkeypatch.setattr(apparmor, "_POLICY", str(made.policy))
    monkeypatch.setattr(loading, "ETC", str(made.etc))
    monkeypatch.setattr(loading, "SBIN", f"{made.parser.parent}")
    made.parser.write_text(made.parser.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\nPATH={os.defpath}\n"))
    return made


def test_bundle() -> None:
    config = compile_bundle(PLAN._replace(apparmor="jailmgr"))
    assert config["process"]["apparmorProfile"] == "jailmgr"
    assert read_bundle(config).apparmor == "jailmgr"


def test_bundle_without() -> None:
    config = compile_bundle(PLAN)
    assert "apparmorProfile" not in config["process"]
    assert read_bundle(config).apparmor == ""


def test_loaded_once(host: Host) -> None:
    assert not apparmor.loaded()
    assert [host.ensure(), host.ensure(), host.ensure()] == ["jailmgr"] * 3
    assert host.loads() == [loading.profile_file()]
    assert apparmor.loaded()


def test_loaded_again_when_another_took_its_place(host: Host) -> None:
    host.ensure()
    (host.policy / "jailmgr.7" / "sha256").write_text("of another\n")
    assert host.ensure() == "jailmgr"
    assert len(host.loads()) == 2


def test_loaded_again_when_it_was_unloaded(host: Host) -> None:
    host.ensure()
    (host.policy / "jailmgr.7" / "sha256").unlink()
    (host.policy / "jailmgr.7").rmdir()
    assert host.ensure() == "jailmgr"
    assert len(host.loads()) == 2


def test_a_host_may_have_its_own(host: Host) -> None:
    host.ensure()
    (host.etc / "jailmgr").write_text("profile jailmgr flags=(complain) {}\n")
    host.ensure()
    assert host.loads()[1:] == [str(host.etc / "jailmgr")]
    (host.etc / "local").mkdir()
    (host.etc / "local" / "jailmgr").write_text("capability,\n")
    host.ensure()
    assert len(host.loads()) == 3, "the site's part counts as well"


@pytest.mark.parametrize("text", ["syntax-error", "not-for-this-kernel"])
def test_no_start_without_it_where_it_can_not_be_loaded(host: Host, text: str) -> None:
    (host.etc / "jailmgr").write_text(text)
    for _ in range(2):
        with pytest.raises(JailmgrError, match="could not be loaded") as caught:
            host.ensure()
        assert str(host.etc / "jailmgr") in caught.value.hint
    assert len(host.loads()) == 2


def test_none_without_a_parser(host: Host) -> None:
    host.parser.unlink()
    assert (host.ensure(), loading.find_parser()) == ("", "")
    (host.policy / "jailmgr.3").mkdir()
    assert host.ensure() == "jailmgr", "somebody else has loaded one"


def test_none_where_it_is_disabled(host: Host) -> None:
    (host.etc / "disable" / "jailmgr").symlink_to(host.etc / "jailmgr")
    assert (host.ensure(), host.loads()) == ("", [])


@pytest.mark.parametrize("told", ["N\n", None])
def test_none_without_apparmor(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str | None) -> None:
    place = tmp_path / "not-enabled"
    if told is not None:
        place.write_text(told)
    monkeypatch.setattr(apparmor, "_ENABLED", str(place))
    assert (host.ensure(), host.loads()) == ("", [])


def test_none_where_policy_can_not_be_seen(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container of another manager's."""
    monkeypatch.setattr(apparmor, "_POLICY", str(host.policy / "nowhere"))
    assert (host.ensure(), host.loads()) == ("", [])


@pytest.mark.parametrize("take_on", [apparmor.at_exec, apparmor.at_once])
def test_a_process_that_can_not_take_it_on_hears_so(take_on: Any, tmp_path: Path) -> None:
    proc = os.open(tmp_path, os.O_PATH)
    with pytest.raises(JailmgrError, match="not loaded"):
        take_on("jailmgr", proc)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(proc)


def test_nothing_is_written_without_a_profile() -> None:
    assert apparmor.open_proc("") == -1
    apparmor.at_exec("", -1)
    apparmor.at_once("", -1)
