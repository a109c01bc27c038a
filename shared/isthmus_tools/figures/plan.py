"""A plan as a picture: what crosses along the graph, every candidate over bandwidth, and the best over all links.

The only place beside `graph.picture` that imports matplotlib. Backgrounds are clear and every colour is a middle tone,
so that it can be read on white and on black.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import ModelError
from isthmus.registry import Registry, Resolved, SegmentCache
from isthmus.units import format_duration, format_rate
from isthmus_tools.figures.cuts import size_text
from isthmus_tools.graph import cuts, open_model, stored_examples
from isthmus_tools.graph.model import Model
from isthmus_tools.planner.candidates import CLOUD, EDGE, CandidateSet
from isthmus_tools.planner.choice import GridCell, over_link
from isthmus_tools.profiling import profiles

_INK, _FAINT = "#7d8590", "#8b949e"
_EDGE, _CLOUD, _BYTES, _BEST = "#d1682f", "#3f8fd2", "#2f9e6e", "#c24a8f"
_HUES = ("#3f8fd2", "#d1682f", "#2f9e6e", "#c24a8f", "#8f74d6", "#b08a1f", "#2a9fa8", "#c75151", "#6f9a2f", "#9a7b5f")
_DPI, _CELL = 130, 11


@dataclass(frozen=True)
class Along:
    """What lies along a model's graph: bytes that cross each prefix cut, and seconds up to it on both tiers."""

    positions: tuple[int, ...]
    bytes: tuple[int, ...]
    edge_s: tuple[float, ...]
    cloud_s: tuple[float, ...]
    marked: Mapping[str, int]

    @classmethod
    def of(cls, draft: CandidateSet) -> Along:
        """Of a plan in the making."""
        return _along(draft.model, draft.profiles, {n: c.position for n, c in draft.bundle.cuts.items()})

    @classmethod
    def published(cls, plan: Plan, found: Resolved, registry: Registry, cache: SegmentCache) -> Along:
        """Of a published plan, with the profiles that it was made with, as far as they are still there."""
        known = {p.tier: profiles.find(registry, found.bundle, p.tier, p.device) for p in plan.profiles}
        there = {tier: p for tier, p in known.items() if p is not None}
        with cache.locate(found.digest, WHOLE) as whole:
            bind, examples = found.bundle.source.get("bind", {}), stored_examples(found.bundle)
            model = open_model(whole.path, bind=bind, examples=examples, normalise=False)
        return _along(model, there, {n: c.position for n, c in found.bundle.cuts.items()})


def _along(model: Model, known: Mapping[str, Profile], places: Mapping[str, int | None]) -> Along:
    every = [c for c in cuts(model) if c.position is not None]
    at = [c.position for c in every if c.position is not None]

    def upto(tier: str) -> tuple[float, ...]:
        times = np.cumsum(known[tier].nodes) if tier in known else np.zeros(len(model.nodes))
        return tuple(float(times[i]) for i in at)

    marked = {name: place for name, place in places.items() if place is not None}
    return Along(tuple(at), tuple(c.bytes for c in every), upto(EDGE), upto(CLOUD), marked)


