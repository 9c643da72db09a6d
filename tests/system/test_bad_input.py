"""What can't be done is told by an Error and a Hint, with the right exit status; nothing is lost or left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jailmgr.runtime import seccomp
from tests.system.conftest import MakeJail
from tests.system.instance import COMMAND, Instance, until
from tests.system.leftovers import leftovers, running
from tests.system.netns import OUTSIDE, Netns, inside, run

MakeInstance = Callable[[], Instance]


def template(instance: Instance, name: str, text: str) -> Path:
    """A template of the admin's own."""
    folder = Path(instance.root.etc) / "templates" / name
    (folder / "files").mkdir(parents=True)
    (folder / "template.toml").write_text(text)
    return folder


def nothing_built(instance: Instance) -> None:
    assert instance.json("image", "list") == []
    assert instance.json("list") == []
    builds = f"{instance.root.pool}/builds"
    assert not os.path.exists(builds) or os.listdir(builds) == []


def test_unknown_template(jm: Instance) -> None:
    refused = jm.refused("launch", "debain", "bad")
    assert "debain" in refused.err
    assert "debian" in refused.err.partition("Hint: ")[2]
    assert "sarge" in jm.refused("launch", "debian/sarge", "bad").err
    jm.refused("launch", "debian/bookworm/novariant", "bad")
    jm.refused("launch", "../../etc", "bad")
    assert jm.gone("bad")


def test_bad_templates(new_instance: MakeInstance) -> None:
    instance = new_instance()
    broken = template(instance, "broken", 'description = "x"\nmethod = "busybox"\nreleases = ["one"\n')
    refused = instance.refused("launch", "broken", "bad", status=2)
    assert "template.toml" in refused.err
    mistaken = template(
        instance,
        "mistaken",
        'description = "x"\nmethod = "magic"\nreleases = ["one"]\n\n[init]\ncomand = ["/sbin/init"]\n',
    )
    told = instance("template", "validate", str(mistaken), status=1)
    said = told.out + told.err
    assert "template.toml:2" in said
    assert "method" in said
    assert "template.toml:6" in said
    assert "comand" in said
    told = instance("template", "validate", str(broken), status=1)
    assert "template.toml:" in told.out + told.err
    nothing_built(instance)


def test_a_step_that_fails_leaves_nothing(new_instance: MakeInstance) -> None:
    instance = new_instance()
    fail = 'command = ["/bin/sh", "-c", "echo oh dear; exit 3"]'
    template(instance, "failing", f'description = "x"\nmethod = "busybox"\nreleases = ["one"]\n\n[[run]]\n{fail}\n')
    refused = instance.refused("launch", "failing", "bad")
    assert "3" in refused.err
    nothing_built(instance)


def test_full_disk_while_building(new_instance: MakeInstance) -> None:
    instance = new_instance()
    os.makedirs(instance.root.etc, exist_ok=True)
    Path(instance.root.etc, "config.toml").write_text('[pool]\nsize = "512MiB"\n')
    fill = 'command = ["/bin/sh", "-c", "exec dd if=/dev/zero of=/big bs=1M count=2000"]'
    template(instance, "huge", f'description = "x"\nmethod = "busybox"\nreleases = ["one"]\n\n[[run]]\n{fill}\n')
    instance("launch", "busybox", "bystander")
    instance.refused("launch", "huge", "bad", within=300)
    assert instance.gone("bad")
    write = "echo text > /root/note && sync && cat /root/note"
    until(lambda: instance.sh("bystander", write, status=None).out == "text\n", 60, "the build's room is given back")
    instance("launch", "busybox", "afterwards")


