"""Progress of long work, reported through a callback: one type for import, calibration, profiling and planning."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callback that a long computation calls at the start of a stage, or as a counted stage advances."""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Report that `stage` runs, with `done` of `total` units finished; 0 of 0 where nothing is counted."""


def silent(stage: str, done: int = 0, total: int = 0) -> None:
    """Report nothing: the default callback."""
