"""Closer looks, confidence-gated second transmissions, as calibration scores them.

Every quality is scored alone on the same inputs; a first transmission and finer ones after it are sums of those scores.
Nothing is trained. Source: docs/calibration.md, "Closer looks".
"""

from __future__ import annotations

import decimal
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from isthmus.artifacts.choice import MAX_MARGIN, TRANSFORM_ID, Choice, Look
from isthmus.artifacts.fidelity import Entry
from isthmus_tools.calibration.scoring import Tally
from isthmus_tools.calibration.sending import finer_than

MOST = 4
"""Closer looks after the first, each of which is one more call."""
QUANTILE = 0.95
"""Of how far a quality moves margins: an answer that is clearer than so many of these moves counts as sure."""
_MIN_MOVE = 1e-6
_Number = TypeVar("_Number", int, float)
_THREE_DIGITS = decimal.Context(prec=3, rounding=decimal.ROUND_CEILING)


def with_looks(once: Sequence[tuple[Choice, Tally]]) -> list[tuple[Choice, Tally, tuple[float, ...]]]:
    """Every quality followed by one closer look, by two, …, as if they had been tried, and the share that took each.

    `once` are the qualities of one codec at one cut, tried on the same inputs. Each look is a fixed factor finer, and
    a quality's margin comes from how far it moves margins, not from which answers it changes: those are too few to
    choose by.
    """
    tallies = dict(once)
    return [made for first in tallies for made in _followed(first, tallies)]


def entries_of(cut: str, tried: Sequence[tuple[Choice, Tally]], plain: Iterable[Entry], limit: float) -> list[Entry]:
    """Those closer looks at a cut that nothing beats: no entry takes fewer bytes, on average, for as much agreement.

    `tried` are the choices at one cut, and `plain` their entries. No looks are believed to keep more than the last
    one's quality does, and a look that no input took is none.
    """
    known = {entry.choice: entry for entry in plain}
    sizes = {choice: statistics.fmean(tally.bytes) for choice, tally in tried}
    once = [(choice, tally) for choice, tally in tried if choice.codec == TRANSFORM_ID and tally.margins]
    for choice, tally, shares in with_looks(once):
        if not all(shares):
            continue
        entry = tally.entry(cut, choice, limit)
        agreement = min(entry.measured, known[choice.last].agreement)
        sizes[choice] = statistics.fmean(tally.bytes)
        known[choice] = replace(
            entry, agreement=agreement, offered=agreement >= limit, shares=tuple(round(share, 6) for share in shares)
        )
    # A mean and a median do not compare, so the others are ranked by their means here, too.
    rivals = sorted(known.items(), key=lambda each: (sizes[each[0]], -each[1].agreement, len(each[0].looks)))
    kept, best = [], -1.0
    for choice, entry in rivals:
        if entry.agreement > best:
            best = entry.agreement
            kept += [entry] if choice.looks else []
    return kept


def _followed(first: Choice, tallies: dict[Choice, Tally]) -> Iterator[tuple[Choice, Tally, tuple[float, ...]]]:
    looks: tuple[Look, ...] = ()
    shares: tuple[float, ...] = ()
    at, so_far = first, tallies[first]
    taking = [True] * len(so_far.bytes)
    while len(looks) < MOST and (finer := finer_than(at, list(tallies))) is not None:
        margin = _margin(tallies[at].moved)
        if not 0 < margin <= MAX_MARGIN:
            return
        taking = [still and clear < margin for still, clear in zip(taking, tallies[at].margins, strict=True)]
        so_far = _then(so_far, tallies[finer], taking)
        looks = (*looks, Look(finer.quality, margin))
        shares = (*shares, sum(taking) / len(taking))
        yield replace(first, looks=looks), so_far, shares
        at = finer


def _margin(moved: Sequence[float]) -> float:
    """Rounded up to three digits, so that settings can say it; 0 where nothing moves by more than sums round."""
    finite = [m for m in moved if math.isfinite(m)]
    if not finite:
        return 0.0
    exact = float(np.quantile(finite, QUANTILE))
    if exact < _MIN_MOVE:
        return 0.0
    return float(_THREE_DIGITS.create_decimal(repr(exact)))


def _then(so_far: Tally, fine: Tally, taking: Sequence[bool]) -> Tally:
    """Sums over both transmissions for the inputs that take one more look, and the others as they were."""

    def summed(one: list[_Number], more: list[_Number]) -> list[_Number]:
        return [a + b if again else a for a, b, again in zip(one, more, taking, strict=True)]

    return Tally(
        sources=so_far.sources,
        same=[b if again else a for a, b, again in zip(so_far.same, fine.same, taking, strict=True)],
        bytes=summed(so_far.bytes, fine.frame_bytes),
        values=so_far.values,
        errors=[b if again else a for a, b, again in zip(so_far.errors, fine.errors, taking, strict=True)],
        encode_s=summed(so_far.encode_s, fine.encode_s),
        decode_s=summed(so_far.decode_s, fine.decode_s),
        fell_back=so_far.fell_back,
    )
