"""Rate against fidelity, as a picture: a panel for each cut, a curve or mark for each codec, JPEG and WebP beside them.

Beside graph/picture.py, the only place that imports matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from isthmus.artifacts.choice import LOSSLESS_ID, SPARSE_ID, TRANSFORM_ID
from isthmus.artifacts.fidelity import Entry, Fidelity, Reference
from isthmus.errors import CalibrationError

_CLOSER = ", closer looks"
_COLOURS = {
    TRANSFORM_ID: "#0b6e4f",
    f"{TRANSFORM_ID}{_CLOSER}": "#3fb68b",
    "int8/1": "#c8553d",
    "int4/1": "#d98e04",
    "half/1": "#33415c",
    "bfloat16/1": "#7d8597",
    LOSSLESS_ID: "#5c4d7d",
    SPARSE_ID: "#a44a7b",
    "raw": "#000000",
    "jpeg": "#1f6fb2",
    "webp": "#7fb3d8",
}
_MARKS = ("o", "s", "D", "^", "v", "P", "X", "p", "*", "h")
_PAPER = "#fcfcfa"
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_Measured: TypeAlias = Entry | Reference


def draw(fidelity: Fidelity, cuts: Sequence[str], title: str, path: Path | None = None, format: str = "") -> bytes:
    """The curves as PNG or SVG, by the end of `path`'s name or `format`; also written to `path` if one is given.

    The vertical axis is logarithmic in the share of answers that differ, so that 99% and 99.9% are apart; its top is
    what so many inputs cannot tell from 100%. Its paper is its own, so it reads on light and dark pages alike.

    Raises:
        CalibrationError: the file's name ends otherwise or cannot be written, or matplotlib is missing.
    """
    kind = format or (path.suffix.lstrip(".").lower() if path is not None else "png")
    if kind not in ("png", "svg"):
        raise CalibrationError(f"{path} is neither .png nor .svg", path=str(path))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise CalibrationError("drawing needs matplotlib", hint="pip install 'isthmus[cli]'") from e
    columns = min(2, len(cuts))
    rows = -(-len(cuts) // columns)
    figure = Figure(figsize=(1 + 6 * columns, 1.6 + 4 * rows), layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(cuts) :]:
        panel.set_visible(False)
    shown: dict[str, Any] = {}
    for panel, cut in zip(panels, cuts, strict=False):
        shown |= _panel(panel, fidelity, cut)
    held_out = fidelity.inputs.held_out
    figure.suptitle(f"{title}: answers that stay the same, of {held_out} inputs held out", fontsize=11)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120, facecolor=_PAPER)
    if path is not None:
        try:
            path.write_bytes(buffer.getvalue())
        except OSError as e:
            raise CalibrationError(f"{path} cannot be written: {e.strerror}", path=str(path)) from e
    return buffer.getvalue()


def _panel(axes: Any, fidelity: Fidelity, cut: str) -> dict[str, Any]:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    floor = 1 / (2 * fidelity.inputs.held_out)
    axes.set_facecolor(_PAPER)
    shown = {}
    by_codec: dict[str, list[_Measured]] = {}
    every: list[_Measured] = [*(e for e in fidelity.entries if e.cut == cut), *fidelity.references]
    for each in every:
        by_codec.setdefault(_family(each), []).append(each)
    for i, (codec, found) in enumerate(by_codec.items()):
        found.sort(key=lambda e: e.bytes)
        xs, ys = [max(1, e.bytes) for e in found], [_height(e.agreement, floor) for e in found]
        colour, line = _COLOURS.get(codec, "#555555"), "-" if len(found) > 1 else "none"
        lows, highs = [_height(e.low, floor) for e in found], [_height(e.high, floor) for e in found]
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
    axes.set_xlabel("bytes that cross: payloads, median; with closer looks, mean")
    axes.set_title(f"cut {cut}", fontsize=10)
    axes.grid(alpha=0.25)
    return shown


def _family(each: _Measured) -> str:
    """What is drawn as one curve."""
    return f"{each.codec}{_CLOSER}" if isinstance(each, Entry) and each.looks else each.codec


def _height(share: float, floor: float) -> float:
    return -math.log10(max(floor, 1 - share))
