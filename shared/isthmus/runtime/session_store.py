"""A store of segments that also runs the steps of sessions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from isthmus.admission import describe_work
from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.sampling import Sampling
from isthmus.artifacts.tensors import TensorSpec
from isthmus.context import Deadline
from isthmus.errors import RequestMalformed, RunFailed, ShapeMismatch, ValueRefused
from isthmus.processing.sampling import sampled_tensors
from isthmus.registry import SegmentSource
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.run_queue import QueuedOutputs
from isthmus.runtime.sessions import Session, Sessions, kind_of
from isthmus.runtime.step_queue import QueuedStep
from isthmus.runtime.store import SegmentStore, TimedOutputs
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Frame, Step

# Of one run: a longer step runs in pieces, between which other sessions' steps run, and whose outputs, the scores of
# the whole vocabulary, take no more memory.
MAX_RUN_TOKENS, MAX_RUN_BYTES = 256, 64 * 2**20
# Beside sessions that decode: a prompt takes a fifth more CPU time than in whole runs, and the others wait a fourth as
# long. Source: measured for SmolLM2; Agrawal et al., Sarathi-Serve, OSDI 2024, "stall-free batching".
SHARED_RUN_TOKENS = 64


def open_store(source: SegmentSource, settings: SegmentSettings) -> SessionStore:
    """A store of the segments of `source`, without sessions yet."""
    return SessionStore(SegmentStore(source, settings), settings)


class SessionStore:
    """`store`, and the state of the sessions that ran on its segments."""

    def __init__(self, store: SegmentStore, settings: SegmentSettings) -> None:
        self.store = store
        self.sessions = Sessions(
            max_sessions=settings.max_sessions,
            max_bytes=settings.session_bytes,
            max_tokens=settings.max_session_tokens,
            idle_s=settings.session_idle_s,
            expiry_s=settings.session_expiry_s,
            batches=settings.batching == "auto",
        )
        store.closing.callback(self.sessions.close)

    def run_frame(self, frame: Frame, deadline: Deadline) -> TimedOutputs:
        """Run the segment that a frame names, as a step of a session, to an exit, or by itself.

        Raises:
            As `step`, `SegmentStore.run_to_exit` or `SegmentStore.run`.
        """
        if frame.step is not None:
            return self.step(frame.bundle, frame.segment, frame.tensors, frame.step, deadline)
        if frame.exit is not None:
            return self.run_to_exit(frame.bundle, frame.segment, frame.tensors, frame.exit, deadline)
        return self.run(frame.bundle, frame.segment, frame.tensors, deadline)

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> TimedOutputs:
        """See `SegmentStore.run`."""
        return self.store.run(bundle, segment, arrays, deadline)

    def run_to_exit(
        self, bundle: str, segment: str, arrays: Mapping[str, Array], threshold: float, deadline: Deadline
    ) -> TimedOutputs:
        """See `SegmentStore.run_to_exit`."""
        return self.store.run_to_exit(bundle, segment, arrays, threshold, deadline)

    def step(
        self, bundle: str, segment: str, arrays: Mapping[str, Array], step: Step, deadline: Deadline
    ) -> TimedOutputs:
        """Run a segment for a session's next tokens; the scores become tokens where the step samples.

        A step that fails leaves the session as it was, without the tokens that the step took back. Shapes: arrays
        (1, tokens, …).

        Raises:
            StateMissing: the session's state here ends before the step.
            RequestMalformed: the bundle declares no state.
            Overloaded: no place for another session, or the session has a step under way.
            ShapeMismatch: more than one row, or the session would be longer than it may be.
            ValueRefused: a token is none of the vocabulary, or the scores are no numbers.
            As `run`.
        """
        runner, load_s = self.store.timed_runner(bundle, segment, deadline)
        if not isinstance(runner, OrtRunner) or runner.state is None:
            raise RequestMalformed(f"the frame is a step of a session, and bundle {bundle} declares no state")
        count = _tokens(runner, arrays)
        _check_sampling(runner, step, count)
        group, session = self.sessions.begin(runner, step, count)
        # Chunks and single tokens take times of their own.
        describe_work(kind_of(step.position, count))
        try:
            _check_whole_history(step, session)
            runs = []
            for start, stop in _pieces(runner, count, lambda: group.others_decode(session)):
                piece = {name: array[:, start:stop] for name, array in arrays.items()}
                work = QueuedStep(
                    deadline,
                    segment,
                    runner=runner,
                    group=group,
                    session=session,
                    arrays=piece,
                    position=step.position + start,
                    count=stop - start,
                    scored=_scored(step, stop - start, stop - count),
                )
                ran = self.store.perform(work)
                runs.append(ran if step.sampling is None else _last_scores(ran, step.sampling, stop - count))
            outputs = _joined(runs)
            if step.sampling is not None:
                outputs = _sampled(session, step, arrays, outputs, deadline)
            wait_s, run_s = sum(ran.wait_s for ran in runs), sum(ran.run_s for ran in runs)
            return TimedOutputs(outputs, load_s, wait_s, run_s, max(ran.batch for ran in runs))
        except BaseException:
            session.length = min(session.length, step.position)
            raise
        finally:
            self.sessions.finish(group, session)

    def end_session(self, session: str) -> None:
        """Forget a session in every segment, once its step under way is over; no-op without it."""
        self.sessions.end(session)

    def room_for_batches(self) -> int:
        """See `RunQueue.room_for_batches`; steps of sessions count."""
        return self.store.room_for_batches(self.sessions.largest_batch)

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """See `SegmentStore.load`."""
        return self.store.load(bundle, segment, deadline)


def _tokens(runner: OrtRunner, arrays: Mapping[str, Array]) -> int:
    """The number of tokens of a step, whose tensors are checked."""
    check_tensors(runner.step_inputs, arrays)
    shapes = [array.shape[:2] for array in arrays.values()]
    if not shapes or any(len(s) < 2 or s[0] != 1 or s != shapes[0] or not s[1] for s in shapes):
        raise ShapeMismatch(
            "a step takes tensors of one row and the same tokens", got={n: list(a.shape) for n, a in arrays.items()}
        )
    tokens = runner.state.tokens if runner.state is not None else ""
    # A graph reads a negative index from the end of its table.
    if tokens in arrays and (lowest := int(arrays[tokens].min())) < 0:
        raise ValueRefused(f"{tokens} holds {lowest}; a token's id is not negative", tensor=tokens, value=lowest)
    return int(shapes[0][1])


def _check_sampling(runner: OrtRunner, step: Step, count: int) -> None:
    sampling = step.sampling
    if sampling is not None and len(_crossing(runner)) != 1:
        raise ValueRefused(f"segment {runner.segment.id} has several outputs, none of them the scores of tokens")
    if sampling is not None and sampling.has_penalty and len(sampling.tokens) != count:
        raise ValueRefused(
            f"the sampling of a step of {count} tokens names {len(sampling.tokens)}; a penalty needs each",
            expected=count,
            got=len(sampling.tokens),
        )


def _check_whole_history(step: Step, session: Session) -> None:
    if step.sampling is not None and step.sampling.has_penalty and len(session.history) < step.position:
        raise ValueRefused("a penalty needs the ids of all the session's tokens, from its first step on")


def _crossing(runner: OrtRunner) -> list[TensorSpec]:
    """The outputs that are no state."""
    kept = runner.state.outputs if runner.state is not None else ()
    return [spec for spec in runner.segment.outputs if spec.name not in kept]


def bytes_per_token(outputs: Iterable[TensorSpec]) -> int:
    """The size of a step's outputs for each of its tokens."""
    return sum(4 * math.prod(d for d in spec.shape if isinstance(d, int)) for spec in outputs)


