"""What other releases have left on disk: an older one's is read, a newer one's is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jailmgr.runtime.adopt import adopt_all
from jailmgr.runtime.bundle import Limits, read_bundle
from jailmgr.runtime.host import Host
from jailmgr.runtime.jail import Jail
from jailmgr.runtime.state import VERSION, load_state

MIB = 1 << 20
FIRST = json.loads((Path(__file__).parent / "releases" / "config-0.1.0.json").read_text())
"""As 0.1.0 wrote it. A jail that reboots before the next engine has written it anew starts from it."""
STATE = {
    "pid": 1, "starttime": 5, "started_at": 1.0, "restarts": 0, "ready": True, "oom_kills": 0,
    "cgroup": "jailmgr/a/web", "lib": "/nowhere", "boot_id": "x", "once": False, "version": 1,
}  # fmt: skip


def test_a_bundle_of_the_first_release_is_read() -> None:
    bundle = read_bundle(FIRST)
    assert (bundle.tenant, bundle.jail, bundle.lib) == ("acme", "web", "/var/lib/jailmgr/jails/acme/web")
    assert (bundle.idmap_base, bundle.idmap_size) == (FIRST["linux"]["uidMappings"][0]["hostID"], 65536)
    assert bundle.limits == Limits(64 * MIB, 0, 150_000, 100_000, None, 500)
    assert (bundle.apparmor, bundle.limits.io, bundle.limits.cpus, bundle.lxcfs) == ("", None, None, "")


@pytest.mark.parametrize("more", [{"version": VERSION + 1}, {"unknown": 1}])
def test_a_state_of_a_newer_release_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    file = tmp_path / "web.json"
    file.write_text(json.dumps(STATE | more))
    assert load_state(str(tmp_path), "web") is None
    jails: dict[str, Jail] = {}
    adopt_all(cast(Host, SimpleNamespace(full_name=lambda jail: f"acme/{jail}", run=str(tmp_path), boot_id="x")), jails)
    assert jails == {}
    assert file.exists()
    assert "web.json is of another release" in capsys.readouterr().err


def test_a_state_of_the_first_release_is_read(tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text(json.dumps(STATE))
    state = load_state(str(tmp_path), "web")
    assert state is not None
    assert state._asdict() == STATE
