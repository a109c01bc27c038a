"""Steps of sessions that share runs: each row has its own result, idle rows keep their state, and who goes first."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.admission import MemoryBudget
from isthmus.artifacts.sampling import Sampling
from isthmus.context import Context, Deadline
from isthmus.errors import DeadlineExceeded, RunFailed, ValueRefused
from isthmus.generation import Generated, GenerationRequest, Generator
from isthmus.pipeline import LocalHop
from isthmus.runtime.batching import BatchTrials
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.run_queue import QueuedOutputs, QueuedWork, RunQueue
from isthmus.runtime.session_store import SessionStore
from isthmus.runtime.sessions import Sessions
from isthmus.runtime.step_queue import QueuedStep
from isthmus.runtime.step_trial import StepTrial
from isthmus.wire.frame import Step
from support.decoders import VOCABULARY
from support.patience import LONG_S, eventually
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder

TAIL = "layer_1.."
WIDTH = 64


@pytest.fixture(scope="module")
def runner(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrtRunner]:
    store = tiny_decoder.store(tmp_path_factory.mktemp("cache"))
    loaded = store.store.runner(tiny_decoder.model.digest, TAIL, Deadline.after(LONG_S))
    assert isinstance(loaded, OrtRunner)
    yield loaded
    store.store.close()


_OPENED: list[Sessions] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while _OPENED:
        _OPENED.pop().close()


class Tail:
    """Sessions of a tail, and their steps run in given batches without a queue."""

    def __init__(self, runner: OrtRunner, **changes: Any) -> None:
        bounds = {"max_sessions": 8, "max_bytes": 2**30, "max_tokens": 128, "idle_s": 60.0, "expiry_s": 600.0}
        self.sessions = Sessions(**(bounds | changes))
        self.runner = runner
        _OPENED.append(self.sessions)

    def prefill(self, name: str, length: int, seed: int = 0) -> None:
        self.together({name: (0, hidden(length, seed))})

    def together(self, steps: Mapping[str, tuple[int, Any]], deadline_s: float = LONG_S) -> dict[str, Any]:
        """The logits of each session's step, or its error, from one `execute`."""
        begun = {}
        for name, (position, array) in steps.items():
            step = Step(name, position, reserve=64)
            group, session = self.sessions.begin(self.runner, step, array.shape[1])
            begun[name] = QueuedStep(
                Deadline.after(deadline_s),
                TAIL,
                runner=self.runner,
                group=group,
                session=session,
                arrays={"layer_1": array},
                position=position,
                count=array.shape[1],
                scored=array.shape[1],
            )
        self.group = group
        entries = list(begun.values())
        entries[0].execute(entries)
        for entry in entries:
            self.sessions.finish(entry.group, entry.session)
        return {
            name: entry.result.outputs["logits"] if isinstance(entry.result, QueuedOutputs) else entry.result
            for name, entry in begun.items()
        }

    def prove(self, *sizes: int, step_s: float = 1000.0) -> None:
        """Have batches of these sizes pay, however the machine pauses, without a comparison."""
        self.group.trial.ran(1, step_s)
        for size in sizes:
            self.group.trial.ran(size, 1e-6)

    def row(self, name: str) -> int:
        return self.group.sessions[name].row


