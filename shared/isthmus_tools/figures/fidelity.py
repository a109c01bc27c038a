"""The figure of rate against fidelity: a panel for each cut, a curve or marker for each codec, JPEG and WebP beside."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from isthmus.artifacts.choice import SPARSE_ID, TRANSFORM_ID
from isthmus.artifacts.fidelity import Entry, Fidelity, Reference
from isthmus.units import format_size
from isthmus_tools.figures.labels import Label, place
from isthmus_tools.figures.style import (
    BLUE,
    GREEN,
    INK,
    MAGENTA,
    ORANGE,
    VIOLET,
    bytes_axis,
    headline,
    new_figure,
    save,
    settle,
    style,
)

_CLOSER = f"{TRANSFORM_ID} with closer looks"
# Curves have colours; codecs without a quality are single points, named beside.
_COLOURS = {TRANSFORM_ID: GREEN, _CLOSER: GREEN, SPARSE_ID: VIOLET, "jpeg": BLUE, "webp": ORANGE}
_NAMES = {"jpeg": "JPEG of the input", "webp": "WebP of the input"}
# Markers beside colours, for printing in grey and for readers who cannot tell some colours apart.
_MARKERS = {TRANSFORM_ID: "o", _CLOSER: "D", SPARSE_ID: "s", "jpeg": "^", "webp": "v"}
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_MAX_COLUMN = 3
_Point: TypeAlias = Entry | Reference


def draw(
    fidelity: Fidelity,
    selected: Mapping[str, Entry | None],
    title: str,
    path: str | os.PathLike[str] | None = None,
) -> bytes:
    """The figure in the format of the suffix of `path`, else PNG; also written to `path` if given.

    Raises:
        ModelError: another suffix, the file cannot be written, or matplotlib is missing.
    """
    with style():
        return save(build(fidelity, selected, title), path)


def build(fidelity: Fidelity, selected: Mapping[str, Entry | None], title: str) -> Any:
    """The figure of the cuts in `selected`, each with its marked entry.

    The vertical axis is logarithmic in the share of changed predictions, which separates 99% from 99.9%; its top is
    the largest share that the number of inputs can distinguish from 100%.
    """
    # Panels side by side halve their text on a page.
    columns = 1 if len(selected) <= _MAX_COLUMN else 2
    rows = -(-len(selected) // columns)
    figure = new_figure(2.5 + 5.5 * columns, 1.3 + 3.7 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel in panels[len(selected) :]:
        panel.set_visible(False)
    for panel, cut in zip(panels, selected, strict=False):
        _axes(panel, fidelity, cut if len(selected) > 1 else "")
    for panel in panels[::columns]:
        panel.set_ylabel("unchanged predictions")
    headline(figure, _title(fidelity, selected, title), *_notes(fidelity))
    settle(figure)
    for panel, (cut, entry) in zip(panels, selected.items(), strict=False):
        place(panel, _curves(panel, fidelity, cut, entry))
    return figure


def _title(fidelity: Fidelity, selected: Mapping[str, Entry | None], title: str) -> str:
    """The finding at a single cut, else the subject."""
    (cut, entry), *others = selected.items()
    if others or entry is None:
        return f"{title}: bytes over the link and unchanged predictions"
    finding = f"{title}, cut {cut}: {format_size(entry.bytes)} keep {entry.agreement:.1%} of the predictions"
    rival = max(fidelity.references, key=lambda r: (r.agreement, -r.bytes), default=None)
    if rival is None:
        return finding
    return f"{finding}; the input as {rival.codec.replace('jpeg', 'JPEG').replace('webp', 'WebP')} of " + (
        f"{format_size(rival.bytes)} keeps {rival.agreement:.1%}"
    )


def _notes(fidelity: Fidelity) -> tuple[str, ...]:
    inputs, measure = fidelity.inputs, fidelity.measure
    same = f"the likeliest class of {measure.output}" if measure.output else f"outputs within {measure.tolerance:g}"
    return (
        f"{inputs.held_out} held-out inputs, {inputs.files} files; unchanged: {same}; bars: {fidelity.confidence:.0%}"
        " intervals",
        f"filled: nothing else sends fewer bytes for as much agreement; plans take {fidelity.limit:.1%} or more",
    )


def _axes(axes: Any, fidelity: Fidelity, title: str) -> None:
    """Scales and ticks; limits follow from all points, so that labels can be placed before the last is drawn."""
    floor = _floor(fidelity)
    axes.set_xscale("log")
    bytes_axis(axes.xaxis)
    every: list[_Point] = [*fidelity.entries, *fidelity.references]
    sizes = [max(1, p.bytes) for p in every]
    axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.8)
    lowest = min(p.agreement for p in every)
    top = _height(1.0, floor)
    axes.set_ylim(_height(lowest, floor) - 0.1 * top, top * 1.12)
    ticks = [t for t in _TICKS if t >= lowest - 0.1 and 1 - t > 1.5 * floor]
    axes.set_yticks([*(_height(t, floor) for t in ticks), top])
    axes.set_yticklabels([*(f"{t * 100:g}%" for t in ticks), "100%"])
    axes.set_xlabel("bytes over the link for one input: median; with closer looks, mean")
    axes.set_title(f"cut {title}" if title else "")
    axes.grid()


def _curves(axes: Any, fidelity: Fidelity, cut: str, selected: Entry | None) -> list[Label]:
    """Draw the points of a cut, and return their labels, the chosen entry's first."""
    floor = _floor(fidelity)
    every: list[_Point] = [*(e for e in fidelity.entries if e.cut == cut), *fidelity.references]
    families: dict[str, list[_Point]] = {}
    for each in sorted(every, key=lambda p: p.bytes):
        families.setdefault(_family(each), []).append(each)
    labels = []
    for name, points in families.items():
        colour, marker = _COLOURS.get(name, INK), _MARKERS.get(name, "P")
        xs, ys = [max(1, p.bytes) for p in points], [_height(p.agreement, floor) for p in points]
        axes.plot(xs, ys, color=colour, linewidth=1.4, linestyle="--" if name == _CLOSER else "-", zorder=2)
        faces = [colour if _leads(p, every) else "none" for p in points]
        axes.scatter(xs, ys, s=26, marker=marker, facecolors=faces, edgecolors=colour, linewidths=1.2, zorder=3)
        ends = list(zip(xs, ys, strict=True))
        # Labels at the finest quality, where the references lie apart.
        is_reference = isinstance(points[0], Reference)
        labels.append(Label(_NAMES.get(name, name), ends[-1:] if is_reference else ends, colour, name in _COLOURS))
        if is_reference:
            _interval(axes, points[-1], floor, colour)
    limit = _height(fidelity.limit, floor)
    axes.axhline(limit, color=INK, linestyle=":", linewidth=1)
    labels.append(Label(f"limit {fidelity.limit:.1%}", [(axes.get_xlim()[0], limit)]))
    if selected is None:
        return labels
    x, y = max(1, selected.bytes), _height(selected.agreement, floor)
    _interval(axes, selected, floor, MAGENTA)
    axes.scatter([x], [y], s=150, facecolors="none", edgecolors=MAGENTA, linewidths=2, zorder=4)
    looks = f" and {len(selected.looks)} closer looks" if selected.looks else ""
    text = f"chosen: {selected.choice.once}{looks}\n{format_size(selected.bytes)}, {selected.agreement:.1%}"
    return [Label(text, [(x, y)], MAGENTA, bold=True, size=9.5), *labels]


def _interval(axes: Any, point: _Point, floor: float, colour: str) -> None:
    axes.vlines(max(1, point.bytes), _height(point.low, floor), _height(point.high, floor), color=colour, linewidth=1)


def _leads(point: _Point, every: Sequence[_Point]) -> bool:
    """Whether `point` is of the Pareto front of bytes and agreement."""
    return not any(
        (p.bytes <= point.bytes and p.agreement > point.agreement)
        or (p.bytes < point.bytes and p.agreement == point.agreement)
        for p in every
    )


def _family(each: _Point) -> str:
    return _CLOSER if isinstance(each, Entry) and each.looks else each.codec


def _floor(fidelity: Fidelity) -> float:
    # Half an input: the share of changed predictions that a single change would round to.
    return 1 / (2 * fidelity.inputs.held_out)


def _height(share: float, floor: float) -> float:
    return -math.log10(max(floor, 1 - share))
