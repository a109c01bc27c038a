"""The style that all figures share: colours for light and dark pages, canvas, headlines, axes and file formats.

Backgrounds are transparent. No single colour has a contrast of 4.5 with both white and a dark page (the best has 4.3),
so all colours are middle tones, and in an SVG a stylesheet darkens or lightens texts by the reader's colour scheme.
"""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.errors import ModelError
from isthmus.units import format_size

SUFFIXES = (".png", ".svg")
INK = "#717a84"
# Of nearly one luminance: white text on each has a contrast of 4.5, and each has 4.1 with a dark page.
BLUE, ORANGE, GREEN, MAGENTA, VIOLET = "#2376d5", "#c55316", "#168758", "#c8438a", "#8362d1"
TEAL, OLIVE, BROWN, RED = "#14838b", "#8d730b", "#976d49", "#d2433e"
FAMILIES = {"edge": (BLUE, TEAL), "cloud": (ORANGE, OLIVE, BROWN), "split": (GREEN, VIOLET, RED)}
"""Colours of candidates by their kind."""
# Text in an SVG on a light and on a dark page.
_TEXT = {
    INK: ("#424a53", "#b6bec7"),
    BLUE: ("#1b5da9", "#81ade0"),
    ORANGE: ("#9c4211", "#dd9b77"),
    GREEN: ("#116b45", "#30c084"),
    MAGENTA: ("#a32f6d", "#df92bb"),
    VIOLET: ("#6a41c8", "#b49fe3"),
    TEAL: ("#10676d", "#31bbc5"),
    OLIVE: ("#705b09", "#c5a831"),
    BROWN: ("#78573a", "#c5a487"),
    RED: ("#ae2d29", "#e49592"),
}
# Twice the width of a README's column.
_DPI = 200
# Characters of the headline and of the lines below in 8 inches.
_TITLE_WIDTH, _NOTE_WIDTH = 76, 104
_RC: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.22,
    "legend.frameon": False,
    "font.size": 9.5,
    # Fonts of readers' machines; texts are measured in the font of matplotlib, the widest of these.
    "font.sans-serif": ["Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans", "sans-serif"],
    # A model's name is no formula.
    "text.parse_math": False,
    "svg.fonttype": "none",
    # Element ids are hashes; a fixed salt makes equal figures equal files.
    "svg.hashsalt": "isthmus",
}


@contextmanager
def style() -> Iterator[None]:
    """The style, while a figure is made and saved.

    Raises:
        ModelError: matplotlib is missing.
    """
    # Imported late, as in all of this room: matplotlib takes a second, and is optional.
    try:
        import matplotlib as mpl
    except ImportError as e:
        raise ModelError("drawing needs matplotlib", hint="pip install isthmus_tools") from e
    with mpl.rc_context(_RC):
        yield


def new_figure(width: float, height: float) -> Any:
    """A figure without a window system, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def headline(figure: Any, title: str, *notes: str) -> None:
    """The title, in bold, and notes below, each on lines of its own, wrapped to the figure's width."""
    width = figure.get_size_inches()[0] / 8
    lines = [line for note in notes if note for line in textwrap.wrap(note, int(_NOTE_WIDTH * width))]
    figure.suptitle(textwrap.fill(title, int(_TITLE_WIDTH * width)), x=0.01, ha="left", fontsize=12, fontweight="bold")
    first = figure.axes[0]
    first.set_title("\n".join(filter(None, [*lines, first.get_title(loc="left")])), loc="left", linespacing=1.35)


def settle(figure: Any) -> None:
    """Lay the figure out for good, the headline above the axes' left edge, before labels are placed in it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if figure.get_suptitle():
        figure.texts[0].set_x(figure.axes[0].get_position().x0)


def suffix_of(path: Path) -> str:
    """The format that a file's name asks for, `svg` or `png`.

    Raises:
        ModelError: another suffix.
    """
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ModelError(f"{path} is neither {' nor '.join(SUFFIXES)}", path=str(path), suffixes=SUFFIXES)
    return suffix.removeprefix(".")


def save(figure: Any, path: str | os.PathLike[str] | None = None) -> bytes:
    """The figure as PNG, or in the format of the suffix of `path`; also written to `path` if given.

    Raises:
        ModelError: another suffix, or the file cannot be written.
    """
    kind = "png" if path is None else suffix_of(Path(path))
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI, transparent=True, metadata={"Date": None} if kind == "svg" else None)
    data = buffer.getvalue() if kind == "png" else _with_schemes(buffer.getvalue().decode()).encode()
    if path is not None:
        try:
            Path(path).write_bytes(data)
        except OSError as e:
            raise ModelError(f"{path} cannot be written: {e.strerror}", path=str(path)) from e
    return data


def scheme_rules() -> str:
    """The stylesheet of texts by colour scheme; readers without one show the middle tones."""

    def rules(tone: int) -> str:
        return " ".join(f'text[style*="{c}"] {{fill: {tones[tone]} !important}}' for c, tones in _TEXT.items())

    return "\n".join(
        f"@media (prefers-color-scheme: {scheme}) {{{rules(i)}}}" for i, scheme in enumerate(("light", "dark"))
    )


def _with_schemes(svg: str) -> str:
    # Numbers to a hundredth of a point: a third fewer bytes.
    short = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    return short.replace("</style>", f"\n{scheme_rules()}</style>", 1)


def bytes_axis(axis: Any) -> None:
    """A logarithmic axis of bytes, in the units of the tables."""
    log_axis(axis, lambda n: round_text(format_size(n)))


def log_axis(axis: Any, text: Any) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 times the powers of ten, or at fewer where its span is wide."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda n, _: text(n)))
    axis.set_minor_locator(NullLocator())


def round_text(text: str) -> str:
    """A size for an axis: `10 kB` of `10.0 kB`."""
    return text.replace(".0 ", " ")
