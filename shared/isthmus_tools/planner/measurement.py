"""Measurement of candidates on the deployed functions, over the link, executed as the router does."""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from msgspec import structs

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Constraints, Objective
from isthmus.artifacts.plan import Candidate
from isthmus.codecs import Tables
from isthmus.context import Context
from isthmus.errors import DeadlineExceeded, HopUnavailable, IsthmusError
from isthmus.pipeline import (
    CallProtection,
    HttpHop,
    Result,
    Route,
    TlsTrust,
    execute,
    hops_by_url,
    photo_input,
    planned_route,
)
from isthmus.processing.image import sample_input
from isthmus_tools.budget import UNLIMITED, Budget, Pace
from isthmus_tools.planner.choice import VALUES, violations, without_deadlines
from isthmus_tools.planner.elimination import ROUNDS, Run, successive_elimination
from isthmus_tools.planner.inputs import TrialInput
from isthmus_tools.planner.throughput import best_division
from isthmus_tools.profiling.slow_edge import AT_FULL_SPEED, SlowEdge
from isthmus_tools.progress import Progress, silent

BASELINES = ("edge-float", "edge-int8", "cloud-photo", "cloud-raw")
"""Always measured, so that every plan states the cost of not splitting."""
MAX_CONTENDERS = 10
# Candidates predicted slower than this factor of the best are too unlikely to win to spend requests on.
_WITHIN = 1.5
# The best splits are measured even where predictions favour not splitting: predictions prune, measurements decide.
_MIN_SPLITS = 2
# The share of a budget after which no further candidate is warmed up: the rest is for the rounds.
_WARM_UP_SHARE = 0.85
# Ten times the prediction, within bounds: loading a model may take half a minute, and ten minutes would be a hang.
_MIN_S, _MAX_S, _MAX_SLOWDOWN = 30.0, 600.0, 10
_MAX_MESSAGE, _CONNECT_S = 500, 5.0


@dataclass(frozen=True)
class LinkedFunctions:
    """The functions' URLs: the head, the tail over the link, and the tail directly.

    Warm-ups call the tail directly, since loading a model over a slow link would only take longer.
    """

    head: str
    tail: str
    tail_direct: str
    protection: CallProtection | None = None
    trust: TlsTrust | None = None

    @property
    def hops(self) -> AbstractContextManager[Mapping[str, HttpHop]]:
        """A hop to each URL, for a block."""
        return hops_by_url((self.head, self.tail, self.tail_direct), self.protection, self.trust)


def contenders(
    candidates: Sequence[Candidate],
    objective: Objective,
    constraints: Constraints,
    max_contenders: int = MAX_CONTENDERS,
) -> list[Candidate]:
    """The candidates to measure: the most promising admissible ones near the best, the best splits, and baselines.

    For throughput also those that share the requests in the best division.
    """
    value = VALUES[objective]
    unlimited = without_deadlines(constraints)
    admissible = sorted((c for c in candidates if not c.refused and not violations(c, unlimited)), key=value)
    near = [c for c in admissible if value(c) <= _WITHIN * value(admissible[0])][:max_contenders]
    splits = [c for c in admissible if c.kind == "split" and c.exit is None][:_MIN_SPLITS]
    # As for splits: the best split with an exit is measured even where predictions are against exits.
    exits = [c for c in admissible if c.exit is not None][:1]
    names = {c.name for c in (*near, *splits, *exits)} | set(BASELINES)
    if objective == "throughput" and admissible:
        shares = best_division(admissible).shares
        names |= {c.name for c, share in zip(admissible, shares, strict=True) if share > 0}
    return [c for c in candidates if c.name in names]


