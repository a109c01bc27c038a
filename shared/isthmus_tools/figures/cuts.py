"""The figure of a model's cuts: bytes of the boundary tensors after each node, and the share of work before it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from isthmus.errors import ModelError
from isthmus_tools.figures.style import GREEN, NAVY, RED, bytes_axis, new_figure, save, size_text
from isthmus_tools.graph.cuts import CutInfo, cuts
from isthmus_tools.graph.model import Model

# More labels than this overlap on a figure of this width.
_MAX_LABELS = 4
_SEVERAL = "#9db4ab"
_COUNT_UNITS = ((10**9, " G"), (10**6, " M"), (10**3, " k"))


def draw(model: Model, title: str, path: str | os.PathLike[str] | None = None) -> bytes:
    """The figure as PNG, or as SVG for a `path` with that suffix; also written to `path` if given.

    Units: bytes of raw tensors on a logarithmic axis; MACs as a share of the whole model's.

    Raises:
        ModelError: the model has no cut, matplotlib is missing, or the file cannot be written.
    """
    every = [c for c in cuts(model) if c.position is not None]
    if not every:
        raise ModelError(f"{title} has no cut to draw")
    figure = new_figure(ModelError, figsize=(11, 5.5))
    axes = figure.add_subplot()
    positions = [_position(c) for c in every]
    # At least 1 byte, since empty tensors have no logarithm.
    axes.step(positions, [max(1, c.bytes) for c in every], where="mid", color=_SEVERAL, linewidth=1, zorder=1)
    for group, colour, size, label in (
        ([c for c in every if len(c.tensors) > 1], _SEVERAL, 10, "cut of several tensors"),
        ([c for c in every if len(c.tensors) == 1], GREEN, 22, "cut of a single tensor"),
    ):
        if group:
            xs, ys = [_position(c) for c in group], [max(1, c.bytes) for c in group]
            axes.scatter(xs, ys, s=size, color=colour, label=f"{label} ({len(group)})", zorder=2)
    input_bytes = sum(model.nbytes(v) for v in model.inputs)
    label = f"the input: {size_text(input_bytes)}"
    axes.axhline(max(1, input_bytes), color=NAVY, linestyle="--", linewidth=1, label=label)
    bytes_axis(axes)
    axes.set_xlabel("cut after node (position in topological order)")
    axes.set_ylabel("bytes of boundary tensors, before any codec")
    axes.set_xlim(-0.5, len(model.nodes) - 0.5)
    axes.grid(axis="y", alpha=0.25)
    for cut in _labelled(every):
        axes.annotate(
            f"{cut.name}: {size_text(cut.bytes)}",
            (_position(cut), max(1, cut.bytes)),
            xytext=(0, -13),
            textcoords="offset points",
            # Centred labels near the right edge would leave the axes.
            ha="right" if _position(cut) > 0.9 * len(model.nodes) else "center",
            fontsize=8,
            color=GREEN,
        )
    work = axes.twinx()
    work.plot(positions, [100 * c.macs_before for c in every], color=RED, linewidth=1.3)
    work.set_ylabel("multiply-accumulates before the cut, %", color=RED)
    work.tick_params(axis="y", colors=RED)
    work.set_ylim(0, 105)
    axes.set_title(f"{title}: {len(model.nodes)} nodes, {_count_text(model.total_macs)} multiply-accumulates")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9)
    kind = "svg" if path is not None and Path(path).suffix.lower() == ".svg" else "png"
    return save(figure, path, kind, ModelError, dpi=120)


def _position(cut: CutInfo) -> int:
    return -1 if cut.position is None else cut.position


def _labelled(every: Sequence[CutInfo]) -> list[CutInfo]:
    """The narrowest cuts, at least an eighth of the graph apart from each other."""
    distance = max(1, every[-1].position or 1) / 8
    labelled: list[CutInfo] = []
    for cut in sorted(every, key=lambda c: c.bytes)[: len(every) // 2 + 1]:
        if len(labelled) < _MAX_LABELS and all(abs(_position(cut) - _position(c)) > distance for c in labelled):
            labelled.append(cut)
    return labelled


def _count_text(n: int) -> str:
    return next((f"{n / unit:.3g}{name}" for unit, name in _COUNT_UNITS if n >= unit), str(n))
