"""Sampling: each run counted once and whole, in whatever order it ends, is noted and sampled, and whoever is killed."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, cast

import pytest

from jailmgr.config import Root, find_root
from jailmgr.errors import JailmgrError
from jailmgr.manager.accounting import Accountant
from jailmgr.manager.host import Manager
from jailmgr.manager.metering import JailUsage
from jailmgr.manager.usage_store import UsageStore
from jailmgr.model import Jail
from jailmgr.runtime import runs
from jailmgr.runtime.cgroup_hierarchies import Hierarchies, relative
from jailmgr.runtime.proc import start_time
from jailmgr.runtime.state import State, host_boot_id, remove_state, write_state
from jailmgr.store import READY, Store
from tests.unit.crash import killed_at

BOOT = host_boot_id()
Begin = Callable[[], State]


class Host(NamedTuple):
    """An instance with a jail in it, whose cgroup is a directory of files."""

    root: Root
    store: Store
    jail: Jail
    accountant: Accountant

    def begin(self, state: State, cpu_ns: int) -> None:
        self.uses(cpu_ns)
        write_state(self.root.tenant_run("acme"), self.jail.name, state)

    def uses(self, cpu_ns: int) -> None:
        group = f"{self.root.at}/cgroup/{relative(f'{self.root.cgroup}/acme/{self.jail.name}')}"
        os.makedirs(group, exist_ok=True)
        Path(group, "cpu.stat").write_text(f"usage_usec {cpu_ns // 1000}\nuser_usec 7\n")
        Path(group, "memory.current").write_text("1000000\n")

    def end(self, state: State, cpu_ns: int) -> None:
        """As the supervisor does it."""
        self.uses(cpu_ns)
        state = state._replace(cgroup=f"{self.root.cgroup}/acme/{self.jail.name}")
        runs.note_run(self.lib, runs.measure(_hierarchies(self.root), state, [], seen=True))
        remove_state(self.root.tenant_run("acme"), self.jail.name)

    @property
    def lib(self) -> str:
        return self.root.jail_lib("acme", self.jail.name)

    def used(self) -> JailUsage:
        (record,) = self.accountant.usage("acme", 0.0, 1e11)
        (jail,) = record.jails
        return jail


def _hierarchies(root: Root) -> Hierarchies:
    return Hierarchies(f"{root.at}/cgroup", ("memory",), {}, ())


def _accountant(root: Root, store: Store) -> Accountant:
    m = SimpleNamespace(strangers={}, root=root, store=store, pool_if_open=None, hierarchies=_hierarchies(root))
    return Accountant(cast(Manager, m))


def _host(at: Path) -> Host:
    root = find_root(str(at))
    os.makedirs(root.tenant_run("acme"))
    store = Store(root.store)
    store.open()
    store.add_tenant("acme", {}, 1000)
    jail = store.reserve("acme", "web", "debian", {}, {})
    store.set_state(jail, READY)
    os.makedirs(root.jail_lib("acme", "web"))
    return Host(root, store, jail, _accountant(root, store))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = _host(tmp_path / "root")
    yield made
    made.accountant.stop()
    made.store.close()


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Begins a process, which stands for the init of a run."""
    inits: list[subprocess.Popen[bytes]] = []

    def run() -> State:
        inits.append(subprocess.Popen(["sleep", "600"]))
        pid = inits[-1].pid
        return State(pid, start_time(pid) or 0, 0.0, 0, True, 0, "", "", BOOT)

    yield run
    for init in inits:
        init.kill()
        init.wait()


