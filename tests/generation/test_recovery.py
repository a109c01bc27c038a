"""Recovery: a function without a session's state is brought up by replay, alone, and the tokens are the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.admission import MemoryBudget
from isthmus.arrays import Array
from isthmus.artifacts.sampling import Sampling
from isthmus.codecs import Encoding
from isthmus.context import Context
from isthmus.errors import DeadlineExceeded, HopUnavailable, StateMissing
from isthmus.generation import Generated, GenerationRequest, Generator
from isthmus.generation.policy import GenerationPolicy
from isthmus.pipeline import Hop, LocalHop, LoopbackHop, Route
from isthmus.pipeline.hop import HopReply
from isthmus.processing.sampling import SampledToken
from isthmus.retries import RetryBudget
from isthmus.runtime.session_store import SessionStore
from isthmus.wire.frame import Frame
from support.decoders import VOCABULARY
from support.patience import eventually
from support.published_decoders import AMPLE, Instead, PublishedDecoder

SEEDED = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3, seed=11, logprobs=3)
PROMPT = tuple(map(int, np.random.default_rng(3).integers(1, VOCABULARY, 12)))
REQUEST = GenerationRequest(prompt=PROMPT, max_tokens=24, sampling=SEEDED)

Fault = Callable[[int, Frame], None]


class Tier(LocalHop):
    """A hop that notes the steps of its calls; `fault` sees the number of each and may raise."""

    def __init__(self, name: str, store: SessionStore, fault: Fault = lambda number, frame: None) -> None:
        super().__init__(store)
        self.name, self.store, self.fault = name, store, fault
        self.steps: list[tuple[int, int]] = []
        self.inputs: list[tuple[int, Mapping[str, Array]]] = []
        self.calls = 0

    def call(self, frame: Frame, context: Context) -> HopReply:
        self.calls += 1
        self.fault(self.calls, frame)
        reply = super().call(frame, context)
        assert frame.step is not None
        count = next(iter(frame.tensors.values())).shape[1]
        self.steps.append((frame.step.position, count))
        self.inputs.append((frame.step.position, frame.tensors))
        return reply

    def forget(self, frame: Frame) -> None:
        assert frame.step is not None
        self.store.sessions.end(frame.step.session)

    def runs_of(self, position: int) -> int:
        """How often a position was run."""
        return sum(start <= position < start + count for start, count in self.steps)


def generate(route: Route, *, done: Generated | None = None, **given: Any) -> list[SampledToken]:
    request = given.pop("request", REQUEST)
    policy = given.pop("policy", None) or GenerationPolicy(recoveries=AMPLE)
    context = Context.from_headers({}, longest_s=60)
    return list(Generator(route, policy=policy, **given).run(request, context, done or Generated()))


@pytest.fixture
def stores(tiny_decoder: PublishedDecoder, tmp_path: Path) -> Iterator[list[SessionStore]]:
    opened = [tiny_decoder.store(tmp_path / name) for name in ("head", "middle", "tail")]
    yield opened
    for store in opened:
        store.store.close()


@pytest.fixture
def expected(tiny_decoder: PublishedDecoder, store: SessionStore) -> list[SampledToken]:
    return generate(tiny_decoder.route((), LocalHop(store)))


def same(one: Sequence[SampledToken], other: Sequence[SampledToken]) -> bool:
    """Whether tokens and alternatives are equal, and log-probabilities up to the order of additions."""
    scores = np.array([[t.logprob, *(p for _, p in t.alternatives)] for t in (*one, *other)])
    ids = [[(t.token, *(i for i, _ in t.alternatives)) for t in tokens] for tokens in (one, other)]
    return ids[0] == ids[1] and np.allclose(*np.split(scores, 2), atol=1e-4)


def losing(tier: Tier, *numbers: int) -> Fault:
    """Lose the session before these calls."""
    return lambda number, frame: tier.forget(frame) if number in numbers else None


def test_a_tail_that_lost_its_state_alone_runs_the_positions_that_it_lacks(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore], expected: list[SampledToken]
) -> None:
    head, tail = Tier("head", stores[0]), Tier("tail", stores[2])
    tail.fault = losing(tail, 10)
    done = Generated()
    assert same(generate(tiny_decoder.route(("layer_1",), head, tail), done=done), expected)
    # Twelve positions of the prompt, one for each of the eight calls before the tenth, and its own.
    assert tail.steps[8:11] == [(19, 1), (0, 21), (21, 1)]
    assert {head.runs_of(position) for position in range(12 + 23)} == {1}
    assert (done.recoveries, done.replayed) == (1, 20)


def test_the_replay_has_no_more_positions_than_the_function_lacks(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore], expected: list[SampledToken]
) -> None:
    def shorten(number: int, frame: Frame) -> None:
        if number == 10:
            raise StateMissing("shorter", session="s", position=15, hop="tail")

    tail = Tier("tail", stores[2], shorten)
    route = tiny_decoder.route(("layer_1",), Tier("head", stores[0]), tail)
    assert same(generate(route), expected)
    assert tail.steps[8:11] == [(19, 1), (15, 6), (21, 1)]


@pytest.mark.parametrize("position", [-1, True, "3", None, 10**9])
def test_a_position_that_makes_no_sense_costs_a_replay_at_most(
    position: Any, tiny_decoder: PublishedDecoder, stores: list[SessionStore], expected: list[SampledToken]
) -> None:
    def lie(number: int, frame: Frame) -> None:
        if number == 10:
            raise StateMissing("?", position=position)

    route = tiny_decoder.route(("layer_1",), Tier("head", stores[0]), Tier("tail", stores[2], lie))
    assert same(generate(route), expected)


def test_every_segment_may_lose_its_state(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore], expected: list[SampledToken]
) -> None:
    tiers = [Tier(name, store) for name, store in zip(("head", "middle", "tail"), stores, strict=True)]
    for i, tier in enumerate(tiers):
        tier.fault = losing(tier, 1 + i, 5 + i, 9, 17 + 2 * i)
    assert same(generate(tiny_decoder.route(("layer_1", "layer_2"), *tiers)), expected)


class Foreseeing:
    """Proposes two tokens that are right, and a wrong token behind these."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        right = self._tokens[len(sequence) - len(PROMPT) :][:2]
        return [*right, VOCABULARY - 1][:count]

    def observe(self, proposed: int, accepted: int, seconds: float) -> None:
        assert accepted <= proposed


