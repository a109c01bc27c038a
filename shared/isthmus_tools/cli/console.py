"""Output of commands: tables for people, JSON documents for programs, errors as one sentence, progress."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import rich.progress
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from isthmus.errors import IsthmusError, RequestMalformed, RequestTooLarge
from isthmus_tools.cli.options import in_registry
from isthmus_tools.printable import printable
from isthmus_tools.progress import Progress, silent

if TYPE_CHECKING:
    from isthmus_tools.usecases.publication import Publication

# Names of files, models and tensors are plain text: `[1]` in a name is no markup, and `:factory:` no picture.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

# Characters of a table's row in a file or a pipe, where no terminal wraps.
_MAX_LINE = 10_000
# Columns of a table cell's frame: a line, and a space on both sides.
_FRAME = 3
# Below either, a first slow step would turn an estimate of minutes into hours.
_MIN_ELAPSED_S, _MIN_SHARE = 2.0, 0.02
# A write to a full disk raises without the file's name.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Request = TypeVar("Request")
Result = TypeVar("Result")


def say(text: str, style: str | None = None) -> None:
    """Print a line to standard output without markup and without wrapping."""
    out.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def run(use_case: Callable[[Request, Progress], Result], request: Request, *, quiet: bool) -> Result:
    """Run a use case, its progress shown unless `quiet`."""
    with progress_bars(quiet) as progress:
        return use_case(request, progress)


def print_json(document: Any) -> None:
    """Write one JSON document to standard output."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"
    # A name in the registry may hold a lone surrogate, which no stream encodes.
    sys.stdout.write(text.encode(errors="backslashreplace").decode())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[str] = ()) -> None:
    """Print rows under columns; columns in `numbers` are aligned right.

    Where the table is too wide for a terminal, the first column breaks before a "+", then the others between words. In
    a file or a pipe each row is one line.
    """
    width = out.width if out.is_terminal else _MAX_LINE
    # Rich would wrap a title to the table's width.
    out.print(f"\n{printable(title)}", highlight=False, soft_wrap=True)
    first, *others = [list(column) for column in zip(columns, *([str(c) for c in row] for row in rows), strict=True)]
    room = width - _FRAME * len(columns) - 1
    first = _folded(first, room - sum(_widest(column) for column in others))
    # Numbers are broken only where there is no other way.
    least = (_widest(c) if c[0] in numbers else _widest([w for text in c for w in text.split()]) for c in others)
    has_room = _widest(first) + sum(least) <= room
    grid = Table(header_style="bold")
    grid.add_column(first[0], overflow="fold", no_wrap=True)
    for name, *_ in others:
        number = name in numbers
        grid.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number and has_room)
    for row in zip(first[1:], *(column[1:] for column in others), strict=True):
        grid.add_row(*map(printable, row))
    whole = out if out.is_terminal else Console(file=out.file, width=width, markup=False, emoji=False)
    whole.print(grid)


def _widest(texts: Sequence[str]) -> int:
    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def _folded(names: Sequence[str], width: int) -> list[str]:
    """The names in lines of at most that width, broken before a "+"; a longer part widens the column."""
    parts = [re.split(r"(?<=.)(?=\+)", name) for name in names]
    width = max(width, *(cell_len(part) for each in parts for part in each))
    folded = []
    for each in parts:
        lines = [each[0]]
        for part in each[1:]:
            if cell_len(lines[-1] + part) <= width:
                lines[-1] += part
            else:
                lines.append(part)
        folded.append("\n".join(lines))
    return folded


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """A progress callback that shows the current stage on one line of standard error; nothing where `quiet`.

    A counted stage has a bar and an estimate of the time left. Stages that go on counting to the same total share the
    estimate.
    """
    if quiet:
        yield silent
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), _CountColumn(), TimeElapsedColumn())
    with rich.progress.Progress(*columns, _TimeLeftColumn(), console=err, transient=True) as display:
        line = display.add_task("", total=None, visible=False)
        before = (0, 0)

        def progress(stage: str, done: int = 0, total: int = 0) -> None:
            nonlocal before
            goes_on = bool(total) and total == before[1] and done >= before[0]
            before = (done, total)
            if goes_on:
                display.update(line, completed=done, description=printable(stage))
            else:
                display.reset(line, total=total or None, completed=done, description=printable(stage), visible=True)
                display.update(line, first=done)

        yield progress


