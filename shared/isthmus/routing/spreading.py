"""Mixed routes under load: requests are spread over candidates by the linear programme's shares.

A greedy choice is selfish: a route quick for its own request may take the edge time of two further requests. In a
simulation of edge, link and cloud, each request on the route that ends soonest reached a third of the best fixed
route's rate; turns by the programme's shares reached 0.87 to 1.21 times that rate in ten cells.
"""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.routing.demand import Demand
from isthmus.routing.forecast import Expectation
from isthmus.routing.mix import Mix, Resources, least_cost

# Below this utilisation of its busiest resource the preferred route has no queue worth a programme.
MIN_LOAD = 0.25
# The mean must gain a tenth for requests to be spread, and a twentieth for them to stay so.
START_GAIN, STAY_GAIN = 0.10, 0.05
# Smaller shares are rounding, and would load a route's segments for a request a minute.
_MIN_SHARE = 0.02
# Forecasts and rates within this of those solved for leave the shares as they are.
_SAME = 0.05
# Refreshes from one solution to the next. Ten a second took an eighth of an edge with a quarter of a CPU.
_SOLVE_EVERY = 5
# A load that grew by more is solved for at once.
_RISE = 1.25
# Seconds sooner that are worth a turn. Less follows the queues too closely: the edge's is in all routes' way.
_TURN_S = 0.5


class Spreading:
    """The shares in force, and the next turn; not thread-safe."""

    def __init__(self, candidates: int) -> None:
        self.shares: tuple[float, ...] = ()
        """A share for each candidate; empty while all requests take the preferred one."""
        self._credits = [0.0] * candidates
        self._solved_for: tuple[frozenset[int], tuple[float, ...]] = (frozenset(), ())
        self._since_solved = 0

    def update(
        self,
        expected: Sequence[Expectation],
        preferred: int,
        allowed: Sequence[int],
        rate: float,
        capacities: Resources,
    ) -> None:
        """Solve for the shares, if the situation differs from the one solved for.

        Units: requests a second; capacities in busy seconds a second.
        """
        loads = [rate * busy / capacity for busy, capacity in zip(expected[preferred].busy, capacities, strict=True)]
        if max(loads) < MIN_LOAD or len(allowed) < 2:
            self.shares, self._solved_for = (), (frozenset(), ())
            return
        situation = (rate, *capacities, *(s for i in allowed for s in (expected[i].seconds, *expected[i].busy)))
        members, solved = self._solved_for
        self._since_solved += 1
        if members == frozenset(allowed):
            has_risen = rate > _RISE * solved[0]
            if (self._since_solved < _SOLVE_EVERY and not has_risen) or all(map(_is_same, situation, solved)):
                return
        self._since_solved = 0
        self._solved_for = frozenset(allowed), situation
        one = _divide(expected, [preferred], rate, capacities)
        several = _divide(expected, allowed, rate, capacities)
        if not _is_worth_it(one, several, STAY_GAIN if self.shares else START_GAIN):
            self.shares = ()
            return
        shares = dict(zip(allowed, several.shares, strict=True))
        used = {i: share for i, share in shares.items() if share >= _MIN_SHARE}
        self.shares = tuple(used.get(i, 0.0) / sum(used.values()) for i in range(len(expected)))

    def take(self, indices: Sequence[int], seconds: Sequence[float]) -> int | None:
        """Whose turn it is among candidates that end after `seconds` each; None where none of them has a share.

        Smooth weighted round robin: each turn adds the shares, and the highest credit pays for the turn.
        """
        members = [(i, s) for i, s in zip(indices, seconds, strict=True) if self.shares and self.shares[i]]
        if not members:
            return None
        total = sum(self.shares[i] for i, _ in members)
        for i, _ in members:
            # Bounded, so that a route that did not answer for a minute does not get that minute's turns at once.
            self._credits[i] = min(self._credits[i] + self.shares[i] / total, 2.0)
        chosen = max(members, key=lambda m: self._credits[m[0]] - m[1] / _TURN_S)[0]
        self._credits[chosen] = max(self._credits[chosen] - 1.0, -2.0)
        return chosen


def _divide(expected: Sequence[Expectation], allowed: Sequence[int], rate: float, capacities: Resources) -> Mix:
    demands = [Demand(*expected[i].busy) for i in allowed]
    return least_cost(demands, [expected[i].seconds for i in allowed], capacities, rate)


def _is_worth_it(one: Mix, several: Mix, gain: float) -> bool:
    if one.seconds is None:  # the preferred route alone cannot serve the rate
        return True
    return several.seconds is not None and several.seconds <= one.seconds * (1 - gain)


def _is_same(new: float, old: float) -> bool:
    return abs(new - old) <= _SAME * abs(old)
