"""Closer looks: most answers are clear when little was sent, and only the others are worth more.

The router holds what crosses, so where the likeliest class leads by too little it sends more: a refinement of what the
next hop has kept, or all of it, finer, where that hop kept nothing. Source: docs/calibration.md, "Closer looks".
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from isthmus.codecs import Packed
from isthmus.context import Deadline
from isthmus.errors import HopRejected, IsthmusError, NotKept
from isthmus.passage import Passage, Stage
from isthmus.route import Looks

if TYPE_CHECKING:
    from isthmus.codecs.layers import Trail

OUTCOMES = ("sure", "last", "late", "failed")
"""The answer was clear; there was no closer look left; no time for one; the hop gave none, and the answer stands."""

WHOLE_FOR_S = 60.0
"""How long a hop that had forgotten what it was to keep is sent everything: another replica may answer each call."""
_LEAST_S, _PATIENCE = 1.0, 10.0


@dataclass(frozen=True)
class Looked:
    """How it went, one of OUTCOMES; how many looks were taken; and whether a hop had forgotten what it was sent."""

    outcome: str
    taken: int = 0
    forgotten: bool = False
    error: IsthmusError | None = field(default=None, compare=False)
    """Why the next look failed, for the log; answers do not say it."""


def look_closer(passage: Passage, looks: Looks) -> Looked | None:
    """Send more of what was packed while the answer is not clear; None where nothing was packed that could be finer.

    The last answer stands where no time is left for another as long, or another cannot be had. No hop that hangs must
    keep it: a look has half of the time left, and no more than some times what the one before it took.
    """
    first = next((i for i in range(len(passage.route.segments)) if _can_be_finer(passage, i, looks)), None)
    if first is None:
        return None
    sending = _Sending(passage, first)
    for taken, look in enumerate(looks.looks):
        if looks.margin_of(passage.outputs()) >= look.margin:
            return Looked("sure", taken, sending.forgotten)
        once_s = _seconds(passage.stages[first:] if taken == 0 else sending.last)
        longest_s = min(passage.context.deadline.remaining() / 2, max(_LEAST_S, _PATIENCE * once_s))
        if longest_s < once_s:
            return Looked("late", taken, sending.forgotten)
        try:
            sending.send(look.quality, Deadline.after(longest_s))
        except IsthmusError as e:
            return Looked("failed", taken, sending.forgotten, e)
    return Looked("last", len(looks.looks), sending.forgotten)


class _Sending:
    """What the first hop that was sent anything coarse has by now, and what the last look took."""

    def __init__(self, passage: Passage, first: int) -> None:
        self._passage, self._first = passage, first
        self._latest = passage
        self._trails: dict[str, Trail] = {}
        self.last: list[Stage] = []
        self.forgotten = False

    def send(self, quality: float, deadline: Deadline) -> None:
        """Answer again with what crosses at that quality, in the time that is left.

        Raises:
            IsthmusError: no answer could be had; the one before it stands.
        """
        known = self._passage
        context = replace(known.context, deadline=deadline)
        closer = Passage(known.route.finer(quality), context, dict(known.values))
        hop = known.route.hops[self._first]
        longer: dict[str, Trail] = {}
        try:
            if time.monotonic() < hop.whole_until:
                closer.through(self._first)
            else:
                closer.through(self._first, lambda: self._refined(closer, longer))
        except HopRejected as e:
            if not _has_forgotten(e):
                raise
            hop.whole_until = time.monotonic() + WHOLE_FOR_S
            self.forgotten = True
            closer.through(self._first)
        else:
            self._trails.update(longer)
        self._latest = closer
        self.last = closer.stages
        known.values.update(closer.values)
        known.stages += closer.stages

    def _refined(self, closer: Passage, longer: dict[str, Trail]) -> Mapping[str, Packed]:
        """Those tensors that the hop has, refined; `longer` takes what it then has of them."""
        from isthmus.codecs.layers import follow_all, trails_of

        self._trails |= trails_of(self._latest.sent[self._first], closer.route.digest)
        made, more = follow_all(self._trails, closer.route.packing(self._first))
        longer |= more
        return made


def _can_be_finer(passage: Passage, segment: int, looks: Looks) -> bool:
    """Whether anything that it takes was packed by the route, at less than the last look's quality.

    What the caller has packed itself is not there to be sent once more.
    """
    if any(spec.name not in passage.values for spec in passage.route.segments[segment].inputs):
        return False
    sent, finest = passage.sent[segment], looks.looks[-1].quality
    return any(name in sent and how.quality < finest for name, how in passage.route.packing(segment).items())


def _seconds(stages: list[Stage]) -> float:
    return sum(stage.pack_s + stage.total_s for stage in stages)


def _has_forgotten(error: HopRejected) -> bool:
    said = error.facts.get("error")
    return isinstance(said, dict) and said.get("type") == NotKept.__name__
