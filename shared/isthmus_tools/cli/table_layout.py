"""Layouts of a table at the width of a terminal: framed, light, with fewer columns, or a list for each row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

# Between words, but not between a number and its unit. A cell also breaks in front of each further codec of a chain,
# and a mark stays with its word. A heading also breaks behind a hyphen, since names of candidates are headings.
_NO_UNIT = r"(?!(?<=\d\s)[A-Za-zµ])"
_WORD = re.compile(rf"(?<=\s){_NO_UNIT}")
_CELL = re.compile(rf"(?<=[^→✓✗–]\s){_NO_UNIT}|(?<=\S)(?=\+)")
_HEADING = re.compile(rf"(?<=\s){_NO_UNIT}|(?<=-)")
# Characters beside a cell: of a frame a line and two spaces, of the light layout two spaces.
_FRAME, _GAP = 3, 2


@dataclass(frozen=True)
class Column:
    """A column; the cells of numbers are aligned right and never broken."""

    name: str
    cells: Sequence[str]
    is_number: bool = False

    @cached_property
    def least(self) -> int:
        """The least width without a broken word or number."""
        parts = self.cells if self.is_number else [part for cell in self.cells for part in _parts(cell, _CELL)]
        return max(_widest(_parts(self.name, _HEADING)), _widest(parts))

    @cached_property
    def natural(self) -> int:
        """The width of every cell in one line."""
        return _widest([self.name, *self.cells])


def lay_out(
    columns: Sequence[Column], width: int, drop: Sequence[str] = ()
) -> tuple[Iterator[RenderableType], list[str]]:
    """The parts of a table of at most `width` characters a line, and the names of the columns left out.

    A table that is too wide loses its frame; then empty columns and the columns of `drop`, in this order; at last each
    row becomes a list of its cells, with every column.
    """
    if sum(column.least for column in columns) + _FRAME * len(columns) + 1 <= width:
        return iter([_grid(columns, width - _FRAME * len(columns) - 1, framed=True)]), []
    shown = list(columns)
    waiting = [column for column in columns[1:] if not any(column.cells)]
    waiting += [column for name in drop for column in columns if column.name == name and column not in waiting]
    while not _fits(shown, width) and waiting:
        shown.remove(waiting.pop(0))
    if not _fits(shown, width):
        return _lists(columns), []
    left_out = [column.name for column in columns if column not in shown and any(column.cells)]
    return iter([_grid(shown, width - _GAP * (len(shown) - 1), framed=False)]), left_out


def one_line_rows(columns: Sequence[Column]) -> Table:
    """The framed table with each row in one line."""
    return _grid(columns, sum(column.natural for column in columns), framed=True)


def _fits(columns: Sequence[Column], width: int) -> bool:
    return sum(column.least for column in columns) + _GAP * (len(columns) - 1) <= width


def _grid(columns: Sequence[Column], room: int, *, framed: bool) -> Table:
    table = Table(header_style="bold")
    if not framed:
        table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    widths = _widths(columns, room)
    for column, width in zip(columns, widths, strict=True):
        heading = fold(column.name, width, _HEADING)
        table.add_column(heading, justify="right" if column.is_number else "left", width=width)
    for cells in zip(*(column.cells for column in columns), strict=True):
        folded = [
            cell if column.is_number else fold(cell, width, _CELL)
            for column, cell, width in zip(columns, cells, widths, strict=True)
        ]
        table.add_row(*folded)
    return table


def _widths(columns: Sequence[Column], room: int) -> list[int]:
    """Each column's least width, and an equal share of the rest of `room` up to its natural width."""
    widths = [column.least for column in columns]
    while (rest := room - sum(widths)) > 0:
        hungry = [i for i, column in enumerate(columns) if widths[i] < column.natural]
        if not hungry:
            break
        share = max(1, rest // len(hungry))
        for i in hungry[:rest]:
            widths[i] = min(columns[i].natural, widths[i] + share)
    return widths


def _lists(columns: Sequence[Column]) -> Iterator[RenderableType]:
    """Each row as its first cell, and below the names and contents of further cells, without empty cells."""
    first, *others = columns
    for head, *cells in zip(first.cells, *(column.cells for column in others), strict=True):
        yield Text(head, style="bold")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for column, cell in zip(others, cells, strict=True):
            if cell:
                grid.add_row(f"  {column.name.strip()}", cell)
        yield grid


def fold(text: str, width: int, between: re.Pattern[str] = _WORD) -> str:
    """The text in lines of at most that width, filled in order; a longer part has a line of its own."""
    return "\n".join(line for each in text.split("\n") for line in _lines(each, width, between))


def _lines(text: str, width: int, between: re.Pattern[str]) -> Iterator[str]:
    line = ""
    for part in between.split(text):
        if line and cell_len((line + part).rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += part
    yield line.rstrip()


def _parts(text: str, between: re.Pattern[str]) -> list[str]:
    return [part.rstrip() for line in text.split("\n") for part in between.split(line)]


def _widest(texts: Sequence[str]) -> int:
    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)
