"""The figure of an explanation: the heat of its cells over the photo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus_tools.figures.style import BLUE, INK, ORANGE, headline, new_figure, save, settle, style

# Of the photo's longer side: as many pixels as the figure shows.
_MAX_SIDE = 1400
# The heat's opacity at the largest change, so that the photo stays visible.
_OPACITY = 0.75


def draw(
    photo: Any,
    drops: Sequence[Sequence[float]],
    part: Sequence[float],
    title: str,
    path: str | os.PathLike[str] | None = None,
) -> bytes:
    """The figure in the format of the suffix of `path`, else PNG; also written to `path` if given.

    `photo` is a picture of Pillow's; `drops` are rows of cells, how far the probability falls with each hidden; `part`
    is the part of the photo with the cells: left, top, width and height as shares of its sides.

    Raises:
        ModelError: another suffix, matplotlib is missing, or the file cannot be written.
    """
    with style():
        return save(build(photo, drops, part, title), path)


def build(photo: Any, drops: Sequence[Sequence[float]], part: Sequence[float], title: str) -> Any:
    """The figure: the photo in grey, since heat would not show on every colour, and the cells over its part."""
    photo = photo.convert("L")
    photo.thumbnail((_MAX_SIDE, _MAX_SIDE))
    width, height = photo.size
    figure = new_figure(8, 0.8 + min(10.0, 8 * height / width))
    axes = figure.subplots()
    axes.imshow(np.asarray(photo), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    left, right = part[0] * width, (part[0] + part[2]) * width
    top, bottom = part[1] * height, (part[1] + part[3]) * height
    heat = np.asarray(drops, np.float64)
    most = float(np.abs(heat).max()) or 1.0
    axes.imshow(_coloured(heat / most), extent=(left, right, bottom, top), interpolation="bilinear")
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=INK, linewidth=1)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    headline(figure, title, _legend(heat))
    settle(figure)
    return figure


def _legend(heat: Any) -> str:
    falls = (
        f"orange: the probability falls where this is hidden, by up to {100 * max(0.0, float(heat.max())):.1f} points"
    )
    rises = max(0.0, -float(heat.min()))
    return f"{falls}; blue: it rises, by up to {100 * rises:.1f}" if rises >= 0.0005 else falls


def _coloured(heat: Any) -> Any:
    """RGBA of changes of -1 to 1."""
    from matplotlib.colors import to_rgb

    colours = np.where(heat[..., np.newaxis] > 0, to_rgb(ORANGE), to_rgb(BLUE))
    return np.concatenate([colours, _OPACITY * np.abs(heat)[..., np.newaxis]], axis=-1)
