"""`python -m bench accounting`: what a sample of many running jails costs the engine.

To boot 500 jails would take minutes and measure the same: a sample reads a jail's row, state file, log, cgroups, veth
and quota group, and /proc of its init. Each of the N has all of these, and a process of its own that uses memory; it
has no namespaces, which no sample looks at.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from jailmgr.config import Root, find_root
from jailmgr.manager.accounting import SAMPLE_SECONDS, Accountant
from jailmgr.manager.host import Manager
from jailmgr.manager.opening import opened
from jailmgr.model import Jail, Network, Nic
from jailmgr.network.bridge import veth_name
from jailmgr.runtime import cgroups
from jailmgr.runtime.proc import start_time
from jailmgr.runtime.state import State, host_boot_id, remove_state, write_state
from jailmgr.storage.volume import create_volume
from jailmgr.store import READY
from tests.system.leftovers import scrap
from tests.system.netns import run, session_namespace

TENANT = "bench"


def main(argv: list[str]) -> int:
    options = _options(argv)
    if os.geteuid() != 0:
        print("Error: bench: it makes cgroups, so it must run as root\nHint: sudo script/bench", file=sys.stderr)
        return 1
    with ExitStack() as undo:
        undo.enter_context(session_namespace())
        root = find_root(tempfile.mkdtemp(prefix="jb-", dir="/tmp"))
        undo.callback(scrap, root)
        m = undo.enter_context(opened(root))
        print(f"-- making {options.jails}", file=sys.stderr, flush=True)
        jails = _rows(m, options.jails)
        _veths(root, jails)
        for jail in jails:
            _run(m, jail, undo)
        _report(m.accountant, options.jails, options.rounds)
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/bench accounting", description="the cost of sampling usage")
    parser.add_argument("--jails", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="samples (default: %(default)s)")
    return parser.parse_args(argv)


def _rows(m: Manager, count: int) -> list[Jail]:
    pool = m.pool
    with m.store.transaction():
        tenant = m.store.add_tenant(TENANT, {}, 1_000_000)
        network = m.store.add_network(TENANT, "default", lambda ident: Network(ident, TENANT, "default", "", ""))
        jails = [m.store.reserve(TENANT, f"j{number}", "busybox", {}, {}) for number in range(count)]
        for number, jail in enumerate(jails):
            veth = veth_name(m.root, jail.id)
            nic = Nic(
                "eth0", "default", veth, "0a:00:00:00:00:01", f"10.0.{number >> 8}.{number & 255}", f"fd::{number:x}"
            )
            m.store.set_nics(jail, [(network, nic)])
            m.store.set_state(jail, READY)
    for jail in jails:
        create_volume(pool, TENANT, tenant.id, jail.name, jail.id, None)
        os.makedirs(m.root.jail_lib(TENANT, jail.name))
    return m.store.jails()


def _veths(root: Root, jails: list[Jail]) -> None:
    pairs = [f"link add {jail.nics[0].veth} type veth peer name p{jail.id:x}" for jail in jails]
    run("ip", "-batch", "-", stdin="\n".join(pairs))


def _run(m: Manager, jail: Jail, undo: ExitStack) -> None:
    cgroup = m.root.jail_cgroup(TENANT, jail.name)
    os.makedirs(m.root.tenant_run(TENANT), exist_ok=True)
    cgroups.tenant_group(m.hierarchies, m.root.cgroup, TENANT)
    cgroups.create_jail_group(m.hierarchies, cgroup, 0)
    # Before its exec, since memory is charged to the group that a process is in when it takes it.
    process = subprocess.Popen(["sleep", "86400"], preexec_fn=partial(cgroups.join, m.hierarchies, cgroup, 0))
    undo.callback(remove_state, m.root.tenant_run(TENANT), jail.name)
    undo.callback(process.wait)
    undo.callback(process.kill)
    state = State(process.pid, start_time(process.pid) or 0, time.time(), 0, True, 0, cgroup, "", host_boot_id())
    write_state(m.root.tenant_run(TENANT), jail.name, state)


def _report(accountant: Accountant, count: int, rounds: int) -> None:
    cpu, wall = [], []
    for _ in range(rounds + 1):
        began, used = time.perf_counter(), time.thread_time()
        accountant.sample()
        cpu.append((time.thread_time() - used) * 1000)
        wall.append((time.perf_counter() - began) * 1000)
    (record,) = accountant.usage(TENANT, 0.0, time.time())
    assert len(record.jails) == count
    assert all(jail.memory_byte_seconds and jail.running_seconds for jail in record.jails)
    median = statistics.median(cpu[1:])
    size = sum(path.stat().st_size for path in Path(accountant.path).parent.glob("usage.db*"))
    print(f"a sample of {count} running jails, median of {rounds} (the first: {cpu[0]:.1f} ms)")
    print(f"  CPU   {median:.1f} ms, at one in {SAMPLE_SECONDS:.0f} s {median / SAMPLE_SECONDS / 10:.3f} % of a core")
    print(f"  time  {statistics.median(wall[1:]):.1f} ms, an fsync in it")
    print(f"  file  {size / 1024:.0f} KiB with its log")