def test_the_hosts_disk_running_full(new_instance: MakeInstance) -> None:
    """Others fill the disk that the pool's sparse file counts on: writers wait, nothing is lost, and they go on."""
    instance = new_instance()
    at, disk = instance.root.at, f"{instance.root.at}.ext4"
    run("truncate", "--size=3584M", disk)
    run("mkfs.ext4", "-q", disk)
    run("mount", "-o", "loop", disk, at)
    try:
        os.makedirs(instance.root.etc)
        Path(instance.root.etc, "config.toml").write_text('[pool]\nsize = "1GiB"\n')
        instance("launch", "busybox", "writer")
        host = os.statvfs(at)
        filler = os.open(f"{at}/filler", os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(filler, 0, host.f_bavail * host.f_frsize - (600 << 20))
        os.close(filler)
        write = "dd if=/dev/zero of=/root/big bs=1M count=700 2>&1 && sync"
        with instance.popen("exec", "writer", "--", "/bin/sh", "-c", write, stdout=subprocess.DEVNULL) as writing:
            until(lambda: instance.status("writer") == "Frozen", 60, "the writer is held still")
            assert not os.statvfs(instance.root.pool).f_flag & os.ST_RDONLY
            assert "nearly full" in instance.refused("launch", "busybox", "another").err
            assert "nearly full" in instance.refused("resume", "writer").err
            checks = {check["check"]: check for check in instance("doctor", "--format", "json", status=1).json}
            assert (checks["disk"]["ok"], checks["disk"]["severity"]) == (False, "error")
            os.unlink(f"{at}/filler")
            until(lambda: instance.status("writer") == "Running", 30, "it goes on")
            assert writing.wait(120) == 0
        assert instance.exec("writer", "stat", "-c", "%s", "/root/big").out == f"{700 << 20}\n"
        instance("delete", "--force", "writer")
        instance("engine", "stop")
        until(lambda: running(leftovers(instance.root)) <= {f"mount {at}"}, 15, "nothing is left")
    finally:
        run("umount", "--lazy", at)
        os.unlink(disk)


def test_no_room_for_a_pool(new_instance: MakeInstance) -> None:
    instance = new_instance()
    run("mount", "-t", "tmpfs", "-o", "size=300M", "tmpfs", instance.root.at)
    try:
        refused = instance.refused("launch", "busybox", "bad")
        assert "Hint: " in refused.err
        assert instance.json("list") == []
        instance("engine", "stop")
        mount = {f"mount {instance.root.at}"}
        until(lambda: running(leftovers(instance.root)) <= mount, 10, "nothing is left")
    finally:
        run("umount", instance.root.at)


def test_no_network_while_building(netns: Netns, new_instance: MakeInstance) -> None:
    instance = new_instance()
    with inside(netns.outside):
        refused = instance.refused("launch", "debian/bookworm", "bad", within=300)
        assert "Hint: " in refused.err
        nothing_built(instance)
        instance("engine", "stop")


def test_interrupted_while_building(new_instance: MakeInstance) -> None:
    instance = new_instance()
    forever = 'command = ["/bin/sh", "-c", "echo started; exec sleep 600"]'
    template(instance, "endless", f'description = "x"\nmethod = "busybox"\nreleases = ["one"]\n\n[[run]]\n{forever}\n')
    process = instance.popen("launch", "endless", "bad", stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    until(lambda: os.path.isdir(instance.root.pool) and _building(instance), 30, "it builds")
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    until(lambda: not _building(instance), 20, "the build is gone")
    nothing_built(instance)


def _building(instance: Instance) -> bool:
    return any("sleep 600" in line for line in leftovers(instance.root))


def test_name_taken(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    init = jm.info(name)["init_pid"]
    refused = jm.refused("launch", "busybox", name)
    assert name in refused.err
    assert jm.info(name)["init_pid"] == init


@pytest.mark.parametrize(
    "name", ["UPPER", "under_score", "-dash", "dash-", "dot.ted", "a" * 64, "a b", "é", "..", "a@b"]
)
def test_names_that_are_no_labels(jm: Instance, name: str) -> None:
    refused = jm.refused("launch", "busybox", "--", name, status=2)
    assert "Hint: " in refused.err
    assert jm.json("list") == []


def test_not_root() -> None:
    done = subprocess.run(["unshare", "--user", COMMAND, "list"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Hint: " in done.stderr


@pytest.mark.parametrize("call", ["clone3", "fsopen", "mount_setattr", "open_tree"])
def test_a_kernel_without_a_needed_feature(new_instance: MakeInstance, call: str) -> None:
    """A filter on all of an instance takes the call away, as an older kernel hasn't got it."""
    instance = new_instance()
    section = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [],
        "syscalls": [{"names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS}],
    }
    program = seccomp.compile(section)

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, *argv], capture_output=True, text=True, timeout=120, env=instance.environment(),
            stdin=subprocess.DEVNULL, preexec_fn=lambda: seccomp.load(program),
        )  # fmt: skip

    done = run("launch", "busybox", "bad")
    assert done.returncode == 1, done.stderr
    assert call in done.stderr or "namespaces" in done.stderr
    assert "doctor" in done.stderr.partition("Hint: ")[2]
    assert json.loads(run("list", "--format", "json").stdout) == []
    (check,) = [
        each for each in json.loads(run("doctor", "--format", "json").stdout) if each["check"] == "system calls"
    ]
    assert not check["ok"]
    assert call in check["detail"]
    run("engine", "stop")
    until(lambda: not running(leftovers(instance.root)), 15, "nothing is left")
    instance("launch", "busybox", "good")


def test_root_too_long_for_a_socket(tmp_path: Path) -> None:
    path = f"/tmp/{'x' * 100}"
    done = subprocess.run([COMMAND, "--root", path, "list"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "Hint: " in done.stderr
    assert not os.path.exists(path)


def test_a_second_engine(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    engine = jm.engine_pid()
    refused = jm.refused("engine", "run")
    assert str(engine) in refused.err
    assert jm.engine_pid() == engine
    assert jm.status(name) == "Running"


def test_a_corrupt_store(new_instance: MakeInstance) -> None:
    instance = new_instance()
    instance("launch", "busybox", "kept")
    init = instance.info("kept")["init_pid"]
    instance("engine", "stop")
    store = Path(instance.root.store)
    good = store.read_bytes()
    bad = b"not a database" * 1000
    store.write_bytes(bad)
    refused = instance.refused("list")
    assert "Hint: " in refused.err
    assert store.read_bytes() == bad, "what is there may still be saved by hand"
    assert not instance.json("engine", "status")["running"]
    store.write_bytes(good)
    assert instance.info("kept")["init_pid"] == init
    assert instance.exec("kept", "echo", "alive").out == "alive\n"


def test_subnets_taken(new_instance: MakeInstance) -> None:
    private = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
    for subnet in private:
        run("ip", "route", "add", subnet, "via", OUTSIDE[0])
    try:
        instance = new_instance()
        refused = instance.refused("launch", "busybox", "bad")
        assert "Hint: " in refused.err
        assert instance.json("list") == []
    finally:
        for subnet in private:
            run("ip", "route", "delete", subnet)


def test_a_hosts_route_is_avoided(new_instance: MakeInstance) -> None:
    run("ip", "route", "add", "10.0.0.0/9", "via", OUTSIDE[0])
    try:
        instance = new_instance()
        instance("launch", "busybox", "careful")
        assert int(instance.info("careful")["ipv4"].split(".")[1]) >= 128
    finally:
        run("ip", "route", "delete", "10.0.0.0/9")


@pytest.mark.parametrize(
    "argv",
    [
        ("snapshot", "list", "x"), ("copy", "a", "b"), ("apply", "lab.toml"), ("nonsense",),
        ("launch",), ("launch", "busybox", "a", "b"), ("list", "--no-such-option"), ("list", "--format", "xml"),
        ("port", "publish", "x"), ("set", "x"),
    ],
)  # fmt: skip
def test_wrong_usage(jm: Instance, argv: tuple[str, ...]) -> None:
    assert jm.refused(*argv, status=2).err.startswith("Error: ")


def test_what_is_not_built_yet_is_not_listed(jm: Instance) -> None:
    commands = jm("--help").out
    for later in ("snapshot", "import", "export", "apply", "publish "):
        assert f"\n  {later}" not in commands


def test_every_command_has_help_with_an_example(jm: Instance) -> None:
    groups = ("template", "image", "tenant", "device", "port", "engine")
    listed = [
        line.split()[0] for line in jm("--help").out.partition("Commands:")[2].splitlines() if line.startswith("  ")
    ]
    assert len(listed) > 20
    for command in listed:
        words = [[command]]
        if command in groups:
            inner = jm(command, "--help").out.partition("Commands:")[2].splitlines()
            words = [[command, line.split()[0]] for line in inner if line.startswith("  ")]
        for argv in words:
            assert "jailmgr " in jm(*argv, "--help").out.partition("Example")[2], argv


def test_a_root_that_is_no_directory() -> None:
    with tempfile.NamedTemporaryFile(prefix="jm-", dir="/tmp") as file:
        done = subprocess.run([COMMAND, "--root", file.name, "list"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