def test_its_thread_has_the_store_copied(host: Host) -> None:
    m = SimpleNamespace(
        strangers={}, root=host.root, store=host.store, pool_if_open=None, hierarchies=_hierarchies(host.root)
    )
    accountant = Accountant(cast(Manager, m), every=0.01)
    accountant.start()
    try:
        deadline = time.monotonic() + 20
        while not os.path.exists(f"{host.root.store}.good"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        accountant.stop()


def test_a_run_that_goes_on_is_counted_as_it_goes(host: Host, begin: Begin) -> None:
    host.begin(begin(), 5_000)
    assert host.used().cpu_ns == 5_000
    host.uses(9_000)
    used = host.used()
    assert used.cpu_ns == 9_000
    assert used.memory_byte_seconds == pytest.approx(used.running_seconds * 1_000_000, rel=0.01)


def test_every_run_counts_however_many_end_between_two_samples(host: Host, begin: Begin) -> None:
    first, last = begin(), begin()
    host.begin(first, 5_000)
    host.accountant.sample()
    host.end(first, 7_000)
    for _ in range(10):
        state = begin()
        host.begin(state, 0)
        host.end(state, 1_000)
    host.begin(last, 3_000)
    assert host.used().cpu_ns == 20_000
    host.end(last, 4_000)
    assert host.used().cpu_ns == 21_000
    assert os.listdir(host.lib) == []


def test_a_run_noted_twice_counts_once(host: Host, begin: Begin) -> None:
    """A supervisor is killed before it has cleared the run away, and the next one finds it ended."""
    state, following = begin(), begin()
    host.begin(state, 0)
    host.end(state, 7_000)
    assert host.used().cpu_ns == 7_000
    host.end(state, 7_000)
    assert host.used().cpu_ns == 7_000
    host.end(state, 7_000)
    host.begin(following, 1_000)
    assert host.used().cpu_ns == 8_000
    assert host.used().cpu_ns == 8_000


def test_a_run_that_ends_during_a_sample_waits_for_the_next(
    host: Host, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers may already be those of the run that follows."""
    first, second = begin(), begin()
    host.begin(first, 5_000)
    host.accountant.sample()
    look = host.accountant._look

    def later(jails: object, running: object) -> object:
        host.end(first, 7_000)
        host.begin(second, 90_000)
        return look(jails, running)  # type: ignore[arg-type]

    monkeypatch.setattr(host.accountant, "_look", later)
    host.accountant.sample()
    monkeypatch.undo()
    host.uses(95_000)
    assert host.used().cpu_ns == 102_000


def test_a_run_that_ends_and_one_that_begins_as_the_log_is_taken(
    host: Host, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = begin(), begin()
    host.begin(first, 5_000)
    host.accountant.sample()
    count = host.accountant._count_ended

    def later(*given: object) -> object:
        host.end(first, 7_000)
        host.begin(second, 90_000)
        return count(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(host.accountant, "_count_ended", later)
    host.accountant.sample()
    monkeypatch.undo()
    assert host.used().cpu_ns == 97_000


def test_a_state_file_whose_init_is_gone_counts_no_time(host: Host) -> None:
    child = subprocess.Popen(["sleep", "600"])
    state = State(child.pid, start_time(child.pid) or 0, 0.0, 0, True, 0, "", "", BOOT)
    host.begin(state, 5_000)
    before = host.used()
    child.kill()
    child.wait()
    assert host.used() == before
    host.begin(state._replace(boot_id="another boot"), 5_000)
    assert host.used().running_seconds == before.running_seconds


def test_a_visit_is_no_run(host: Host, begin: Begin) -> None:
    host.begin(begin()._replace(once=True), 5_000)
    assert host.accountant.usage(None, 0.0, 1e11) == []


def test_a_log_that_cant_be_taken_keeps_its_jail_waiting(
    host: Host, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the run that goes on would hide the one before it."""
    first, second = begin(), begin()
    host.begin(first, 5_000)
    host.accountant.sample()
    host.end(first, 7_000)
    os.rename(f"{host.lib}/{runs.LOG}", f"{host.lib}/kept")
    os.symlink("kept", f"{host.lib}/{runs.LOG}")
    host.begin(second, 3_000)
    assert host.used().cpu_ns == 5_000
    assert "acme/web" in caplog.text
    os.rename(f"{host.lib}/kept", f"{host.lib}/{runs.LOG}")
    assert host.used().cpu_ns == 10_000


def test_a_deleted_jail_keeps_what_it_used(host: Host, begin: Begin) -> None:
    state = begin()
    host.begin(state, 0)
    host.end(state, 7_000)
    host.accountant.settle(host.jail)
    host.store.remove(host.jail)
    assert host.used().cpu_ns == 7_000
    host.store.remove_tenant("acme")
    assert host.used().cpu_ns == 7_000


def test_a_renamed_jail_is_the_same_one(host: Host, begin: Begin) -> None:
    state = begin()
    host.begin(state, 0)
    host.end(state, 7_000)
    host.accountant.sample()
    os.rename(host.lib, host.root.jail_lib("acme", "www"))
    host.store.set_name(host.jail, "www")
    renamed = host._replace(jail=host.store.jail("acme", "www"))
    renamed.begin(begin(), 1_000)
    used = renamed.used()
    assert (used.jail, used.jail_id, used.cpu_ns) == ("www", host.jail.id, 8_000)


def test_a_span_that_ends_before_it_begins_is_refused(host: Host) -> None:
    with pytest.raises(JailmgrError, match="span"):
        host.accountant.usage(None, 2.0, 1.0)


def test_a_store_that_cant_be_written_keeps_no_jail_from_going(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    os.rename(host.root.lib, f"{host.root.lib}.away")
    host.accountant.settle(host.jail)
    assert "could not be counted" in caplog.text


def test_the_thread_samples_until_it_is_stopped(host: Host, begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    """What goes wrong in one sample, it tries again in the next."""
    host.begin(begin(), 5_000)
    os.rename(host.root.lib, f"{host.root.lib}.away")
    accountant = Accountant(host.accountant._m, every=0.01)
    with caplog.at_level(logging.ERROR):
        accountant.start()
        _until(lambda: "could not be sampled" in caplog.text)
    os.rename(f"{host.root.lib}.away", host.root.lib)
    _until(lambda: os.path.isfile(host.root.usage))
    accountant.stop()
    accountant.stop()
    assert not accountant._thread.is_alive()
    store = UsageStore(host.root.usage)
    assert store.tracks()[host.jail.id].cpu_ns == 5_000
    store.close()


def _until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory whose files are on no disk: SIGKILL tells no difference, and fsync(2) takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def _sample(root: Root) -> None:
    store = Store(root.store)
    store.open()
    _accountant(root, store).sample()


KILLED_IN = ("manager/accounting.py", "manager/usage_store.py", "runtime/runs.py")


def test_an_engine_killed_at_any_line_of_a_sample_counts_each_run_once(in_memory: Path, begin: Begin) -> None:
    """Of three runs one was sampled as it ran, or wasn't, one came between two samples, and one goes on."""
    first, second, third = begin(), begin(), begin()
    killed, line = True, 0
    while killed:
        line += 1
        host = _host(in_memory / str(line))
        host.begin(first, 5_000)
        if line % 2:
            host.accountant.sample()
        host.end(first, 7_000)
        host.begin(second, 0)
        host.end(second, 30_000)
        host.begin(third, 100_000)
        host.accountant.stop()
        killed = killed_at(line, KILLED_IN, partial(_sample, host.root))
        host.end(third, 200_000)
        assert host.used().cpu_ns == 237_000, f"killed at line {line}"
        assert host.used().cpu_ns == 237_000, f"killed at line {line}, and again"
        assert os.listdir(host.lib) == []
        host.accountant.stop()
        host.store.close()
    assert line > 100