def _pieces(runner: OrtRunner, count: int, is_shared: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """Where a step of `count` tokens is cut into runs; shorter ones while others decode."""
    token_bytes = bytes_per_token(_crossing(runner))
    most = max(1, min(MAX_RUN_TOKENS, MAX_RUN_BYTES // max(1, token_bytes)))
    start = 0
    while start < count:
        stop = min(start + (min(most, SHARED_RUN_TOKENS) if is_shared() else most), count)
        yield start, stop
        start = stop


def _scored(step: Step, count: int, offset: int) -> int:
    """The last positions to score of a run of `count` tokens; `offset` is its end from the step's end."""
    # At least one: not every kernel takes a tensor without elements.
    return count if step.sampling is None else min(count, max(1, step.sampling.last + offset))


def _last_scores(ran: QueuedOutputs, sampling: Sampling, offset: int) -> QueuedOutputs:
    """The run with the scores of those positions alone that are sampled; `offset` is its end from the step's end."""
    wanted = max(0, sampling.last + offset)
    # Copies, as a view of one position would keep the scores of all in memory.
    return ran._replace(
        outputs={n: a[:, a.shape[1] - wanted :].copy() if wanted < a.shape[1] else a for n, a in ran.outputs.items()}
    )


def _joined(runs: list[QueuedOutputs]) -> dict[str, Array]:
    if len(runs) == 1:
        return runs[0].outputs
    return {name: np.concatenate([ran.outputs[name] for ran in runs], axis=1) for name in runs[0].outputs}


def _sampled(
    session: Session, step: Step, arrays: Mapping[str, Array], outputs: Mapping[str, Array], deadline: Deadline
) -> dict[str, Array]:
    """Tokens in place of the scores of the step's last positions."""
    sampling, end = step.sampling or Sampling(), session.length
    if sampling.has_penalty:
        session.history[step.position :] = sampling.tokens
    (scores,) = outputs.values()
    try:
        return sampled_tensors(
            scores[0],
            sampling,
            end - scores.shape[1] + 1,
            session.history,
            lambda: deadline.check("all tokens were sampled"),
        )
    except RunFailed as e:
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueRefused(f"{name} holds values that are no finite numbers", tensor=name) from e
        raise
