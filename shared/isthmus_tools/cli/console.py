"""Output of commands: tables for people, JSON documents for programs, errors as one sentence, progress."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
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
FOLLOWING = "routers that run follow within their setting refresh_s: 10 s by default"
# A write to a full disk raises without the file's name.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Request = TypeVar("Request")
Result = TypeVar("Result")


def say(text: str, style: str | None = None) -> None:
    """Print a text to standard output without markup.

    A terminal gets lines wrapped between words; a file or a pipe gets a single line, for programs to read.
    """
    out.print(_wrapped(text, out), style=style, highlight=False, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """Print a text to standard error, as `say` does to standard output."""
    err.print(_wrapped(text, err), highlight=False, markup=False, soft_wrap=True)


def say_command(label: str, command: str) -> None:
    """Print a command to copy; a narrow terminal gets lines that end in a backslash, valid for shells."""
    line, *options = re.split(r" (?=--)", f"{label}: {command}")
    lines = []
    for option in options:
        if out.is_terminal and cell_len(f"{line} {option} \\") > out.width:
            lines.append(f"{line} \\")
            line = f"    {option}"
        else:
            line = f"{line} {option}"
    out.print("\n".join([*lines, line]), highlight=False, markup=False, soft_wrap=True)


def _wrapped(text: str, console: Console) -> str:
    """The text in lines of the terminal's width, further lines indented; a longer word stays whole, to be copied."""
    if not console.is_terminal:
        return text
    lines = []
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        if cell_len(line) <= console.width:
            lines.append(line)
            continue
        # Imported late: most lines are short.
        from isthmus_tools.cli.table_layout import fold

        first, *others = fold(line[indent:], console.width - indent - 2).split("\n")
        lines += [" " * indent + first, *(" " * (indent + 2) + other for other in others)]
    return "\n".join(lines)


def run(use_case: Callable[[Request, Progress], Result], request: Request, *, quiet: bool) -> Result:
    """Run a use case, its progress shown unless `quiet`."""
    with progress_bars(quiet) as progress:
        return use_case(request, progress)


def print_json(document: Any) -> None:
    """Write one JSON document to standard output."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"
    # A name in the registry may hold a lone surrogate, which no stream encodes.
    sys.stdout.write(text.encode(errors="backslashreplace").decode())


def print_json_line(document: Any) -> None:
    """Write a JSON document as one line, at once: programs read the lines as they come."""
    sys.stdout.write(json.dumps(document, default=str) + "\n")
    sys.stdout.flush()


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numbers: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> None:
    """Print rows under columns; columns in `numbers` are aligned right and never broken.

    In a file or a pipe each row is one line. A terminal that is too narrow gets the table without its frame, then
    without the columns of `drop`, in this order, and at last each row as a list of its cells.
    """
    # Imported late: help and JSON take no tables.
    from isthmus_tools.cli.table_layout import Column, lay_out, one_line_rows

    say(f"\n{printable(title)}")
    cells = zip(*([printable(str(cell)) for cell in row] for row in rows), strict=True) if rows else [()] * len(columns)
    laid = [Column(name, cell, name in numbers) for name, cell in zip(columns, cells, strict=True)]
    if not out.is_terminal:
        Console(file=out.file, width=_MAX_LINE, markup=False, emoji=False).print(one_line_rows(laid))
        return
    parts, left_out = lay_out(laid, out.width, drop)
    for part in parts:
        out.print(part, highlight=False)
    if left_out:
        say(f"left out at this width: {', '.join(left_out)}; --json has all")


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """A progress callback that shows the current stage on one line of standard error; nothing where `quiet`."""
    if quiet:
        yield silent
        return
    # Imported late: help and JSON show no progress.
    from isthmus_tools.cli.progress_line import progress_line

    with progress_line(err) as progress:
        yield progress


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
        sys.stderr.write(json.dumps({"hint": "", **error.document()}, default=str) + "\n")
        return
    _print_error_line("error", "bold red", error.message)
    if exists := error.facts.get("exists"):
        _print_error_line("there is", "", ", ".join(map(str, exists)))
    if error.hint:
        _print_error_line("hint", "bold", error.hint)


def _print_error_line(label: str, style: str, text: str) -> None:
    line = Text(_wrapped(f"{label}: {printable(text)}", err))
    line.stylize(style, 0, len(label) + 1)
    err.print(line, highlight=False, soft_wrap=True)


def warn(sentences: Sequence[str]) -> None:
    """Print warnings on standard error."""
    for sentence in sentences:
        _print_error_line("warning", "", sentence)


def publication_document(publication: Publication, registry: str) -> dict[str, Any]:
    """A publication as JSON: the alias, the plan, the version that serves, and the next command."""
    return publication.document() | {"next": in_registry(publication.following, registry)}


def published_document(publication: Publication, registry: str, **facts: Any) -> dict[str, Any]:
    """A published version as JSON: its name, number and digest, `facts` about it, and the publication."""
    version = publication.version
    named = {"name": version.name, "version": version.version, "digest": version.digest}
    return named | facts | publication_document(publication, registry)


def show_publication(publication: Publication, registry: str) -> None:
    """Print the alias's version, whether the plan stays in force, the version that serves, and the next command."""
    version, lost = publication.version, publication.lost
    name = f"{version.name}:{version.version}"
    if publication.alias:
        say(_alias_line(publication))
    if publication.plan:
        kept = "the plan was renewed" if publication.renewed else "the plan stays in force"
        say(f"{kept}: {publication.plan}; to choose anew: isthmus plan {name} …")
    if publication.redacts:
        say(f"{name} redacts as the version before: {publication.redacts}; isthmus redact {version.name} changes it")
    if lost is not None:
        say(f"{name} has no plan: the plan before it ({lost.chosen}) is for another bundle")
    if publication.serving and not (publication.alias == "prod" and publication.serving == version.version):
        say(f"requests for {version.name} reach version {publication.serving}")
    if publication.following:
        say_command("next", in_registry(publication.following, registry))


def _alias_line(publication: Publication) -> str:
    alias, was = publication.alias, publication.was
    name, number = publication.version.name, publication.version.version
    if not publication.moved:
        stays = f"{alias} stays at {name}:{was}, which serves by a plan"
        return f"{stays}; --drop-plan moves it to {name}:{number} without one"
    if was == number:
        return f"{alias} means {name}:{number}, as before"
    return f"{alias} means {name}:{number} now" + (f"; it meant {name}:{was}" if was else "")
