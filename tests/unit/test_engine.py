"""The engine's API over a real unix socket; the manager behind it is made up."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from jailmgr.cli.client import Connection
from jailmgr.config import Root, find_root
from jailmgr.engine import background, protocol, requests
from jailmgr.engine.app import make_app
from jailmgr.engine.background import Operations
from jailmgr.engine.door import Door
from jailmgr.engine.protocol import Protocol, Server
from jailmgr.engine.requests import BODY_MAX, Engine
from jailmgr.engine.serve import listen
from jailmgr.errors import JailmgrError
from jailmgr.manager.host import Manager
from jailmgr.progress import CancelledError


class Mine(Protocol):
    """Lets in the user who runs the tests."""

    allowed = frozenset({os.getuid()})


class Others(Protocol):
    """Lets in nobody that can be here."""

    allowed = frozenset({os.getuid() + 1})


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]
    headers: http.client.HTTPMessage

    @property
    def metadata(self) -> Any:
        return self.body["metadata"]


class Client:
    """A connection for each request, as the command line has it."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def __call__(self, method: str, path: str, body: object = None, raw: bytes | None = None) -> Answer:
        connection = http.client.HTTPConnection("jailmgr", timeout=20)
        connection.sock = self.connect()
        try:
            content = raw if raw is not None else None if body is None else json.dumps(body).encode()
            connection.request(method, path, content)
            response = connection.getresponse()
            answer = Answer(response.status, json.loads(response.read() or b"{}"), response.headers)
        finally:
            connection.close()
        assert "Traceback" not in json.dumps(answer.body)
        return answer

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(self.root.socket)
        return sock

    def ended(self, answer: Answer) -> dict[str, Any]:
        """The operation that an answer began, once it is over."""
        assert answer.status == 202, answer.body
        assert answer.body["operation"] == answer.headers["location"]
        found = self("GET", f"{answer.body['operation']}/wait?timeout=20").metadata
        assert isinstance(found, dict)
        return found


class Running:
    """The engine's own parts in a thread: app, operations and uvicorn, without signals and locks."""

    def __init__(self, root: Root, protocol: type[Protocol], store: object) -> None:
        self.started = threading.Event()
        self.root, self.protocol = root, protocol
        self.manager = cast(Manager, SimpleNamespace(root=root, store=store))
        self.loop: asyncio.AbstractEventLoop
        self.operations: Operations
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()))
        self.thread.start()
        assert self.started.wait(20)

    async def serve(self) -> None:
        self.loop, self.operations = asyncio.get_running_loop(), Operations()
        threads = ThreadPoolExecutor(4)
        app = make_app(
            Engine(self.root, self.manager, self.operations, threads, time.time(), Door(self.root, self.manager))
        )
        self.server = Server(app, self.started.set, self.protocol)
        await self.server.serve([listen(self.root)])
        threads.shutdown()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.leave.set)
        self.thread.join(20)
        assert not self.thread.is_alive()


class Store:
    """One jail, `web` of tenant `default`."""

    def find_row(self, tenant: str, name: str) -> object:
        return object() if (tenant, name) == ("default", "web") else None

    def jail(self, tenant: str, name: str) -> object:
        raise JailmgrError(f"jail {name}", "there is none of that name", "See jailmgr list.", "missing")


@pytest.fixture
def root(tmp_path: Path) -> Root:
    found = find_root(str(tmp_path))
    os.makedirs(found.run)
    return found


@pytest.fixture
def running(root: Root) -> Iterator[Running]:
    engine = Running(root, Mine, Store())
    yield engine
    engine.stop()


@pytest.fixture
def client(running: Running) -> Client:
    return Client(running.root)


class Spy:
    """In place of a manager's function: remembers what it was called with, does what it is told."""

    def __init__(self, does: Callable[..., Any]) -> None:
        self.does = does
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, m: object, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.does(*args, **kwargs)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spy]:
    def put(name: str, result: Any = None, does: Callable[..., Any] | None = None) -> Spy:
        spy = Spy(does or (lambda *_, **__: result))
        monkeypatch.setattr(f"jailmgr.manager.{name}", spy)
        return spy

    return put


NEW = {"source": {"type": "template", "alias": "debian"}, "name": "web"}


def test_server(client: Client, root: Root) -> None:
    told = client("GET", "/1.0")
    assert (told.status, told.body["type"], told.body["status_code"]) == (200, "sync", 200)
    assert told.metadata["environment"]["server_pid"] == os.getpid()
    assert told.metadata["socket"] == root.socket
    assert client("GET", "/").metadata == ["/1.0"]


