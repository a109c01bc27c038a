"""Streams of the OpenAI API: errors in their middle, pauses, clients that go away or do not read."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from flask.testing import FlaskClient

from isthmus.errors import HopUnavailable
from isthmus.processing.sampling import SampledToken
from isthmus.serving import generations
from isthmus.serving.openai import responses
from support.bundles import metrics
from support.language_router import HANDLER, decoder_router, language_router, openai_client
from support.patience import LONG_S, eventually
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder

TEXT = "/v1/completions"
Script = Callable[[Any], Iterator[int]]


@pytest.fixture(scope="module")
def router(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    return decoder_router(tiny_decoder, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], None]:
    """Replaces the generator by a script of token ids."""

    def play(script: Script) -> None:
        class Scripted:
            def __init__(self, *_: Any, **__: Any) -> None:
                pass

            def run(self, request: Any, context: Any, done: Any) -> Iterator[SampledToken]:
                for token in script(context):
                    done.tokens.append(token)
                    yield SampledToken(token, -1.0)
                done.finish = "stop"

        monkeypatch.setattr(generations, "Generator", Scripted)

    return play


def streamed(router: FlaskClient) -> bytes:
    """The whole stream; closed as a server closes it, which Flask's client leaves to its caller."""
    with router.post(TEXT, json={"prompt": "a", "stream": True}) as response:
        assert response.status_code == 200
        return response.data


def events(body: bytes) -> list[Any]:
    """The data of a stream's events, `[DONE]` as it is; comments are left out."""
    data = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line.startswith(b"data: ")]
    return [each.decode() if each == b"[DONE]" else json.loads(each) for each in data]


def test_an_error_in_the_middle_is_the_last_event(router: FlaskClient, scripted: Callable[[Script], None]) -> None:
    def failing(_: Any) -> Iterator[int]:
        yield from (40, 41)
        raise HopUnavailable("http://tail gives no response", hop="http://tail")

    scripted(failing)
    *chunks, last = events(streamed(router))
    assert len(chunks) == 2
    assert last == {
        "error": {
            "message": HopUnavailable.public_message,
            "type": "server_error",
            "param": None,
            "code": "hop_unavailable",
            "facts": {},
        }
    }


def test_a_defect_in_the_middle_is_an_event_and_a_log_line(
    router: FlaskClient, scripted: Callable[[Script], None], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Any) -> Iterator[int]:
        yield 40
        raise ZeroDivisionError

    scripted(broken)
    last = events(streamed(router))[-1]
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "internal_error")
    assert "unexpected: ZeroDivisionError" in caplog.text


def test_openais_client_raises_an_error_in_the_middle(router: FlaskClient, scripted: Callable[[Script], None]) -> None:
    def failing(_: Any) -> Iterator[int]:
        yield 40
        raise HopUnavailable("gone", hop="tail")

    scripted(failing)
    http_client = httpx2.Client(transport=httpx2.WSGITransport(app=router.application))
    with openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http_client) as client:
        stream = client.completions.create(model="tiny", prompt="a", stream=True)
        assert next(stream).choices[0].text
        with pytest.raises(openai.APIError, match="cannot be reached"):
            next(stream)


def test_an_error_before_the_first_token_has_its_status(
    router: FlaskClient, scripted: Callable[[Script], None]
) -> None:
    def failing(_: Any) -> Iterator[int]:
        raise HopUnavailable("gone", hop="tail")
        yield

    scripted(failing)
    response = router.post(TEXT, json={"prompt": "a", "stream": True})
    assert (response.status_code, response.json["error"]["code"]) == (503, "hop_unavailable")
    assert "Retry-After" in response.headers


