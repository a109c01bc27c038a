"""Second looks: most answers are clear at a coarse step, and only the others are worth a finer one.

The router holds what crosses, so where the likeliest class leads by too little it sends once more, finer; nothing is
kept anywhere, and nothing is trained. Source: docs/calibration.md, "A second look".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from isthmus.calibration.choice import Again, Choice
from isthmus.calibration.fidelity import Entry
from isthmus.calibration.scoring import Tally

QUANTILE = 0.8
"""Of how far a quality moves margins: an answer that is clearer than so many of these moves counts as sure."""
FINER_BY = 0.35
"""How much higher the second quality is: one pair for each first quality, so that none is picked for its luck."""
_NEAR = 0.08


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
        if margin > 0 and distance <= _NEAR:
            choice = replace(first, again=Again(quality, margin))
            found.append((choice, _together(coarse, fine, margin)))
    return found


def asked_again(coarse: Tally, margin: float) -> list[bool]:
    """Which of the inputs would be sent a second time."""
    return [clear < margin for clear in coarse.margins]


def entries_of(cut: str, once: Sequence[tuple[Choice, Tally]], plain: Iterable[Entry], limit: float) -> list[Entry]:
    """Those second looks at a cut that nothing beats: no entry takes fewer bytes for as much agreement.

    `plain` are the cut's entries without a second look. No pair is believed to keep more than its finer quality does.
    """
    known = list(plain)
    of_quality = {(e.codec, e.quality): e.agreement for e in known}
    tallies = dict(once)
    made = []
    for choice, tally in second_looks(once):
        if choice.again is None:
            continue
        entry = tally.entry(cut, choice, limit)
        agreement = min(entry.measured, of_quality[choice.codec, choice.again.quality])
        share = float(np.mean(asked_again(tallies[choice.once], choice.again.margin)))
        made.append(
            replace(
                entry,
                agreement=agreement,
                offered=agreement >= limit,
                again_quality=choice.again.quality,
                again_margin=choice.again.margin,
                asked_again=round(share, 6),
            )
        )
    rivals = sorted([*known, *made], key=lambda e: (e.bytes, -e.agreement, e.again_margin))
    kept, best = [], -1.0
    for entry in rivals:
        if entry.agreement > best:
            best = entry.agreement
            kept += [entry] if entry.again_margin else []
    return kept


def _margin(moved: Sequence[float]) -> float:
    """Rounded up to three digits, so that settings can say it."""
    finite = [m for m in moved if math.isfinite(m)]
    if not finite:
        return 0.0
    exact = float(np.quantile(finite, QUANTILE))
    if exact <= 0:
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
