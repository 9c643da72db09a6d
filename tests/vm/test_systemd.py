"""Under systemd: who is in which unit's group, and what stopping and killing units leaves running."""

from __future__ import annotations

from collections.abc import Callable

from tests.system.instance import COMMAND, Instance, alive, kill, until
from tests.system.netns import run
from tests.vm.conftest import cgroup_of, in_a_login_session, unit_property

MakeJail = Callable[..., str]


def processes(unit: str) -> list[int]:
    group = unit_property(unit, "ControlGroup")
    with open(f"/sys/fs/cgroup{group}/cgroup.procs", encoding="ascii") as file:
        return [int(line) for line in file]


def test_jails_are_in_one_delegated_scope(host: Instance, jail: MakeJail) -> None:
    info = host.info(jail())
    scope = "/jailmgr.slice/jailmgr.scope"
    assert cgroup_of(info["init_pid"]).startswith(f"{scope}/default/{info['name']}/payload")
    assert cgroup_of(info["supervisor_pid"]) == f"{scope}/.supervisors"
    assert unit_property("jailmgr.scope", "Delegate") == "yes"
    assert unit_property("jailmgr.scope", "Before").split().count("jailmgr-autostart.service") == 1


def test_nothing_of_a_jail_is_in_the_service(host: Instance, jail: MakeJail) -> None:
    jail()
    assert processes("jailmgr.service") == [host.engine_pid()]
    assert unit_property("jailmgr.service", "KillMode") == "process"


def test_names_are_answered_from_a_scope_of_their_own(host: Instance, jail: MakeJail) -> None:
    name = jail()
    servers = run("pgrep", "--full", "dnsmasq.*--pid-file=/run/jailmgr/dns/").split()
    assert {cgroup_of(int(pid)).split("/")[1] for pid in servers} == {"jailmgr.slice"}
    run("systemctl", "stop", "jailmgr.service")
    assert host.sh(name, f"nslookup {name}.jailmgr").status == 0


def test_the_engine_may_stop_and_start_again(host: Instance, jail: MakeJail) -> None:
    name = jail()
    init = host.info(name)["init_pid"]
    engine = host.engine_pid()
    run("systemctl", "restart", "jailmgr.service")
    assert host.engine_pid() not in (engine, None)
    run("systemctl", "stop", "jailmgr.service")
    assert not host.json("engine", "status")["running"]
    assert host.exec(name, "echo", "here").out == "here\n"
    assert not host.json("engine", "status")["running"]
    assert host.info(name)["init_pid"] == init
    assert host.json("engine", "status")["running"]
    host("engine", "stop")
    assert unit_property("jailmgr.service", "Result") == "success"
    assert host.status(name) == "Running"


def test_a_killed_engine_is_started_again(host: Instance, jail: MakeJail) -> None:
    name = jail()
    init, engine = host.info(name)["init_pid"], host.engine_pid()
    kill(engine)
    until(lambda: unit_property("jailmgr.service", "MainPID") not in ("0", str(engine)), 30, "systemd starts it")
    assert (host.status(name), host.info(name)["init_pid"]) == ("Running", init)


def test_a_command_of_a_login_session_starts_the_socket_unit(host: Instance, jail: MakeJail) -> None:
    name = jail()
    run("systemctl", "stop", "jailmgr.service", "jailmgr.socket")
    assert in_a_login_session(COMMAND, "list", "--format", "json").returncode == 0
    assert unit_property("jailmgr.socket", "ActiveState") == "active"
    assert unit_property("jailmgr.service", "ActiveState") == "active"
    assert host.status(name) == "Running"


def test_without_units_the_engine_outlives_the_session(host: Instance) -> None:
    """An instance of another root has none."""
    other = ["env", "JAILMGR_ROOT=/root/other", COMMAND]
    done = in_a_login_session(*other, "launch", "busybox", "one")
    assert done.returncode == 0, done.stderr
    pid = int(run(*other, "info", "one", "--format", "json").split('"init_pid": ')[1].split(",")[0])
    assert alive(pid)
    assert "jailmgr.slice" in cgroup_of(pid)
    status = run(*other, "engine", "status", "--format", "json")
    engine = int(status.split('"pid": ')[1].split(",")[0])
    assert "jailmgr.slice" in cgroup_of(engine)
    run(*other, "delete", "--force", "one")
    run(*other, "engine", "stop")
    assert not alive(engine)


def test_the_scope_goes_with_its_last_jail(host: Instance, jail: MakeJail) -> None:
    name = jail()
    others = [row["name"] for row in host.json("list") if row["name"] != name and row["status"] == "Running"]
    assert not others, "the jails of other tests are gone"
    host("stop", "--force", name)
    until(lambda: unit_property("jailmgr.scope", "ActiveState") == "inactive", 30, "the scope ends")
    host("start", name)
    assert host.exec(name, "true").status == 0


def test_pausing_is_v2s_freezer(host: Instance, jail: MakeJail) -> None:
    name = jail()
    group = f"/sys/fs/cgroup/jailmgr.slice/jailmgr.scope/default/{name}/cgroup.events"
    host("pause", name)
    with open(group, encoding="ascii") as file:
        assert "frozen 1" in file.read()
    host("resume", name)
    with open(group, encoding="ascii") as file:
        assert "frozen 0" in file.read()
