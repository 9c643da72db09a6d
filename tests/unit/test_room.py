"""Sysctls of tables that all jails share: raised where they are low, never lowered."""

from __future__ import annotations

from pathlib import Path

from jailmgr.network.bridge import ROOM, make_room


def test_low_ones_are_raised_and_others_left(tmp_path: Path) -> None:
    values = {"net.ipv4.neigh.default.gc_thresh3": "1024", "net.netfilter.nf_conntrack_max": "262144"}
    for name, value in values.items():
        path = tmp_path.joinpath(*name.split("."))
        path.parent.mkdir(parents=True)
        path.write_text(f"{value}\n")
    make_room(str(tmp_path))
    read = {name: tmp_path.joinpath(*name.split(".")).read_text().strip() for name in values}
    assert read == values | {"net.ipv4.neigh.default.gc_thresh3": str(ROOM["net.ipv4.neigh.default.gc_thresh3"])}
    missing = [name for name in ROOM if name not in values]
    assert not any(tmp_path.joinpath(*name.split(".")).exists() for name in missing), "none is made"


def test_one_that_cannot_be_set_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "net/netfilter/nf_conntrack_max"
    path.parent.mkdir(parents=True)
    path.symlink_to("/proc/version")
    make_room(str(tmp_path))
    path.unlink()
    path.symlink_to("/proc/sys/kernel/ngroups_max")
    make_room(str(tmp_path))
    assert path.read_text() == "65536\n"
