"""What jails use is billed once and whole, however they end and whoever is killed meanwhile.

Nothing samples here but what a test asks for: the first sample of an engine comes a minute after its start.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from jailmgr.config import Root
from jailmgr.manager.create import create, launch
from jailmgr.manager.delete import delete
from jailmgr.manager.host import Manager
from jailmgr.manager.metering import Clock, JailUsage
from jailmgr.manager.opening import close_manager, open_manager
from jailmgr.manager.stop import stop
from jailmgr.runtime.runs import LOG
from jailmgr.runtime.state import load_state, running_jails
from jailmgr.storage.volume import sync_pool, volume_usage
from tests.system.instance import Instance, kill, until
from tests.system.netns import OUTSIDE, Netns
from tests.system.traffic import bound

SECOND = 1_000_000_000
BURN = "while read t _ < /proc/$$/schedstat; [ $t -lt {seconds}000000000 ]; do :; done"
"""Until the shell has had so much time of CPU, however long that takes on a busy host (sched-stats.rst).

Not `ulimit -t`: what that counts are clock ticks, of which some 20 % were wrong here.
"""
MIB = 1 << 20
LAUNCH_ALLOWS, PORT = 300, 4711


@pytest.fixture
def instance(new_instance: Callable[[], Instance]) -> Instance:
    return new_instance()


def _launch(instance: Instance, name: str) -> None:
    instance("launch", "busybox", name, within=LAUNCH_ALLOWS)


@contextmanager
def engine(root: Root) -> Iterator[Manager]:
    """What an engine does when it begins and ends, in this process."""
    m = Manager(root)
    open_manager(m)
    try:
        yield m
    finally:
        close_manager(m)


def used(m: Manager, name: str) -> JailUsage:
    found = [jail for record in m.accountant.usage(None, 0.0, 1e11) for jail in record.jails if jail.jail == name]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


def ended(root: Root, name: str) -> None:
    """Wait until the supervisor has cleared a jail away."""
    until(lambda: name not in running_jails(root, "default"), 60, f"{name} has ended")


def burnt(cpu_ns: int, seconds: float) -> bool:
    """Whether that is the seconds that were burnt, with what a boot and a few commands take besides."""
    return seconds * SECOND <= cpu_ns <= (seconds + 0.8) * SECOND


def test_what_a_jail_uses_while_no_engine_runs_is_billed_when_one_does(instance: Instance) -> None:
    _launch(instance, "burns")
    began = time.monotonic()
    kill(instance.engine_pid())
    instance.sh("burns", f"{BURN.format(seconds=2)}; poweroff -f", status=None)
    ended(instance.root, "burns")
    took = time.monotonic() - began
    with engine(instance.root) as m:
        first = used(m, "burns")
        assert used(m, "burns").cpu_ns == first.cpu_ns
    assert burnt(first.cpu_ns, 2), first
    assert 2 <= first.running_seconds <= took + 5, first
    assert not os.path.exists(f"{instance.root.jail_lib('default', 'burns')}/{LOG}")
    with engine(instance.root) as m:
        assert used(m, "burns").cpu_ns == first.cpu_ns


def test_a_reboot_is_two_runs_and_one_bill(instance: Instance) -> None:
    _launch(instance, "again")
    kill(instance.engine_pid())
    burn = BURN.format(seconds=1)
    instance.sh("again", burn, status=None)
    with engine(instance.root) as m:
        assert burnt(used(m, "again").cpu_ns, 1)
        before = _pid(instance.root, "again")
        instance.sh("again", f"{burn}; reboot -f", status=None)
        until(lambda: _pid(instance.root, "again") not in (None, before), 60, "it is back")
        assert burnt(used(m, "again").cpu_ns, 2)
    instance.sh("again", burn, status=None)
    with engine(instance.root) as m:
        assert burnt(used(m, "again").cpu_ns, 3)
        stop(m, "default", "again", force=True)
        assert burnt(used(m, "again").cpu_ns, 3)


def _pid(root: Root, name: str) -> int | None:
    found = load_state(root.tenant_run("default"), name)
    return found.pid if found is not None else None


def _talk(instance: Instance, netns: Netns, name: str, sent: int, received: int, then: str) -> None:
    """Send and receive so many MiB from inside of a jail, and run a last command there the moment that is through."""
    with bound(netns.outside, socket.SOCK_STREAM, PORT, OUTSIDE[0]) as listener:
        script = f"head -c {sent * MIB} /dev/zero | nc {OUTSIDE[0]} {PORT} | wc -c; {then}"
        with instance.popen("exec", name, "--", "/bin/sh", "-c", script) as talking:
            listener.settimeout(30)
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(30)
                left = sent * MIB
                while left > 0:
                    left -= len(peer.recv(65536))
                peer.sendall(bytes(received * MIB))
            talking.wait(60)


def test_bytes_up_to_the_last_are_billed(instance: Instance, netns: Netns) -> None:
    """Init ends the moment the last byte is through, and its interface with it."""
    _launch(instance, "talks")
    kill(instance.engine_pid())
    for sent, received in ((1, 3), (2, 1)):
        before = _pid(instance.root, "talks")
        _talk(instance, netns, "talks", sent, received, "reboot -f")
        until(lambda: _pid(instance.root, "talks") not in (None, before), 60, "it is back")  # noqa: B023
    with engine(instance.root) as m:
        found = used(m, "talks")
        assert 3 * MIB <= found.sent_bytes <= 3.5 * MIB, found
        assert 4 * MIB <= found.received_bytes <= 4.5 * MIB, found


def test_a_guest_that_deletes_its_interface_takes_back_nothing_that_was_counted(
    instance: Instance, netns: Netns
) -> None:
    _launch(instance, "hides")
    kill(instance.engine_pid())
    _talk(instance, netns, "hides", 1, 3, "true")
    with engine(instance.root) as m:
        before = used(m, "hides")
        init = _pid(instance.root, "hides")
        instance.sh("hides", "ip link delete eth0")
        found = used(m, "hides")
        assert (found.sent_bytes, found.received_bytes) == (before.sent_bytes, before.received_bytes)
        instance.sh("hides", "reboot -f", status=None)
        until(lambda: _pid(instance.root, "hides") not in (None, init), 60, "it is back")
        _talk(instance, netns, "hides", 2, 1, "poweroff -f")
        ended(instance.root, "hides")
        found = used(m, "hides")
    assert 3 * MIB <= found.sent_bytes <= 3.5 * MIB, found
    assert 4 * MIB <= found.received_bytes <= 4.5 * MIB, found


def test_a_run_that_ended_while_nobody_watched_is_billed(instance: Instance) -> None:
    _launch(instance, "alone")
    instance.sh("alone", BURN.format(seconds=1), status=None)
    info = instance.info("alone")
    for pid in (instance.engine_pid(), info["supervisor_pid"], info["init_pid"]):
        kill(pid)
    with engine(instance.root) as m:
        ended(instance.root, "alone")
        found = used(m, "alone")
        assert burnt(found.cpu_ns, 1), found
        assert found.running_seconds == 0, "nobody knows how long it was"


def test_a_supervisor_killed_amid_a_run_changes_no_bill(instance: Instance) -> None:
    _launch(instance, "adopted")
    instance.sh("adopted", BURN.format(seconds=1), status=None)
    kill(instance.info("adopted")["supervisor_pid"])
    instance.sh("adopted", f"{BURN.format(seconds=1)}; poweroff -f", status=None)
    ended(instance.root, "adopted")
    kill(instance.engine_pid())
    with engine(instance.root) as m:
        found = used(m, "adopted")
        assert burnt(found.cpu_ns, 2), found
        assert found.running_seconds >= 2


def test_a_jail_that_is_deleted_stays_on_the_bill(instance: Instance) -> None:
    _launch(instance, "goes")
    instance.sh("goes", BURN.format(seconds=1), status=None)
    instance("delete", "--force", "goes")
    _launch(instance, "goes")
    kill(instance.engine_pid())
    with engine(instance.root) as m:
        (record,) = m.accountant.usage("default", 0.0, 1e11)
        gone, there = sorted(record.jails, key=lambda jail: jail.jail_id)
        assert burnt(gone.cpu_ns, 1), gone
        assert there.jail == "goes"
        assert there.cpu_ns < SECOND
        assert record.cpu_ns == gone.cpu_ns + there.cpu_ns


def test_a_disk_is_billed_whether_its_jail_runs_or_not(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(instance.root) as m:
        launch(m, "default", "runs", "busybox", {}, {})
        stopped = create(m, "default", "stopped", "busybox", {}, {})
        with open(f"{m.root.volume('default', 'stopped')}/upper/large", "wb") as file:
            file.write(os.urandom(8 * MIB))
        sync_pool(m.pool)
        size = volume_usage(m.pool, stopped.id)
        assert size is not None
        assert size >= 8 * MIB
        before = {name: used(m, name) for name in ("runs", "stopped")}
        accountant = m.accountant
        assert accountant is not None
        now = accountant._now()
        later = Clock(now.boot, now.wall + 3600, now.monotonic + 3600)
        monkeypatch.setattr(accountant, "_now", lambda: later)
        after = {name: used(m, name) for name in ("runs", "stopped")}
        hour = after["stopped"].disk_byte_seconds - before["stopped"].disk_byte_seconds
        assert hour == pytest.approx(3600 * size, rel=0.01)
        assert after["runs"].disk_byte_seconds > before["runs"].disk_byte_seconds
        assert after["runs"].running_seconds - before["runs"].running_seconds == pytest.approx(3600, rel=0.01)
        memory = (after["runs"].memory_byte_seconds - before["runs"].memory_byte_seconds) / 3600
        assert 100_000 < memory < 100 * MIB, "a shell, and what it has read"
        assert after["stopped"].memory_byte_seconds == after["stopped"].running_seconds == 0


SAMPLING = """
import sys
from jailmgr.config import find_root
from jailmgr.manager.host import Manager
from jailmgr.manager.opening import close_manager, open_manager
m = Manager(find_root(sys.argv[1]))
open_manager(m)
print("open", flush=True)
while True:
    m.accountant.sample()
"""


def test_an_engine_killed_as_it_samples_bills_once(instance: Instance) -> None:
    """The jail burns and reboots, and the engine samples without a pause until it is killed, again and again."""
    _launch(instance, "busy")
    kill(instance.engine_pid())
    rounds = 4
    for _ in range(rounds):
        before = _pid(instance.root, "busy")
        argv = [sys.executable, "-c", SAMPLING, instance.root.at]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            instance.sh("busy", f"{BURN.format(seconds=1)}; reboot -f", status=None)
            until(lambda: _pid(instance.root, "busy") not in (None, before), 60, "it is back")  # noqa: B023
            assert child.poll() is None
            child.kill()
    with engine(instance.root) as m:
        found = used(m, "busy")
        assert burnt(found.cpu_ns, rounds), found
        delete(m, "default", "busy", force=True)
        assert burnt(used(m, "busy").cpu_ns, rounds)
