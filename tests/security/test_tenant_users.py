"""Users of the host who are not root, in the tenants that name them: what they may do, and above all what not."""

from __future__ import annotations

import _socket
import contextlib
import grp
import os
import pwd
import socket
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jailmgr.keys import IDS, IDS_MAX
from jailmgr.runtime import doorkeeper, protocol
from jailmgr.tenant_keys import IDS_OF_USERS
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, Result, until
from tests.system.users import ALICE, BOB, GROUP, alices_tenant, as_user, ask, connected, run_as, session

As = Callable[..., Result]


@pytest.fixture
def tenant(jm: Instance) -> Iterator[str]:
    with alices_tenant(jm) as name:
        yield name


def test_a_user_manages_the_jails_of_the_tenant(jm: Instance, tenant: str) -> None:
    def alice(*argv: str, **more: Any) -> Result:
        return run_as(jm, ALICE, "--tenant", tenant, *argv, **more)

    alice("launch", "busybox", "mine", "-e", "GREETING=hello")
    assert [jail["name"] for jail in alice("list", "--format", "json").json] == ["mine", "web"]
    assert alice("exec", "mine", "--", "sh", "-c", "echo $GREETING; id -u").out == "hello\n0\n"
    assert alice("exec", "mine", "--", "cat", stdin=b"in and out").out == "in and out"
    assert alice("exec", "mine", "--", "sh", "-c", "exit 7", status=7).out == ""
    alice("cp", "-", "mine:/root/note", stdin=b"kept")
    alice("stop", "mine")
    assert alice("cp", "mine:/root/note", "-").out == "kept"
    alice("start", "mine")
    copy = f"/tmp/of-{tenant}"
    try:
        alice("cp", "mine:/root/note", copy)
        assert os.stat(copy).st_uid == pwd.getpwnam(ALICE).pw_uid
    finally:
        os.unlink(copy)
    assert "BusyBox" in alice("logs", "mine").out
    alice("set", "mine", "limits.memory=64MiB")
    assert alice("get", "mine", "limits.memory").out == "64MiB\n"
    alice("port", "publish", "mine", "18080:80")
    assert [port["host_port"] for port in alice("port", "list", "--format", "json").json] == [18080]
    (shown,) = alice("tenant", "list", "--format", "json").json
    assert (shown["tenant"], shown["allocated"]["instances"]) == (tenant, 2)
    alice("create", "busybox", "third")
    assert "limits.instances is 3" in alice("create", "busybox", "fourth", status=1).err
    alice("delete", "--force", "mine")


def test_the_hosts_ids_are_not_all_theirs(jm: Instance, tenant: str) -> None:
    """Mechanism: admission counts the ids of a tenant's jails; without `limits.ids` a user's tenant has a ninth."""
    for argv in (
        ("launch", "busybox", f"{tenant}/all", "-c", f"security.idmap.size={IDS_MAX}"),
        ("set", f"{tenant}/web", f"security.idmap.size={IDS_OF_USERS + 1}"),
    ):
        refused = run_as(jm, ALICE, *argv, status=1)
        assert f"limits.ids is {IDS_OF_USERS}: {IDS} are used" in refused.err
    assert run_as(jm, ALICE, "tenant", "set", tenant, "limits.ids=4294967295", status=None).status in (1, 2)


def test_nothing_of_another_tenant_is_there(jm: Instance, tenant: str, busybox_jail: MakeJail) -> None:
    """Refused in the words that a tenant gets which is not there at all."""
    other = busybox_jail("-p", "18081:80")
    for where in ("default", "no-such-tenant"):
        for argv in (
            ("list",), ("info", other), ("exec", other, "--", "id"), ("stop", other), ("delete", "--force", other),
            ("logs", other), ("console", other), ("cp", f"{other}:/etc/passwd", "-"), ("set", other, "user.a=b"),
            ("launch", "busybox", "x"), ("port", "list"), ("port", "publish", other, "18082:80"),
            ("rename", other, "mine"), ("tenant", "show", where),
        ):  # fmt: skip
            refused = run_as(jm, ALICE, "--tenant", where, *argv, status=None)
            assert refused.status in (1, 125), refused.told()
            assert refused.err.startswith(f"Error: tenant {where}: there is none of that name\n"), refused.told()
            assert refused.out == ""
    everything = run_as(jm, ALICE, "list", "--all-tenants", "--format", "json").json
    assert {jail["tenant"] for jail in everything} == {tenant}
    taken = run_as(jm, ALICE, "port", "publish", f"{tenant}/web", "18081:80", status=1)
    assert other not in taken.err
    assert "default" not in taken.err
    images = run_as(jm, ALICE, "image", "list", "--format", "json").json
    assert sum(image["jails"] for image in images) == 1
    assert jm.status(other) == "Running"