def test_socket_is_roots_alone(running: Running) -> None:
    assert os.stat(running.root.socket).st_mode & 0o777 == 0o600


def test_other_users_are_refused(root: Root) -> None:
    engine = Running(root, Others, Store())
    try:
        told = Client(root)("GET", "/1.0/instances")
    finally:
        engine.stop()
    assert told.status == 403
    assert told.metadata["code"] == "denied"


def test_list_paths_and_objects(client: Client, fake: Callable[..., Spy]) -> None:
    spy = fake("view.list_jails", [SimpleNamespace(tenant="acme", name="web")])
    assert client("GET", "/1.0/instances?project=acme").metadata == ["/1.0/instances/web?project=acme"]
    spy.does = lambda tenant: [{"name": "web"}]
    assert client("GET", "/1.0/instances?recursion=2").metadata == [{"name": "web"}]
    client("GET", "/1.0/instances?recursion=2&all-projects=true")
    assert [args for args, _ in spy.calls] == [("acme",), ("default",), (None,)]


def test_launch_reports_progress_and_result(client: Client, fake: Callable[..., Spy]) -> None:
    told, go_on = threading.Event(), threading.Event()

    def launch(*_: Any, progress: Callable[[str, int, int], None], **__: Any) -> object:
        progress("unpacking", 3, 10)
        told.set()
        assert go_on.wait(20)
        return SimpleNamespace(name="web", tenant="acme")

    check, spy = fake("create.check_new"), fake("create.launch", does=launch)
    begun = client("POST", "/1.0/instances?project=acme", NEW | {"start": True, "config": {"limits.cpu": "2"}})
    assert told.wait(20)
    now = client("GET", begun.body["operation"]).metadata
    assert (now["status_code"], now["may_cancel"]) == (103, True)
    assert now["metadata"]["progress"] == {"step": "unpacking", "done": 3, "total": 10}
    assert now["resources"] == {"instances": ["/1.0/instances/web?project=acme"]}
    go_on.set()
    end = client.ended(begun)
    assert (end["status"], end["status_code"], end["err"]) == ("Success", 200, "")
    assert end["metadata"]["result"] == {"name": "web", "tenant": "acme"}
    wanted: tuple[Any, ...] = ("acme", "web", "debian", {"limits.cpu": "2"}, {})
    assert check.calls == [(wanted, {"root": True})]
    assert spy.calls[0][0] == wanted
    assert spy.calls[0][1]["root"] is True
    assert spy.calls[0][1]["wait"] is False


def test_what_can_be_refused_at_once_begins_no_operation(client: Client, fake: Callable[..., Spy]) -> None:
    def taken(*_: Any, **__: Any) -> None:
        raise JailmgrError("jail web", "the name is taken", "Choose another.", "exists")

    fake("create.check_new", does=taken)
    create = fake("create.create")
    told = client("POST", "/1.0/instances", NEW)
    assert (told.status, told.body["error_code"], told.body["error"]) == (409, 409, "jail web: the name is taken")
    assert told.metadata == {
        "what": "jail web",
        "why": "the name is taken",
        "hint": "Choose another.",
        "code": "exists",
    }
    assert create.calls == []
    assert client("GET", "/1.0/operations").metadata == {}


@pytest.mark.parametrize(
    ("body", "of", "wanted"),
    [
        ({"action": "start", "wait": True}, "start.start", {"wait": True}),
        ({"action": "stop", "timeout": 5}, "stop.stop", {"force": False, "timeout": 5}),
        ({"action": "stop", "timeout": -1, "force": True}, "stop.stop", {"force": True, "timeout": None}),
        ({"action": "restart"}, "restart.restart", {"force": False, "timeout": None, "wait": False}),
        ({"action": "freeze"}, "stop.freeze", {}),
        ({"action": "unfreeze"}, "stop.unfreeze", {}),
    ],
)
def test_state(client: Client, fake: Callable[..., Spy], body: dict[str, Any], of: str, wanted: dict[str, Any]) -> None:
    spy = fake(of)
    assert client.ended(client("PUT", "/1.0/instances/web/state", body))["status"] == "Success"
    assert spy.calls == [(("default", "web"), wanted)]


