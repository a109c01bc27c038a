"""Measurement of a model on a function: its segments, its nodes, and the cost of a call itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeAlias

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.device import Device
from isthmus.artifacts.profile import HopCost, Profile, SegmentCost, Timing, content_of
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import ProfileMalformed
from isthmus.wire.frame import Frame
from isthmus_tools.budget import UNLIMITED, Budget, Pace
from isthmus_tools.graph.load import read_optimised
from isthmus_tools.graph.model import Model
from isthmus_tools.profiling.nodes import node_seconds
from isthmus_tools.profiling.remote import Call, Measured, ProfiledFunction
from isthmus_tools.profiling.steady import ROUNDS, timing
from isthmus_tools.progress import Progress

MORE_ROUNDS = 4
_ECHOES = 7
_ECHO_BYTES = (2**16, 2**20)
_SOON_S = 0.05

Arrays: TypeAlias = Callable[[Segment], Mapping[str, Array]]


@dataclass(frozen=True)
class Subject:
    """The measured model: a bundle's version, its uncut graph, and each segment's input tensors.

    `inputs` is the kind of the model's inputs: random, photo or tensors.
    """

    bundle: Bundle
    digest: str
    model: Model
    arrays: Arrays
    inputs: str


def measure(
    function: ProfiledFunction,
    subject: Subject,
    tier: str,
    segments: Sequence[Segment],
    *,
    runs: int,
    progress: Progress,
    budget: Budget = UNLIMITED,
) -> Profile:
    """Profile the function's device for the whole model and for `segments`, each run `runs` times or a few more.

    Runs are interleaved in ROUNDS rounds over all segments, so that each segment meets the device at several moments.
    Segments whose series disagree run in up to MORE_ROUNDS more rounds, and are marked unsteady if they still disagree.
    When the budget is spent no further series begins; a warning names the segments without one. The whole model always
    has a series.

    Raises:
        HopError, RequestError, SegmentError: the function failed, or could not be reached.
        ProfileMalformed: two devices responded at one URL.
    """
    device = function.device()
    whole = subject.bundle.segment(WHOLE)
    every = [_Series(function, subject, device, s, max(1, -(-runs // ROUNDS))) for s in (whole, *segments)]
    pace = Pace(ROUNDS * len(every))
    for number in range(1, ROUNDS + MORE_ROUNDS + 1):
        due = every if number <= ROUNDS else [s for s in every if s.results and not s.timing().steady]
        for i, series in enumerate(due, start=1):
            if budget.spent and every[0].results:
                break
            suffix = f" of {ROUNDS}" if number <= ROUNDS else ", it was unsteady"
            remaining = pace.left((number - 1) * len(every) + i - 1) if number <= ROUNDS else ""
            progress(f"{tier}, round {number}{suffix}: {series.segment.id}, {i} of {len(due)}{remaining}")
            series.run_series()
    progress(f"{tier}: the cost of a call itself and of encoding")
    skipped = [series.segment.id for series in every if not series.results]
    every = [series for series in every if series.results]
    warnings = [w for series in every for w in series.warnings()]
    if skipped:
        warnings.append(f"the time limit left {len(skipped)} segments unmeasured: {', '.join(skipped)}")
    costs = {series.segment.id: series.cost() for series in every}
    nodes = every[0].nodes(costs[WHOLE].run.median)
    if nodes is None:
        warnings.append("the nodes were not measured: the whole model's time is shared out by their work")
    return Profile(
        model=subject.bundle.name,
        content=content_of(subject.bundle),
        bundle=subject.digest,
        tier=tier,
        device=device,
        nodes=nodes or node_seconds(subject.model, (), {}, costs[WHOLE].run.median),
        segments=costs,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=subject.inputs,
        shapes={name: tuple(a.shape) for name, a in subject.arrays(whole).items()},
        hop=hop_cost(function),
        codecs=function.codecs(),
        steady=all(cost.run.steady for cost in costs.values()),
        warnings=tuple(warnings),
    )


class _Series:
    """The series of runs of one segment on one function, a few runs at a time."""

    def __init__(
        self, function: ProfiledFunction, subject: Subject, device: Device, segment: Segment, runs: int
    ) -> None:
        self.segment = segment
        self._function, self._subject, self._device, self._runs = function, subject, device, runs
        self.results: list[Measured] = []

    def run_series(self) -> None:
        """Run a further series; the first also measures the memory, and the nodes of the whole model."""
        first = not self.results
        result = self._function.measure(
            Frame(self._subject.arrays(self.segment), self._subject.digest, self.segment.id),
            runs=self._runs,
            warmup=2 if first else 1,
            nodes=first and self.segment.id == WHOLE,
            memory=first,
        )
        if result.device != self._device:
            raise ProfileMalformed(
                f"two devices answer at {self._function.url}: {self._device.id} and {result.device.id}",
                path=self._function.url,
                hint="scale the function to one replica, or give the URL of one of them",
            )
        self.results.append(result)

    def timing(self) -> Timing:
        return timing([result.runs_s for result in self.results])

    def cost(self) -> SegmentCost:
        first = self.results[0]
        weights = sum(t.length for t in self._subject.bundle.weight_ranges(self.segment))
        return SegmentCost(
            run=self.timing(),
            decode_s=statistics.median(result.decode_s for result in self.results),
            encode_s=statistics.median(result.encode_s for result in self.results),
            input_bytes=first.input_bytes,
            output_bytes=first.output_bytes,
            weights_bytes=weights,
            activation_bytes=first.activation_bytes,
            memory_bytes=weights + first.arena_bytes,
        )

    def nodes(self, total_s: float) -> tuple[float, ...] | None:
        """Seconds of each node of the model, `total_s` in all; None where the nodes were not measured."""
        first = self.results[0]
        if not first.graph:
            return None
        return node_seconds(self._subject.model, read_optimised(first.graph), first.kernels, total_s)

    def warnings(self) -> Iterator[str]:
        run, name = self.timing(), f"segment {self.segment.id}"
        if not run.steady:
            yield (
                f"{name} was unsteady in {len(self.results)} series: the device changed its speed, or others use it"
                f" (quartiles {run.spread:.0%} of the median apart)"
            )
        if (min_runs := min(len(result.runs_s) for result in self.results)) < self._runs:
            yield f"{name} was run {min_runs} instead of {self._runs} times in a row: the function's deadline was near"
        if not self.results[0].arena_bytes:
            yield f"the memory of {name} was not measured: only its weights count"


def hop_cost(function: ProfiledFunction) -> HopCost:
    """The cost of a call itself and of each byte, from interleaved frames without and with a payload.

    Raises:
        As `ProfiledFunction.echo`.
    """
    for _ in range(2):
        function.echo(0, 0)
    small, large = _ECHO_BYTES
    count = large if function.echo(small, small).total_s < _SOON_S else small
    calls: dict[tuple[int, int], list[Call]] = {(0, 0): [], (count, 0): [], (0, count): []}
    for _ in range(_ECHOES):
        for (up, down), repeats in calls.items():
            repeats.append(function.echo(up, down))
    totals = {size: statistics.median(c.total_s for c in repeats) for size, repeats in calls.items()}
    served = {size: statistics.median(c.served_s for c in repeats) for size, repeats in calls.items()}

    def per_byte(seconds: Mapping[tuple[int, int], float], size: tuple[int, int]) -> float:
        return max(0.0, seconds[size] - seconds[0, 0]) / count

    return HopCost(
        fixed_s=totals[0, 0],
        up_byte_s=per_byte(totals, (count, 0)),
        down_byte_s=per_byte(totals, (0, count)),
        served_fixed_s=served[0, 0],
        served_byte_s=(per_byte(served, (count, 0)) + per_byte(served, (0, count))) / 2,
    )


def merged(older: Profile, newer: Profile) -> Profile:
    """`newer`, completed by the segments and codecs of `older`, a profile of the same content and device."""
    return replace(newer, segments={**older.segments, **newer.segments}, codecs={**older.codecs, **newer.codecs})