def test_proposals_and_losses_go_together(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore], store: SessionStore
) -> None:
    request = replace(REQUEST, max_tokens=40)
    whole = generate(tiny_decoder.route((), LocalHop(store)), request=request)
    head, tail = Tier("head", stores[0]), Tier("tail", stores[2])
    head.fault, tail.fault = losing(head, 4, 12), losing(tail, 3, 7, 9, 15)
    done = Generated()
    route = tiny_decoder.route(("layer_1",), head, tail)
    tokens = generate(route, request=request, done=done, proposer=Foreseeing([t.token for t in whole]))
    assert same(tokens, whole)
    assert done.proposed > done.accepted > 20


@pytest.mark.parametrize("codec", ["half/1", "int8/1", "int8-token/1"])
def test_a_replay_under_a_codec_gives_the_tail_the_same_bits(
    codec: str, tiny_decoder: PublishedDecoder, stores: list[SessionStore]
) -> None:
    head, tail = Tier("head", stores[0]), Tier("tail", stores[2])
    route = tiny_decoder.route(("layer_1",), head, LoopbackHop(tail))
    (tensor,) = (s.name for s in tiny_decoder.model.bundle.carried(route.segments[1].inputs))
    route = replace(route, encodings=({}, {tensor: Encoding(codec)}))
    calm = generate(route)
    values = {start + i: row for start, sent in tail.inputs for i, row in enumerate(sent[tensor][0])}
    tail.inputs.clear()
    tail.calls = 0
    tail.fault = losing(tail, 4, 19)
    assert [t.token for t in generate(route)] == [t.token for t in calm]
    replays = [(start, sent[tensor][0]) for start, sent in tail.inputs if not start]
    assert [len(rows) for _, rows in replays] == [12, 15, 29]
    for _, rows in replays:
        assert all(np.array_equal(row, values[i]) for i, row in enumerate(rows))


def test_beyond_the_bound_segments_before_run_again(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore], expected: list[SampledToken]
) -> None:
    head, tail = Tier("head", stores[0]), Tier("tail", stores[2])
    tail.fault = losing(tail, 10)
    # Twelve rows of 64 floats and two steps.
    policy = GenerationPolicy(recoveries=AMPLE, replay_bytes=14 * 64 * 4 + 3 * 600)
    assert same(generate(tiny_decoder.route(("layer_1",), head, tail), policy=policy), expected)
    assert [head.runs_of(position) for position in range(22)] == [1] * 14 + [2] * 7 + [1]
    assert policy.memory.used == 0


def test_generations_share_the_memory_of_replays(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore], expected: list[SampledToken]
) -> None:
    head, tail = Tier("head", stores[0]), Tier("tail", stores[2])
    tail.fault = losing(tail, 10)
    policy = GenerationPolicy(recoveries=AMPLE, memory=MemoryBudget(100))
    assert same(generate(tiny_decoder.route(("layer_1",), head, tail), policy=policy), expected)
    assert head.runs_of(0) == 2


