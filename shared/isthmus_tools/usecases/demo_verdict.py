"""The ways of the demo, and the planner's verdict: every figure follows from what was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.artifacts.choice import PHOTO_ID
from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.json_documents import builtins
from isthmus.artifacts.plan import Candidate, Coding
from isthmus.errors import HopUnavailable
from isthmus.units import format_size
from isthmus_tools.engine.cpu_share import MAX_SLOWDOWN
from isthmus_tools.planner.choice import choose
from isthmus_tools.planner.costs import HEADERS_DOWN, HEADERS_UP

# The ranges of the verdict's outlook: from narrow-band radio to a local network, from an edge like the cloud on.
_RATES = (0.05e6, 1e9)
_SLOWDOWNS = (1.0, MAX_SLOWDOWN)


@dataclass(frozen=True)
class Way:
    """One way to serve the photos: the planner's candidate as measured, and what it predicted.

    The candidate's bytes are whole frames, medians of the photos. `photos_agree` counts the photos whose likeliest
    class is the uncut model's, `difference` is the largest of an output, relative to the largest output.
    `edge_weight_bytes` are the weights of what runs at the edge.
    """

    what: str
    candidate: Candidate
    classes: Mapping[str, str]
    photos_agree: int
    difference: float
    edge_weight_bytes: int = 0

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.candidate.name

    @property
    def exact(self) -> bool:
        """Whether the way changes no number: its tensors are sent raw, or the photo as it came."""
        return all(coding == Coding(PHOTO_ID) for coding in self.candidate.codecs.values())

    @property
    def held_out(self) -> float | None:
        """The agreement that calibration measured on inputs held out; None without such a measurement."""
        error = self.candidate.error
        return 1 - error.disagreement if error.inputs else None

    @property
    def medians(self) -> dict[str, float]:
        """Milliseconds that add up: the medians `total_ms`, `edge_ms` and `cloud_ms`, and the rest, `link_ms`.

        Raises:
            HopUnavailable: the way failed over the link.
        """
        measured = self.candidate.measured
        if measured is None:
            raise HopUnavailable(f"{self.name} was not measured: {self.candidate.refused}")
        parts = measured.parts
        total, cloud = measured.median, parts.get("cloud_run", 0.0)
        # Medians of parts need not add up to the median of their sums; all of a request at the edge is the edge's.
        edge = total - cloud
        if self.candidate.kind != "edge":
            edge = min(edge, parts["preprocess"] + parts["pack"] + parts.get("edge", 0.0))
        seconds = {"total_ms": total, "edge_ms": edge, "link_ms": total - cloud - edge, "cloud_ms": cloud}
        return {name: 1000 * s for name, s in seconds.items()}

    def document(self) -> dict[str, Any]:
        """This way, JSON-ready; seconds under `measured`, milliseconds beside it."""
        c = self.candidate
        return {
            "name": c.name,
            "what": self.what,
            "kind": c.kind,
            "measured": builtins(c)["measured"],
            "classes": dict(self.classes),
            "up_bytes": c.up_bytes,
            "down_bytes": c.down_bytes,
            "photos_agree": self.photos_agree,
            "difference": self.difference,
            "edge_weight_bytes": self.edge_weight_bytes,
            "held_out": self.held_out,
            "exact": self.exact,
            "refused": c.refused,
            **self.medians,
        }


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


def judge(ways: Sequence[Way], link: Conditions, slowdown: float, *, private: bool = False) -> Verdict:
    """The planner's choice for latency, with its reasons, and the best ways of other links and edges.

    With `private`, only ways that send no photo compete. Other links and edges are linear in what was measured: bytes
    over the rate, time at the edge over its speed.

    Raises:
        HopUnavailable: a way failed over the link.
    """
    competing = [way for way in ways if not (private and way.candidate.kind == "cloud")]
    _, best, reasons = choose([way.candidate for way in competing], "latency", Constraints())
    chosen = next(way for way in ways if way.name == best.name)
    ms = chosen.medians
    more = []
    for way in (way for way in competing if way.candidate.refused):
        more.append(f"{way.name} may not serve: {way.candidate.refused}")
        if way.medians["total_ms"] < ms["total_ms"]:
            more.append(f"{way.name} would be faster")
    more.append(
        f"{best.name} takes {ms['edge_ms']:.0f} ms at the edge, {ms['link_ms']:.0f} ms on the link for"
        f" {format_size(chosen.candidate.up_bytes)}, {ms['cloud_ms']:.0f} ms in the cloud"
    )
    if private:
        more += _gains(ways, chosen)
    able = [way for way in competing if not way.candidate.refused]
    by_slowdown = {
        way.name: (way.medians["total_ms"] - way.medians["edge_ms"], way.medians["edge_ms"] / slowdown) for way in able
    }
    ranges = tuple(Range(name, start) for name, start in lower_envelope(by_slowdown, *_SLOWDOWNS))
    return Verdict(best.name, (*reasons, *more), _by_bandwidth(able, link), ranges)


def _gains(ways: Sequence[Way], split: Way) -> list[str]:
    """What a split gains beside the whole model on one side, in one sentence; none for other ways."""
    edge, cloud = (next((w for w in ways if w.candidate.kind == kind), None) for kind in ("edge", "cloud"))
    if split.candidate.kind != "split" or edge is None or cloud is None:
        return []
    return [
        f"beside {cloud.name}: no photo leaves the edge, {format_size(split.candidate.up_bytes)} over the link instead"
        f" of {format_size(cloud.candidate.up_bytes)}, {split.medians['cloud_ms']:.1f} ms of the cloud instead of"
        f" {cloud.medians['cloud_ms']:.1f} ms",
        f"beside {edge.name}: {format_size(split.edge_weight_bytes)} of weights at the edge instead of"
        f" {format_size(edge.edge_weight_bytes)}",
    ]


def _by_bandwidth(ways: Sequence[Way], link: Conditions) -> tuple[Range, ...]:
    """The best way over the uplink's rate, the downlink in proportion; none for an unlimited link."""
    if math.isinf(link.up_bps):
        return ()
    # Over seconds per bit, which a link's time is linear in.
    here, share = 1 / link.up_bps, link.up_bps / link.down_bps
    lines = {}
    for way in ways:
        up, down = way.candidate.up_bytes, way.candidate.down_bytes
        bits = 8 * (up + HEADERS_UP + share * (down + HEADERS_DOWN)) if up else 0.0
        lines[way.name] = (way.medians["total_ms"] / 1000 - bits * here, bits)
    steps = lower_envelope(lines, 1 / _RATES[1], 1 / _RATES[0])
    ends = [*(start for _, start in steps[1:]), 1 / _RATES[0]]
    return tuple(Range(name, 1 / end) for (name, _), end in zip(steps, ends, strict=True))[::-1]


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
