"""The figure of a plan: bytes and run time along the graph with the cuts of its candidates, and time over bandwidth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import MAX_ERROR, Conditions
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry import Registry, Resolved, SegmentCache
from isthmus.units import format_duration, format_rate, format_size
from isthmus_tools.figures.labels import Label, place
from isthmus_tools.figures.style import (
    BLUE,
    FAMILIES,
    GREEN,
    INK,
    MAGENTA,
    ORANGE,
    bytes_axis,
    headline,
    log_axis,
    new_figure,
    save,
    settle,
    style,
)
from isthmus_tools.graph import cuts, open_model, stored_examples
from isthmus_tools.graph.model import Model
from isthmus_tools.planner.candidates import CLOUD, EDGE, CandidateSet
from isthmus_tools.planner.choice import over_link
from isthmus_tools.profiling import profiles

# Ends of the bandwidth panel in bit/s: from a poor mobile link to a local network.
_RATES = (0.3e6, 1e9)
# Points of a curve where its label may be.
_ANCHORS = 12


@dataclass(frozen=True)
class GraphCurves:
    """Curves over the prefix cuts of a graph: bytes of boundary tensors, and seconds up to the cut on both tiers.

    `marked` are the positions of the bundle's cuts.
    """

    positions: tuple[int, ...]
    bytes: tuple[int, ...]
    edge_s: tuple[float, ...]
    cloud_s: tuple[float, ...]
    marked: Mapping[str, int]

    @classmethod
    def of(cls, candidates: CandidateSet) -> GraphCurves:
        """The curves of a candidate set, before its plan is published."""
        return _curves(candidates.model, candidates.profiles, candidates.bundle)

    @classmethod
    def published(cls, plan: Plan, version: Resolved, registry: Registry, cache: SegmentCache) -> GraphCurves:
        """The curves of a published plan; a tier whose profile has been removed has zero times."""
        bundle = version.bundle
        stored = {p.tier: profiles.find(registry, bundle, p.tier, p.device) for p in plan.profiles}
        with cache.locate(version.digest, WHOLE) as whole:
            bind, examples = bundle.source.get("bind", {}), stored_examples(bundle)
            model = open_model(whole.path, bind=bind, examples=examples, normalise=False)
        return _curves(model, {tier: p for tier, p in stored.items() if p is not None}, bundle)


def _curves(model: Model, by_tier: Mapping[str, Profile], bundle: Bundle) -> GraphCurves:
    every = [(c.position, c.bytes) for c in cuts(model) if c.position is not None]
    positions, sizes = tuple(p for p, _ in every), tuple(size for _, size in every)

    def seconds(tier: str) -> tuple[float, ...]:
        times = np.cumsum(by_tier[tier].nodes) if tier in by_tier else np.zeros(len(model.nodes))
        return tuple(float(times[i]) for i in positions)

    marked = {name: cut.position for name, cut in bundle.cuts.items() if cut.position is not None}
    return GraphCurves(positions, sizes, seconds(EDGE), seconds(CLOUD), marked)


def draw(plan: Plan, curves: GraphCurves, path: str | os.PathLike[str] | None = None) -> bytes:
    """The figure in the format of the suffix of `path`, else PNG; also written to `path` if given.

    Raises:
        ModelError: another suffix, the file cannot be written, or matplotlib is missing.
    """
    with style():
        return save(build(plan, curves), path)


def build(plan: Plan, curves: GraphCurves) -> Any:
    """The figure; without cuts there are no panels along the graph."""
    panels: dict[str, float] = {"sizes": 2.4, "times": 1.3} if curves.positions else {}
    panels["bandwidth"] = 3.2
    figure = new_figure(8, 1.2 + 1.1 * sum(panels.values()))
    grid = figure.add_gridspec(len(panels), 1, height_ratios=list(panels.values()))
    axes = {name: figure.add_subplot(grid[row]) for row, name in enumerate(panels)}
    labels = {}
    if curves.positions:
        labels["sizes"] = _draw_sizes(axes["sizes"], plan, curves)
        labels["times"] = _draw_times(axes["times"], curves)
        axes["sizes"].sharex(axes["times"])
        axes["sizes"].tick_params(labelbottom=False)
    labels["bandwidth"] = _draw_bandwidth(axes["bandwidth"], plan)
    kind = "measured" if plan.measured else "predicted"
    title = f"{plan.model} for {plan.objective}: {plan.chosen}, {format_ms(plan.choice.seconds)} a request, {kind}"
    headline(figure, title, f"{_link(plan)}; {constraints_text(plan)}")
    settle(figure)
    for name, each in labels.items():
        place(axes[name], each)
    return figure


def format_ms(seconds: float) -> str:
    """A request's time as in tables: `84.6 ms`."""
    return f"{seconds * 1e3:.1f} ms"


