"""Bounds of sessions: bytes reserved at the beginning, eviction of idle ones, memory that returns, hostile steps."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.artifacts.sampling import Sampling
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, Overloaded, RunFailed, ShapeMismatch, StateMissing, ValueRefused
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.session_store import SessionStore
from isthmus.runtime.sessions import Sessions
from isthmus.runtime.state_memory import StateMemory
from isthmus.wire.frame import Step
from support.decoders import VOCABULARY
from support.patience import LONG_S, eventually
from support.published_decoders import PublishedDecoder
from support.published_decoders import store as store
from support.published_decoders import tiny_decoder as tiny_decoder

PAGE = os.sysconf("SC_PAGE_SIZE")
PENALISED = Sampling(repetition_penalty=1.5, tokens=(1, 2))


@pytest.fixture(scope="module")
def runner(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrtRunner]:
    opened = tiny_decoder.store(tmp_path_factory.mktemp("cache"))
    loaded = opened.store.runner(tiny_decoder.model.digest, "..", Deadline.after(LONG_S))
    assert isinstance(loaded, OrtRunner)
    yield loaded
    opened.store.close()


class Clocked:
    """Sessions of a segment on a clock that the test moves."""

    def __init__(self, runner: OrtRunner, **changes: Any) -> None:
        bounds = {"max_sessions": 4, "max_bytes": 2**30, "max_tokens": 128, "idle_s": 10.0, "expiry_s": 100.0}
        self.now = 0.0
        self.sessions = Sessions(**(bounds | changes), clock=lambda: self.now)
        self.runner = runner

    def step(self, name: str, position: int = 0, count: int = 1, reserve: int = 0) -> None:
        group, session = self.sessions.begin(self.runner, Step(name, position, reserve=reserve), count)
        group.ran(session, position + count)
        self.sessions.finish(group, session)

    def has(self, name: str) -> bool:
        try:
            self.step(name, 1)
        except StateMissing:
            return False
        return True


@pytest.fixture
def clocked(runner: OrtRunner) -> Iterator[Any]:
    opened: list[Clocked] = []

    def make(**changes: Any) -> Clocked:
        opened.append(Clocked(runner, **changes))
        return opened[-1]

    yield make
    for each in opened:
        each.sessions.close()


def test_a_new_session_is_refused_before_one_that_runs_loses_its_state(clocked: Any) -> None:
    each = clocked(max_sessions=2)
    each.step("a")
    each.step("b")
    each.now = 3.0
    with pytest.raises(Overloaded, match="2 sessions are kept") as caught:
        each.step("c")
    assert caught.value.facts["retry_after_s"] == 7
    assert each.has("a")
    assert each.has("b")
    assert each.sessions.counts().refused == 1


def test_the_session_idle_for_longest_makes_room(clocked: Any) -> None:
    each = clocked(max_sessions=2)
    each.step("a")
    each.now = 1.0
    each.step("b")
    each.now = 2.0
    each.step("a", 1)
    each.now = 20.0
    each.step("c")
    assert [each.has(name) for name in "abc"] == [True, False, True]
    assert each.sessions.counts().dropped == {"evicted": 1}


def test_bytes_are_reserved_when_a_session_begins(clocked: Any, runner: OrtRunner) -> None:
    assert runner.state is not None
    full = StateMemory(runner.segment, runner.state, rows=1, tokens=128).row_bytes(128)
    each = clocked(max_bytes=2 * full)
    each.step("a", reserve=2**31 - 1)
    each.step("b", reserve=128)
    assert each.sessions.counts().reserved == 2 * full
    with pytest.raises(Overloaded):
        each.step("c")
    each.sessions.end("a")
    each.step("c")
    each.step("d")
    # Beyond what it reserved a session goes on only where there is room, and its state stays where there is none.
    with pytest.raises(Overloaded):
        each.step("c", 1, 127)
    assert each.has("c")


def test_a_session_that_can_never_fit_is_no_matter_of_waiting(clocked: Any) -> None:
    each = clocked(max_bytes=PAGE)
    with pytest.raises(ShapeMismatch, match="session_bytes is 4096"):
        each.step("a", reserve=128)
    with pytest.raises(ShapeMismatch, match="at most 128"):
        each.step("a", 0, 129)


def test_a_session_that_can_never_fit_takes_nobodys_place(clocked: Any) -> None:
    each = clocked(max_sessions=1, max_bytes=16 * PAGE)
    each.step("a")
    each.now = 50.0  # idle: another that fits would have its place
    with pytest.raises(ShapeMismatch, match="session_bytes"):
        each.step("b", reserve=128)
    assert each.has("a")


def test_sessions_without_a_step_expire_by_themselves(clocked: Any) -> None:
    each = clocked(expiry_s=0.2)
    each.step("a")
    assert each.sessions.counts().resident > 0
    each.now = 1.0
    eventually(lambda: each.sessions.counts().sessions == 0)
    assert each.sessions.counts().dropped == {"expired": 1}
    assert each.sessions.counts().resident == 0


def test_a_session_that_ends_during_its_step_goes_after_it(clocked: Any, runner: OrtRunner) -> None:
    each = clocked()
    group, session = each.sessions.begin(runner, Step("a", 0), 1)
    each.sessions.end("a")
    with pytest.raises(Overloaded, match="under way"):
        each.step("a")
    group.ran(session, 1)
    each.sessions.finish(group, session)
    assert not each.has("a")


def test_state_goes_with_the_segment_that_is_unloaded(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    digest = tiny_decoder.model.digest
    tail = tiny_decoder.model.bundle.segment("layer_1..")
    room = sum(t.length for t in tiny_decoder.model.bundle.weight_ranges(tail))
    opened = tiny_decoder.store(tmp_path, max_loaded_bytes=room)
    hidden = {"layer_1": np.zeros((1, 2, 64), np.float32)}
    opened.step(digest, "layer_1..", hidden, Step("a", 0), Deadline.after(LONG_S))
    gone = weakref.ref(opened.store.runner(digest, "layer_1..", Deadline.after(LONG_S)))
    ids = {"input_ids": np.array([[1]])}
    opened.step(digest, "..layer_1", ids, Step("a", 0), Deadline.after(LONG_S))
    gc.collect()
    assert gone() is None
    assert opened.sessions.counts().sessions == 1
    with pytest.raises(StateMissing):
        opened.step(digest, "layer_1..", hidden, Step("a", 2), Deadline.after(LONG_S))
    opened.store.close()


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * PAGE


def test_the_memory_of_a_released_row_goes_back_to_the_system(runner: OrtRunner) -> None:
    assert runner.state is not None
    memory = StateMemory(runner.segment, runner.state, rows=64, tokens=100_000)
    before = resident()
    for pair in memory._pairs:
        pair.rows[3] = 1
    assert resident() - before > 0.9 * memory.row_bytes(100_000)
    memory.release(3)
    assert resident() - before < 0.1 * memory.row_bytes(100_000)
    assert not memory._pairs[0].rows[3].any()


@pytest.mark.parametrize("tokens", [1, 16, 100, 127])
def test_any_number_of_tokens_is_a_number_of_pages(runner: OrtRunner, tokens: int) -> None:
    assert runner.state is not None
    memory = StateMemory(runner.segment, runner.state, rows=3, tokens=tokens)
    first, second = memory.buffers(0), memory.buffers(1)
    assert all((b.address - a.address) % PAGE == 0 for a, b in zip(first, second, strict=True))
    assert all(buffer.shape[2] >= tokens for buffer in first)


def test_thousands_of_short_sessions_leave_nothing_behind(store: SessionStore, tiny_decoder: PublishedDecoder) -> None:
    ids = {"input_ids": np.arange(4)[None]}

    def rounds(count: int) -> None:
        for i in range(count):
            store.step(tiny_decoder.model.digest, "..", ids, Step(f"s{i}", 0, Sampling()), Deadline.after(LONG_S))
            store.end_session(f"s{i}")

    rounds(200)
    before = resident()
    rounds(2000)
    assert resident() - before < 8 * 2**20
    counts = store.sessions.counts()
    assert (counts.sessions, counts.reserved, counts.resident) == (0, 0, 0)
    assert counts.dropped == {"ended": 2200}


def step(store: SessionStore, decoder: PublishedDecoder, given: Step, ids: Any = ((1, 2),)) -> dict[str, Any]:
    arrays = {"input_ids": np.array(ids, np.int64)}
    return store.step(decoder.model.digest, "..", arrays, given, Deadline.after(LONG_S)).outputs


@pytest.mark.parametrize("ids", [[[-1]], [[VOCABULARY]], [[2**62]], [[-(2**63)]]])
def test_a_token_that_is_none_is_refused_and_the_session_stays(
    ids: Any, store: SessionStore, tiny_decoder: PublishedDecoder
) -> None:
    expected = step(store, tiny_decoder, Step("good", 0, Sampling(logprobs=3)))
    step(store, tiny_decoder, Step("s", 0))
    with pytest.raises(ValueRefused):
        step(store, tiny_decoder, Step("s", 2), ids)
    with pytest.raises(ValueRefused):
        step(store, tiny_decoder, Step("s", 0), ids)
    got = step(store, tiny_decoder, Step("s", 0, Sampling(logprobs=3)))
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("given", "ids", "error"),
    [
        (Step("s", 2**31 - 1), [[1]], ShapeMismatch),
        (Step("s", 7), [[1]], StateMissing),
        (Step("s", 0), [[1], [2]], ShapeMismatch),
        (Step("s", 0), [[]], ShapeMismatch),
        (Step("s", 0), [1], ShapeMismatch),
        (Step("s", 0, Sampling(repetition_penalty=2, tokens=(1, 2, 3))), [[1, 2]], ValueRefused),
        (Step("s", 0, Sampling(repetition_penalty=2)), [[1, 2]], ValueRefused),
    ],
)
def test_a_hostile_step_is_refused(
    given: Step, ids: Any, error: type[Exception], store: SessionStore, tiny_decoder: PublishedDecoder
) -> None:
    with pytest.raises(error):
        step(store, tiny_decoder, given, ids)
    assert step(store, tiny_decoder, Step("s", 0, Sampling(), reserve=2**31 - 1))["tokens"].shape == (1, 1)


def test_a_session_may_have_any_name(store: SessionStore, tiny_decoder: PublishedDecoder) -> None:
    name = "\n\x00☃'{}%s/../"[:12] * 10
    step(store, tiny_decoder, Step(name, 0))
    step(store, tiny_decoder, Step(name, 2))
    store.end_session(name)
    with pytest.raises(StateMissing) as caught:
        step(store, tiny_decoder, Step(name, 4))
    assert "\n" not in caught.value.message


def test_a_penalty_needs_the_ids_of_the_whole_session(store: SessionStore, tiny_decoder: PublishedDecoder) -> None:
    step(store, tiny_decoder, Step("s", 0))
    with pytest.raises(ValueRefused, match="from its first step on"):
        step(store, tiny_decoder, Step("s", 2, PENALISED))
    step(store, tiny_decoder, Step("s", 0, PENALISED))
    step(store, tiny_decoder, Step("s", 2, PENALISED))


def test_a_step_that_fails_leaves_the_session_at_its_position(
    store: SessionStore, tiny_decoder: PublishedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(store, tiny_decoder, Step("s", 0, PENALISED))
    step(store, tiny_decoder, Step("s", 2, PENALISED))
    expected = step(store, tiny_decoder, Step("s", 4, PENALISED))

    def fail(*_: Any) -> Any:
        raise RunFailed("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(OrtRunner, "run_step", fail)
        with pytest.raises(RunFailed):
            step(store, tiny_decoder, Step("s", 4, PENALISED))
    with monkeypatch.context() as patch:
        patch.setattr("isthmus.runtime.session_store.sampled_tensors", fail)
        with pytest.raises(RunFailed):
            step(store, tiny_decoder, Step("s", 4, PENALISED))
    arrays = {"input_ids": np.array([[1, 2]])}
    with pytest.raises(DeadlineExceeded):
        store.step(tiny_decoder.model.digest, "..", arrays, Step("s", 4, PENALISED), Deadline.after(0))
    with pytest.raises(StateMissing) as caught:
        step(store, tiny_decoder, Step("s", 5, PENALISED))
    assert caught.value.facts["position"] == 4
    got = step(store, tiny_decoder, Step("s", 4, PENALISED))
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_hidden_states_that_are_no_numbers_give_no_token(store: SessionStore, tiny_decoder: PublishedDecoder) -> None:
    arrays = {"layer_1": np.full((1, 1, 64), np.nan, np.float32)}
    for sampling in (Sampling(), Sampling(temperature=1, min_p=0.1), Sampling(temperature=1, top_k=3)):
        with pytest.raises(ValueRefused, match="layer_1 holds values that are no finite numbers"):
            store.step(tiny_decoder.model.digest, "layer_1..", arrays, Step("s", 0, sampling), Deadline.after(LONG_S))
