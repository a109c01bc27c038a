"""Thresholds and scores of closer looks, confidence-gated second transmissions.

Every quality is scored alone on the same inputs; a chain of transmissions is a sum of their
scores. Nothing is trained. Source: docs/explanation/calibration.md, "Closer looks".
"""

from __future__ import annotations

import decimal
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from msgspec import structs

from isthmus.artifacts.choice import MAX_LOOKS, MAX_MARGIN, TRANSFORM_ID, Choice, Look
from isthmus.artifacts.fidelity import Entry
from isthmus_tools.calibration.scoring import Tally

QUALITY_STEP = 0.2
"""Rise in quality from look to look: a third of the quantiser step in tables as calibration learns them."""
QUANTILE = 0.95
"""Share of margin shifts below a look's margin: predictions of larger margins count as confident."""

# Qualities are rounded to four digits.
_QUALITY_TOLERANCE = 1e-3
# Rounding of float32 sums moves margins by up to this much.
_MIN_SHIFT = 1e-6
_THREE_DIGITS = decimal.Context(prec=3, rounding=decimal.ROUND_CEILING)
_Number = TypeVar("_Number", int, float)


def with_looks(tallies: Sequence[tuple[Choice, Tally]]) -> list[tuple[Choice, Tally, tuple[float, ...]]]:
    """Chains of every quality with closer looks: tallies as if scored, and each look's share of the inputs.

    `tallies` are of the qualities of a codec at a cut, on the same inputs. Each look is a fixed factor finer. A look's
    margin comes from the margin shifts at the quality before, not from changed predictions: too few to choose by.
    """
    by_choice = dict(tallies)
    return [chain for first in by_choice for chain in _chains(first, by_choice)]


def look_entries(cut: str, scored: Sequence[tuple[Choice, Tally]], plain: Iterable[Entry], limit: float) -> list[Entry]:
    """Entries of the chains on the Pareto front of mean bytes and agreement, at a cut.

    `scored` are all choices with their tallies, and `plain` their entries. A chain's agreement is at most that of its
    last quality; a chain with a look that no input took is left out.
    """
    entries = {entry.choice: entry for entry in plain}
    sizes = {choice: statistics.fmean(tally.bytes) for choice, tally in scored}
    graded = [(choice, tally) for choice, tally in scored if choice.codec == TRANSFORM_ID and tally.margins]
    for choice, tally, shares in with_looks(graded):
        # A look without inputs was never scored: the shorter chain says the same.
        if not all(shares):
            continue
        entry = tally.entry(cut, choice, limit)
        agreement = min(entry.measured, entries[choice.last].agreement)
        sizes[choice] = statistics.fmean(tally.bytes)
        entries[choice] = structs.replace(
            entry, agreement=agreement, offered=agreement >= limit, shares=tuple(round(share, 6) for share in shares)
        )
    # Means for all choices here: a chain's mean does not compare with the medians in the other entries.
    by_size = sorted(entries.items(), key=lambda each: (sizes[each[0]], -each[1].agreement, len(each[0].looks)))
    front, best = [], -1.0
    for choice, entry in by_size:
        if entry.agreement > best:
            best = entry.agreement
            front += [entry] if choice.looks else []
    return front


def finer_than(choice: Choice, others: Sequence[Choice]) -> Choice | None:
    """The choice among `others` for a closer look after `choice`."""
    quality = choice.quality + QUALITY_STEP
    candidates = (o for o in others if o.codec == choice.codec and abs(o.quality - quality) < _QUALITY_TOLERANCE)
    return next(candidates, None)


def _chains(first: Choice, tallies: dict[Choice, Tally]) -> Iterator[tuple[Choice, Tally, tuple[float, ...]]]:
    looks: tuple[Look, ...] = ()
    shares: tuple[float, ...] = ()
    latest, total = first, tallies[first]
    takes = [True] * len(total.bytes)
    while len(looks) < MAX_LOOKS and (finer := finer_than(latest, list(tallies))) is not None:
        threshold = _threshold(tallies[latest].shifts)
        if not 0 < threshold <= MAX_MARGIN:
            return
        takes = [still and margin < threshold for still, margin in zip(takes, tallies[latest].margins, strict=True)]
        total = _after_look(total, tallies[finer], takes)
        looks = (*looks, Look(finer.quality, threshold))
        shares = (*shares, sum(takes) / len(takes))
        yield replace(first, looks=looks), total, shares
        latest = finer


def _threshold(shifts: Sequence[float]) -> float:
    """The quantile, rounded up to the three digits of settings; 0 where nothing shifts by more than sums round."""
    finite = [shift for shift in shifts if math.isfinite(shift)]
    if not finite:
        return 0.0
    exact = float(np.quantile(finite, QUANTILE))
    if exact < _MIN_SHIFT:
        return 0.0
    return float(_THREE_DIGITS.create_decimal(repr(exact)))


def _after_look(total: Tally, fine: Tally, takes: Sequence[bool]) -> Tally:
    """Costs of both transmissions and the finer prediction for inputs that take the look; other inputs unchanged."""

    def added(costs: list[_Number], more: list[_Number]) -> list[_Number]:
        return [a + b if looks else a for a, b, looks in zip(costs, more, takes, strict=True)]

    return Tally(
        groups=total.groups,
        same=[b if looks else a for a, b, looks in zip(total.same, fine.same, takes, strict=True)],
        bytes=added(total.bytes, fine.frame_bytes),
        values=total.values,
        errors=[b if looks else a for a, b, looks in zip(total.errors, fine.errors, takes, strict=True)],
        encode_s=added(total.encode_s, fine.encode_s),
        decode_s=added(total.decode_s, fine.decode_s),
        fell_back=total.fell_back,
    )
