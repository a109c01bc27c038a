"""Sessions of segment functions over HTTP: state that stays between frames, and ends when the router says so."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.artifacts.sampling import Sampling
from isthmus.context import Deadline
from isthmus.errors import HopBusy, HopTimeout, ShapeMismatch, StateMissing, ValueRefused
from isthmus.pipeline import Hop, LocalHop, LoopbackHop, SessionHop
from isthmus.routing.estimates import Estimates
from isthmus.routing.replicas import watch
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.serving import create_segment_app
from isthmus.serving.metrics import KINDS
from isthmus.wire.frame import Frame, Step, encode
from support.bundles import metrics, ready
from support.hop_servers import context
from support.patience import LONG_S, eventually
from support.ports import free_port
from support.published_decoders import PublishedDecoder, http_hop
from support.published_decoders import tiny_decoder as tiny_decoder
from support.routers import served_functions

HEAD = "..layer_1"


@pytest.fixture(scope="module")
def functions(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The URLs of two replicas."""
    with served_functions(*(tiny_decoder.settings(tmp_path_factory.mktemp(name)) for name in ("one", "two"))) as urls:
        yield urls


def step(hop: Hop, decoder: PublishedDecoder, position: int, session: str = "s") -> None:
    frame = Frame(
        {"input_ids": np.array([[1, 2]])}, decoder.model.digest, HEAD, "r", step=Step(session, position, reserve=8)
    )
    hop.call(frame, context())


def test_a_session_that_ends_is_missing_at_the_next_step(
    functions: list[str], tiny_decoder: PublishedDecoder, tmp_path: Path
) -> None:
    store = tiny_decoder.store(tmp_path)
    remote = http_hop(functions[0], 1)
    (watched,) = watch([[http_hop(functions[0], 1)]], Estimates())
    hops: list[Hop] = [LocalHop(store), LoopbackHop(LocalHop(store)), remote, watched]
    for hop, name in zip(hops, ("local", "local", functions[0], functions[0]), strict=True):
        step(hop, tiny_decoder, 0)
        step(hop, tiny_decoder, 2)
        assert isinstance(hop, SessionHop)
        hop.end_session("s", Deadline.after(LONG_S))
        hop.end_session("s", Deadline.after(LONG_S))  # it is no error to end it again
        with pytest.raises(StateMissing) as caught:
            step(hop, tiny_decoder, 4)
        told = {key: caught.value.facts[key] for key in ("hop", "segment", "session", "position")}
        assert told == {"hop": name, "segment": HEAD, "session": "s", "position": 0}
    for each in hops:
        each.close()
    store.store.close()