def constraints_text(plan: Plan) -> str:
    """The constraints that candidates meet, in words."""
    bounds, texts = plan.constraints, []
    if bounds.private_depth:
        texts.append(f"raw inputs stay, the first {bounds.private_depth} nodes run at the edge")
    if bounds.private_ssim is not None:
        texts.append(f"inputs reconstructed to {bounds.private_ssim:g} at most")
    if bounds.edge_memory_bytes is not None:
        texts.append(f"at most {format_size(bounds.edge_memory_bytes)} at the edge")
    if bounds.latency_s is not None:
        texts.append(f"at most {format_duration(bounds.latency_s)} a request")
    if bounds.max_disagreement is not None:
        texts.append(f"at least {1 - bounds.max_disagreement:.1%} unchanged predictions")
    if bounds.max_error is not None:
        texts.append(f"errors of at most {bounds.max_error:g}")
    elif bounds.max_disagreement is None:
        # Exits and variants are held to limits of their own, in bundles without calibration too.
        calibrated = any(c.error.calibrated for c in plan.candidates if c.exit is None and not c.head)
        texts.append(
            "codecs that calibration approved" if calibrated else f"errors of at most {MAX_ERROR:g} of an output"
        )
    return f"constraints: {', '.join(texts)}"


def _link(plan: Plan) -> str:
    link = plan.conditions
    if link.adds_nothing:
        return "over the network that is there"
    return f"{format_rate(link.up_bps)} up, {format_rate(link.down_bps)} down, {format_duration(link.rtt_s)} round trip"


def _draw_sizes(axes: Any, plan: Plan, curves: GraphCurves) -> list[Label]:
    from matplotlib.cbook import pts_to_midstep

    sizes = {x: max(1, size) for x, size in zip(curves.positions, curves.bytes, strict=True)}
    axes.plot(*pts_to_midstep(np.array(curves.positions), np.array(list(sizes.values()))), color=INK, linewidth=0.9)
    names = dict.fromkeys(c.cuts[0] for c in plan.candidates if c.cuts)
    spots = {name: curves.marked[name] for name in names if curves.marked.get(name) in sizes}
    axes.scatter(list(spots.values()), [sizes[x] for x in spots.values()], s=26, color=GREEN, zorder=3)
    axes.set_yscale("log")
    bytes_axis(axes.yaxis)
    axes.set_ylim(min(sizes.values()) / 2.5, max(sizes.values()) * 2)
    axes.set_ylabel("bytes that cross, raw")
    axes.set_title("cuts of the candidates along the graph")
    axes.grid(axis="y")
    labels = [
        Label(name, [(x, sizes[x])], GREEN)
        for name, x in sorted(spots.items(), key=lambda spot: sizes[spot[1]])
        if name not in plan.choice.cuts
    ]
    for name in (name for name in plan.choice.cuts if name in spots):
        point = (spots[name], sizes[spots[name]])
        axes.scatter(*point, s=110, facecolors="none", edgecolors=MAGENTA, linewidths=2, zorder=4)
        labels.insert(0, Label(f"{name}: {format_size(point[1])}", [point], MAGENTA, bold=True, size=9.5))
    return labels


