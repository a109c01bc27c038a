"""The ways of the demo with their requests, and the planner's verdict: every figure follows from the requests."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from msgspec.structs import replace

from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Candidate, Measured
from isthmus.units import format_size
from isthmus_tools.engine.cpu_share import MAX_SLOWDOWN
from isthmus_tools.planner.choice import choose
from isthmus_tools.planner.costs import HEADERS_DOWN, HEADERS_UP
from isthmus_tools.planner.elimination import quartiles

# The ranges of the verdict's outlook: from narrow-band radio to a local network, from an edge like the cloud on.
_RATES = (0.05e6, 1e9)
_SLOWDOWNS = (1.0, MAX_SLOWDOWN)


@dataclass(frozen=True)
class TimedRequest:
    """Milliseconds of one request: all of it, at the edge, the model's run in the cloud, and the rest, the link's."""

    photo: str
    total_ms: float
    edge_ms: float
    link_ms: float
    cloud_ms: float


@dataclass(frozen=True)
class Way:
    """One way to serve the photos, with every request; times are medians of these.

    `up_bytes` and `down_bytes` are whole frames, medians of the photos. `photos_agree` counts the photos whose
    likeliest class is the uncut model's, `difference` is the largest of an output, relative to the largest output.
    `held_out` is the agreement that calibration measured on inputs held out; None without such a measurement. An
    `exact` way changes no number. A way that is `refused` may not serve, for that reason.
    """

    name: str
    what: str
    requests: tuple[TimedRequest, ...]
    classes: Mapping[str, str]
    up_bytes: int
    down_bytes: int
    photos_agree: int
    difference: float
    held_out: float | None
    exact: bool
    refused: str = ""

    @property
    def medians(self) -> dict[str, float]:
        """Median milliseconds: `total_ms`, `edge_ms`, `link_ms`, `cloud_ms`."""
        return {
            name: statistics.median(getattr(request, name) for request in self.requests)
            for name in ("total_ms", "edge_ms", "link_ms", "cloud_ms")
        }

    def document(self) -> dict[str, Any]:
        """This way, JSON-ready."""
        return {**asdict(self), **self.medians}


@dataclass(frozen=True)
class Range:
    """The best way from a value on, up to the next range's."""

    best: str
    start: float


@dataclass(frozen=True)
class Verdict:
    """The best way here, why, and where another would be: over bandwidth and over edge slowdown, each alone."""

    best: str
    reasons: tuple[str, ...]
    by_bandwidth: tuple[Range, ...]
    by_slowdown: tuple[Range, ...]


def measured_as(candidate: Candidate, way: Way) -> Candidate:
    """The candidate with the measurement of its way, as the planner's choice takes it."""
    totals = sorted(r.total_ms / 1000 for r in way.requests)
    low, high = quartiles(totals)
    measured = Measured(statistics.median(totals), low, high, len(totals))
    return replace(candidate, measured=measured, up_bytes=way.up_bytes, down_bytes=way.down_bytes)


def judge(measured: Sequence[Candidate], ways: Sequence[Way], link: Conditions, slowdown: float) -> Verdict:
    """The planner's choice for latency, with its reasons, and the best ways of other links and edges.

    Other links and edges are linear in what was measured: bytes over the rate, time at the edge over its speed.
    """
    _, best, reasons = choose(measured, "latency", Constraints())
    admissible = [way for way in ways if not way.refused]
    more = [f"{way.name} may not serve: {way.refused}" for way in ways if way.refused]
    chosen = next(way for way in ways if way.name == best.name)
    chosen_ms = chosen.medians["total_ms"]
    more += [f"{way.name} would be faster" for way in ways if way.refused and way.medians["total_ms"] < chosen_ms]
    more.append(
        f"{best.name} takes {chosen.medians['edge_ms']:.0f} ms at the edge, {chosen.medians['link_ms']:.0f} ms on the"
        f" link for {format_size(chosen.up_bytes)}, {chosen.medians['cloud_ms']:.0f} ms in the cloud"
    )
    by_bandwidth: tuple[Range, ...] = ()
    if not math.isinf(link.up_bps):
        # Over seconds per bit, which a link's time is linear in.
        here, share = 1 / link.up_bps, link.up_bps / link.down_bps
        lines = {}
        for way in admissible:
            bits = 8 * (way.up_bytes + HEADERS_UP + share * (way.down_bytes + HEADERS_DOWN)) if way.up_bytes else 0.0
            lines[way.name] = (way.medians["total_ms"] / 1000 - bits * here, bits)
        steps = lower_envelope(lines, 1 / _RATES[1], 1 / _RATES[0])
        ends = [*(start for _, start in steps[1:]), 1 / _RATES[0]]
        by_bandwidth = tuple(Range(name, 1 / end) for (name, _), end in zip(steps, ends, strict=True))[::-1]
    lines = {}
    for way in admissible:
        edge_ms = way.medians["edge_ms"]
        lines[way.name] = (way.medians["total_ms"] - edge_ms, edge_ms / slowdown)
    by_slowdown = tuple(Range(name, start) for name, start in lower_envelope(lines, *_SLOWDOWNS))
    return Verdict(best.name, (*reasons, *more), by_bandwidth, by_slowdown)


def lower_envelope(lines: Mapping[str, tuple[float, float]], low: float, high: float) -> list[tuple[str, float]]:
    """The lowest of lines (value at 0, slope) between `low` and `high`: each with where it begins, in order."""
    crossings = (
        (b - a) / (slope_a - slope_b)
        for (a, slope_a), (b, slope_b) in itertools.combinations(lines.values(), 2)
        if slope_a != slope_b
    )
    places = [low, *sorted(x for x in crossings if low < x < high), high]
    steps: list[tuple[str, float]] = []
    for start, end in itertools.pairwise(places):
        middle = (start + end) / 2
        lowest = min(lines, key=lambda name: lines[name][0] + lines[name][1] * middle)
        if not steps or steps[-1][0] != lowest:
            steps.append((lowest, start))
    return steps
