"""Statistics of measured shares: confidence intervals, isotonic regression and a one-sided binomial test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist

# Two-sided confidence level of the intervals in a fidelity document.
CONFIDENCE = 0.95


def interval(groups: Iterable[tuple[int, int]], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson interval of a share of hits, from (hits, count) per group of inputs.

    Inputs derived from one photo are correlated. The effective count is the count over the design effect: the variance
    of the share between groups, relative to independent inputs. Without variation between groups the design effect is
    1.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927); Kish, Survey Sampling (1965), section 5.4.
    """
    pairs = [(hits, count) for hits, count in groups if count]
    total = sum(count for _, count in pairs)
    if not total:
        return 0.0, 1.0
    share = sum(hits for hits, _ in pairs) / total
    return wilson(share, total / _design_effect(pairs, share, total), confidence)


def wilson(share: float, count: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of `share` over `count` independent trials."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def isotonic(shares: Sequence[float]) -> list[float]:
    """Isotonic regression of shares of equal weight: the nearest non-decreasing sequence.

    A finer quality preserves at least as many predictions as a coarser quality; a measured decrease is noise, and the
    mean replaces both values.

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
    """Whether the rate behind `hits` of `count` trials exceeds `limit`, by the one-sided lower bound of Clopper and
    Pearson.

    With a limit of 1% and a confidence of 99.9%, two hits suffice in up to five trials, three in up to 19.
    """
    if hits <= count * limit:
        return False
    # The logarithm below needs a positive limit.
    if limit <= 0:
        return True
    # By log-gamma, since binomial coefficients of thousands of trials overflow a float.
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
    # No variance to estimate from.
    if number < 2 or share in (0.0, 1.0):
        return 1.0
    between = sum((hits - share * count) ** 2 for hits, count in groups) * number / (number - 1) / total**2
    # Below 1 the groups would tell more than independent inputs, which is chance.
    return max(1.0, between / (share * (1 - share) / total))