def failing(*numbers: int) -> Fault:
    """Give no response to these calls."""

    def fail(number: int, frame: Frame) -> None:
        if number in numbers:
            raise HopUnavailable("away", hop="tail")

    return fail


def test_a_generation_moves_to_another_replica_another_cut_and_the_whole_model(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore], store: SessionStore, expected: list[SampledToken]
) -> None:
    head, replica = Tier("head", stores[0]), Tier("replica", stores[1], failing(7))
    tail = Tier("tail", stores[2], failing(5))
    cut = tiny_decoder.route(("layer_1",), head, tail)
    routes = (
        tiny_decoder.route(("layer_1",), head, replica),
        tiny_decoder.route(("layer_2",), Tier("head", stores[0]), Tier("other", stores[2], failing(6))),
        tiny_decoder.route((), LocalHop(store)),
    )
    done = Generated()
    assert same(generate(cut, rerouting=Instead(*routes), done=done), expected)
    assert done.recoveries == 3
    # The replica alone was brought up.
    assert {head.runs_of(position) for position in range(20)} == {1}


def test_a_call_that_fails_is_made_again_without_the_segments_before_it(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore], expected: list[SampledToken]
) -> None:
    head, tail = Tier("head", stores[0]), Tier("tail", stores[2], failing(1, 6))
    route = tiny_decoder.route(("layer_1",), head, tail)
    assert same(generate(route, rerouting=Instead(route, route)), expected)
    assert {head.runs_of(position) for position in range(12 + 23)} == {1}


def test_a_function_that_loses_state_again_and_again_ends_the_generation(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore]
) -> None:
    def refuse(number: int, frame: Frame) -> None:
        if number > 3:
            raise StateMissing("gone", position=0)

    tail = Tier("tail", stores[2], refuse)
    with pytest.raises(StateMissing):
        generate(tiny_decoder.route(("layer_1",), Tier("head", stores[0]), tail))
    assert tail.calls == 3 + 8


def test_recoveries_of_all_generations_have_a_budget(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore]
) -> None:
    empty = RetryBudget(burst=1, per_second=0.0, per_success=0.0)
    tail = Tier("tail", stores[2])
    tail.fault = losing(tail, 5, 10)
    done = Generated()
    with pytest.raises(StateMissing):
        generate(
            tiny_decoder.route(("layer_1",), Tier("head", stores[0]), tail),
            policy=GenerationPolicy(recoveries=empty, silence_s=0.5),
            done=done,
        )
    assert done.recoveries == 2


def test_silence_ends_a_generation(tiny_decoder: PublishedDecoder, stores: list[SessionStore]) -> None:
    seen: list[float] = []

    class Slow(Tier):
        def call(self, frame: Frame, context: Context) -> HopReply:
            seen.append(context.deadline.remaining())
            time.sleep(0.35)
            return super().call(frame, context)

    route = tiny_decoder.route(("layer_1",), Slow("head", stores[0]), Slow("tail", stores[2]))
    generate(route, request=replace(REQUEST, max_tokens=1))  # the segments are loaded
    seen.clear()
    with pytest.raises(DeadlineExceeded):
        generate(route, policy=GenerationPolicy(silence_s=0.3, recoveries=AMPLE))
    assert max(seen) <= 0.3


def test_a_reader_who_leaves_ends_the_session_at_every_function(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore]
) -> None:
    ended: list[tuple[str, str]] = []

    class Ending(Tier):
        def end_session(self, session: str, deadline: Any) -> None:
            ended.append((self.name, session))

    hops: list[Hop] = [Ending("head", stores[0]), Ending("tail", stores[2], failing(5)), Ending("more", stores[1])]
    first, second = (tiny_decoder.route(("layer_1",), hops[0], hop) for hop in hops[1:])
    policy = GenerationPolicy(recoveries=AMPLE)
    tokens = Generator(first, Instead(second), policy=policy).run(
        REQUEST, Context.from_headers({}, longest_s=60), Generated()
    )
    for _ in range(6):
        next(tokens)
    calls = hops[0].calls
    assert policy.memory.used > 0
    tokens.close()
    eventually(lambda: sorted(name for name, _ in ended) == ["head", "more", "tail"])
    assert len({session for _, session in ended}) == 1
    assert hops[0].calls == calls
    assert policy.memory.used == 0


def test_a_deadline_that_passes_while_the_reader_waits_ends_the_generation(
    tiny_decoder: PublishedDecoder, stores: list[SessionStore]
) -> None:
    route = tiny_decoder.route((), Tier("head", stores[0]))
    tokens = Generator(route).run(REQUEST, Context.from_headers({}, longest_s=0.0), Generated())
    with pytest.raises(DeadlineExceeded):
        next(tokens)
