"""Profiling of a model on a function: times of its segments and nodes, their memory, and the fixed cost of a call.

Segments run in interleaved rounds, so each meets the device at several moments. A segment is in steady state when the
medians of several rounds agree and the interquartile range is narrow; others get additional rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.device import Device
from isthmus.artifacts.profile import HopCost, Profile, SegmentCost, Timing, content_of
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import ProfileMalformed
from isthmus.wire.frame import Frame
from isthmus_tools.budget import UNLIMITED, Budget, Pace
from isthmus_tools.graph.load import read_optimised
from isthmus_tools.profiling.nodes import node_seconds
from isthmus_tools.profiling.remote import Echo, ProfiledFunction, SegmentMeasurement
from isthmus_tools.profiling.slow_edge import AT_FULL_SPEED, SlowEdge
from isthmus_tools.profiling.subject import Subject
from isthmus_tools.progress import Progress

# Rounds over all segments; more rounds sample more moments, fewer leave each series more runs.
ROUNDS = 5
# A device that other processes use for minutes stays unsteady; a profile must end nevertheless.
MAX_EXTRA_ROUNDS = 4
# Two equal medians happen by chance.
MIN_AGREEING = 3
# Between the medians of agreeing series, relative to the smallest: clock changes of laptops exceed it. Series
# within a third of it are preferred.
MAX_DRIFT = 0.15
# The interquartile range of all runs of agreeing series, relative to the median.
MAX_SPREAD = 0.25
# Smaller differences come from the clock and the scheduler, for any segment.
_NOISE_S = 100e-6
# The first runs allocate buffers and fill caches; later series find both warm.
_FIRST_WARMUP, _WARMUP = 2, 1
# Odd, so that the median is a measured call.
_ECHOES = 7
_CPU_RUNS = 10
_ECHO_BYTES = (2**16, 2**20)
# A link that carries the small echo faster than this carries the large echo within seconds.
_FAST_ECHO_S = 0.05


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
    """Profile the whole model and `segments` on the function's device, with at least `runs` runs of each.

    Segments that are not steady after ROUNDS rounds get up to MAX_EXTRA_ROUNDS more, and are then marked unsteady.
    When the budget is spent no further series begins; segments without a series are left out with a warning, except the
    whole model, which always has one.

    Raises:
        HopError, RequestError, SegmentError: the function cannot be reached, or refuses.
        ProfileMalformed: two devices respond at the function's URL.
    """
    device = function.device()
    whole = subject.bundle.segment(WHOLE)
    every = [_Series(function, subject, device, s, max(1, -(-runs // ROUNDS))) for s in (whole, *segments)]
    pace = Pace(ROUNDS * len(every))
    for number in range(1, ROUNDS + MAX_EXTRA_ROUNDS + 1):
        due = every if number <= ROUNDS else [s for s in every if s.rounds and not s.timing().steady]
        for i, series in enumerate(due, start=1):
            if budget.spent and every[0].rounds:
                break
            suffix = f" of {ROUNDS}" if number <= ROUNDS else ", it was unsteady"
            left = pace.left((number - 1) * len(every) + i - 1) if number <= ROUNDS else ""
            progress(f"{tier}, round {number}{suffix}: {series.segment.id}, {i} of {len(due)}{left}")
            series.run_round()
    # After the segments: their runs have brought the device to its working temperature and clock.
    progress(f"{tier}: the cost of a call itself and of encoding")
    skipped = [series.segment.id for series in every if not series.rounds]
    every = [series for series in every if series.rounds]
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
    """The rounds of a segment on a function, each a series of runs."""

    def __init__(
        self, function: ProfiledFunction, subject: Subject, device: Device, segment: Segment, runs: int
    ) -> None:
        self.segment = segment
        self._function, self._subject, self._device, self._runs = function, subject, device, runs
        self.rounds: list[SegmentMeasurement] = []

    def run_round(self) -> None:
        """Run another series; the first also measures memory and, for the whole model, nodes."""
        is_first = not self.rounds
        measurement = self._function.measure(
            Frame(self._subject.arrays(self.segment), self._subject.digest, self.segment.id),
            runs=self._runs,
            warmup=_FIRST_WARMUP if is_first else _WARMUP,
            nodes=is_first and self.segment.id == WHOLE,
            memory=is_first,
        )
        # Replicas behind a gateway may run on different machines; their times must not mix.
        if measurement.device != self._device:
            raise ProfileMalformed(
                f"two devices answer at {self._function.url}: {self._device.id} and {measurement.device.id}",
                path=self._function.url,
                hint="scale the function to one replica, or give the URL of one of them",
            )
        self.rounds.append(measurement)

    def timing(self) -> Timing:
        return timing([r.runs_s for r in self.rounds])

    def cost(self) -> SegmentCost:
        first = self.rounds[0]
        weights = sum(t.length for t in self._subject.bundle.weight_ranges(self.segment))
        return SegmentCost(
            run=self.timing(),
            decode_s=statistics.median(r.decode_s for r in self.rounds),
            encode_s=statistics.median(r.encode_s for r in self.rounds),
            input_bytes=first.input_bytes,
            output_bytes=first.output_bytes,
            weights_bytes=weights,
            activation_bytes=first.activation_bytes,
            memory_bytes=weights + first.arena_bytes,
        )

    def nodes(self, total_s: float) -> tuple[float, ...] | None:
        """Seconds of each node of the model, `total_s` in sum; None without a measurement of kernels."""
        first = self.rounds[0]
        if not first.graph:
            return None
        return node_seconds(self._subject.model, read_optimised(first.graph), first.kernels, total_s)

    def warnings(self) -> Iterator[str]:
        run, name = self.timing(), f"segment {self.segment.id}"
        if not run.steady:
            yield (
                f"{name} was unsteady in {len(self.rounds)} series: the device changed its speed, or others use it"
                f" (quartiles {run.spread:.0%} of the median apart)"
            )
        if (fewest := min(len(r.runs_s) for r in self.rounds)) < self._runs:
            yield f"{name} was run {fewest} instead of {self._runs} times in a row: the function's deadline was near"
        if not self.rounds[0].arena_bytes:
            yield f"the memory of {name} was not measured: only its weights count"


def timing(series: Sequence[Sequence[float]]) -> Timing:
    """Median and quartiles of the fastest agreeing series of runs; `series` are in the order of measurement.

    Other load only slows a device, so the fastest repeated speed is the device's own. The timing is unsteady where
    too few series agree, or where the last two series both depart from the median: the speed may have changed for good.
    """
    ordered = sorted(series, key=statistics.median)
    count = min(MIN_AGREEING, len(ordered))
    windows = [ordered[i : i + count] for i in range(len(ordered) - count + 1)]
    # A window's first and last series have its smallest and largest median.
    agreeing = [w for drift in (MAX_DRIFT / 3, MAX_DRIFT) for w in windows if _agree(*_extremes(w), drift)]
    window = agreeing[0] if agreeing else min(windows, key=lambda w: _extremes(w)[1] / (_extremes(w)[0] or 1.0))
    pooled = sorted(s for runs in window for s in runs)
    low, median, high = statistics.quantiles(pooled, n=4, method="inclusive") if len(pooled) > 1 else pooled * 3
    narrow = high - low <= max(MAX_SPREAD * median, _NOISE_S)
    recent = any(_agree(median, statistics.median(s), MAX_DRIFT) for s in series[-2:])
    return Timing(median, low, high, len(pooled), bool(agreeing) and narrow and recent)


def _extremes(window: Sequence[Sequence[float]]) -> tuple[float, float]:
    return statistics.median(window[0]), statistics.median(window[-1])


def _agree(a: float, b: float, drift: float) -> bool:
    return abs(a - b) <= max(drift * min(a, b), _NOISE_S)


def whole_cpu_seconds(function: ProfiledFunction, subject: Subject, edge: SlowEdge) -> float:
    """CPU seconds of a run of the whole model in one of the edge's processes, at full speed.

    Raises:
        As `ProfiledFunction.measure`.
    """
    whole = subject.bundle.segment(WHOLE)
    frame = Frame(subject.arrays(whole), subject.digest, whole.id)

    def spent(runs: int) -> float:
        before = edge.work().function_s
        function.measure(frame, runs=runs, warmup=0, memory=False)
        return edge.work().function_s - before

    spent(1)  # loads the segment
    # The difference of two calls is of runs alone, without HTTP and frames.
    return max(0.0, spent(1 + _CPU_RUNS) - spent(1)) / _CPU_RUNS


def _echo(function: ProfiledFunction, up: int, down: int, edge: SlowEdge) -> Echo:
    before = edge.work()
    echo = function.echo(up, down)
    if edge.slowdown == 1:
        return echo
    parts = {"total": echo.total_s, "preprocess": 0.0, "pack": 0.0}
    if edge.pids:
        parts["edge"] = echo.total_s
    return Echo(edge.slowed(parts, before, 0.0)["total"], echo.served_s)


def hop_cost(function: ProfiledFunction, edge: SlowEdge = AT_FULL_SPEED) -> HopCost:
    """The fixed cost of a call and the cost of each byte, from interleaved echoes with and without payloads.

    A caller at a slow `edge` has its CPU time multiplied, and the function too if it is one of the edge's processes.

    Raises:
        As `ProfiledFunction.echo`.
    """
    # Two calls to open the connection and warm the route.
    # The first calls open the connection.
    for _ in range(2):
        function.echo(0, 0)
    small, large = _ECHO_BYTES
    count = large if function.echo(small, small).total_s < _FAST_ECHO_S else small
    echoes: dict[tuple[int, int], list[Echo]] = {(0, 0): [], (count, 0): [], (0, count): []}
    for _ in range(_ECHOES):
        for (up, down), calls in echoes.items():
            calls.append(_echo(function, up, down, edge))
    totals = {size: statistics.median(c.total_s for c in calls) for size, calls in echoes.items()}
    served = {size: statistics.median(c.served_s for c in calls) for size, calls in echoes.items()}

    def per_byte(seconds: Mapping[tuple[int, int], float], size: tuple[int, int]) -> float:
        return max(0.0, seconds[size] - seconds[0, 0]) / count

    return HopCost(
        fixed_s=totals[0, 0],
        up_byte_s=per_byte(totals, (count, 0)),
        down_byte_s=per_byte(totals, (0, count)),
        served_fixed_s=served[0, 0],
        served_byte_s=(per_byte(served, (count, 0)) + per_byte(served, (0, count))) / 2,
    )
