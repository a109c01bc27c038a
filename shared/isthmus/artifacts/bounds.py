"""Confidence intervals of measured shares, isotonic regression, and a binomial test with few false alarms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

CONFIDENCE = 0.95
"""Of the intervals in a fidelity document, both sides together."""


def interval(groups: Iterable[tuple[int, int]], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval around the share of hits, from (hits, count) of each group of inputs.

    Inputs made of one photo are alike, so that they tell less than as many photos would. The count is therefore divided
    by the design effect: the variance of the share between groups over what independent inputs would have. Where no two
    groups differ there is nothing to estimate it from, and every input counts.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927); Kish, Survey Sampling (1965), section 5.4.
    """
    pairs = [(hits, count) for hits, count in groups if count]
    total = sum(count for _, count in pairs)
    if not total:
        return 0.0, 1.0
    share = sum(hits for hits, _ in pairs) / total
    return wilson(share, total / _design_effect(pairs, share, total), confidence)


def wilson(share: float, count: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval around `share` of `count` independent trials."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def rising(shares: Sequence[float]) -> list[float]:
    """The non-decreasing shares that are nearest to those measured, each from as many inputs.

    A finer step keeps no fewer answers than a coarser one; where it was measured to, that was luck on one side or the
    other, and their mean stands for both.

    Source: pool adjacent violators; Ayer et al., Ann. Math. Statist. 26 (1955).
    """
    pools: list[tuple[float, int]] = []
    for share in shares:
        total, count = share, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            before, number = pools.pop()
            total, count = total + before, count + number
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def exceeds(hits: int, count: int, limit: float, confidence: float) -> bool:
    """Whether the rate behind `hits` of `count` trials is above `limit`, at that confidence.

    The same as: the one-sided lower bound of Clopper and Pearson lies above `limit`. With a limit of 1% and a
    confidence of 99.9%, two hits do in up to five trials, three in up to 19.
    """
    if hits <= count * limit:
        return False
    if limit <= 0:
        return True
    fewer = sum(
        math.exp(
            math.lgamma(count + 1)
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            + k * math.log(limit)
            + (count - k) * math.log1p(-limit)
        )
        for k in range(hits)
    )
    return 1 - fewer < 1 - confidence


def _design_effect(groups: list[tuple[int, int]], share: float, total: int) -> float:
    number = len(groups)
    if number < 2 or share in (0.0, 1.0):
        return 1.0
    between = sum((hits - share * count) ** 2 for hits, count in groups) * number / (number - 1) / total**2
    return max(1.0, between / (share * (1 - share) / total))
