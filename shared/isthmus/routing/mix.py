"""How requests divide over candidate routes: a linear programme over what each takes of edge, link and cloud.

`joint_capacity` is the maximal rate of all candidates together, `least_cost` the division of a given rate with the
least mean seconds. An instance of 16 candidates takes about a millisecond, so that a division follows every change
of the estimates. Pure functions; HiGHS solves, on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import highspy
import numpy as np
import numpy.typing as npt

from isthmus.errors import Infeasible, ProblemMalformed
from isthmus.routing.demand import Demand

# Above this utilisation a queue grows faster than estimates can follow.
HEADROOM = 0.9
# Utilisations at which a tangent bounds the queueing cost from below; the curve bends most near 1.
_KNOTS = (0.0, 0.2, 0.35, 0.5, 0.62, 0.72, 0.8, 0.86, 0.9, 0.93, 0.96, 0.98)
# A lower rate divides as this one does: queues are empty, and the quickest candidate takes all.
_MIN_RATE = 1e-6

Floats = npt.NDArray[np.float64]


class Resources(NamedTuple):
    """A number for each resource; as capacities: seconds of computation, or bytes, in a second.

    A tier of several CPUs that computes one request on each has as many seconds a second. `inf` is unlimited.
    """

    edge: float = math.inf
    uplink: float = math.inf
    downlink: float = math.inf
    cloud: float = math.inf


NONE = Resources(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Mix:
    """A division of requests.

    `rate` is requests a second, `shares` each candidate's share of these, `used` the utilisation of each resource.
    `prices` are marginal: of `least_cost` the seconds that a second or byte of demand adds to all requests' latency,
    of `joint_capacity` the requests that a second or byte of further capacity would serve. `seconds` is the mean of a
    request, queueing included; None of `joint_capacity`. `served` is false where the rate that was asked for exceeds
    the joint capacity: then rate, shares and prices are those of `joint_capacity`.
    """

    rate: float
    shares: tuple[float, ...]
    used: Resources
    prices: Resources
    seconds: float | None = None
    served: bool = True

    @property
    def bottleneck(self) -> str:
        """The resource that is used most; empty where all are free."""
        name = max(Resources._fields, key=lambda r: getattr(self.used, r))
        return name if getattr(self.used, name) > 0 else ""

    def cost(self, demand: Demand, seconds: float) -> float:
        """Seconds of a request alone plus the seconds by which it delays others, at the prices of `least_cost`."""
        return seconds + sum(price * amount for price, amount in zip(self.prices, demand, strict=False) if amount)


def joint_capacity(demands: Sequence[Demand], capacities: Resources, *, headroom: float = 1.0) -> Mix:
    """The maximal rate at which no resource is used beyond `headroom`, and its division.

    The rate is infinite where a candidate needs no limited resource.

    Raises:
        Infeasible: no candidate, or none whose resources have capacity.
        ProblemMalformed: a negative number or NaN.
    """
    loads, usable = _loads(demands, capacities, headroom)
    if (free := usable & ~loads.any(axis=1)).any():
        return _one(int(free.argmax()), loads, math.inf)
    # Columns: requests a second of each usable candidate. Rows: the resources.
    solution = _solve(-np.ones(usable.sum()), loads[usable].T, np.full(4, -np.inf), np.full(4, headroom))
    if solution is None:
        raise Infeasible("no division of requests keeps within the resources", constraint="headroom", nearest=None)
    rates = np.zeros(len(demands))
    rates[usable] = solution.columns
    rate = float(rates.sum())
    prices = _prices(-solution.rows, capacities)
    return Mix(rate, tuple((rates / rate).tolist()), _used(rates, loads), prices)


def least_cost(
    demands: Sequence[Demand],
    seconds: Sequence[float],
    capacities: Resources,
    rate: float,
    *,
    headroom: float = HEADROOM,
) -> Mix:
    """The division of `rate` requests a second with the least mean seconds, no resource used beyond `headroom`.

    `seconds` are those of a request alone. Each resource adds the expected number of waiting requests, a convex
    function of its utilisation, as tangents. Where the rate cannot be served, the division of `joint_capacity`.

    Raises:
        As `joint_capacity`.

    Source: Sakasegawa, An approximation formula L_q = α·ρ^β/(1-ρ), 1977; for one server the exact value of M/M/1, and
    of processor sharing with any distribution.
    """
    if len(seconds) != len(demands) or not all(s >= 0 for s in (*seconds, rate)) or math.isinf(rate):
        raise ProblemMalformed("a division needs a rate, and seconds of each candidate, of 0 or more", rate=rate)
    loads, usable = _loads(demands, capacities, headroom)
    usable &= np.isfinite(seconds)
    if not usable.any():
        raise _none_usable(len(demands))
    rate = max(rate, _MIN_RATE)
    per_share = loads[usable] * rate  # (candidates, resources): utilisation by a share of 1
    knots = np.array([u for u in _KNOTS if u <= headroom] or [0.0])
    values, slopes = zip(*(_waiting(c, knots) for c in _servers(capacities)), strict=True)
    slope, intercept = np.array(slopes), (np.array(values) - np.array(slopes) * knots) / rate
    # Columns: a share for each candidate, then the mean seconds of waiting for each resource.
    # Rows: shares sum to 1; utilisations; for each resource and knot, waiting >= its tangent.
    count = int(usable.sum())
    tangents = [np.hstack([-np.outer(slope[r], per_share[:, r]) / rate, _unit(r, len(knots))]) for r in range(4)]
    sums = np.concatenate([np.ones(count), np.zeros(4)])
    matrix = np.vstack([sums, np.hstack([per_share.T, np.zeros((4, 4))]), *tangents])
    low = np.concatenate([[1.0], np.full(4, -np.inf), intercept.ravel()])
    high = np.concatenate([[1.0], np.full(4, headroom), np.full(4 * len(knots), np.inf)])
    solution = _solve(np.concatenate([np.asarray(seconds)[usable], np.ones(4)]), matrix, low, high)
    if solution is None:
        most = joint_capacity(demands, capacities, headroom=headroom)
        return Mix(most.rate, most.shares, most.used, most.prices, served=False)
    shares = np.zeros(len(demands))
    shares[usable] = solution.columns[:count]
    # A unit of utilisation costs at the limit, and along the active tangents.
    limits, along = -solution.rows[1:5], solution.rows[5:].reshape(4, -1)
    prices = _prices(rate * limits + (along * slope).sum(axis=1), capacities)
    mean = float(solution.columns @ np.concatenate([np.asarray(seconds)[usable], np.ones(4)]))
    return Mix(rate, tuple(shares.tolist()), _used(rate * shares, loads), prices, mean)


class _Solution(NamedTuple):
    columns: Floats
    rows: Floats
    """Dual values: the change of the least cost for a unit more of the row's bound."""