def test_a_pause_has_comments_that_keep_proxies_awake(
    router: FlaskClient, scripted: Callable[[Script], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "KEEP_ALIVE_S", 0.02)

    def slow(_: Any) -> Iterator[int]:
        time.sleep(0.1)  # before the first token, as a long prompt takes
        yield 40
        time.sleep(0.1)
        yield 41

    scripted(slow)
    body = streamed(router)
    first, second = body.split(b"data: ")[1:3]
    assert body.startswith(b": waiting\n\n")
    assert b": waiting\n\n" in first
    assert len(events(body)) == 4
    assert second


def test_a_stream_holds_its_slot_to_its_end(router: FlaskClient, scripted: Callable[[Script], None]) -> None:
    def in_flight() -> float:
        return metrics(router)["isthmus_requests_in_flight", ()]

    scripted(lambda _: iter((40, 41, 42)))
    response = router.post(TEXT, json={"prompt": "a", "stream": True}, buffered=False)
    parts = iter(response.response)
    next(parts)
    assert in_flight() == 1
    response.close()
    assert in_flight() == 0
    count = ("isthmus_requests_total", (("code", "200"), ("endpoint", "completions")))
    assert metrics(router)[count] >= 1


def test_a_call_that_its_leaving_reader_ended_is_no_failure(
    router: FlaskClient, scripted: Callable[[Script], None]
) -> None:
    def outcomes() -> tuple[float, float]:
        numbers = metrics(router)
        left, failed = (numbers["isthmus_generations_total", (("outcome", name),)] for name in ("left", "failed"))
        return left, failed

    def called(context: Any) -> Iterator[int]:
        yield 40
        eventually(lambda: context.abandonment.is_abandoned)
        raise HopUnavailable("the call was abandoned", hop="tail")

    scripted(called)
    left, failed = outcomes()
    response = router.post(TEXT, json={"prompt": "a", "stream": True}, buffered=False)
    next(iter(response.response))
    response.close()
    assert outcomes() == (left + 1, failed)


def test_a_reader_that_leaves_ends_the_generation_and_its_call(
    router: FlaskClient, scripted: Callable[[Script], None]
) -> None:
    ended: list[str] = []

    def endless(context: Any) -> Iterator[int]:
        try:
            while True:
                yield 40
                time.sleep(0.001)
        finally:
            ended.append(f"abandoned: {context.abandonment.is_abandoned}")

    scripted(endless)
    response = router.post(TEXT, json={"prompt": "a", "stream": True}, buffered=False)
    next(iter(response.response))
    response.close()
    assert ended == ["abandoned: True"]


SLOW_HANDLER = (
    HANDLER
    + '''
import time
from pathlib import Path

from isthmus.processing.sampling import SampledToken
from isthmus.serving import generations


class Slow:
    """Tokens without end; a file says that the generation was closed."""

    def __init__(self, *_, **__):
        pass

    def run(self, request, context, done):
        try:
            while True:
                done.tokens.append(40)
                yield SampledToken(40, -1.0)
                time.sleep(float(os.environ["pause_s"]))
        finally:
            Path(os.environ["ended_file"]).touch()


generations.Generator = Slow
'''
)


def test_a_client_that_hangs_up_ends_the_generation(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    settings = {"pause_s": "0.01", "ended_file": str(ended)}
    with (
        language_router(tiny_decoder, tmp_path, handler=SLOW_HANDLER, **settings) as url,
        openai_client(url) as client,
    ):
        with client.completions.create(model="tiny", prompt="a", stream=True) as stream:
            for _ in range(3):
                next(stream)
            assert not ended.exists()
        eventually(ended.exists)


def test_a_client_that_reads_byte_by_byte_is_cut_off(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    settings = {"pause_s": "0", "ended_file": str(ended), "deadline_s": "1"}
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with language_router(tiny_decoder, tmp_path, handler=SLOW_HANDLER, **settings) as url, socket.socket() as s:
        # Little fits into the kernel's buffers, so that the server soon waits for its reader.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        s.sendall(head + body)
        s.settimeout(LONG_S)

        def one_byte_later() -> bool:
            with contextlib.suppress(ConnectionError):
                assert s.recv(1) or ended.exists()
            return ended.exists()

        eventually(one_byte_later)
        with openai_client(url) as client:
            assert client.models.list().data