def test_a_session_ends_at_every_replica(functions: list[str], tiny_decoder: PublishedDecoder) -> None:
    singles = [http_hop(url, 1) for url in functions]
    # The third is away, and is no reason not to ask the others.
    (tier,) = watch([[http_hop(url, 1) for url in (*functions, f"http://127.0.0.1:{free_port()}/")]], Estimates())
    for hop in singles:
        step(hop, tiny_decoder, 0, "everywhere")
    tier.end_session("everywhere", Deadline.after(LONG_S))
    for hop in singles:
        with pytest.raises(StateMissing):
            step(hop, tiny_decoder, 2, "everywhere")
    for each in (*singles, tier):
        each.close()
    tier.end_session("everywhere", Deadline.after(LONG_S))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff", b'{"session": ""}', b'{"session": 1}', json.dumps({"session": "x" * 129}).encode()]
)
def test_a_malformed_end_is_refused(body: bytes, tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    client = ready(create_segment_app(tiny_decoder.settings(tmp_path)).test_client())
    answer = client.post("/sessions/end", data=body)
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed")


def frame_of(decoder: PublishedDecoder, ids: Any, given: Step, segment: str = "..") -> Frame:
    return Frame({"input_ids": np.array(ids, np.int64)}, decoder.model.digest, segment, "r", step=given)


@pytest.mark.parametrize(
    ("ids", "given", "error", "status"),
    [
        ([[-1]], Step("h", 0), ValueRefused, 400),
        ([[2**60]], Step("h", 0), ValueRefused, 400),
        ([[1]], Step("h", 2**31 - 1), ShapeMismatch, 400),
        ([[1, 2]], Step("h", 0, Sampling(presence_penalty=1, tokens=(1, 2, 3))), ValueRefused, 400),
        ([[1], [1]], Step("h", 0), ShapeMismatch, 400),
        ([[1]], Step("\x00\n☃" * 40, 5), StateMissing, 409),
    ],
)
def test_a_hostile_frame_is_the_callers_error(
    ids: Any, given: Step, error: Any, status: int, functions: list[str], tiny_decoder: PublishedDecoder
) -> None:
    hop = http_hop(functions[0], 1)
    with pytest.raises(error) as caught:
        hop.call(frame_of(tiny_decoder, ids, given), context())
    assert caught.value.facts["status"] == status
    reply = hop.call(frame_of(tiny_decoder, [[1]], Step("well", 0, Sampling(), reserve=2**31 - 1)), context())
    assert reply.frame.tensors["tokens"].shape == (1, 1)
    hop.end_session("well", Deadline.after(LONG_S))
    hop.close()


def test_hidden_states_that_are_no_numbers_are_the_callers_error(
    functions: list[str], tiny_decoder: PublishedDecoder
) -> None:
    hop = http_hop(functions[0], 1)
    hidden = np.full((1, 2, 64), np.nan, np.float32)
    frame = Frame({"layer_1": hidden}, tiny_decoder.model.digest, "layer_1..", "r", step=Step("n", 0, Sampling()))
    with pytest.raises(ValueRefused, match="layer_1 holds values that are no finite numbers") as caught:
        hop.call(frame, context())
    assert caught.value.facts["status"] == 400
    assert hop.call(frame._replace(tensors={"layer_1": np.ones_like(hidden)}), context())
    hop.close()


def test_the_scores_of_a_step_are_within_the_memory_of_requests(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    settings = tiny_decoder.settings(tmp_path, max_request_bytes=2**16, max_working_bytes=2**17)
    client = ready(create_segment_app(settings).test_client())
    # 64 tokens with 300 scores of four bytes each, and the frame with a copy of them: 150 kB.
    all_scores, one_token = (
        client.post("/", data=encode(frame_of(tiny_decoder, np.ones((1, 64)), Step("w", 0, sampling))))
        for sampling in (None, Sampling())
    )
    assert (all_scores.status_code, all_scores.json["type"]) == (413, "RequestTooLarge")
    assert one_token.status_code == 200


@pytest.mark.parametrize(
    "field", [b'"temperature":NaN', b'"temperature":-1', b'"top_p":0', b'"last":4097', b'"seed":9223372036854775808']
)
def test_sampling_beyond_its_bounds_is_a_malformed_frame(
    field: bytes, functions: list[str], tiny_decoder: PublishedDecoder
) -> None:
    frame = encode(frame_of(tiny_decoder, [[1]], Step("m", 0, Sampling(temperature=0.5))))
    assert frame.count(b'"temperature":0.5') == 1
    # The header's text is followed by spaces up to a multiple of 64 bytes, then by the id's eight bytes.
    text, body = frame[16:-8].rstrip().replace(b'"temperature":0.5', field), frame[-8:]
    size = len(text) + -(16 + len(text)) % 64
    changed = frame[:8] + size.to_bytes(8, "little") + text.ljust(size) + body
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(functions[0], data=changed), timeout=LONG_S)
    with caught.value as answer:
        assert (answer.code, json.loads(answer.read())["type"]) == (400, "FrameMalformed")


def test_a_step_whose_caller_went_can_be_made_again(
    functions: list[str], tiny_decoder: PublishedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hop = http_hop(functions[0], 1)
    hop.call(frame_of(tiny_decoder, [[1, 2, 3]], Step("gone", 0)), context())
    step = frame_of(tiny_decoder, [[4]], Step("gone", 3))
    gate, started, run = threading.Event(), threading.Event(), OrtRunner.run_step

    def slow(*given: Any) -> Any:
        started.set()
        assert gate.wait(LONG_S)
        return run(*given)

    with monkeypatch.context() as patch:
        patch.setattr(OrtRunner, "run_step", slow)
        with pytest.raises(HopTimeout):
            hop.call(step, context(0.3))
        assert started.wait(LONG_S)
        with pytest.raises(HopBusy) as caught:
            hop.call(step, context())
        assert caught.value.facts["retry_after_s"] == 1
        gate.set()
    again: list[Any] = []

    def repeated() -> bool:
        with contextlib.suppress(HopBusy):
            again.append(hop.call(step, context()).frame.tensors["logits"])
        return bool(again)

    eventually(repeated)
    np.testing.assert_array_equal(again[0], hop.call(step, context()).frame.tensors["logits"])
    hop.end_session("gone", Deadline.after(LONG_S))
    hop.close()


def test_a_function_counts_its_sessions(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    client = ready(create_segment_app(tiny_decoder.settings(tmp_path, max_sessions=1)).test_client())

    def post(given: Step, ids: Any) -> int:
        return client.post("/", data=encode(frame_of(tiny_decoder, ids, given))).status_code

    steps = [post(Step("a", 0, reserve=20), [[1, 2]]), post(Step("a", 2), [[3]]), post(Step("a", 3), [[4, 5]])]
    assert steps == [200, 200, 200]
    refused = client.post("/", data=encode(frame_of(tiny_decoder, [[1]], Step("b", 0))))
    assert (refused.status_code, refused.json["type"]) == (429, "Overloaded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    found = metrics(client)
    assert {kind: found["isthmus_session_steps_total", (("kind", kind),)] for kind in KINDS} == {
        "prefill": 1,
        "decode": 1,
        "verify": 1,
    }
    assert found["isthmus_session_runs_total", (("steps", "1"),)] == 3
    assert found["isthmus_session_steps_refused_total", ()] == 1
    assert found["isthmus_sessions", ()] == 1
    assert found["isthmus_session_reserved_bytes", ()] >= found["isthmus_session_resident_bytes", ()] > 0
    client.post("/sessions/end", json={"session": "a"})
    found = metrics(client)
    assert found["isthmus_sessions_dropped_total", (("reason", "ended"),)] == 1
    assert found["isthmus_session_reserved_bytes", ()] == found["isthmus_session_resident_bytes", ()] == 0
    assert post(Step("b", 0), [[1]]) == 200