class _CountColumn(BarColumn):
    """A bar for counted stages alone."""

    def render(self, task: Task) -> Any:
        return super().render(task) if task.total else Text()


class _TimeLeftColumn(ProgressColumn):
    """The time left of a counted stage, by its mean speed."""

    def render(self, task: Task) -> Text:
        first = task.fields.get("first", 0)
        return Text(time_left(task.completed - first, (task.total or 0) - first, task.elapsed or 0.0))


def time_left(done: float, total: float, elapsed_s: float) -> str:
    """`about 4 min left`; empty without a total, and while too little is done for an estimate."""
    if total <= 0 or elapsed_s < _MIN_ELAPSED_S or done < _MIN_SHARE * total:
        return ""
    seconds = elapsed_s * (total - done) / done
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {max(1, round(seconds))} s left"


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Print an error of Isthmus as its sentence and hint on standard error, and exit with status 1."""
    try:
        yield
    except IsthmusError as e:
        _print_error(e, as_json)
        raise typer.Exit(1) from e
    except OSError as e:
        # An error without a file's name is a defect, unless the disk is full.
        if e.filename is None and e.errno not in _FULL:
            raise
        where = "" if e.filename is None else f"{e.filename}: "
        _print_error(RequestMalformed(f"{where}{e.strerror}", path=str(e.filename or "")), as_json)
        raise typer.Exit(1) from e
    except MemoryError as e:
        _print_error(RequestTooLarge(f"there is not enough memory: {e}".removesuffix(": ")), as_json)
        raise typer.Exit(1) from e


def _print_error(error: IsthmusError, as_json: bool) -> None:
    if as_json:
        doc = {"error": error.message, "type": type(error).__name__, "facts": dict(error.facts), "hint": error.hint}
        sys.stderr.write(json.dumps(doc, default=str) + "\n")
        return
    _labelled("error", "bold red", error.message)
    if exists := error.facts.get("exists"):
        err.print(printable(f"there is: {', '.join(map(str, exists))}"), highlight=False, soft_wrap=True)
    if error.hint:
        _labelled("hint", "bold", error.hint)


def _labelled(label: str, style: str, text: str) -> None:
    err.print(Text.assemble((f"{label}:", style), " ", printable(text)), highlight=False, soft_wrap=True)


def warn(sentences: Sequence[str]) -> None:
    """Print warnings on standard error."""
    for sentence in sentences:
        err.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)


def publication_document(publication: Publication, registry: str) -> dict[str, Any]:
    """A publication as JSON: the alias, the plan, the version that serves, and the next command."""
    return publication.document() | {"next": in_registry(publication.following, registry)}


def show_publication(publication: Publication, registry: str) -> None:
    """Print the alias's version, whether the plan stays in force, the version that serves, and the next command."""
    version, lost = publication.version, publication.lost
    name = f"{version.name}:{version.version}"
    if publication.alias:
        say(_alias_line(publication))
    if publication.plan:
        kept = "the plan was renewed for the new tables" if publication.renewed else "the plan stays in force"
        say(f"{kept}: {publication.plan}; to choose anew: isthmus plan {name} …")
    if lost is not None:
        say(f"{name} has no plan: the plan before it ({lost.chosen}) is for another bundle")
    if publication.serving:
        say(f"requests for {version.name} reach version {publication.serving}")
    if publication.following:
        say(f"next: {in_registry(publication.following, registry)}")


def _alias_line(publication: Publication) -> str:
    alias, was = publication.alias, publication.was
    name, number = publication.version.name, publication.version.version
    if not publication.moved:
        stays = f"{alias} stays at {name}:{was}, which serves by a plan"
        return f"{stays}; --drop-plan moves it to {name}:{number} without one"
    if was == number:
        return f"{alias} means {name}:{number}, as before"
    return f"{alias} means {name}:{number} now" + (f"; it meant {name}:{was}" if was else "")