def measure(
    candidates: Sequence[Candidate],
    digest: str,
    bundle: Bundle,
    functions: LinkedFunctions,
    inputs: Sequence[TrialInput],
    tables: Tables,
    variant: Callable[[str], Bundle],
    *,
    constraints: Constraints | None = None,
    edge: SlowEdge = AT_FULL_SPEED,
    rounds: int = ROUNDS,
    eliminate: bool = True,
    seed: int = 0,
    progress: Progress = silent,
    budget: Budget = UNLIMITED,
) -> tuple[Candidate, ...]:
    """`candidates` with measurements; `digest` is that of `bundle` in the functions' registry.

    A candidate that fails is refused, with the reason, and the rest go on. Candidates that violate `constraints`, other
    than in latency, are measured without eliminating any other. Candidates beyond the budget return without a
    measurement; the most promising are warmed up first. Work at a slow `edge`, the router's here included, counts by
    its CPU time.

    Raises:
        HopError: the functions cannot be reached, so that no candidate runs, or no longer over the link.
    """
    with functions.hops as hops:
        direct = (hops[functions.head], hops[functions.tail_direct])
        linked = (hops[functions.head], hops[functions.tail])

        def request(candidate: Candidate, to: tuple[HttpHop, HttpHop]) -> Run:
            return requester(candidate, digest, bundle, to, inputs, tables, variant, edge)

        failed: dict[str, IsthmusError] = {}
        ready = _warm_up(candidates, direct, request, failed, progress, budget.share(_WARM_UP_SHARE))
        if failed and not ready:
            raise next(iter(failed.values()))
        runs = {c.name: request(c, linked) for c in ready}
        remote = [c for c in candidates if c.name in runs and c.kind != "edge"]
        if remote:
            # A new connection's first bytes wait for a further round trip, and the router keeps connections.
            runs[min(remote, key=lambda c: (c.looks is not None, c.up_bytes)).name](0)
        unlimited = without_deadlines(constraints or Constraints())
        measured = successive_elimination(
            runs,
            expected={c.name: c.predicted.total for c in candidates},
            excluded={c.name for c in candidates if c.refused or violations(c, unlimited)},
            rounds=rounds,
            eliminate=eliminate,
            seed=seed,
            failed=failed,
            progress=progress,
            budget=budget,
        )
        if remote and all(c.name in failed for c in remote):
            raise failed[remote[0].name]
    return tuple(
        refused_for(c, failed[c.name]) if c.name in failed else structs.replace(c, measured=measured.get(c.name))
        for c in candidates
    )


def _warm_up(
    candidates: Sequence[Candidate],
    hops: tuple[HttpHop, HttpHop],
    request: Callable[[Candidate, tuple[HttpHop, HttpHop]], Run],
    failed: dict[str, IsthmusError],
    progress: Progress,
    budget: Budget,
) -> list[Candidate]:
    """The candidates whose segments are loaded, after a request of each; failures go to `failed`."""
    unreachable = unreachable_urls([hop.name for hop in hops])
    ready: list[Candidate] = []
    pace = Pace(len(candidates))
    for i, candidate in enumerate(sorted(candidates, key=lambda c: c.predicted.total)):
        if budget.spent and (ready or failed):
            break
        progress(f"warming up {candidate.name}, {i + 1} of {len(candidates)}{pace.left(i)}")
        used = {"edge": hops[:1], "cloud": hops[1:]}.get(candidate.kind, hops)
        if error := next((unreachable[hop.name] for hop in used if hop.name in unreachable), None):
            failed[candidate.name] = error
            continue
        try:
            request(candidate, hops)(0)
        except IsthmusError as e:
            failed[candidate.name] = e
            if isinstance(e, HopUnavailable) and "status" not in e.facts:
                # Not reached within the time of a cold start: no other candidate waits as long for this function.
                unreachable[str(e.facts.get("hop", ""))] = e
            continue
        ready.append(candidate)
    return ready


def longest_seconds(candidate: Candidate) -> float:
    """How long a measured request of a candidate may take."""
    return min(_MAX_S, max(_MIN_S, _MAX_SLOWDOWN * candidate.predicted.total))


def refused_for(candidate: Candidate, error: IsthmusError) -> Candidate:
    """A candidate whose measurement failed."""
    return structs.replace(candidate, refused=f"it failed: {error.message[:_MAX_MESSAGE]}")


def unreachable_urls(urls: Sequence[str]) -> dict[str, IsthmusError]:
    """The error of each URL whose address refuses connections: a mistyped URL is not worth a cold start's wait."""
    errors: dict[str, IsthmusError] = {}
    for url in dict.fromkeys(urls):
        parts = urlsplit(url)
        address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection(address, timeout=_CONNECT_S).close()
        except OSError as e:
            errors[url] = HopUnavailable(f"{url} cannot be reached: {e.strerror or e}", hop=url)
    return errors


