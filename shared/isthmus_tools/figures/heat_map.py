"""The figure of an explanation: the heat of its cells over the photo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import ModelError
from isthmus_tools.figures.style import NAVY, RED, new_figure, save

# Of the photo's longer side: as many as the figure shows.
_MAX_SIDE = 1200
# The heat's opacity at the largest change, so that the photo stays visible.
_OPACITY = 0.7


def draw(
    photo: Any,
    drops: Sequence[Sequence[float]],
    part: Sequence[float],
    title: str,
    path: str | os.PathLike[str] | None = None,
) -> bytes:
    """The figure as PNG, or as SVG for a `path` with that suffix; also written to `path` if given.

    `photo` is a picture of Pillow's; `drops` are rows of cells, how far the probability falls with each hidden; `part`
    is the part of the photo with the cells: left, top, width and height as shares of its sides.

    Raises:
        ModelError: matplotlib is missing, or the file cannot be written.
    """
    photo = photo.copy()
    photo.thumbnail((_MAX_SIDE, _MAX_SIDE))
    width, height = photo.size
    figure = new_figure(ModelError, figsize=(7, 7 * height / width + 0.6))
    axes = figure.add_subplot()
    # Grey, so that the heat shows on photos of any colour.
    axes.imshow(np.asarray(photo.convert("L")), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    left, top, right, bottom = (
        side * size
        for side, size in zip(
            (part[0], part[1], part[0] + part[2], part[1] + part[3]), (width, height, width, height), strict=True
        )
    )
    heat = np.asarray(drops, np.float64)
    most = float(np.abs(heat).max()) or 1.0
    axes.imshow(_coloured(heat / most), extent=(left, right, bottom, top), interpolation="bilinear")
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=NAVY, linewidth=0.8)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    axes.set_title(title, fontsize=11)
    kind = "svg" if path is not None and Path(path).suffix.lower() == ".svg" else "png"
    return save(figure, path, kind, ModelError, dpi=120)


def _coloured(heat: Any) -> Any:
    """RGBA of changes of -1 to 1: RED where hiding lowers the probability, NAVY where it raises it."""
    from matplotlib.colors import to_rgb

    colours = np.where(heat[..., np.newaxis] > 0, to_rgb(RED), to_rgb(NAVY))
    return np.concatenate([colours, _OPACITY * np.abs(heat)[..., np.newaxis]], axis=-1)
