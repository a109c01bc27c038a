"""What every command says and how: a table for people, a JSON document for programs, one sentence for errors."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import rich.progress
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from isthmus.errors import IsthmusError, RequestMalformed, RequestTooLarge
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.cli import private_caches
from isthmus_tools.progress import Progress, silent

# Names of files, models and tensors are text: `[1]` in them is no markup, and `:factory:` no picture. What has markup
# says so where it is printed, and escapes the rest.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
RegistryOption = Annotated[
    str,
    typer.Option(
        "--registry",
        envvar="ISTHMUS_REGISTRY",
        help="Where bundles live: a folder, or s3://BUCKET/PREFIX.",
    ),
]
DEFAULT_REGISTRY = ".isthmus/registry"
CACHE_DIR = private_caches.CACHE_DIR
ENGINE_SECRETS = ".isthmus/secrets"
"""Where the local engine keeps secrets; commands find the S3 keys where the functions of `isthmus up` do."""
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What would steer the terminal, and what no stream can encode: halves of characters, which JSON and arguments hold."""
_CACHE_BYTES = "8GiB"
"""More than a function's: a whole model is read here, on a disk that no pod's memory bounds."""
_MAX_LINE = 10_000
"""Characters of a table's row where no terminal wraps it."""
_FRAME = 3
"""What a column of a table takes beside its text: a line, and a space on both sides."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write raises without the file's name."""
Number = TypeVar("Number", int, float)


def registry_settings(registry: str, cache_dir: str = CACHE_DIR) -> RegistrySettings:
    """A command's registry settings: read from the environment as a function reads them, except for three defaults.

    Raises:
        SettingsError: as for a function.
    """
    defaults = {"cache_dir": cache_dir, "cache_bytes": _CACHE_BYTES}
    if not Path(RegistrySettings.secrets_dir).is_dir():
        defaults["secrets_dir"] = ENGINE_SECRETS
    given = {name: text for name, text in os.environ.items() if text.strip()}
    return RegistrySettings.from_env({**defaults, **given, "registry": registry})


def segment_settings(registry: str, cache_dir: str = CACHE_DIR, *, threads: int = 0) -> SegmentSettings:
    """`registry_settings`, for a command that runs segments itself."""
    return SegmentSettings(**vars(registry_settings(registry, cache_dir)), threads=threads)


def print_json(document: Any) -> None:
    """Write one JSON document to standard output."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"
    # Half a character, in a name that someone wrote into the registry, becomes its escape.
    sys.stdout.write(text.encode(errors="backslashreplace").decode())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[str] = ()) -> None:
    """Print rows under columns; those in `numbers` are aligned right.

    Where the table is too wide for a terminal, what is in the first column goes on below before a "+", and then words
    of others do. In a file or a pipe each row is one line.
    """
    width = out.width if out.is_terminal else _MAX_LINE
    # Rich would wrap a title to the table's width.
    out.print(f"\n{visible(title)}", highlight=False, soft_wrap=True)
    first, *others = [list(column) for column in zip(columns, *([str(c) for c in row] for row in rows), strict=True)]
    room = width - _FRAME * len(columns) - 1
    first = _folded(first, room - sum(_widest(column) for column in others))
    # Numbers are broken only where there is no other way.
    least = (_widest(c) if c[0] in numbers else _widest([w for text in c for w in text.split()]) for c in others)
    fits = _widest(first) + sum(least) <= room
    made = Table(header_style="bold")
    made.add_column(first[0], overflow="fold", no_wrap=True)
    for name, *_ in others:
        number = name in numbers
        made.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number and fits)
    for row in zip(first[1:], *(column[1:] for column in others), strict=True):
        made.add_row(*map(visible, row))
    whole = out if out.is_terminal else Console(file=out.file, width=width, markup=False, emoji=False)
    whole.print(made)


def _widest(texts: Sequence[str]) -> int:
    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def _folded(names: Sequence[str], width: int) -> list[str]:
    """The names in lines of at most that width, broken before a "+"; a part that is longer makes room for itself."""
    parts = [re.split(r"(?<=.)(?=\+)", name) for name in names]
    width = max(width, *(cell_len(part) for each in parts for part in each))
    made = []
    for each in parts:
        lines = [each[0]]
        for part in each[1:]:
            if cell_len(lines[-1] + part) <= width:
                lines[-1] += part
            else:
                lines.append(part)
        made.append("\n".join(lines))
    return made


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """A progress callback that shows each stage and its duration on standard error; nothing where `quiet`.

    A stage without a count has a spinner and ends where the next one begins; a counted one has a bar.
    """
    if quiet:
        yield silent
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), _CountColumn(), TimeElapsedColumn())
    with rich.progress.Progress(*columns, console=err) as display:
        counted: dict[str, TaskID] = {}
        current = display.add_task("", total=1, visible=False)

        def progress(stage: str, done: int = 0, total: int = 0) -> None:
            nonlocal current
            if not total:
                display.update(current, completed=1)
                current = display.add_task(visible(stage), total=1)
                return
            if stage not in counted:
                counted[stage] = display.add_task(visible(stage), total=total, counted=True)
            display.update(counted[stage], completed=done, total=total)

        yield progress
        display.update(current, completed=1)


class _CountColumn(BarColumn):
    """A bar for counted stages alone."""

    def render(self, task: Task) -> Any:
        return super().render(task) if task.fields.get("counted") else Text()


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turns an error that Isthmus understood into its sentence and hint on standard error, and exit status 1."""
    try:
        yield
    except IsthmusError as e:
        _say(e, as_json)
        raise typer.Exit(1) from e
    except OSError as e:
        # A file or folder that was named: unreadable, unwritable, full. Anything else is a fault of ours.
        if e.filename is None and e.errno not in _FULL:
            raise
        where = "" if e.filename is None else f"{e.filename}: "
        _say(RequestMalformed(f"{where}{e.strerror}", path=str(e.filename or "")), as_json)
        raise typer.Exit(1) from e
    except MemoryError as e:
        _say(RequestTooLarge(f"there is not enough memory: {e}".removesuffix(": ")), as_json)
        raise typer.Exit(1) from e


def _say(error: IsthmusError, as_json: bool) -> None:
    if as_json:
        doc = {"error": error.message, "type": type(error).__name__, "facts": dict(error.facts), "hint": error.hint}
        sys.stderr.write(json.dumps(doc, default=str) + "\n")
        return
    _labelled("error", "bold red", error.message)
    if exists := error.facts.get("exists"):
        err.print(visible(f"there is: {', '.join(map(str, exists))}"), highlight=False, soft_wrap=True)
    if error.hint:
        _labelled("hint", "bold", error.hint)


def _labelled(label: str, style: str, text: str) -> None:
    err.print(Text.assemble((f"{label}:", style), " ", visible(text)), highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """`text` with its control characters written out, lest a name in it steers the terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def read_option(parse: Callable[[str], Number], option: str, text: str) -> Number:
    """What `parse` makes of an option's text.

    Raises:
        RequestMalformed: it is none; the sentence names the option.
    """
    try:
        return parse(text)
    except ValueError as e:
        raise RequestMalformed(f"{option}: {e}", option=option) from e