def draw(plan: Plan, cells: Sequence[Sequence[GridCell]], path: Path, along: Along) -> None:
    """Draw `plan` to `path`, as PNG or SVG by its ending: the graph, the candidates over bandwidth, and the sweep.

    Raises:
        ModelError: the file cannot be written, or matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ModelError("drawing needs matplotlib", hint="pip install 'isthmus[cli]'") from e
    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
        "axes.titlecolor": _INK,
        "svg.fonttype": "none",
        "svg.hashsalt": "isthmus",
        "font.size": 9.5,
    }
    data = io.BytesIO()
    with mpl.rc_context(style):
        panels = [bool(along.positions), True, bool(cells)]
        figure = Figure(figsize=(10, 4.1 * sum(panels)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = iter(np.atleast_1d(figure.subplots(sum(panels), 1)))
        if along.positions:
            _draw_graph(next(axes), plan, along)
        hues = _hues(plan, cells)
        _draw_bandwidth(next(axes), plan, hues)
        if cells:
            _draw_sweep(next(axes), cells, hues)
        figure.savefig(data, format=path.suffix[1:].lower(), dpi=_DPI, transparent=True)
    try:
        path.write_bytes(data.getvalue())
    except OSError as e:
        raise ModelError(f"{path} cannot be written: {e.strerror}") from e


def _draw_graph(axes: Any, plan: Plan, along: Along) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.step(along.positions, [max(1, b) for b in along.bytes], where="mid", color=_BYTES, linewidth=1.2)
    tried = {c.cuts[0] for c in plan.candidates if c.cuts and c.cuts[0] in along.marked}
    sizes = dict(zip(along.positions, along.bytes, strict=True))
    spots = [(along.marked[name], name) for name in tried if along.marked[name] in sizes]
    axes.scatter([x for x, _ in spots], [max(1, sizes[x]) for x, _ in spots], s=26, color=_BYTES, zorder=3)
    chosen = set(plan.choice.cuts)
    for x, name in spots:
        best = name in chosen
        axes.annotate(
            f"{name}: {size_text(sizes[x])}" if best else name,
            (x, max(1, sizes[x])),
            xytext=(0, -15 if best else 7),
            textcoords="offset points",
            ha="center",
            fontsize=9 if best else 7.5,
            fontweight="bold" if best else "normal",
            color=_BEST if best else _INK,
        )
        if best:
            axes.scatter([x], [max(1, sizes[x])], s=80, color=_BEST, zorder=4)
    axes.set_yscale("log", base=4)
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: size_text(int(n))))
    axes.set_ylabel("bytes that cross, raw", color=_BYTES)
    axes.set_xlabel("cut after node (position in topological order)")
    axes.grid(axis="y", color=_FAINT, alpha=0.25)
    time = axes.twinx()
    for seconds, colour, label in ((along.edge_s, _EDGE, "edge"), (along.cloud_s, _CLOUD, "cloud")):
        if any(seconds):
            shown = [s * 1e3 for s in seconds]
            time.plot(along.positions, shown, color=colour, linewidth=1.5, label=f"time on the {label}")
    time.legend(frameon=False, fontsize=8.5, loc="upper center", ncols=2, labelcolor=_INK)
    time.set_ylabel("computing up to the cut, ms")
    time.set_ylim(0, time.get_ylim()[1] * 1.12)
    axes.set_title(f"{plan.model}: what crosses, and what lies before it; candidates marked", loc="left")


def _draw_bandwidth(axes: Any, plan: Plan, hues: Mapping[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    able = [c for c in plan.candidates if not c.refused]
    rates = np.geomspace(0.3e6, 1e9, 160)
    rtt_s = plan.conditions.rtt_s
    lines = {c.name: np.array([_seconds(c, rate, rtt_s) for rate in rates]) * 1e3 for c in able}
    lowest = np.min(list(lines.values()), axis=0)
    for name, line in lines.items():
        if name not in hues:
            axes.plot(rates / 1e6, line, color=_FAINT, linewidth=0.6, alpha=0.45)
    for name, colour in hues.items():
        if name in lines:
            axes.plot(rates / 1e6, lines[name], color=colour, linewidth=1.6, label=name)
    axes.plot(rates / 1e6, lowest, color=_INK, linewidth=4, alpha=0.35, label="the lowest", zorder=1)
    if np.isfinite(plan.conditions.uplink_bps):
        at = plan.conditions.uplink_bps / 1e6
        axes.axvline(at, color=_INK, linestyle=":", linewidth=1)
        for c in able:
            if c.measured is not None:
                axes.scatter([at], [c.measured.median * 1e3], color=hues.get(c.name, _FAINT), s=26, zorder=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(lowest.min() * 0.8, lowest.max() * 12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("bandwidth, Mbit/s")
    axes.set_ylabel("one request, ms")
    axes.grid(color=_FAINT, alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right", labelcolor=_INK)
    dots = "; dots are measured" if plan.measured else ""
    axes.set_title(f"candidates over bandwidth as predicted, {format_duration(rtt_s)} of round trip{dots}", loc="left")


def _draw_sweep(axes: Any, cells: Sequence[Sequence[GridCell]], hues: Mapping[str, str]) -> None:
    from matplotlib.colors import ListedColormap

    count: dict[str, int] = {}
    for row in cells:
        for cell in row:
            count[cell.best] = count.get(cell.best, 0) + 1
    names = sorted(count, key=lambda n: -count[n])
    index = np.array([[names.index(cell.best) for cell in row] for row in cells])
    colours = [hues.get(name, _FAINT) for name in names]
    axes.imshow(index, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", origin="lower")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            name = cell.best.removeprefix("split-")
            # A long name takes two lines, so that it stays in its cell.
            shown = name.replace("-", "\n", 1) if len(name) > _CELL else name
            text = f"{shown}\n{cell.seconds * 1e3:.0f} ms" if name else "none"
            # The cells are opaque, so here white is readable in either scheme.
            axes.text(x, y, text, ha="center", va="center", fontsize=6.8, color="white", fontweight="bold")
    axes.set_xticks(range(len(cells[0])), [format_rate(c.conditions.uplink_bps) for c in cells[0]], fontsize=8)
    axes.set_yticks(range(len(cells)), [format_duration(r[0].conditions.rtt_s) for r in cells])
    axes.set_ylabel("round trip")
    axes.set_title("the best candidate for every link, as predicted", loc="left")


def _seconds(candidate: Candidate, rate: float, rtt_s: float) -> float:
    return over_link(candidate, Conditions(rate, rate, rtt_s)).predicted.total


def _hues(plan: Plan, cells: Sequence[Sequence[GridCell]]) -> dict[str, str]:
    """A colour for each candidate that is named: the chosen one, those that win somewhere, and the baselines."""
    wins: dict[str, int] = {}
    for cell in (cell for row in cells for cell in row):
        wins[cell.best] = wins.get(cell.best, 0) + 1
    winners = sorted((n for n in wins if n), key=lambda n: -wins[n])
    able = {c.name for c in plan.candidates if not c.refused}
    baselines = [n for n in ("edge-float", "cloud-photo", "cloud-raw") if n in able]
    named = dict.fromkeys([plan.chosen, *winners, *baselines])
    return dict(zip(named, _HUES, strict=False))
