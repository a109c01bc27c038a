"""The figure of a model's cuts: bytes of the boundary tensors after each node, and the share of work before it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from isthmus.errors import ModelError
from isthmus.units import format_size
from isthmus_tools.figures.labels import Label, place
from isthmus_tools.figures.style import (
    BLUE,
    GREEN,
    INK,
    MAGENTA,
    ORANGE,
    bytes_axis,
    headline,
    new_figure,
    save,
    settle,
    style,
)
from isthmus_tools.graph.cuts import CutInfo, cuts
from isthmus_tools.graph.model import Model

# Narrow cuts that a label names beside the default.
_MAX_LABELS = 6
_COUNT_UNITS = ((10**9, " G"), (10**6, " M"), (10**3, " k"))


def draw(model: Model, title: str, path: str | os.PathLike[str] | None = None, default: str = "") -> bytes:
    """The figure in the format of the suffix of `path`, else PNG; also written to `path` if given.

    Raises:
        ModelError: the model has no cut, another suffix, matplotlib is missing, or the file cannot be written.
    """
    with style():
        return save(build(model, title, default), path)


def build(model: Model, title: str, default: str = "") -> Any:
    """The figure; `default` is the name of the cut that an import takes, which is marked.

    Units: bytes of raw tensors on a logarithmic axis; multiply-accumulates as a share of the whole model's.

    Raises:
        ModelError: the model has no cut.
    """
    every = [c for c in cuts(model) if c.position is not None]
    if not every:
        raise ModelError(f"{title} has no cut to draw")
    figure = new_figure(8, 5)
    sizes, work = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    input_bytes = sum(model.nbytes(v) for v in model.inputs)
    labels = _draw_sizes(sizes, every, input_bytes, default)
    positions = [_position(c) for c in every]
    work.fill_between(positions, [100 * c.macs_before for c in every], color=ORANGE, alpha=0.25, linewidth=0)
    work.plot(positions, [100 * c.macs_before for c in every], color=ORANGE, linewidth=1.4)
    work.set_ylabel("work before, %")
    work.set_ylim(0, 105)
    work.grid(axis="y")
    work.set_xlabel("cut after node (position in topological order)")
    work.set_xlim(-0.02 * len(model.nodes) - 0.5, 1.02 * len(model.nodes) - 0.5)
    single = sum(len(c.tensors) == 1 for c in every)
    headline(
        figure,
        f"{title}: bytes that cross each cut",
        f"{len(model.nodes)} nodes, {_count_text(model.total_macs)} multiply-accumulates; bytes before any codec",
        f"filled: cuts of a single tensor ({single}); open: cuts of several ({len(every) - single})",
    )
    settle(figure)
    place(sizes, labels)
    return figure


def _draw_sizes(axes: Any, every: Sequence[CutInfo], input_bytes: int, default: str) -> list[Label]:
    """Draw bytes along the graph, and return the labels: the default cut's, the input's, the narrow cuts'."""
    from matplotlib.cbook import pts_to_midstep

    positions = [_position(c) for c in every]
    # At least 1 byte, since empty tensors have no logarithm.
    bounds = [max(1, c.bytes) for c in every]
    axes.plot(*pts_to_midstep(np.array(positions), np.array(bounds)), color=INK, linewidth=0.9, zorder=1)
    faces = [GREEN if len(c.tensors) == 1 else "none" for c in every]
    colours = [GREEN if len(c.tensors) == 1 else INK for c in every]
    # Hundreds of cuts would melt into a band.
    size = 24 if len(every) < 150 else 9
    axes.scatter(positions, bounds, s=size, facecolors=faces, edgecolors=colours, zorder=2)
    axes.set_yscale("log")
    bytes_axis(axes.yaxis)
    # Room for labels below the narrowest and above the widest.
    level = max(1, input_bytes)
    axes.set_ylim(min(*bounds, level) / 2.5, max(*bounds, level) * 2)
    axes.set_ylabel("bytes of boundary tensors")
    axes.grid(axis="y")
    axes.axhline(level, color=BLUE, linestyle="--", linewidth=1.2)
    at = [(share * _position(every[-1]), level) for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    labels = [Label(f"the input: {format_size(input_bytes)}", at, BLUE, bold=True)]
    # A cut of more bytes than the input seldom pays.
    below = [c for c in every if c.bytes < input_bytes] or every
    narrow = [
        Label(f"{c.name}: {format_size(c.bytes)}", [(_position(c), max(1, c.bytes))], colours[every.index(c)])
        for c in _narrow(below)
    ]
    for cut in (c for c in every if c.name == default):
        point = (_position(cut), max(1, cut.bytes))
        axes.scatter(*point, s=110, facecolors="none", edgecolors=MAGENTA, linewidths=2, zorder=4)
        text = f"default: {cut.name}, {format_size(cut.bytes)}"
        labels.insert(0, Label(text, [point], MAGENTA, bold=True, size=9.5))
        narrow = [label for label in narrow if label.points != [point]]
    return labels + narrow


def _position(cut: CutInfo) -> int:
    return -1 if cut.position is None else cut.position


def _narrow(every: Sequence[CutInfo]) -> list[CutInfo]:
    """The narrowest cuts, at least a fourteenth of the graph apart from each other."""
    distance = max(1, _position(every[-1])) / 14
    narrow: list[CutInfo] = []
    for cut in sorted(every, key=lambda c: c.bytes)[: len(every) // 2 + 1]:
        if len(narrow) < _MAX_LABELS and all(abs(_position(cut) - _position(c)) > distance for c in narrow):
            narrow.append(cut)
    return narrow


def _count_text(n: int) -> str:
    return next((f"{n / unit:.3g}{name}" for unit, name in _COUNT_UNITS if n >= unit), str(n))
