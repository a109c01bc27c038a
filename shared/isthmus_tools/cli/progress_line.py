"""The progress of a use case on one line of standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from isthmus_tools.printable import printable
from isthmus_tools.progress import Progress

# Below either, a first slow step would turn an estimate of minutes into hours.
_MIN_ELAPSED_S, _MIN_SHARE = 2.0, 0.02


@contextmanager
def progress_line(console: Console) -> Iterator[Progress]:
    """A progress callback that shows the current stage.

    A counted stage has a bar and an estimate of the time left. Stages that go on counting to the same total share the
    estimate.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), _CountColumn(), TimeElapsedColumn())
    with rich.progress.Progress(*columns, _TimeLeftColumn(), console=console, transient=True) as display:
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
