"""The style that all figures share: canvas, file formats, byte axes and colours."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError

# Readable on light and dark backgrounds alike, and apart from each other in greyscale.
GREEN, RED, NAVY = "#0b6e4f", "#c8553d", "#33415c"
_BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def new_figure(error: type[IsthmusError], **options: Any) -> Any:
    """A figure without a window system.

    Raises:
        IsthmusError: matplotlib is missing; an `error`.
    """
    # Imported late, as in all of this room: matplotlib takes a second, and is optional.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise error("drawing needs matplotlib", hint="pip install isthmus_tools") from e
    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def save(
    figure: Any, path: str | os.PathLike[str] | None, kind: str, error: type[IsthmusError], **options: Any
) -> bytes:
    """The figure as `kind`, png or svg; also written to `path` if given.

    Raises:
        IsthmusError: the file cannot be written; an `error`.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    if path is not None:
        try:
            Path(path).write_bytes(buffer.getvalue())
        except OSError as e:
            raise error(f"{path} cannot be written: {e.strerror}", path=str(path)) from e
    return buffer.getvalue()


def bytes_axis(axes: Any) -> None:
    """A logarithmic vertical axis of bytes."""
    from matplotlib.ticker import FuncFormatter

    # Powers of 4: all ticks are then whole numbers of KiB or MiB.
    axes.set_yscale("log", base=4)
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: size_text(int(n))))


def size_text(n: int) -> str:
    """Bytes in the largest unit of at least 1: `588 KiB`."""
    return next((f"{n / unit:.3g} {name}" for unit, name in _BYTE_UNITS if n >= unit), "0 B")
