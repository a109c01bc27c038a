"""Sessions of segment functions over HTTP: state that stays between frames, and ends when the router says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isthmus.context import Context, Deadline
from isthmus.errors import StateMissing
from isthmus.pipeline import Hop, HttpHop, LocalHop, LoopbackHop, SessionHop
from isthmus.routing.estimates import Estimates
from isthmus.routing.replicas import watch
from isthmus.serving import create_segment_app
from isthmus.wire.frame import Frame, Step
from support.bundles import ready, served
from support.patience import LONG_S
from support.ports import free_port
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder

HEAD = "..layer_1"


@pytest.fixture(scope="module")
def functions(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The URLs of two replicas."""
    caches = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    apps = [create_segment_app(tiny_decoder.settings(cache)) for cache in caches]
    with served(apps[0]) as one, served(apps[1]) as two:
        yield [one, two]
    for app in apps:
        app.extensions["isthmus"].close()


def http_hop(url: str) -> HttpHop:
    return HttpHop(url, attempts=1, connect_timeout_s=2, max_reply_bytes=2**24)


def step(hop: Hop, decoder: PublishedDecoder, position: int, session: str = "s") -> None:
    frame = Frame(
        {"input_ids": np.array([[1, 2]])}, decoder.model.digest, HEAD, "r", step=Step(session, position, reserve=8)
    )
    hop.call(frame, Context.from_headers({}, longest_s=LONG_S))


def test_a_session_that_ends_is_missing_at_the_next_step(
    functions: list[str], tiny_decoder: PublishedDecoder, tmp_path: Path
) -> None:
    store = tiny_decoder.store(tmp_path)
    remote = http_hop(functions[0])
    (watched,) = watch([[http_hop(functions[0])]], Estimates())
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
    singles = [http_hop(url) for url in functions]
    # The third is away, and is no reason not to ask the others.
    (tier,) = watch([[http_hop(url) for url in (*functions, f"http://127.0.0.1:{free_port()}/")]], Estimates())
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