def test_failed_operation(client: Client, fake: Callable[..., Spy]) -> None:
    def runs(*_: Any, **__: Any) -> None:
        raise JailmgrError("jail web", "it runs already", "See jailmgr list.", "conflict")

    fake("start.start", does=runs)
    end = client.ended(client("PUT", "/1.0/instances/web/state", {"action": "start"}))
    assert (end["status"], end["status_code"], end["err_code"]) == ("Failure", 400, 409)
    assert end["err"] == "jail web: it runs already"
    assert end["error"]["hint"] == "See jailmgr list."


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/1.0/instances/nix/state", {"action": "start"}),
        ("DELETE", "/1.0/instances/nix", None),
        ("POST", "/1.0/instances/nix", {"name": "new"}),
        ("GET", "/1.0/operations/nix", None),
        ("GET", "/1.0/operations/nix/wait", None),
        ("DELETE", "/1.0/operations/nix", None),
        ("GET", "/1.0/nix", None),
        ("GET", "/nix", None),
        ("GET", "/1.0/instances/../../etc/passwd", None),
    ],
)
def test_missing(client: Client, method: str, path: str, body: object) -> None:
    told = client(method, path, body)
    assert told.status == 404
    assert told.metadata["code"] == "missing"


def test_method_not_allowed(client: Client) -> None:
    told = client("PUT", "/1.0/instances", {})
    assert told.status == 405
    assert set(told.headers["allow"].replace(",", " ").split()) == {"GET", "HEAD", "POST"}
    assert told.body["type"] == "error"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"action": "\xff"}',
        b'{"action": "explode"}',
        b'{"action": 1}',
        b'{"action": "start", "wait": "yes"}',
        b'{"action": "stop", "timeout": 1e99}',
        b'{"action": "stop", "timeout": -2}',
        b'{"action": "stop", "timeout": "5"}',
        b'{"action": "start", "typo": true}',
        b'{"typo": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 200_000,
    ],
)
def test_bad_bodies(client: Client, raw: bytes) -> None:
    told = client("PUT", "/1.0/instances/web/state", raw=raw)
    assert told.status == 400
    assert (told.metadata["what"], told.metadata["code"]) == ("request body", "invalid")
    assert told.metadata["why"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"source": "debian"},
        {"source": {"type": "iso", "alias": "x"}},
        NEW | {"config": {"limits.cpu": 2}},
        NEW | {"config": None},
        NEW | {"devices": {"root": "5GiB"}},
        NEW | {"name": 5},
        NEW | {"profiles": []},
    ],
)
def test_bad_new_instances(client: Client, fake: Callable[..., Spy], body: dict[str, Any]) -> None:
    check = fake("create.check_new")
    assert client("POST", "/1.0/instances", body).status == 400
    assert check.calls == []


@pytest.mark.parametrize("query", ["force=maybe", "force=2"])
def test_bad_flag(client: Client, query: str) -> None:
    assert client("DELETE", f"/1.0/instances/web?{query}").status == 400


@pytest.mark.parametrize("timeout", ["soon", "nan", "inf", "-5", "1e300"])
def test_bad_timeout(client: Client, fake: Callable[..., Spy], timeout: str) -> None:
    fake("start.start")
    begun = client("PUT", "/1.0/instances/web/state", {"action": "start"})
    assert client("GET", f"{begun.body['operation']}/wait?timeout={timeout}").status == 400


def test_too_large_a_body(client: Client, fake: Callable[..., Spy]) -> None:
    configure = fake("configure.configure", [])
    fits = {"config": {"user.x": "x" * (BODY_MAX - 100)}}
    assert client("PATCH", "/1.0/instances/web", fits).metadata == {"restart_needed": []}
    told = client("PATCH", "/1.0/instances/web", {"config": {"user.x": "x" * BODY_MAX}})
    assert told.status == 413
    assert told.body["type"] == "error"
    assert len(configure.calls) == 1


def test_a_body_that_is_held_back(client: Client, fake: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.1)
    configure = fake("configure.configure", [])
    with client.connect() as sock:
        sock.sendall(b"PATCH /1.0/instances/web HTTP/1.1\r\nHost: jailmgr\r\nContent-Length: 2\r\n\r\n{")
        assert sock.recv(65536).startswith(b"HTTP/1.1 408 ")
    assert configure.calls == []


def test_what_an_operation_keeps_is_bounded(client: Client, fake: Callable[..., Spy]) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise JailmgrError("jail web", "no\nmore " * 100_000, "", "conflict")

    assert client("POST", "/1.0/instances/web", {"name": "x" * 100_000}).status == 400
    assert client("GET", "/1.0/operations").metadata == {}
    fake("start.start", does=fails)
    end = client.ended(client("PUT", "/1.0/instances/web/state", {"action": "start"}))
    assert end["error"]["why"].startswith("no\\nmore no\\nmore")
    assert len(end["error"]["why"]) < 4000