def test_devices_of_the_host_are_roots_alone(jm: Instance, tenant: str) -> None:
    """Add, change and remove them: neither a block device nor another. What root has given a jail, its user may use."""
    web, keys = f"{tenant}/web", ("source=/dev/loop-control", "path=/dev/knob")

    def refused(name: str, kind: str, *argv: str) -> None:
        said = run_as(jm, ALICE, *argv, status=1)
        why = f"Error: device {name}: only root may add, change or remove a {kind} device\n"
        assert said.err == f"{why}Hint: Ask who looks after this host.\n"

    disk = next(f"source=/dev/{name}" for name in os.listdir("/dev") if stat.S_ISBLK(os.stat(f"/dev/{name}").st_mode))
    refused("d", "unix-block", "device", "add", web, "d", "unix-block", disk, "path=/dev/d")
    refused("d", "unix-block", "device", "add", web, "d", "unix-block", "path=/dev/d", "major=7", "minor=0")
    refused("c", "unix-char", "device", "add", web, "c", "unix-char", *keys)
    refused("c", "unix-char", "device", "add", web, "c", "unix-char", "source=/dev/none", "path=/dev/x")
    refused("c", "unix-char", "device", "add", web, "c", "unix-char", "source=/etc/shadow", "path=/dev/x")
    jm("device", "add", web, "knob", "unix-char", *keys)
    refused("knob", "unix-char", "device", "set", web, "knob", "mode=0666")
    refused("knob", "unix-char", "device", "set", web, "knob", "source=/dev/kmsg")
    refused("knob", "unix-char", "device", "remove", web, "knob")
    assert jm.json("device", "list", web)["knob"] == {"type": "unix-char", **dict(key.split("=") for key in keys)}
    made: dict[str, Any] = {"source": {"type": "template", "alias": "busybox"}, "name": "mine"}
    for start in (False, True):
        body = made | {
            "start": start,
            "devices": {"c": {"type": "unix-char", "path": "/dev/x", "major": "1", "minor": "1"}},
        }
        with connected(jm, ALICE) as sock:
            answer = ask(sock, "POST", f"/1.0/instances?project={tenant}", body)
        assert (answer["error_code"], answer["metadata"]["code"]) == (403, "denied"), answer
    for key in ("security.syscalls.allow_socketcall", "security.syscalls.allow_keyctl"):
        denied = f"Error: key {key}: only root may set or unset it\n"
        assert run_as(jm, ALICE, "set", web, f"{key}=true", status=1).err.startswith(denied)
        jm("set", web, f"{key}=false")
        assert run_as(jm, ALICE, "unset", web, key, status=1).err.startswith(denied)
    run_as(jm, ALICE, "set", web, "limits.memory=64MiB")
    run_as(jm, ALICE, "restart", "--force", web)
    assert run_as(jm, ALICE, "exec", web, "--", "stat", "-c", "%a %t:%T", "/dev/knob").out == "660 a:ed\n"


def test_what_is_roots_alone(jm: Instance, tenant: str) -> None:
    web = f"{tenant}/web"
    for argv in (
        ("tenant", "set", tenant, "limits.instances=100"), ("tenant", "unset", tenant, "limits.instances"),
        ("tenant", "create", "more"), ("tenant", "delete", tenant), ("image", "delete", "busybox"),
        ("template", "build", "busybox"), ("doctor",), ("engine", "stop"), ("engine", "run"), ("engine", "shutdown"),
        ("port", "publish", web, "80:80"), ("launch", "busybox", f"{tenant}/low", "-p", "443:443"),
        ("set", web, "security.privileged=true"),
    ):  # fmt: skip
        refused = run_as(jm, ALICE, *argv, status=None)
        assert refused.status in (1, 2), refused.told()
        assert refused.err.startswith("Error: "), refused.told()
    with contextlib.closing(connected(jm, ALICE)) as sock:
        for method, path in (
            ("POST", "/internal/autostart"),
            ("POST", "/1.0/images"),
            ("PATCH", f"/1.0/projects/{tenant}"),
        ):
            assert ask(sock, method, path, {})["error_code"] == 403
        for device, status in (
            ({"type": "disk", "source": "/etc", "path": "/mnt"}, 400),
            ({"type": "unix-char", "source": "/dev/mem"}, 403),
            ({"type": "unix-block", "source": "/dev/vda"}, 403),
        ):
            body = {"devices": {"x": device}}
            assert ask(sock, "PATCH", f"/1.0/instances/web?project={tenant}", body)["error_code"] == status
        other = {"tenant": "default", "jail": "web", "host_port": 18083, "port": 80}
        assert ask(sock, "POST", f"/1.0/ports?project={tenant}", other)["error_code"] == 404
    assert jm.json("tenant", "show", tenant)["config"] == {"users": ALICE, "limits.instances": "3"}


def test_who_is_in_no_tenant_gets_nothing(jm: Instance, tenant: str) -> None:
    refused = run_as(jm, BOB, "--tenant", tenant, "list", status=1)
    assert "there is none of that name" in refused.err
    assert run_as(jm, BOB, "tenant", "list", "--format", "json").json == []
    sock, answer = session(jm, BOB, tenant, "web")
    sock.close()
    assert answer["error"]["code"] == "missing"
    for path in (jm.root.socket, f"{jm.root.tenant_run(tenant)}/{protocol.SOCKET}", jm.root.store):
        with as_user(BOB), socket.socket(socket.AF_UNIX) as direct, pytest.raises(PermissionError):
            direct.connect(path)


