"""The figure of rate against fidelity: a panel for each cut, a curve or marker for each codec, JPEG and WebP beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from isthmus.artifacts.choice import LOSSLESS_ID, SPARSE_ID, TRANSFORM_ID
from isthmus.artifacts.fidelity import Entry, Fidelity, Reference
from isthmus.errors import CalibrationError
from isthmus_tools.figures.style import GREEN, NAVY, RED, new_figure, save

_CLOSER = ", closer looks"
_COLOURS = {
    TRANSFORM_ID: GREEN,
    f"{TRANSFORM_ID}{_CLOSER}": "#3fb68b",
    "int8/1": RED,
    "int4/1": "#d98e04",
    "half/1": NAVY,
    "bfloat16/1": "#7d8597",
    LOSSLESS_ID: "#5c4d7d",
    SPARSE_ID: "#a44a7b",
    "raw": "#000000",
    "jpeg": "#1f6fb2",
    "webp": "#7fb3d8",
}
# Markers beside colours, for printing in grey and for readers who cannot tell some colours apart.
_MARKS = ("o", "s", "D", "^", "v", "P", "X", "p", "*", "h")
# An opaque background of its own: black markers must stay visible on dark pages.
_PAPER = "#fcfcfa"
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_Point: TypeAlias = Entry | Reference


def draw(fidelity: Fidelity, cuts: Sequence[str], title: str, path: Path | None = None, format: str = "") -> bytes:
    """The figure as PNG or SVG, by `format` or the suffix of `path`; also written to `path` if given.

    The vertical axis is logarithmic in the share of changed predictions, which separates 99% from 99.9%; its top is
    the largest share that the number of inputs can distinguish from 100%.

    Raises:
        CalibrationError: another suffix, the file cannot be written, or matplotlib is missing.
    """
    kind = format or (path.suffix.lstrip(".").lower() if path is not None else "png")
    if kind not in ("png", "svg"):
        raise CalibrationError(f"{path} is neither .png nor .svg", path=str(path))
    # Two panels fit a page's width.
    columns = min(2, len(cuts))
    rows = -(-len(cuts) // columns)
    figure = new_figure(CalibrationError, figsize=(1 + 6 * columns, 1.6 + 4 * rows), facecolor=_PAPER)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(cuts) :]:
        panel.set_visible(False)
    shown: dict[str, Any] = {}
    for panel, cut in zip(panels, cuts, strict=False):
        shown |= _panel(panel, fidelity, cut)
    held_out = fidelity.inputs.held_out
    figure.suptitle(f"{title}: unchanged predictions, of {held_out} held-out inputs", fontsize=11)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return save(figure, path, kind, CalibrationError, dpi=120, facecolor=_PAPER)


def _panel(axes: Any, fidelity: Fidelity, cut: str) -> dict[str, Any]:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # Half an input: the share of changed predictions that a single change would round to.
    floor = 1 / (2 * fidelity.inputs.held_out)
    axes.set_facecolor(_PAPER)
    shown = {}
    by_codec: dict[str, list[_Point]] = {}
    every: list[_Point] = [*(e for e in fidelity.entries if e.cut == cut), *fidelity.references]
    for each in every:
        by_codec.setdefault(_family(each), []).append(each)
    for i, (codec, points) in enumerate(by_codec.items()):
        points.sort(key=lambda e: e.bytes)
        xs, ys = [max(1, e.bytes) for e in points], [_height(e.agreement, floor) for e in points]
        colour, line = _COLOURS.get(codec, "#555555"), "-" if len(points) > 1 else "none"
        lows, highs = [_height(e.low, floor) for e in points], [_height(e.high, floor) for e in points]
        axes.vlines(xs, lows, highs, color=colour, alpha=0.25, linewidth=1)
        (shown[codec],) = axes.plot(
            xs, ys, marker=_MARKS[i % len(_MARKS)], linestyle=line, color=colour, markersize=5, linewidth=1.4
        )
    shown["limit"] = axes.axhline(_height(fidelity.limit, floor), color="#888888", linestyle="--", linewidth=1)
    ticks = [t for t in _TICKS if 1 - t > 1.5 * floor]
    axes.set_yticks([*(_height(t, floor) for t in ticks), _height(1.0, floor)])
    axes.set_yticklabels([*(f"{t * 100:g}%" for t in ticks), "100%"])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1000:g} kB" if n >= 1000 else f"{n:g} B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes of encoded boundary tensors: median; with closer looks, mean")
    axes.set_title(f"cut {cut}", fontsize=10)
    axes.grid(alpha=0.25)
    return shown


def _family(each: _Point) -> str:
    return f"{each.codec}{_CLOSER}" if isinstance(each, Entry) and each.looks else each.codec


def _height(share: float, floor: float) -> float:
    return -math.log10(max(floor, 1 - share))
