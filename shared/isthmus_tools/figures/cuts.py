"""A model's cuts as a picture: what crosses after each node, and how much of the work lies before it.

The only place that imports matplotlib.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from isthmus.errors import ModelError
from isthmus_tools.graph.cuts import CutInfo, cuts
from isthmus_tools.graph.model import Model

_LABELLED = 4
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_SINGLE, _SEVERAL, _MACS, _INPUT = "#0b6e4f", "#9db4ab", "#c8553d", "#33415c"


def draw(model: Model, title: str, path: str | os.PathLike[str] | None = None) -> bytes:
    """The picture as PNG, or as SVG where `path` ends so; also written to `path` if one is given.

    Units: bytes on a logarithmic axis, as tensors are before any codec; multiply-accumulates as a share of the whole.

    Raises:
        ModelError: the model has no cut to draw, matplotlib is missing, or the file cannot be written.
    """
    every = [c for c in cuts(model) if c.position is not None]
    if not every:
        raise ModelError(f"{title} has no cut to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as e:
        raise ModelError("drawing needs matplotlib", hint="pip install 'isthmus[cli]'") from e
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = [_position(c) for c in every]
    axes.step(positions, [max(1, c.bytes) for c in every], where="mid", color=_SEVERAL, linewidth=1, zorder=1)
    for chosen, colour, size, label in (
        ([c for c in every if len(c.tensors) > 1], _SEVERAL, 10, "cut of several tensors"),
        ([c for c in every if len(c.tensors) == 1], _SINGLE, 22, "cut of a single tensor"),
    ):
        if chosen:
            xs, ys = [_position(c) for c in chosen], [max(1, c.bytes) for c in chosen]
            axes.scatter(xs, ys, s=size, color=colour, label=f"{label} ({len(chosen)})", zorder=2)
    taken = sum(model.nbytes(v) for v in model.inputs)
    axes.axhline(max(1, taken), color=_INPUT, linestyle="--", linewidth=1, label=f"the input: {size_text(taken)}")
    # Powers of 4: the ticks are then whole numbers of KiB and MiB.
    axes.set_yscale("log", base=4)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: size_text(int(n))))
    axes.set_xlabel("cut after node (position in topological order)")
    axes.set_ylabel("bytes that cross, before any codec")
    axes.set_xlim(-0.5, len(model.nodes) - 0.5)
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.25)
    for cut in _narrow(every):
        axes.annotate(
            f"{cut.name}: {size_text(cut.bytes)}",
            (_position(cut), max(1, cut.bytes)),
            xytext=(0, -13),
            textcoords="offset points",
            ha="right" if _position(cut) > 0.9 * len(model.nodes) else "center",
            fontsize=8,
            color=_SINGLE,
        )
    work = axes.twinx()
    work.plot(positions, [100 * c.macs_before for c in every], color=_MACS, linewidth=1.3)
    work.set_ylabel("multiply-accumulates before the cut, %", color=_MACS)
    work.tick_params(axis="y", colors=_MACS)
    work.set_ylim(0, 105)
    axes.set_title(f"{title}: {len(model.nodes)} nodes, {_count_text(model.total_macs)} multiply-accumulates")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    kind = "svg" if path is not None and Path(path).suffix.lower() == ".svg" else "png"
    figure.savefig(buffer, format=kind, dpi=120)
    if path is not None:
        try:
            Path(path).write_bytes(buffer.getvalue())
        except OSError as e:
            raise ModelError(f"{path} cannot be written: {e.strerror}") from e
    return buffer.getvalue()


def size_text(n: int) -> str:
    """Bytes for people: `588 KiB`."""
    for unit, name in _UNITS:
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return "0 B"


def _position(cut: CutInfo) -> int:
    return -1 if cut.position is None else cut.position


def _narrow(every: Sequence[CutInfo]) -> list[CutInfo]:
    """The narrowest cuts to write beside, no two close together."""
    apart = max(1, every[-1].position or 1) / 8
    found: list[CutInfo] = []
    for cut in sorted(every, key=lambda c: c.bytes)[: len(every) // 2 + 1]:
        if len(found) < _LABELLED and all(abs(_position(cut) - _position(f)) > apart for f in found):
            found.append(cut)
    return found


def _count_text(n: int) -> str:
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return str(n)