def requester(
    candidate: Candidate,
    digest: str,
    bundle: Bundle,
    hops: tuple[HttpHop, HttpHop],
    inputs: Sequence[TrialInput],
    tables: Tables,
    variant: Callable[[str], Bundle],
    edge: SlowEdge = AT_FULL_SPEED,
) -> Run:
    """A function that runs one request of a candidate, from the photo on if any, and returns the seconds of its parts.

    Every request takes all closer looks, and each look counts by its share: a few inputs would estimate shares badly. A
    request without one of its looks is a failure. For the same reason a candidate with an exit sends every input twice,
    forced to end there and forced to go on, and both requests count by the exit's share: the median of a mix would be
    the time of the more frequent kind.
    """
    route = planned_route(candidate, digest, bundle, hops, tables, variant)
    if route.looks is not None:
        always = tuple(structs.replace(look, margin=math.inf) for look in route.looks.looks)
        route = replace(route, looks=replace(route.looks, looks=always))
    photo = photo_input(candidate, bundle, hops)
    longest_s = longest_seconds(candidate)
    ordered = _typical_first(inputs)

    def request(trial_input: TrialInput, route: Route) -> Mapping[str, float]:
        context = Context.from_headers({}, longest_s=longest_s)
        before = edge.work()
        start = time.perf_counter()
        preprocess_s = preprocess_cpu_s = 0.0
        if photo is not None and trial_input.photo is not None:
            encoded = photo.encode(trial_input.photo)
            if photo.jpeg_quality:
                preprocess_s = time.perf_counter() - start
                preprocess_cpu_s = time.thread_time() - before.router_s
            result = execute(route, {}, context, encoded)
        else:
            arrays = trial_input.arrays
            if trial_input.photo is not None and bundle.preprocess is not None:
                arrays = sample_input(bundle, trial_input.photo)
            preprocess_s = time.perf_counter() - start
            preprocess_cpu_s = time.thread_time() - before.router_s
            result = execute(route, arrays, context)
        total = time.perf_counter() - start
        _check_looks(result)
        seconds = {"preprocess": preprocess_s, **_seconds(candidate, result, total)}
        if edge.slowdown == 1:
            return seconds
        # Of the calls of closer looks, as many as requests take.
        return edge.slowed(seconds, before, preprocess_cpu_s, statistics.mean(_shares(candidate, result)))

    def run(n: int) -> Mapping[str, float]:
        trial_input = ordered[n % len(ordered)]
        if route.exit is None or candidate.exit is None:
            return request(trial_input, route)
        share = candidate.exit.share
        ways = (replace(route, exit=route.exit.forced(taken=taken)) for taken in (True, False))
        early, late = (request(trial_input, way) for way in ways)
        return {name: share * early[name] + (1 - share) * late[name] for name in late}

    return run


def _check_looks(result: Result) -> None:
    """Check that every closer look was taken; without one the candidate would seem faster than it is."""
    looks = result.closer_looks
    if looks is not None and looks.error is not None:
        raise looks.error
    if looks is not None and looks.outcome == "late":
        raise DeadlineExceeded(f"there was no time for closer look {looks.count + 1}", looks=looks.count)


def _typical_first(inputs: Sequence[TrialInput]) -> list[TrialInput]:
    """Inputs of middling size first: eliminated candidates ran with these, and predictions are of medians."""

    def size(trial_input: TrialInput) -> int:
        photo = trial_input.photo
        return len(photo) if photo is not None else sum(a.nbytes for a in trial_input.arrays.values())

    middle = statistics.median_low(map(size, inputs))
    return sorted(inputs, key=lambda i: abs(size(i) - middle))


def _seconds(candidate: Candidate, result: Result, total: float) -> dict[str, float]:
    """The seconds of the parts, and the total without the requests that take no closer look."""
    names = {"edge": ("edge",), "cloud": ("cloud",), "split": ("edge", "cloud")}[candidate.kind]
    parts = dict.fromkeys(("pack", *names, *(f"{name}_run" for name in names)), 0.0)
    for i, (run, share) in enumerate(zip(result.runs, _shares(candidate, result), strict=True)):
        name = names[min(i, len(names) - 1)]
        parts["pack"] += share * run.encode_s
        parts[name] += share * run.total_s
        parts[f"{name}_run"] += share * run.run_s
        total -= (1 - share) * (run.encode_s + run.total_s)
    return {"total": total, **parts}


def _shares(candidate: Candidate, result: Result) -> list[float]:
    """The share of requests that make each of the result's runs."""
    once = len(candidate.cuts) + 1
    shares = [1.0] * min(once, len(result.runs))
    looks = result.closer_looks
    if candidate.looks is not None and looks is not None and looks.count:
        per_look = (len(result.runs) - once) // looks.count
        # Looks are taken by requests that go on past an exit.
        travels = 1 - candidate.exit.share if candidate.exit is not None and candidate.exit.share < 1 else 1.0
        shares += [share / travels for share in candidate.looks.shares[: looks.count] for _ in range(per_look)]
    return shares