def test_users_leave_root_room_for_operations(
    running: Running, client: Client, fake: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "RUNNING_OF_USERS", 1)
    go_on = threading.Event()

    def work(*_: Any) -> None:
        go_on.wait(20)

    def begin(uid: int) -> None:
        async def ask() -> None:
            running.operations.begin("waiting", work, uid=uid)

        asyncio.run_coroutine_threadsafe(ask(), running.loop).result(20)

    begin(1000)
    with pytest.raises(JailmgrError, match="under way"):
        begin(1001)
    begin(0)
    go_on.set()
    fake("start.start")
    client.ended(client("PUT", "/1.0/instances/web/state", {"action": "start"}))


def test_one_connection_too_many_is_told_as_the_api_tells_errors(
    running: Running, client: Client, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the connections that were there before it are served."""
    monkeypatch.setattr(protocol, "CONNECTIONS_MAX", 2)
    held = [client.connect() for _ in range(2)]
    try:
        for sock in held:
            sock.sendall(b"GET /1.0 HTTP/1.1\r\nHost: jailmgr\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        refused = client("GET", "/1.0")
        assert (refused.status, refused.headers["connection"]) == (503, "close")
        assert refused.metadata["why"] == "it has 2 connections already"
        assert refused.metadata["code"] == "unavailable"
        connection = Connection(root, client.connect())
        with pytest.raises(JailmgrError) as caught:
            connection.call("GET", "/1.0")
        assert (caught.value.code, caught.value.why) == ("unavailable", "it has 2 connections already")
        assert caught.value.hint
        connection.close()
    finally:
        for sock in held:
            sock.close()


def test_not_http(client: Client) -> None:
    with client.connect() as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        told = b""
        while part := sock.recv(65536):
            told += part
    assert told.startswith(b"HTTP/1.1 400 ")
    assert json.loads(told.partition(b"\r\n\r\n")[2])["metadata"]["code"] == "invalid"


def test_patch_tells_what_needs_a_restart(client: Client, fake: Callable[..., Spy]) -> None:
    spy = fake("configure.configure", ["limits.cpu"])
    body = {"config": {"limits.cpu": "2", "user.x": None}, "devices": {"port-80-tcp": None, "root": {"size": None}}}
    assert client("PATCH", "/1.0/instances/web?project=acme", body).metadata == {"restart_needed": ["limits.cpu"]}
    assert spy.calls == [(("acme", "web", body["config"], body["devices"]), {"root": True})]


def test_internal_errors_are_told_without_their_text(
    client: Client, fake: Callable[..., Spy], caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("secret")

    fake("images.list_images", does=fails)
    told = client("GET", "/1.0/images")
    assert (told.status, told.metadata["code"]) == (500, "failed")
    assert "secret" not in json.dumps(told.body)
    assert "KeyError: 'secret'" in caplog.text
    fake("start.start", does=fails)
    end = client.ended(client("PUT", "/1.0/instances/web/state", {"action": "start"}))
    assert "secret" not in json.dumps(end)
    assert end["error"]["code"] == "failed"


def test_cancel(client: Client, fake: Callable[..., Spy]) -> None:
    def build(_source: str, _progress: object, cancelled: Callable[[], bool], _refresh: bool) -> None:
        deadline = time.monotonic() + 20
        while not cancelled():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        raise CancelledError("building debian")

    fake("images.ensure_image", does=build)
    begun = client("POST", "/1.0/images", {"source": {"type": "template", "alias": "debian"}})
    waited = time.monotonic()
    assert client("GET", f"{begun.body['operation']}/wait?timeout=0.2").metadata["status_code"] == 103
    assert 0.15 < time.monotonic() - waited < 5
    assert client("DELETE", begun.body["operation"]).status == 200
    end = client.ended(begun)
    assert (end["status"], end["status_code"], end["may_cancel"]) == ("Cancelled", 401, False)
    told = client("DELETE", begun.body["operation"])
    assert (told.status, told.metadata["why"]) == (409, "it has ended already")


def test_what_cannot_be_cancelled_says_so(client: Client, fake: Callable[..., Spy]) -> None:
    go_on = threading.Event()
    fake("start.start", does=lambda *_, **__: go_on.wait(20))
    begun = client("PUT", "/1.0/instances/web/state", {"action": "start"})
    assert client("DELETE", begun.body["operation"]).status == 409
    go_on.set()
    assert client.ended(begun)["status"] == "Success"


def test_ended_operations_are_forgotten(
    client: Client, fake: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "KEPT_MAX", 3)
    fake("start.start")
    begun = [client("PUT", "/1.0/instances/web/state", {"action": "start"}) for _ in range(5)]
    client.ended(begun[-1])
    listed = client("GET", "/1.0/operations?recursion=1").metadata["success"]
    assert [one["id"] for one in listed] == [answer.metadata["id"] for answer in begun[2:]]
    monkeypatch.setattr(background, "KEPT_SECONDS", 0)
    last = client("PUT", "/1.0/instances/web/state", {"action": "start"})
    deadline = time.monotonic() + 20
    while client("GET", last.body["operation"]).status != 404:
        assert time.monotonic() < deadline


def test_too_many_operations(client: Client, fake: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RUNNING_MAX", 1)
    go_on = threading.Event()
    fake("start.start", does=lambda *_, **__: go_on.wait(20))
    begun = client("PUT", "/1.0/instances/web/state", {"action": "start"})
    assert client("PUT", "/1.0/instances/web/state", {"action": "start"}).status == 503
    go_on.set()
    client.ended(begun)


def test_closing_waits_and_begins_nothing_more(running: Running, client: Client, fake: Callable[..., Spy]) -> None:
    go_on = threading.Event()
    fake("start.start", does=lambda *_, **__: go_on.wait(20))
    begun = client("PUT", "/1.0/instances/web/state", {"action": "start"})
    late = asyncio.run_coroutine_threadsafe(running.operations.close(0.1), running.loop)
    assert late.result(20) is False
    assert client("PUT", "/1.0/instances/web/state", {"action": "start"}).status == 503
    in_time = asyncio.run_coroutine_threadsafe(running.operations.close(20), running.loop)
    go_on.set()
    assert in_time.result(20) is True
    assert client.ended(begun)["status"] == "Success"


def test_ports(client: Client, fake: Callable[..., Spy]) -> None:
    publish, unpublish = fake("publishing.publish", {}), fake("publishing.unpublish")
    port = {"tenant": "acme", "jail": "web", "host_port": 8080, "port": 80}
    assert client("POST", "/1.0/ports", port).status == 200
    assert publish.calls == [(("acme", "web", "", 8080, 80, "tcp"), {})]
    assert client("POST", "/1.0/ports", port | {"port": 65536}).status == 400
    assert client("POST", "/1.0/ports", port | {"protocol": "sctp"}).status == 400
    assert client("DELETE", "/1.0/ports?project=acme", {"jail": "web", "host_port": 8080}).status == 200
    assert unpublish.calls == [(("acme", "web", 8080, None, None), {})]


def test_projects(client: Client, fake: Callable[..., Spy]) -> None:
    create, delete = fake("tenants.create_tenant"), fake("tenants.delete_tenant")
    fake("access.is_shared", False)
    change, get = fake("tenants.set_tenant"), fake("tenant_view.get_tenant", {"name": "acme"})
    assert client("POST", "/1.0/projects", {"name": "acme"}).metadata == {"name": "acme"}
    config = {"limits.memory": "1GiB", "limits.cpu": None}
    assert client("PATCH", "/1.0/projects/acme", {"config": config}).metadata == {"name": "acme"}
    assert client("DELETE", "/1.0/projects/acme").status == 200
    assert (create.calls, delete.calls) == ([(("acme", {}), {})], [(("acme",), {})])
    assert (change.calls, get.calls) == ([(("acme", config), {})], [(("acme",), {})] * 2)


def test_image_references_may_have_slashes(client: Client, fake: Callable[..., Spy]) -> None:
    get, delete = fake("images.get_image", {}), fake("images.delete_image")
    client("GET", "/1.0/images/debian/trixie")
    client("DELETE", "/1.0/images/debian%2Ftrixie")
    assert (get.calls, delete.calls) == ([(("debian/trixie", None), {})], [(("debian/trixie",), {})])


def test_requests_are_answered_side_by_side(client: Client, fake: Callable[..., Spy]) -> None:
    go_on = threading.Event()
    fake("configure.configure", does=lambda *_, **__: [str(go_on.wait(20))])
    fake("images.list_templates", [])
    with ThreadPoolExecutor(1) as other:
        blocked = other.submit(client, "PATCH", "/1.0/instances/web", {})
        assert client("GET", "/1.0/templates").status == 200
        assert not blocked.done()
        go_on.set()
        assert blocked.result(20).metadata == {"restart_needed": ["True"]}
