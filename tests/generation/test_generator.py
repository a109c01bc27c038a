"""Generation along a route: the tokens of the uncut model in transformers, however the route and its state change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from isthmus.artifacts.sampling import Sampling
from isthmus.context import Context
from isthmus.errors import (
    DeadlineExceeded,
    HopUnavailable,
    ModelError,
    Overloaded,
    ShapeMismatch,
    StateMissing,
)
from isthmus.generation import AdaptiveProposer, Generated, GenerationRequest, Generator, PromptLookup
from isthmus.generation.policy import GenerationPolicy
from isthmus.pipeline import LocalHop, Route, plan_route
from isthmus.pipeline.hop import HopReply
from isthmus.runtime.session_store import SessionStore
from isthmus.wire.frame import Frame, Step
from support.decoders import VOCABULARY
from support.patience import eventually
from support.published_decoders import AMPLE, Instead, PublishedDecoder, chained, http_hop
from support.routers import served_functions

CUTS = [(), ("layer_1",), ("layer_1", "layer_2")]
SEEDED = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3, seed=11)


def prompt(seed: int = 0, length: int = 12) -> list[int]:
    return list(map(int, np.random.default_rng(seed).integers(1, VOCABULARY, length)))


def generated(
    route: Route, request: GenerationRequest, done: Generated | None = None, *, speculate: bool = False
) -> list[int]:
    context = Context.from_headers({}, longest_s=60)
    proposer = AdaptiveProposer([PromptLookup()]) if speculate else None
    generator = Generator(route, None, proposer, GenerationPolicy(recoveries=AMPLE))
    return [drawn.token for drawn in generator.run(request, context, done or Generated())]


@pytest.fixture(scope="module")
def transformers_model(tiny_decoder: PublishedDecoder) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_decoder.folder).eval()


@pytest.mark.parametrize("cuts", CUTS, ids=len)
@pytest.mark.parametrize("speculate", [False, True])
def test_greedy_tokens_are_those_of_transformers(
    cuts: Sequence[str], speculate: bool, tiny_decoder: PublishedDecoder, store: SessionStore, transformers_model: Any
) -> None:
    for seed in range(3):
        ids = prompt(seed)
        with torch.no_grad():
            whole = transformers_model.generate(
                torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None
            )
        request = GenerationRequest(prompt=ids, max_tokens=40)
        tokens = generated(tiny_decoder.route(cuts, *chained(store)), request, speculate=speculate)
        assert tokens == whole[0, len(ids) :].tolist()


@pytest.mark.parametrize("sampling", [Sampling(temperature=1, seed=5), SEEDED])
def test_seeded_tokens_are_the_same_at_every_cut_and_with_speculation(
    sampling: Sampling, tiny_decoder: PublishedDecoder, store: SessionStore
) -> None:
    # A prompt that repeats itself, so that proposals are accepted and refused.
    ids = prompt(1, 6) * 3
    found = {
        tuple(
            generated(
                tiny_decoder.route(cuts, *chained(store)),
                GenerationRequest(prompt=ids, max_tokens=40, sampling=sampling),
                speculate=speculate,
            )
        )
        for cuts in CUTS
        for speculate in (False, True)
    }
    assert len(found) == 1


def test_proposals_save_crossings(tiny_decoder: PublishedDecoder, store: SessionStore) -> None:
    done = Generated()
    tokens = generated(
        tiny_decoder.route(CUTS[1], *chained(store)),
        GenerationRequest(prompt=prompt(), max_tokens=90),
        done,
        speculate=True,
    )
    # Random weights fall into a loop soon, which the lookup finds.
    assert len(tokens) == 90
    assert done.accepted > 20
    assert done.steps == 90 - done.accepted


def test_a_long_prompt_is_run_in_chunks(
    tiny_decoder: PublishedDecoder, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest(prompt=prompt(2, 60), max_tokens=10, sampling=SEEDED)
    route = tiny_decoder.route(CUTS[1], *chained(store))
    expected = generated(route, request)
    monkeypatch.setattr("isthmus.generation.session.CHUNK", 7)
    assert generated(route, request) == expected


def test_a_stop_token_ends_the_generation(tiny_decoder: PublishedDecoder, store: SessionStore) -> None:
    route = tiny_decoder.route(CUTS[1], *chained(store))
    tokens = generated(route, GenerationRequest(prompt=prompt(), max_tokens=20))
    done = Generated()
    request = GenerationRequest(prompt=prompt(), max_tokens=20, stop=frozenset({tokens[3]}))
    assert generated(route, request, done) == tokens[: tokens.index(tokens[3]) + 1]
    assert done.finish == "stop"


class _Forgetful(LocalHop):
    """A tail that loses its sessions before some calls."""

    def __init__(self, store: SessionStore, every: int) -> None:
        super().__init__(store)
        self._store, self._every, self._calls = store, every, 0

    def call(self, frame: Frame, context: Context) -> HopReply:
        self._calls += 1
        if self._calls % self._every == 0 and frame.step is not None:
            self._store.sessions.end(frame.step.session)
        return super().call(frame, context)


@pytest.mark.parametrize("every", [2, 7])
@pytest.mark.parametrize("sampling", [Sampling(), SEEDED])
def test_a_tail_that_loses_its_state_is_rebuilt_with_the_same_tokens(
    every: int, sampling: Sampling, tiny_decoder: PublishedDecoder, tmp_path: Path
) -> None:
    head, tail = (tiny_decoder.store(tmp_path / name) for name in ("head", "tail"))
    request = GenerationRequest(prompt=prompt(3), max_tokens=30, sampling=sampling)
    whole = generated(tiny_decoder.route((), LocalHop(head)), request)
    done = Generated()
    assert generated(tiny_decoder.route(CUTS[1], LocalHop(head), _Forgetful(tail, every)), request, done) == whole
    assert done.recoveries >= 3
    head.store.close()
    tail.store.close()


def test_another_route_goes_on_where_a_hop_is_gone(tiny_decoder: PublishedDecoder, store: SessionStore) -> None:
    request = GenerationRequest(prompt=prompt(4), max_tokens=20, sampling=SEEDED)
    whole = tiny_decoder.route((), LocalHop(store))
    expected = generated(whole, request)

    class Gone(LocalHop):
        calls = 0

        def call(self, frame: Frame, context: Context) -> HopReply:
            self.calls += 1
            if self.calls > 8:
                raise HopUnavailable("gone", hop="tail")
            return super().call(frame, context)

    split = tiny_decoder.route(CUTS[1], LocalHop(store), Gone(store))
    found = Generator(split, Instead(whole)).run(request, Context.from_headers({}, longest_s=60), Generated())
    assert [drawn.token for drawn in found] == expected
    with pytest.raises(HopUnavailable):
        generated(tiny_decoder.route(CUTS[1], LocalHop(store), Gone(store)), request)


@pytest.fixture
def functions(tiny_decoder: PublishedDecoder, tmp_path: Path) -> Iterator[list[str]]:
    with served_functions(*(tiny_decoder.settings(tmp_path / name) for name in ("head", "tail"))) as urls:
        yield urls


def test_functions_keep_sessions_between_requests(
    functions: list[str], tiny_decoder: PublishedDecoder, store: SessionStore
) -> None:
    request = GenerationRequest(prompt=prompt(5), max_tokens=20, sampling=SEEDED)
    hops = [http_hop(url) for url in functions]
    done = Generated()
    found = generated(tiny_decoder.route(CUTS[1], *hops), request, done)
    assert found == generated(tiny_decoder.route((), LocalHop(store)), request)
    # A token's hidden state and its frames, and no scores of the vocabulary.
    assert done.link_bytes / done.steps < 4000
    frame = Frame({"input_ids": np.array([[1]])}, tiny_decoder.model.digest, "..layer_1", "r", step=Step("other", 3))
    with pytest.raises(StateMissing) as caught:
        hops[0].call(frame, Context.from_headers({}, longest_s=10))
    assert caught.value.facts["position"] == 0
    for hop in hops:
        hop.close()


def test_bounds_of_sessions(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    store = tiny_decoder.store(tmp_path, max_sessions=2, max_session_tokens=64, session_idle_s=3600)
    route = tiny_decoder.route((), LocalHop(store))
    with pytest.raises(ShapeMismatch, match="at most 64"):
        generated(route, GenerationRequest(prompt=prompt(0, 65), max_tokens=1))
    context = Context.from_headers({}, longest_s=60)
    running = [
        Generator(route).run(GenerationRequest(prompt=prompt(), max_tokens=2), context, Generated()) for _ in range(2)
    ]
    for tokens in running:
        next(tokens)
    with pytest.raises(Overloaded, match="2 sessions are kept"):
        generated(route, GenerationRequest(prompt=prompt(), max_tokens=2))
    running[0].close()
    eventually(lambda: _is_admitted(route))
    running[1].close()
    store.store.close()


def _is_admitted(route: Route) -> bool:
    try:
        return len(generated(route, GenerationRequest(prompt=prompt(), max_tokens=2))) == 2
    except Overloaded:
        return False


def test_the_deadline_ends_a_generation(tiny_decoder: PublishedDecoder, store: SessionStore) -> None:
    route = tiny_decoder.route((), LocalHop(store))
    generated(route, GenerationRequest(prompt=prompt(), max_tokens=1))  # the segment is loaded
    context = Context.from_headers({}, longest_s=0.005)
    with pytest.raises(DeadlineExceeded):
        list(Generator(route).run(GenerationRequest(prompt=prompt(), max_tokens=100), context, Generated()))


def test_a_model_without_state_generates_nothing(photos: Any) -> None:
    with pytest.raises(ModelError, match="no language model"):
        Generator(plan_route(photos.digest, photos.bundle, (http_hop("http://127.0.0.1:9/"),)))
