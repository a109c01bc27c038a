"""Evaluation of options in this process: bytes on the wire, codec seconds and prediction error, on real inputs.

Every transmission is a `pipeline.execute` over a loopback hop, which encodes and decodes real frames.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.choice import PHOTO_ID, RAW_ID, TRANSFORM_ID, Choice
from isthmus.artifacts.fidelity import Measure, measure_for
from isthmus.artifacts.plan import CloserLooks, Coding, Error, PlannedExit
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.codecs import EncodedTensor, Encoding, Tables, encodings
from isthmus.context import Context
from isthmus.pipeline import LocalHop, LookPolicy, LoopbackHop, PhotoInput, Result, SegmentRun, execute, local_route
from isthmus.pipeline.agreement import agrees, output_error
from isthmus.processing.image import sample_input
from isthmus.runtime.tables import tables_of
from isthmus_tools.planner.costs import CallBytes
from isthmus_tools.planner.inputs import TrialInput, least_seconds, preprocess_seconds
from isthmus_tools.planner.segment_pool import Replay, SegmentPool

# Hours would be a hang; a large model on one core takes minutes.
_MAX_EXECUTION_S = 3600.0
_WHOLE_RUNS = 3
# Codecs are timed by the least of a few tries, since the machine may be busy: until 5 ms were measured, at least twice
# unless the first try took 100 ms, and never more than 10 times.
_MIN_CODEC_S, _MAX_CODEC_S, _MAX_TRIES = 0.005, 0.1, 10
# A plan's numbers are finite; a prediction without any relation to the right one has an error far below this.
MAX_OUTPUT_ERROR = 1e9


class TransferCosts(NamedTuple):
    """Medians over the inputs of one transmission behind the head: bytes of both frames, codec seconds."""

    sent: int
    received: int
    encode_s: float
    decode_s: float


@dataclass(frozen=True)
class Evaluation:
    """An option on the trial inputs: medians of bytes and of seconds in this process, and the prediction error.

    `codecs` are for tensors not sent raw; `run_s` is the run of a variant or of the whole model at the edge. Bytes and
    codec seconds are sums of `transfers`: the first, behind an exit by the share that goes on, and each closer look by
    its share. `branch_s` is the run of the exit's branch, `head_ratio` the run of a variant of the head over the head's
    own. `refused` says why the option may not serve.
    """

    near: CallBytes | None = None
    far: CallBytes | None = None
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    codecs: Mapping[str, Coding] = field(default_factory=dict)
    error: Error = Error(0.0, 0)  # noqa: RUF009 - it is frozen
    run_s: float = 0.0
    looks: CloserLooks | None = None
    refused: str = ""
    transfers: tuple[TransferCosts, ...] = ()
    exit: PlannedExit | None = None
    branch_s: float = 0.0
    head_ratio: float = 1.0

    def weighted(self, shares: Sequence[float]) -> Evaluation:
        """Bytes and codec seconds with each transmission taken by its share of the requests."""
        each = list(zip(shares, self.transfers, strict=True))
        return replace(
            self,
            far=CallBytes(round(sum(s * t.sent for s, t in each)), round(sum(s * t.received for s, t in each))),
            encode_s=sum(s * t.encode_s for s, t in each),
            decode_s=sum(s * t.decode_s for s, t in each),
        )


class BranchRuns(NamedTuple):
    """An exit's branch on the trial inputs: run time here, tensors, and the uncut model's predictions.

    `sure` are the bytes of a call to head and branch for a request that ends there, `unsure` for a request that goes
    on.
    """

    run_s: float
    answers: Sequence[Mapping[str, Array]]
    expected: Sequence[Mapping[str, Array]]
    sure: CallBytes
    unsure: CallBytes


class Evaluator:
    """Evaluates options of one bundle on the same inputs; `digest` names the bundle to the codecs' tables."""

    def __init__(
        self,
        bundle: Bundle,
        digest: str,
        pool: SegmentPool,
        inputs: Sequence[TrialInput],
        tables: Tables,
    ) -> None:
        self._bundle, self._digest, self._pool, self._inputs = bundle, digest, pool, inputs
        self._preprocess_s = preprocess_seconds(bundle, inputs)
        self._table = tables_of(bundle, digest, TRANSFORM_ID, tables)
        self._replay = Replay(pool, len(inputs))
        self._hop = LoopbackHop(LocalHop(self._replay), tables)
        self._measure: Measure = measure_for(bundle)
        self._whole = bundle.segment(WHOLE)
        self.whole_s, self._expected = self._timed_runs(digest, bundle, pool, self._whole)
        self._head = SegmentId()
        self._at_cut: list[Mapping[str, Array]] = []
        self._near: CallBytes | None = None

    def edge(self) -> Evaluation:
        """The whole model on the first hop."""
        return self._edge(self.whole_s, self._expected)

    def variant(self, digest: str, bundle: Bundle, pool: SegmentPool) -> Evaluation:
        """Another bundle, whole on the first hop.

        Raises:
            RunFailed: the variant cannot be loaded, or does not run.
        """
        return self._edge(*self._timed_runs(digest, bundle, pool, bundle.segment(WHOLE)))

    def whole_variant(self, segment: Segment) -> Evaluation:
        """A variant of the whole model on the first hop.

        Raises:
            RunFailed: the variant cannot be loaded, or does not run.
        """
        return self._edge(*self._timed_runs(self._digest, self._bundle, self._pool, segment))

    def photo(self, target: PhotoInput) -> Evaluation:
        """The photo's file sent to the whole model on the last hop, which decodes and pre-processes it.

        A photo that is compressed anew at the edge counts that as pre-processing.
        """
        photos = [i.photo or b"" for i in self._inputs]
        rows = [self._tries(self._whole, {}, {}, encoded=target.encode(photo)) for photo in photos]
        how = {target.tensor: Encoding(PHOTO_ID, target.jpeg_quality / 100)} if target.jpeg_quality else {}
        preprocess_s = statistics.median(least_seconds(partial(target.encode, p)) for p in photos) if how else 0.0
        return replace(_transmission(rows, how), encode_s=0.0, preprocess_s=preprocess_s, error=self._error(rows))

    def photo_error(self, target: PhotoInput, photos: Sequence[bytes]) -> Error:
        """The error of `target` over further photos, against the uncut model's predictions of the photos themselves."""
        whole = local_route(self._digest, self._bundle, [self._whole], self._hop)
        pairs = [
            (
                execute(whole, sample_input(self._bundle, photo), _context()).outputs,
                self._execute(self._whole, {}, {}, encoded=target.encode(photo)).outputs,
            )
            for photo in photos
        ]
        return self._error_of(pairs)

    def cloud(self, choice: Choice) -> Evaluation | None:
        """The whole model on the last hop, with encoded inputs; None where the choice encodes none."""
        evaluation = self._send(self._whole, [i.arrays for i in self._inputs], choice)
        return None if evaluation is None else replace(evaluation, preprocess_s=self._preprocess_s)

    def split(self, cut: str, choice: Choice, head: str = "") -> Evaluation | None:
        """The head on the first hop, or its variant `head`, the tail on the last.

        None where the choice encodes no boundary tensor.

        Raises:
            RunFailed: the variant cannot be loaded, or does not run.
        """
        self._run_head(cut, head)
        evaluation = self._send(self._bundle.segment(SegmentId(cut)), self._at_cut, choice)
        return None if evaluation is None else replace(evaluation, near=self._near, preprocess_s=self._preprocess_s)

    def closer_looks(self, cut: str, choice: Choice, looks: CloserLooks, error: Error) -> Evaluation | None:
        """A split where every input takes every closer look; None where no boundary tensor can be sent finer.

        `error` is that of calibration, over more inputs and with the shares of the looks.
        """
        self._run_head(cut)
        tail = self._bundle.segment(SegmentId(cut))
        how = encodings(tail.inputs, choice, self._table)
        # No margin reaches a threshold above 0, so every look is taken.
        policy = LookPolicy(looks.looks, lambda outputs: float("-inf"))
        rows = [self._tries(tail, tensors, how, policy) for tensors in self._at_cut]
        if not any(row[0].closer_looks for row in rows):
            return None
        evaluation = _transmission(rows, how, (1.0, *looks.shares))
        return replace(evaluation, near=self._near, preprocess_s=self._preprocess_s, error=error, looks=looks)

    def head_ratio(self, cut: str, head: str) -> float:
        """Run time of the head's variant over that of the head itself, in this process.

        Raises:
            RunFailed: the variant cannot be loaded, or does not run.
        """
        segments = (self._bundle.segment(SegmentId(stop=cut, variant=name)) for name in ("", head))
        own_s, variant_s = (self._timed_runs(self._digest, self._bundle, self._pool, s)[0] for s in segments)
        return variant_s / own_s if own_s else 1.0

    def branch(self, branch: Segment) -> BranchRuns:
        """The branch of an exit behind the head of its cut, on the trial inputs.

        Raises:
            RunFailed: the branch cannot be loaded, or does not run.
        """
        self._run_head(branch.id.start)
        seconds, results = self._timed_runs(self._digest, self._bundle, self._pool, branch, self._at_cut)
        head, reply = self._near or CallBytes(0, 0), _typical([result.runs[0] for result in results]).received
        sure, unsure = CallBytes(head.sent, reply), CallBytes(head.sent, head.received + reply)
        return BranchRuns(seconds, [result.tensors for result in results], self._predictions, sure, unsure)

    def branch_on(self, branch: Segment, photos: Sequence[bytes]) -> list[Mapping[str, Array]]:
        """The tensors of an exit's branch for further photos.

        Raises:
            RunFailed, MediaUnsupported: a segment does not run, or a photo cannot be read.
        """
        head = self._bundle.segment(SegmentId(stop=branch.id.start))
        route = local_route(self._digest, self._bundle, [head, branch], LoopbackHop(LocalHop(self._pool)))
        inputs = (sample_input(self._bundle, photo) for photo in photos)
        return [execute(route, arrays, _context()).tensors for arrays in inputs]

    @property
    def _predictions(self) -> list[Mapping[str, Array]]:
        return [result.outputs for result in self._expected]

    def _timed_runs(
        self,
        digest: str,
        bundle: Bundle,
        pool: SegmentPool,
        segment: Segment,
        inputs: Sequence[Mapping[str, Array]] = (),
    ) -> tuple[float, list[Result]]:
        """The median over `inputs` of the least run time, after a warm-up, and a result for each; by default the
        trial inputs.
        """
        route = local_route(digest, bundle, [segment], LoopbackHop(LocalHop(pool)))
        arrays = inputs or [i.arrays for i in self._inputs]
        execute(route, arrays[0], _context())
        rows = [[execute(route, each, _context()) for _ in range(_WHOLE_RUNS)] for each in arrays]
        return statistics.median(min(r.runs[0].run_s for r in row) for row in rows), [row[0] for row in rows]

    def _edge(self, run_s: float, results: Sequence[Result]) -> Evaluation:
        near = _typical([result.runs[0] for result in results])
        error = self._error([[result] for result in results])
        return Evaluation(near=near, preprocess_s=self._preprocess_s, error=error, run_s=run_s)

    def _run_head(self, cut: str, variant: str = "") -> None:
        """Compute the tensors at hand after the head, for each input, unless the call before ran the same head."""
        if (own := SegmentId(stop=cut, variant=variant)) == self._head:
            return
        self._pool.clear()
        self._replay.clear()
        head = self._bundle.segment(own)
        route = local_route(self._digest, self._bundle, [head], LoopbackHop(LocalHop(self._pool)))
        results = [execute(route, i.arrays, _context()) for i in self._inputs]
        self._head, self._at_cut = own, [result.tensors for result in results]
        self._near = _typical([result.runs[0] for result in results])

    def _send(self, segment: Segment, tensors: Sequence[Mapping[str, Array]], choice: Choice) -> Evaluation | None:
        how = encodings(segment.inputs, choice, self._table)
        if any(encoding.table is not None for encoding in how.values()):
            self._execute(segment, tensors[0], how)  # the codec prepares a table at first use
        rows = [self._tries(segment, each, how) for each in tensors]
        evaluation = _transmission(rows, how)
        if choice.codec != RAW_ID and not evaluation.codecs:
            return None
        return replace(evaluation, error=self._error(rows))

    def _tries(
        self,
        segment: Segment,
        tensors: Mapping[str, Array],
        how: Mapping[str, Encoding],
        policy: LookPolicy | None = None,
        encoded: Mapping[str, EncodedTensor] | None = None,
    ) -> list[Result]:
        """Results of the same transmission, repeated while the codecs are too quick for the clock."""
        results, spent = [self._execute(segment, tensors, how, policy, encoded)], 0.0
        while results[0].runs[0].codecs and len(results) < _MAX_TRIES:
            spent += sum(run.encode_s + run.decode_s for run in results[-1].runs)
            if spent >= (_MAX_CODEC_S if len(results) == 1 else _MIN_CODEC_S):
                break
            results.append(self._execute(segment, tensors, how, policy, encoded))
        return results

    def _execute(
        self,
        segment: Segment,
        tensors: Mapping[str, Array],
        how: Mapping[str, Encoding],
        policy: LookPolicy | None = None,
        encoded: Mapping[str, EncodedTensor] | None = None,
    ) -> Result:
        route = replace(local_route(self._digest, self._bundle, [segment], self._hop, how), looks=policy)
        result = execute(route, tensors, _context(), encoded)
        if result.closer_looks is not None and result.closer_looks.error is not None:
            raise result.closer_looks.error
        return result

    def _error(self, rows: Sequence[Sequence[Result]]) -> Error:
        return self._error_of([(e.outputs, row[0].outputs) for e, row in zip(self._expected, rows, strict=True)])

    def _error_of(self, pairs: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> Error:
        relative = max(output_error(self._measure, expected, outputs) for expected, outputs in pairs)
        differing = sum(not agrees(self._measure, expected, outputs) for expected, outputs in pairs)
        return Error(min(relative, MAX_OUTPUT_ERROR), len(pairs), differing / len(pairs))


def _context() -> Context:
    return Context.from_headers({}, longest_s=_MAX_EXECUTION_S)


def _typical(runs: Sequence[SegmentRun]) -> CallBytes:
    # The lower median is the size of a real frame.
    return CallBytes(
        statistics.median_low([run.sent_bytes for run in runs]),
        statistics.median_low([run.received_bytes for run in runs]),
    )


def _transmission(
    rows: Sequence[Sequence[Result]], how: Mapping[str, Encoding], shares: Sequence[float] = (1.0,)
) -> Evaluation:
    """Bytes, codec seconds and codecs of transmissions that take the given shares of the requests.

    `rows` holds the tries for each input; an input for which nothing could be sent finer has no later transmissions.
    """
    transfers = []
    for place in range(len(shares)):
        tries = [[result.runs[place] for result in row] for row in rows if place < len(row[0].runs)]
        call = _typical([runs[0] for runs in tries])
        # Without a codec, the seconds are those of the frame, which the hops' measured costs include.
        encode_s = statistics.median(min(run.encode_s * bool(run.codecs) for run in runs) for runs in tries)
        decode_s = statistics.median(min(run.decode_s * bool(run.codecs) for run in runs) for runs in tries)
        transfers.append(TransferCosts(call.sent, call.received, encode_s, decode_s))
    codecs = {
        name: Coding(codec, how[name].quality if name in how else 1.0)
        for row in rows
        for name, codec in row[0].runs[0].codecs.items()
    }
    return Evaluation(codecs=codecs, transfers=tuple(transfers)).weighted(shares)
