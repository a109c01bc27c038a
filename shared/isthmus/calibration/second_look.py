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

QUANTILES = (0.8, 0.9)
"""Of how far a quality moves margins: an answer that is clearer than so many of these moves counts as sure."""


def second_looks(once: Sequence[tuple[Choice, Tally]]) -> list[tuple[Choice, Tally]]:
    """Every pair of a coarser and a finer quality of one codec, for each quantile, as if they had been tried.

    `once` are the qualities at one cut, tried on the same inputs. A pair's margin comes from how far the coarser one
    moves margins, not from which answers it changes: those are too few to choose by.
    """
    found: dict[Choice, Tally] = {}
    ordered = sorted(once, key=lambda each: each[0].quality)
    for i, (first, coarse) in enumerate(ordered):
        for quantile in QUANTILES:
            margin = _margin(coarse.moved, quantile)
            if margin <= 0:
                continue
            for second, fine in ordered[i + 1 :]:
                if second.codec == first.codec:
                    choice = replace(first, again=Again(second.quality, margin))
                    found[choice] = _together(coarse, fine, margin)
    return list(found.items())


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


def _margin(moved: Sequence[float], quantile: float) -> float:
    """Rounded up to three digits, so that settings can say it."""
    finite = [m for m in moved if math.isfinite(m)]
    if not finite:
        return 0.0
    exact = float(np.quantile(finite, quantile))
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
