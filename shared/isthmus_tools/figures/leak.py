"""The figure of leakage: held-out inputs above, and below reconstructions by cut and codec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from isthmus.artifacts.leak import SSIM, Leak
from isthmus_tools.figures.style import BLUE, headline, new_figure, save, settle, style

# Inches of a picture's width, and the distance of pictures in widths.
_CELL, _STRIDE = 1.05, 1.06


def draw(
    leak: Leak,
    originals: Any,
    baseline: Any,
    reconstructions: Mapping[tuple[str, str], Any],
    title: str,
    path: str | os.PathLike[str] | None = None,
) -> bytes:
    """The figure in the format of the suffix of `path`, else PNG; also written to `path` if given.

    `reconstructions` are by cut and codec. Shapes: (inputs, channels, height, width); baseline without inputs.

    Raises:
        ModelError: another suffix, matplotlib is missing, or the file cannot be written.
    """
    with style():
        return save(build(leak, originals, baseline, reconstructions, title), path)


def build(leak: Leak, originals: Any, baseline: Any, reconstructions: Mapping[tuple[str, str], Any], title: str) -> Any:
    """The figure: a row of inputs, a row for each measured cut and codec, and the mean input as the last row."""
    name = "SSIM" if leak.measure == SSIM else "correlation"
    likeness = {(e.cut, str(e.choice)): e.likeness.similarity for e in leak.entries}
    rows: list[tuple[str, Any]] = [("input", originals)]
    rows += [
        (f"cut {cut}\n{codec}\n{name} {likeness[cut, codec]:.2f}", pictures)
        for (cut, codec), pictures in reconstructions.items()
    ]
    rows.append((f"mean input\n{name} {leak.baseline.similarity:.2f}", np.repeat(baseline[None], len(originals), 0)))
    columns = len(originals)
    aspect = _aspect(originals, leak)
    figure = new_figure(max(6.0, 1.6 + _CELL * columns), 1.2 + _CELL * aspect * len(rows))
    # One pair of axes, with a unit square for each picture: the headline belongs to axes as wide as the figure.
    axes = figure.subplots()
    for row, (_, pictures) in enumerate(rows):
        for column, picture in enumerate(pictures):
            _show(axes, picture, leak, column * _STRIDE, row * _STRIDE)
    axes.set_xlim(0, columns * _STRIDE)
    axes.set_ylim(len(rows) * _STRIDE, 0)
    axes.set_aspect(aspect)
    axes.set_xticks([])
    axes.set_yticks([row * _STRIDE + 0.5 for row in range(len(rows))], [label for label, _ in rows], fontsize=8)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    headline(
        figure,
        f"What the cuts of {title} reveal",
        f"held-out inputs, reconstructed by the strongest attacker of those tried, trained on {leak.inputs.trained}"
        " public ones; a better attacker may do better",
    )
    settle(figure)
    return figure


def _aspect(pictures: Any, leak: Leak) -> float:
    return float(pictures.shape[2] / pictures.shape[3]) if leak.measure == SSIM else 0.5


def _show(axes: Any, picture: Any, leak: Leak, left: float, top: float) -> None:
    """Draw a picture into the unit square below and right of a point."""
    if leak.measure != SSIM:
        # A line for each channel of series, a single line for a vector.
        lines = picture.reshape(-1, picture.shape[2]) if picture.shape[2] > 1 else picture.reshape(1, -1)
        low, span = float(lines.min()), float(np.ptp(lines)) or 1.0
        for line in lines:
            axes.plot(np.linspace(left, left + 1, len(line)), top + 1 - (line - low) / span, color=BLUE, linewidth=0.8)
        return
    extent = (left, left + 1, top + 1, top)
    if len(picture) in (3, 4):
        axes.imshow(np.clip(picture[:3].transpose(1, 2, 0), 0, 1), interpolation="nearest", extent=extent)
    else:
        axes.imshow(picture[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
