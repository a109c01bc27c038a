"""Labels beside points of a chart: where each collides with no other text and hides the fewest marks.

Source: greedy placement over candidate positions, the most important label first (Christensen, Marks, Shieber,
"An empirical study of algorithms for point-feature label placement", 1995).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus_tools.figures.style import INK

# Directions of a label from its point: right, above, below and left first, since diagonals look loose.
_DIRECTIONS = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
# Distances from a point in typographic points; labels farther away than the first get a line to their point.
_DISTANCES = (7.0, 16.0, 28.0, 42.0)
# A step of distance is as bad as so many hidden marks.
_STEP_COST = 3.0
# Points between two texts, also apart in wider fonts then.
_GAP = 2.0
_ALIGNMENTS = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}


@dataclass(frozen=True)
class Label:
    """A text for a point (x, y) in data coordinates, of several, such as those of a curve; the first is preferred."""

    text: str
    points: Sequence[tuple[float, float]]
    colour: str = INK
    bold: bool = False
    size: float = 8.5


def place(axes: Any, labels: Sequence[Label]) -> list[Any]:
    """Annotate a chart whose layout is final with `labels`, the most important first; a label without room is left out.

    Returns matplotlib's annotations.
    """
    renderer = axes.figure.canvas.get_renderer()
    # With the title, the axis labels and the ticks.
    taken = [t.get_window_extent(renderer) for t in axes.figure.findobj(_is_text)]
    marks = _marks(axes)
    placed = []
    for label in labels:
        best = min(_positions(axes, label, renderer, taken, marks), default=None, key=lambda option: option[0])
        if best is not None:
            _, spot, box = best
            taken.append(box)
            placed.append(_annotate(axes, label, spot, line=spot.distance > _DISTANCES[0]))
    return placed


@dataclass(frozen=True)
class _Spot:
    """A place for a label: a point, a direction and a distance from the point."""

    point: tuple[float, float]
    direction: tuple[int, int]
    distance: float


def _is_text(artist: Any) -> bool:
    from matplotlib.text import Text

    return isinstance(artist, Text) and artist.get_visible() and bool(artist.get_text())


def _positions(
    axes: Any, label: Label, renderer: Any, taken: Sequence[Any], marks: Array
) -> Iterator[tuple[float, _Spot, Any]]:
    """The possible places: cost, place, and the text's box in pixels."""
    from matplotlib.transforms import Bbox

    # Measured once; a line to the point may cross other texts.
    trial = _annotate(axes, label, _Spot(label.points[0], (1, 1), 0.0), line=False)
    size = np.array(trial.get_window_extent(renderer).size)
    trial.remove()
    pixels = axes.figure.dpi / 72
    bounds = axes.bbox.get_points()
    # matplotlib draws no annotation of a point beyond the axes.
    points = [point for point in label.points if axes.bbox.contains(*axes.transData.transform(point))]
    every = itertools.product(enumerate(_DISTANCES), points, _DIRECTIONS)
    for (step, distance), point, direction in every:
        anchor = axes.transData.transform(point) + np.array(direction) * distance * pixels
        # From the anchor a text extends in its direction, and to both sides if centred.
        low = anchor + (np.array(direction) - 1) / 2 * size
        box = Bbox([low, low + size]).padded(_GAP * pixels)
        inside = (bounds[0] <= box.min).all() and (box.max <= bounds[1]).all()
        if inside and not any(box.overlaps(other) for other in taken):
            hidden = int(((marks >= box.min) & (marks <= box.max)).all(axis=1).sum())
            yield hidden + _STEP_COST * step, _Spot(point, direction, distance), box


def _annotate(axes: Any, label: Label, spot: _Spot, *, line: bool) -> Any:
    dx, dy = spot.direction
    horizontal, vertical = _ALIGNMENTS[dx][0], _ALIGNMENTS[dy][1]
    return axes.annotate(
        label.text,
        spot.point,
        xytext=(dx * spot.distance, dy * spot.distance),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=label.size,
        fontweight="bold" if label.bold else "normal",
        color=label.colour,
        arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "shrinkB": 3} if line else None,
    )


def _marks(axes: Any) -> Array:
    """Pixels of the chart's lines and markers, (count, 2); lines as points a few pixels apart."""
    from matplotlib.collections import LineCollection

    parts = [np.zeros((0, 2))]
    for line in axes.lines:
        path = line.get_transform().transform_path(line.get_path())
        parts.append(_dense(path.vertices))
    for collection in axes.collections:
        segments = [p.vertices for p in collection.get_paths()] if isinstance(collection, LineCollection) else []
        parts += [_dense(axes.transData.transform(segment)) for segment in segments]
        parts.append(axes.transData.transform(np.zeros((0, 2)) if segments else collection.get_offsets()))
    pixels = np.concatenate(parts)
    return pixels[np.isfinite(pixels).all(axis=1)]


def _dense(vertices: Array) -> Array:
    """Points along a line, at most four pixels apart within the canvas."""
    if len(vertices) < 2:
        return vertices
    steps = np.clip(np.ceil(np.abs(np.diff(vertices, axis=0)).max(axis=1) / 4), 1, 500).astype(int)
    parts = [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(vertices, vertices[1:], steps, strict=False)]
    return np.concatenate([*parts, vertices[-1:]])
