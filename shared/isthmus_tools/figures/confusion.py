"""The figure of an evaluation: its confusion matrix, each row as shares of the true class."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from isthmus_tools.figures.style import BLUE, INK, headline, new_figure, save, settle, style
from isthmus_tools.learning.training.evaluation import HeldOutScores

# Beyond, numbers in cells would overlap.
_MAX_NUMBERED = 30
# A darker cell has white numbers.
_DARK = 0.6


def draw(evaluation: HeldOutScores, path: str | os.PathLike[str] | None = None) -> bytes:
    """The figure in the format of the suffix of `path`, else PNG; also written to `path` if given.

    Raises:
        ModelError: another suffix, matplotlib is missing, or the file cannot be written.
    """
    with style():
        return save(build(evaluation), path)


def build(evaluation: HeldOutScores) -> Any:
    """The figure: rows are true classes, columns predicted ones."""
    counts = np.array(evaluation.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = len(counts)
    side = min(12.0, max(6.5, 2 + 0.5 * size))
    figure = new_figure(side, side)
    axes = figure.subplots()
    # A single colour, its opacity the share: readable on light and dark pages.
    from matplotlib.colors import to_rgb

    cells = np.empty((size, size, 4))
    cells[..., :3], cells[..., 3] = to_rgb(BLUE), shares
    axes.imshow(cells)
    names = [each.label for each in evaluation.classes]
    axes.set_xticks(range(size), names, rotation=90 if size > 5 else 0)
    axes.set_yticks(range(size), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if size <= _MAX_NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > _DARK else INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    accuracy = evaluation.accuracy
    headline(
        figure,
        f"{accuracy.value:.1%} of {evaluation.samples} held-out samples right",
        f"95% interval: {100 * accuracy.low:.0f} to {100 * accuracy.high:.0f}%",
        "opacity: share of the true class",
    )
    settle(figure)
    return figure
