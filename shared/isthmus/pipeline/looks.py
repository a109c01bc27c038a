"""Closer looks: confidence-gated second transmission.

Where the margin of the prediction is below a look's threshold, the router sends the boundary tensors again, whole and
at a finer quality, and runs the segments behind them again. Source: docs/calibration.md, "Closer looks".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.context import Deadline
from isthmus.errors import IsthmusError
from isthmus.pipeline.passage import Passage, Stage
from isthmus.pipeline.route import Looks

OUTCOMES = ("sure", "last", "late", "failed")
"""The prediction was clear; no look was left; no time was left for one; a look failed and the prediction stands."""

_MIN_BOUND_S, _MAX_SLOWDOWN = 1.0, 10.0


@dataclass(frozen=True)
class Looked:
    """The outcome, one of OUTCOMES, and the number of looks taken."""

    outcome: str
    taken: int = 0
    error: IsthmusError | None = field(default=None, compare=False)
    """The reason why the next look failed, for the log; responses do not name it."""


def look_closer(passage: Passage, looks: Looks) -> Looked | None:
    """Take closer looks until the prediction is clear; None where the route encoded nothing that could be finer.

    A look that fails, or that no time is left for, leaves the prediction before it in the passage.
    """
    first = next((i for i in range(len(passage.route.segments)) if _can_be_finer(passage, i, looks)), None)
    if first is None:
        return None
    stages = passage.stages[first:]
    for taken, look in enumerate(looks.looks):
        if looks.margin_of(passage.outputs()) >= look.margin:
            return Looked("sure", taken)
        once_s = sum(stage.encode_s + stage.total_s for stage in stages)
        # A hop that hangs must leave time for the response: half of what is left, and a few times the run before.
        bound_s = min(passage.context.deadline.remaining() / 2, max(_MIN_BOUND_S, _MAX_SLOWDOWN * once_s))
        if bound_s < once_s:
            return Looked("late", taken)
        try:
            stages = _run_again(passage, first, look.quality, Deadline.after(bound_s))
        except IsthmusError as e:
            return Looked("failed", taken, e)
    return Looked("last", len(looks.looks))


def _run_again(passage: Passage, first: int, quality: float, deadline: Deadline) -> list[Stage]:
    """Run the segments from `first` on with at least that quality; the passage changes only once all of them ran."""
    finer = passage.again(passage.route.finer(quality), deadline)
    finer.through(first)
    passage.values.update(finer.values)
    passage.stages += finer.stages
    return finer.stages


def _can_be_finer(passage: Passage, segment: int, looks: Looks) -> bool:
    """Whether the route encoded any input of that segment below the last look's quality.

    Inputs that the caller encoded are not among the values, so that segment cannot run again.
    """
    if any(spec.name not in passage.values for spec in passage.route.segments[segment].inputs):
        return False
    sent, finest = passage.stages[segment].codecs, looks.looks[-1].quality
    return any(name in sent and how.quality < finest for name, how in passage.route.encoding(segment).items())