def _loads(demands: Sequence[Demand], capacities: Resources, headroom: float) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Utilisation of each resource by a request a second, (candidates, 4), and the candidates that can run at all."""
    if not all(amount >= 0 for amounts in (capacities, *demands) for amount in amounts) or not 0 < headroom <= 1:
        raise ProblemMalformed("demands and capacities are numbers of 0 or more, the headroom above 0 and at most 1")
    taken = np.array([d[:4] for d in demands], float).reshape(-1, 4)
    limits = np.array(capacities, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        loads = np.where(taken == 0, 0.0, taken / limits)
    usable: npt.NDArray[np.bool_] = np.all(np.isfinite(loads), axis=1)
    if not usable.any():
        raise _none_usable(len(demands))
    return np.where(usable[:, None], loads, 0.0), usable


def _none_usable(count: int) -> Infeasible:
    why = "none has its resources" if count else "there is none"
    return Infeasible(f"no candidate route can take requests: {why}", constraint="capacity", nearest=None)


def _one(index: int, loads: Floats, rate: float) -> Mix:
    """All requests on one candidate, which uses no limited resource."""
    return Mix(rate, tuple(float(i == index) for i in range(len(loads))), NONE, NONE)


def _servers(capacities: Resources) -> tuple[float, ...]:
    """Parallel servers of each resource: CPUs compute side by side, a link sends byte after byte."""
    return max(1.0, capacities.edge), 1.0, 1.0, max(1.0, capacities.cloud)


def _waiting(servers: float, at: Floats) -> tuple[Floats, Floats]:
    """The mean number of waiting requests at utilisations, and its slope."""
    if math.isinf(servers):
        return np.zeros_like(at), np.zeros_like(at)
    power = math.sqrt(2 * (servers + 1))
    return at**power / (1 - at), at ** (power - 1) * (power * (1 - at) + at) / (1 - at) ** 2


def _unit(column: int, rows: int) -> Floats:
    unit = np.zeros((rows, 4))
    unit[:, column] = 1.0
    return unit


def _used(rates: Floats, loads: Floats) -> Resources:
    return Resources(*(rates @ loads).tolist())


def _prices(per_utilisation: Floats, capacities: Resources) -> Resources:
    limits = np.array(capacities, float)
    prices = np.where(limits > 0, np.maximum(per_utilisation, 0.0) / np.where(limits > 0, limits, 1), 0.0)
    return Resources(*prices.tolist())


class _QuietHighs(highspy.Highs):
    """A solver without callbacks, whose start in the constructor prints a header before any option can be set."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def enableCallbacks(self) -> None:  # noqa: N802 - the library's name
        """Called by the constructor."""
        self.setOptionValue("output_flag", False)


def _solve(costs: Floats, matrix: Floats, low: Floats, high: Floats) -> _Solution | None:
    """Minimise costs · x under low <= matrix · x <= high, x >= 0; None where nothing satisfies the rows."""
    rows, columns = matrix.shape
    programme = highspy.HighsLp()
    programme.num_col_, programme.num_row_ = columns, rows
    programme.col_cost_, programme.row_lower_, programme.row_upper_ = costs, low, high
    programme.col_lower_, programme.col_upper_ = np.zeros(columns), np.full(columns, np.inf)
    programme.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    row, column = np.nonzero(matrix)
    programme.a_matrix_.start_ = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
    programme.a_matrix_.index_ = column.astype(np.int32)
    programme.a_matrix_.value_ = matrix[row, column]
    solver = _QuietHighs()
    # Presolve costs more than it saves here, and would not tell infeasible from unbounded.
    for option, value in (("threads", 1), ("presolve", "off"), ("solver", "simplex")):
        solver.setOptionValue(option, value)
    solver.passModel(programme)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solution = solver.getSolution()
    return _Solution(np.array(solution.col_value), np.array(solution.row_dual))