def _draw_times(axes: Any, curves: GraphCurves) -> list[Label]:
    labels = []
    for seconds, colour, tier in ((curves.edge_s, BLUE, "edge"), (curves.cloud_s, ORANGE, "cloud")):
        if any(seconds):
            points = list(zip(curves.positions, (s * 1e3 for s in seconds), strict=True))
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5)
            labels.append(Label(f"on the {tier}: {format_ms(seconds[-1])}", points[::-_ANCHORS], colour, bold=True))
    axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-3))
    axes.set_ylabel("run up to it, ms")
    axes.set_xlabel("cut after node (position in topological order)")
    axes.grid(axis="y")
    return labels


def _draw_bandwidth(axes: Any, plan: Plan) -> list[Label]:
    usable = [c for c in plan.candidates if not c.refused]
    rates = np.geomspace(*_RATES, 160)
    rtt_s = plan.conditions.rtt_s
    lines = {c.name: np.array([_seconds(c, rate, rtt_s) for rate in rates]) * 1e3 for c in usable}
    # The lower envelope: the best candidate at each bandwidth.
    lowest = np.min(list(lines.values()), axis=0)
    winners = [min(lines, key=lambda name: lines[name][i]) for i in range(len(rates))]
    drawn = dict.fromkeys([plan.chosen, *winners, "edge-float", "cloud-photo", "cloud-raw"])
    hues = hues_of(c for c in usable if c.name in drawn)
    labels = []
    # The chosen candidate's label first.
    for name in (name for name in drawn if name in hues):
        is_chosen = name == plan.chosen
        axes.plot(rates / 1e6, lines[name], color=hues[name], linewidth=2.4 if is_chosen else 1.4)
        anchors = list(zip(rates / 1e6, lines[name], strict=True))[:: len(rates) // _ANCHORS]
        labels.append(Label(f"{name}, chosen" if is_chosen else name, anchors, hues[name], bold=True))
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Slow candidates at low bandwidth would squeeze the curves that compete.
    axes.set_ylim(lowest.min() * 0.7, lowest.max() * 12)
    if np.isfinite(plan.conditions.up_bps):
        at = plan.conditions.up_bps / 1e6
        axes.axvline(at, color=MAGENTA, linestyle=":", linewidth=1.4)
        for c in usable:
            if c.measured is not None:
                axes.scatter([at], [c.measured.median * 1e3], color=hues.get(c.name, INK), s=26, zorder=5)
        heights = [axes.get_ylim()[1] * share for share in (0.9, 0.6, 0.4)]
        labels.insert(0, Label("this plan's link", [(at, height) for height in heights], MAGENTA, bold=True))
    log_axis(axes.xaxis, lambda mbit: format_rate(mbit * 1e6).removesuffix("bit/s"))
    log_axis(axes.yaxis, lambda ms: f"{ms:g}")
    axes.set_xlabel("bandwidth, bit/s")
    axes.set_ylabel("one request, ms")
    axes.grid()
    hidden = len(usable) - len(hues)
    never = f"; {hidden} more are the fastest nowhere" if hidden else ""
    dots = "; dots: measured" if any(c.measured for c in usable) else ""
    axes.set_title(f"time over bandwidth, as predicted at {format_duration(rtt_s)} of round trip{dots}{never}")
    return labels


def _seconds(candidate: Candidate, rate: float, rtt_s: float) -> float:
    return over_link(candidate, Conditions(rate, rate, rtt_s)).predicted.total


def hues_of(candidates: Iterable[Candidate]) -> dict[str, str]:
    """A colour for each candidate, of its kind's family; splits with the same head and exit have the same colour."""
    hues: dict[str, str] = {}
    groups: dict[str, dict[str, str]] = {}
    for each in candidates:
        family, group = FAMILIES[each.kind], "/".join(each.cuts) or each.name
        group += f"~{each.head}" + " exit" * (each.exit is not None)
        colours = groups.setdefault(each.kind, {})
        hues[each.name] = colours.setdefault(group, family[len(colours) % len(family)])
    return hues
