"""Calls that are answered later: what a callback gets, where it may lead, and that no call ends a worker."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import urllib3
from multidict import CIMultiDict
from yarl import URL

from isthmus.errors import LocalError, RequestMalformed
from isthmus.http import sockets
from isthmus_tools.engine import Engine, Event, async_queue
from isthmus_tools.engine.callbacks import CallbackPolicy, PermittedResolver, networks_of
from support.local_stack import http, write_stack
from support.patience import LONG_S, eventually

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


def test_an_async_body_over_the_queues_limit_is_refused(engine: Engine) -> None:
    assert http("POST", f"{engine.url}/async-function/echo", body=b"x" * 256_001).status == 413


# No call ends a worker


def test_a_call_that_fails_unforeseen_is_told_and_the_queue_goes_on(
    engine: Engine, callbacks: Callbacks, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    post = async_queue._post

    async def broken(session: Any, url: URL, headers: CIMultiDict[str], *rest: Any, **options: Any) -> Any:
        if "X-Break" in headers:
            raise UnicodeError("label empty or too long")
        return await post(session, url, headers, *rest, **options)

    monkeypatch.setattr(async_queue, "_post", broken)
    before = len(failures(events))
    for _ in range(2 * async_queue.WORKERS):
        assert call(engine, callbacks.url, **{"X-Break": "1"}).status == 202
    assert call(engine, callbacks.url).status == 202
    eventually(lambda: bool(callbacks.got))
    eventually(lambda: len(failures(events)) == before + 2 * async_queue.WORKERS)
    assert failures(events)[-1].endswith("UnicodeError: label empty or too long")


def test_a_callback_that_takes_too_long_is_not_tried_again(
    engine: Engine, callbacks: Callbacks, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    callbacks.answer = lambda _: bool(release.wait(LONG_S)) and None
    monkeypatch.setattr(async_queue, "CALLBACK_TIMEOUT_S", 0.2)
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
