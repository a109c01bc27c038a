"""Second looks: most answers are clear at a coarse step, and only the others are worth a finer one.

The router holds what crosses, so where the likeliest class leads by too little it sends once more, finer; nothing is
kept anywhere, and nothing is trained. Source: docs/calibration.md, "A second look".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from isthmus.calibration.choice import WIDEST_MARGIN, Again, Choice
from isthmus.calibration.fidelity import Entry
from isthmus.calibration.scoring import Tally

CODEC = "transform/1"
"""The codec whose qualities are paired."""
QUANTILE = 0.8
"""Of how far a quality moves margins: an answer that is clearer than so many of these moves counts as sure."""
FINER_BY = 0.35
"""How much higher the second quality is: one pair for each first quality, so that none is picked for its luck."""
_NEAR = 0.08
_LEAST_MOVE = 1e-6


def second_looks(once: Sequence[tuple[Choice, Tally]]) -> list[tuple[Choice, Tally]]:
    """A pair for each quality that has one finer by some FINER_BY, as if it had been tried.

    `once` are the qualities of one codec at one cut, tried on the same inputs. A pair's margin comes from how far the
    coarser one moves margins, not from which answers it changes: those are too few to choose by.
    """
    found = []
    for first, coarse in once:
        margin = _margin(coarse.moved)
        finer = [(abs(c.quality - first.quality - FINER_BY), c.quality, t) for c, t in once]
        distance, quality, fine = min(finer, key=lambda each: each[:2])
        if 0 < margin <= WIDEST_MARGIN and distance <= _NEAR:
            choice = replace(first, again=Again(quality, margin))
            found.append((choice, _together(coarse, fine, margin)))
    return found


def asked_again(coarse: Tally, margin: float) -> list[bool]:
    """Which of the inputs would be sent a second time."""
    return [clear < margin for clear in coarse.margins]


def entries_of(cut: str, tried: Sequence[tuple[Choice, Tally]], plain: Iterable[Entry], limit: float) -> list[Entry]:
    """Those second looks at a cut that nothing beats: no entry takes fewer bytes, on average, for as much agreement.

    `tried` are the choices at one cut, and `plain` their entries. No pair is believed to keep more than its finer
    quality does, and one that no input took is none.
    """
    known = {entry.choice: entry for entry in plain}
    sizes = {choice: statistics.fmean(tally.bytes) for choice, tally in tried}
    once = [(choice, tally) for choice, tally in tried if choice.codec == CODEC and tally.margins]
    tallies = dict(once)
    for choice, tally in second_looks(once):
        again = choice.again
        if again is None or not any(asked := asked_again(tallies[choice.once], again.margin)):
            continue
        entry = tally.entry(cut, choice, limit)
        agreement = min(entry.measured, known[replace(choice, quality=again.quality, again=None)].agreement)
        sizes[choice] = statistics.fmean(tally.bytes)
        known[choice] = replace(
            entry,
            agreement=agreement,
            offered=agreement >= limit,
            again_quality=again.quality,
            again_margin=again.margin,
            asked_again=round(sum(asked) / len(asked), 6),
        )
    # A mean and a median do not compare, so the others are ranked by their means here, too.
    rivals = sorted(known.items(), key=lambda each: (sizes[each[0]], -each[1].agreement, each[1].again_margin))
    kept, best = [], -1.0
    for _, entry in rivals:
        if entry.agreement > best:
            best = entry.agreement
            kept += [entry] if entry.again_margin else []
    return kept


def _margin(moved: Sequence[float]) -> float:
    """Rounded up to three digits, so that settings can say it; 0 where nothing moves by more than sums round."""
    finite = [m for m in moved if math.isfinite(m)]
    if not finite:
        return 0.0
    exact = float(np.quantile(finite, QUANTILE))
    if exact < _LEAST_MOVE:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(exact)) - 2)
    return float(f"{math.ceil(exact / unit) * unit:.3g}")


def _together(coarse: Tally, fine: Tally, margin: float) -> Tally:
    again = asked_again(coarse, margin)

    def summed(one: list[float], other: list[float]) -> list[float]:
        return [a + b if twice else a for a, b, twice in zip(one, other, again, strict=True)]

    return Tally(
        sources=coarse.sources,
        same=[b if twice else a for a, b, twice in zip(coarse.same, fine.same, again, strict=True)],
        bytes=[a + b if twice else a for a, b, twice in zip(coarse.bytes, fine.bytes, again, strict=True)],
        values=coarse.values,
        errors=[b if twice else a for a, b, twice in zip(coarse.errors, fine.errors, again, strict=True)],
        pack_s=summed(coarse.pack_s, fine.pack_s),
        unpack_s=summed(coarse.unpack_s, fine.unpack_s),
        fell_back=coarse.fell_back,
    )