def test_a_group_is_told_by_all_groups_of_the_process(jm: Instance, tenant: str) -> None:
    gid = str(grp.getgrnam(GROUP).gr_gid)
    jm("tenant", "set", tenant, f"groups={GROUP}", "users=")
    assert [
        jail["name"] for jail in run_as(jm, BOB, "--tenant", tenant, "list", "--format", "json", groups=gid).json
    ] == ["web"]
    assert run_as(jm, BOB, "exec", f"{tenant}/web", "--", "id", "-u", groups=gid).out == "0\n"
    run_as(jm, BOB, "--tenant", tenant, "list", status=1)
    run_as(jm, ALICE, "--tenant", tenant, "list", status=1)


def test_who_is_taken_out_is_out_at_once(jm: Instance, tenant: str) -> None:
    with contextlib.closing(connected(jm, ALICE)) as sock:
        path = f"/1.0/instances?project={tenant}"
        assert ask(sock, "GET", path)["metadata"] == [f"/1.0/instances/web?project={tenant}"]
        jm("tenant", "set", tenant, f"users={BOB}")
        assert ask(sock, "GET", path)["error_code"] == 404
    jm("tenant", "unset", tenant, "users")
    assert not os.path.exists(jm.root.user_socket)
    assert "only root" in run_as(jm, ALICE, "list", status=1).err


def test_a_request_that_is_held_back_is_judged_when_it_is_whole(jm: Instance, tenant: str) -> None:
    body = b'{"config": {"user.late": "yes"}}'
    head = f"PATCH /1.0/instances/web?project={tenant} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(jm, ALICE) as sock:
        ask(sock, "GET", "/1.0")
        sock.sendall(head.encode() + body[:5])
        jm("tenant", "set", tenant, f"users={BOB}")
        sock.sendall(body[5:])
        assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")
    assert "user.late" not in jm.info(f"{tenant}/web")["config"]


def test_a_session_is_of_one_jail_and_some_requests(jm: Instance, tenant: str, busybox_jail: MakeJail) -> None:
    """What the supervisor's protocol has for root it has for nobody else, whatever a user puts into a request."""
    jm("launch", "busybox", f"{tenant}/second")
    jm.exec(f"{tenant}/second", "touch", "/root/second")
    sock, answer = session(jm, ALICE, tenant, "web")
    assert "error" not in answer
    with contextlib.closing(sock):

        def say(op: str, **values: Any) -> dict[str, Any]:
            protocol.send(sock, {"v": protocol.VERSION, "op": op, **values})
            message = protocol.receive(sock)
            assert message is not None
            return message.body

        lib = jm.root.jail_lib(tenant, "second")
        for op in ("status", "start", "stop", "run", "reexec", "admit"):
            told = say(op, jail="second", lib=lib, argv=["/bin/sh"], signal="SIGKILL", force=True)
            assert told["error"]["code"] == "invalid", (op, told)
            assert "does not know" in told["error"]["why"]
        protocol.send(sock, {"v": protocol.VERSION, "op": "exec", "jail": "second", "args": ["ls", "/root"], "env": {}})
        begun = protocol.receive(sock)
        assert begun is not None
        assert begun.body == {"pipes": 3}
        ended = protocol.receive(sock)
        assert ended is not None
        assert ended.body == {"exit": {"code": 0}}
        assert b"second" not in os.read(begun.fds[1], 100)
        protocol.close_all(begun.fds)
        for op in ("exec", "archive", "console"):
            assert say(op, args=["true"], env={}, path="/root", out=True)["error"]["code"] == "denied", op
        protocol.send(sock, {"op": "x" * 1000})
        assert protocol.receive(sock)
        sock.send(b"\0not json")
        assert protocol.receive(sock) is None
    assert jm.status(f"{tenant}/second") == "Running"


def test_no_user_takes_the_engine_from_the_others(jm: Instance, tenant: str) -> None:
    """All the connections Bob may have, and more, each with half a request: root and Alice are served as before."""
    held: list[_socket.socket] = [connected(jm, BOB) for _ in range(doorkeeper.EACH[doorkeeper.HTTP] * 2)]
    try:
        for sock in held:
            with contextlib.suppress(OSError):
                sock.sendall(b"GET /1.0/instances HTTP/1.1\r\nHost")
        until(lambda: _refused(held[-1]), 20, "one too many is told so")
        for _ in range(4):
            with as_user(BOB):
                held.append(protocol.connect(jm.root.users, protocol.SESSIONS))
        assert jm.json("list") is not None
        assert run_as(jm, ALICE, "--tenant", tenant, "list", "--format", "json").json
        assert run_as(jm, ALICE, "exec", f"{tenant}/web", "--", "echo", "served").out == "served\n"
    finally:
        for sock in held:
            sock.close()
    until(lambda: run_as(jm, BOB, "tenant", "list", status=None).status == 0, 20, "his are free again")


def _refused(sock: _socket.socket) -> bool:
    sock.sendall(b": x\r\n\r\n")
    return b"too many connections" in sock.recv(65536)