def hidden(tokens: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((1, tokens, WIDTH)).astype(np.float32)


def assert_same(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_steps_of_different_lengths_together_give_what_each_gives_alone(runner: OrtRunner) -> None:
    lengths = {"a": 3, "b": 40, "c": 1, "d": 17}
    alone, shared = Tail(runner), Tail(runner)
    for tail in (alone, shared):
        for seed, (name, length) in enumerate(lengths.items()):
            tail.prefill(name, length, seed)
    shared.prove(2, 4)
    for position in range(5):
        steps = {name: (length + position, hidden(1, 50 + position + length)) for name, length in lengths.items()}
        together = shared.together(steps)
        for name, step in steps.items():
            assert_same(together[name], alone.together({name: step})[name])
    assert shared.sessions.counts().runs == {1: 4, 4: 5}


def test_a_row_that_runs_along_idle_keeps_its_state(runner: OrtRunner) -> None:
    idle, plain = Tail(runner), Tail(runner)
    for tail in (idle, plain):
        for seed, (name, length) in enumerate({"a": 5, "idle": 31, "c": 2}.items()):
            tail.prefill(name, length, seed)
    idle.prove(2, 4)
    for position in range(3):
        idle.together({"a": (5 + position, hidden(1, 7)), "c": (2 + position, hidden(1, 8))})
    assert idle.sessions.counts().runs[2] == 3
    # Over positions that idle runs wrote to, and over those before.
    for position, tokens in ((31, 1), (32, 4), (30, 2)):
        step = {"idle": (position, hidden(tokens, position))}
        assert_same(idle.together(step)["idle"], plain.together(step)["idle"])


def test_a_full_session_between_others_takes_no_part(runner: OrtRunner) -> None:
    tail, plain = Tail(runner, max_tokens=32), Tail(runner, max_tokens=32)
    for each in (tail, plain):
        for name, length in {"a": 3, "full": 32, "c": 3}.items():
            each.prefill(name, length, length)
    tail.prove(2, 4)
    tail.together({"a": (3, hidden(1, 1)), "c": (3, hidden(1, 2))})
    assert tail.sessions.counts().runs == {1: 5}
    again = {"full": (31, hidden(1, 9))}
    assert_same(tail.together(again)["full"], plain.together(again)["full"])


def test_the_rows_of_sessions_that_ended_are_taken_by_those_that_go_on(runner: OrtRunner) -> None:
    tail, plain = Tail(runner), Tail(runner)
    for each in (tail, plain):
        for seed, name in enumerate("abcde"):
            each.prefill(name, 4 + seed, seed)
    tail.prove(2)
    for name in "abc":
        tail.sessions.end(name)
    steps = {"d": (7, hidden(1, 1)), "e": (8, hidden(1, 2))}
    together = tail.together(steps)
    assert {tail.row(name) for name in "de"} == {0, 1}
    for name, step in steps.items():
        assert_same(together[name], plain.together({name: step})[name])


def test_a_hostile_row_changes_no_other_step(runner: OrtRunner) -> None:
    tail, plain = Tail(runner), Tail(runner)
    for each in (tail, plain):
        for name in "abc":
            each.prefill(name, 6, 1)
    tail.prove(2, 4)
    hostile = np.full((1, 1, WIDTH), np.nan, np.float32)
    for position in (6, 7):
        steps = {"a": (position, hidden(1, 2)), "b": (position, hostile), "c": (position, hidden(1, 3))}
        together = tail.together(steps)
        for name in "ac":
            assert_same(together[name], plain.together({name: steps[name]})[name])


def test_a_batch_that_fails_runs_row_by_row_and_is_not_formed_again(
    runner: OrtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail, run = Tail(runner), runner.run_step

    def failing(arrays: Any, lengths: Any, buffers: Any, scored: int) -> Any:
        if len(lengths) > 1:
            raise RunFailed("no memory for so many")
        return run(arrays, lengths, buffers, scored)

    tail.prefill("a", 3)
    tail.prefill("b", 3)
    tail.prove(2)
    monkeypatch.setattr(runner, "run_step", failing)
    results = tail.together({"a": (3, hidden(1, 1)), "b": (3, hidden(1, 2))})
    assert all(result.shape == (1, 1, VOCABULARY) for result in results.values())
    assert tail.group.trial.max_size == 1


def test_a_step_that_fails_in_a_batch_fails_alone(runner: OrtRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    tail, run = Tail(runner), runner.run_step

    def refusing(arrays: Any, lengths: Any, buffers: Any, scored: int) -> Any:
        if (arrays["layer_1"] == 666).any():
            raise ValueRefused("an index is out of range")
        return run(arrays, lengths, buffers, scored)

    for name in "abc":
        tail.prefill(name, 3)
    tail.prove(2, 4)
    monkeypatch.setattr(runner, "run_step", refusing)
    bad = np.full((1, 1, WIDTH), 666, np.float32)
    results = tail.together({"a": (3, hidden(1, 1)), "b": (3, bad), "c": (3, hidden(1, 2))})
    assert isinstance(results["b"], ValueRefused)
    assert {name: tail.group.sessions[name].length for name in "abc"} == {"a": 4, "b": 3, "c": 4}
    # The fault was a step's, so batches go on.
    assert tail.group.trial.max_size == 4
    assert tail.together({"b": (3, hidden(1, 5))})["b"].shape == (1, 1, VOCABULARY)


def test_a_step_past_its_deadline_is_not_run(runner: OrtRunner) -> None:
    tail = Tail(runner)
    tail.prefill("a", 3)
    late = tail.together({"a": (2, hidden(1, 1))}, deadline_s=0)["a"]
    assert isinstance(late, DeadlineExceeded)
    assert tail.group.sessions["a"].length == 3


def test_the_first_batch_of_a_size_is_compared_with_its_rows(
    runner: OrtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.runtime.step_trial.MAX_SHARE", 1000.0)
    tail, plain = Tail(runner), Tail(runner)
    for each in (tail, plain):
        for name in "ab":
            each.prefill(name, 5, 2)
    tail.prove()
    for position in (5, 6):
        steps = {name: (position, hidden(1, position)) for name in "ab"}
        together = tail.together(steps)
        for name, step in steps.items():
            assert_same(together[name], plain.together({name: step})[name])
    assert tail.group.trial.max_size == 2


@pytest.mark.parametrize(("fault", "size"), [(0.0, 2), (1e-3, 1)])
def test_rows_that_mix_turn_batches_off(
    fault: float, size: int, runner: OrtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.runtime.step_trial.MAX_SHARE", 1000.0)
    tail, run = Tail(runner), runner.run_step
    for name in "ab":
        tail.prefill(name, 5)
    tail.prove(step_s=0.001)

    def mixing(arrays: Any, lengths: Any, buffers: Any, scored: int) -> Any:
        outputs = run(arrays, lengths, buffers, scored)
        return {n: a + fault * np.abs(a).max() if len(lengths) > 1 else a for n, a in outputs.items()}

    monkeypatch.setattr(runner, "run_step", mixing)
    steps = {name: (5, hidden(1, 1)) for name in "ab"}
    results = tail.together(steps)
    assert_same(
        results["a"], run({"layer_1": hidden(1, 1)}, np.array([5], np.int32), tail.group.memory.buffers(0), 1)["logits"]
    )
    assert tail.group.trial.max_size == size
    assert tail.group.trial.largest([LONG_S] * 8) == (4 if size == 2 else 1)


def test_batches_that_gain_nothing_are_tried_again_later() -> None:
    now = [0.0]
    trial = StepTrial("s", enabled=True, clock=lambda: now[0])
    trial.ran(1, 0.01)
    for _ in range(3):
        assert trial.largest([LONG_S] * 4) == 2
        trial.compared(2, 0.02, 0.02, agrees=True)
    assert trial.largest([LONG_S] * 4) == 1
    now[0] = 1000.0
    assert trial.largest([LONG_S] * 4) == 2
    trial.compared(2, 0.011, 0.02, agrees=True)
    assert (trial.largest([LONG_S] * 4), trial.max_size) == (4, 2)


def test_a_batch_ends_before_the_deadline_of_each_step() -> None:
    trial = StepTrial("s", enabled=True)
    for size in (1, 2, 4):
        trial.ran(size, float(size))
    assert [trial.largest([left] * 4) for left in (7.0, 5.0, 2.0)] == [4, 2, 1]
    assert trial.largest([100.0, 100.0, 2.0]) == 2
    assert StepTrial("s", enabled=False).largest([100.0] * 4) == 1


@dataclasses.dataclass(eq=False)
class _Named(QueuedWork):
    name: str = ""
    order: list[str] = dataclasses.field(default_factory=list)
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)

    def execute(self, entries: Sequence[QueuedWork]) -> None:
        assert self.gate.wait(LONG_S)
        self.order.append(self.name)
        self.result = QueuedOutputs({}, 0, 0, 1)


def test_steps_wait_for_one_chunk_of_a_prompt_at_most() -> None:
    queue, gate, order = RunQueue(1, BatchTrials(enabled=False), MemoryBudget(1)), threading.Event(), list[str]()
    with ThreadPoolExecutor(16) as pool:
        for count, name in enumerate(["CHUNK", "CHUNK", "CHUNK", "photo", "step", "step", "CHUNK"]):
            work = _Named(
                Deadline.after(LONG_S),
                name,
                is_long=name == "CHUNK",
                is_step=name == "step",
                name=name,
                order=order,
                gate=gate,
            )
            pool.submit(queue.perform, work)
            eventually(lambda count=count: len(queue.waiting()) == count)  # type: ignore[misc]
        gate.set()
    assert order == ["CHUNK", "step", "CHUNK", "step", "CHUNK", "photo", "CHUNK"]


def test_a_run_waits_for_sessions_that_are_due(runner: OrtRunner) -> None:
    now = [100.0]
    tail = Tail(runner, clock=lambda: now[0])
    for name in "ab":
        tail.prefill(name, 3)
    tail.prove(2, step_s=0.001)
    for position in (3, 4, 5):
        now[0] += 0.001
        tail.together({name: (position, hidden(1, 1)) for name in "ab"})

    def window() -> float:
        step = Step("a", 6)
        group, session = tail.sessions.begin(tail.runner, step, 1)
        work = QueuedStep(
            Deadline.after(LONG_S),
            runner=runner,
            group=group,
            session=session,
            arrays={},
            position=6,
            count=1,
            scored=1,
        )
        seconds = work.window_s(has_waited=True)
        tail.sessions.finish(group, session)
        return seconds

    now[0] += 0.001
    assert window() > 0
    now[0] += 10.0  # a session that has not come back is not waited for again
    assert window() == 0


def generated(decoder: PublishedDecoder, store: SessionStore, seed: int) -> list[int]:
    ids = list(map(int, np.random.default_rng(seed).integers(1, VOCABULARY, 5 + 3 * seed)))
    sampling = Sampling(temperature=0.8, seed=seed) if seed % 2 else Sampling()
    request = GenerationRequest(prompt=ids, max_tokens=40, sampling=sampling)
    route = decoder.route(("layer_1",), LocalHop(store), LocalHop(store))
    context = Context.from_headers({}, longest_s=LONG_S)
    return [drawn.token for drawn in Generator(route).run(request, context, Generated())]


def test_sessions_at_once_generate_what_each_generates_alone(
    tiny_decoder: PublishedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.runtime.step_trial.MAX_SHARE", 1000.0)
    store = tiny_decoder.store(tmp_path)
    alone = [generated(tiny_decoder, store, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda seed: generated(tiny_decoder, store, seed), range(8))) == alone
    runs = store.sessions.counts().runs
    assert sum(count for size, count in runs.items() if size > 1) > 20, runs
    store.store.close()


def test_a_step_longer_than_a_run_gives_what_one_run_gives(
    tiny_decoder: PublishedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tiny_decoder.store(tmp_path)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (1, 23))
    sampling = Sampling(temperature=1, repetition_penalty=1.3, last=9, tokens=tuple(ids[0].tolist()), logprobs=2)

    def step(segment: str, name: str, arrays: Any, how: Sampling | None) -> dict[str, Any]:
        step = Step(name, 0, how)
        return store.step(tiny_decoder.model.digest, segment, arrays, step, Deadline.after(LONG_S)).outputs

    whole = [step("..layer_1", "a", {"input_ids": ids}, None), step("..", "b", {"input_ids": ids}, sampling)]
    monkeypatch.setattr("isthmus.runtime.session_store.MAX_RUN_TOKENS", 5)
    pieces = [step("..layer_1", "c", {"input_ids": ids}, None), step("..", "d", {"input_ids": ids}, sampling)]
    assert_same(pieces[0]["layer_1"], whole[0]["layer_1"])
    assert pieces[1]["tokens"].shape == (1, 9)
    for name, array in whole[1].items():
        np.testing.assert_allclose(pieces[1][name], array, atol=1e-4)
    store.store.close()


def test_a_prompt_runs_in_shorter_pieces_beside_sessions_that_decode(
    tiny_decoder: PublishedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.runtime.session_store.SHARED_RUN_TOKENS", 8)
    monkeypatch.setattr("isthmus.runtime.sessions._DECODING_S", LONG_S)
    store = tiny_decoder.store(tmp_path)

    def step(name: str, position: int, count: int) -> int:
        before = store.sessions.counts().runs.get(1, 0)
        arrays = {"input_ids": np.ones((1, count), np.int64)}
        store.step(tiny_decoder.model.digest, "..", arrays, Step(name, position), Deadline.after(LONG_S))
        return store.sessions.counts().runs[1] - before

    assert [step("a", 0, 20), step("b", 0, 20), step("a", 20, 1), step("b", 20, 20), step("a", 21, 20)] == [
        1,
        1,
        1,
        3,
        1,
    ]
    store.store.close()


def program(
    decoder: PublishedDecoder, store: SessionStore, seed: int, steps: int = 120
) -> Iterator[tuple[int, list[int], Any]]:
    """Random steps of one caller: prompts, tokens, proposals, steps back, sessions that end; position, ids, scores."""
    rng = np.random.default_rng(seed)
    position, session = 0, 0
    for _ in range(steps):
        kind = rng.random()
        if kind < 0.04 or position > 90:
            store.end_session(f"{seed}.{session}")
            position, session = 0, session + 1
        back = int(rng.integers(1, 6)) if kind > 0.9 else 0
        position = max(0, position - back)
        count = int(rng.integers(1, 30)) if not position else int(rng.integers(2, 9)) if 0.8 < kind < 0.9 else 1
        ids = rng.integers(1, VOCABULARY, (1, count))
        step = Step(f"{seed}.{session}", position, reserve=8)
        ran = store.step(decoder.model.digest, "..", {"input_ids": ids}, step, Deadline.after(LONG_S))
        yield position, ids[0].tolist(), ran.outputs["logits"]
        position += count
    store.end_session(f"{seed}.{session}")


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_random_steps_at_once_give_what_each_gives_alone(
    slots: int, tiny_decoder: PublishedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.runtime.step_trial.MAX_SHARE", 1000.0)
    monkeypatch.setattr("isthmus.runtime.store.cpu_limit", lambda: slots)
    alone = tiny_decoder.store(tmp_path / "alone", batching="off")
    shared = tiny_decoder.store(tmp_path / "shared")
    expected = [list(program(tiny_decoder, alone, seed)) for seed in range(10)]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda seed: list(program(tiny_decoder, shared, seed)), range(10)))
    for steps, wanted in zip(found, expected, strict=True):
        assert [(position, ids) for position, ids, _ in steps] == [(position, ids) for position, ids, _ in wanted]
        for (_, _, got), (_, _, scores) in zip(steps, wanted, strict=True):
            assert_same(got, scores)
    counts = shared.sessions.counts()
    assert sum(count for size, count in counts.runs.items() if size > 1) > 10, counts.runs
    assert (counts.sessions, counts.reserved, counts.resident) == (0, 0, 0)
    alone.store.close()
    shared.store.close()
