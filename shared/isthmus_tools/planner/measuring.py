"""Candidates run for real: the pipeline here as the router has it, the functions where they are deployed."""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Constraints, Objective
from isthmus.artifacts.plan import Candidate
from isthmus.codecs import Tables
from isthmus.context import Context
from isthmus.errors import DeadlineExceeded, HopUnavailable, IsthmusError
from isthmus.pipeline import HttpHop, Result, execute, photo_input, planned_route
from isthmus.processing.image import MAX_PIXELS, preprocess
from isthmus_tools.budget import UNLIMITED, Budget, Pace
from isthmus_tools.planner.choose import VALUES, broken
from isthmus_tools.planner.examples import Example
from isthmus_tools.planner.race import ROUNDS, Run, race
from isthmus_tools.progress import Progress, silent

BASELINES = ("edge-float", "edge-int8", "cloud-photo", "cloud-raw")
"""Measured whatever is predicted of them, so that a plan says what not splitting costs."""
MOST = 10
_WITHIN = 1.5
_SPLITS = 2
"""The best of these are measured even where not splitting looks better."""
_WARMING = 0.85
"""Of what a budget leaves, the share after which no further candidate is warmed up."""
_MIN_S, _MAX_S = 30.0, 600.0
_ATTEMPTS, _CONNECT_S, _MAX_REPLY = 3, 5.0, 2**30


@dataclass(frozen=True)
class Functions:
    """Where candidates run: the head's URL, the tail's as it is reached over the link, and the tail's own.

    The last is used to warm up, so that nobody waits for a model to load over a slow link.
    """

    head: str
    tail: str
    tail_direct: str


def contenders(
    candidates: Sequence[Candidate], objective: Objective, constraints: Constraints, most: int = MOST
) -> list[Candidate]:
    """Whom to measure: of those that may be chosen the `most` promising, none far behind the best, and baselines."""
    value = VALUES[objective]
    unlimited = replace(constraints, latency_s=None)
    able = sorted((c for c in candidates if not c.refused and not broken(c, unlimited)), key=value)
    near = [c for c in able if value(c) <= _WITHIN * value(able[0])][:most]
    splits = [c for c in able if c.kind == "split"][:_SPLITS]
    names = {c.name for c in (*near, *splits)} | set(BASELINES)
    return [c for c in candidates if c.name in names]


def measure(
    candidates: Sequence[Candidate],
    digest: str,
    bundle: Bundle,
    functions: Functions,
    examples: Sequence[Example],
    tables: Tables,
    variant: Callable[[str], Bundle],
    *,
    constraints: Constraints | None = None,
    rounds: int = ROUNDS,
    eliminate: bool = True,
    seed: int = 0,
    progress: Progress = silent,
    budget: Budget = UNLIMITED,
) -> tuple[Candidate, ...]:
    """`candidates` with what they took. `digest` is that of `bundle`, which the functions find in their registry.

    One that fails is refused, with the reason, and the others go on. Those that break `constraints`, other than in
    time, are measured beside the others and put none of them out. Candidates that the budget leaves no time for come
    back without a measurement; the most promising are warmed up first.

    Raises:
        HopError: the functions cannot be reached, so that no candidate runs, or no longer over the link.
    """
    hops = {
        url: HttpHop(url, attempts=_ATTEMPTS, connect_timeout_s=_CONNECT_S, max_reply_bytes=_MAX_REPLY)
        for url in dict.fromkeys((functions.head, functions.tail, functions.tail_direct))
    }
    failed: dict[str, IsthmusError] = {}
    away = _unreachable((functions.head, functions.tail_direct))
    runs: dict[str, Run] = {}
    try:
        pace, warming = Pace(len(candidates)), budget.share(_WARMING)
        for i, candidate in enumerate(sorted(candidates, key=lambda c: c.predicted.total)):
            if warming.spent and (runs or failed):
                break
            progress(f"warming up {candidate.name}, {i + 1} of {len(candidates)}{pace.left(i)}")
            near = (hops[functions.head], hops[functions.tail_direct])
            used = {"edge": near[:1], "cloud": near[1:]}.get(candidate.kind, near)
            if gone := next((away[hop.name] for hop in used if hop.name in away), None):
                failed[candidate.name] = gone
                continue
            try:
                requester(candidate, digest, bundle, near, examples, tables, variant)(0)
            except IsthmusError as e:
                failed[candidate.name] = e
                if isinstance(e, HopUnavailable) and "status" not in e.facts:
                    # Not reached in the time that a start takes: no other candidate waits as long again.
                    away[str(e.facts.get("hop", ""))] = e
                continue
            far = (hops[functions.head], hops[functions.tail])
            runs[candidate.name] = requester(candidate, digest, bundle, far, examples, tables, variant)
        if failed and not runs:
            raise next(iter(failed.values()))
        # A connection's first bytes wait for a round trip more than those of the router, which keeps its own.
        linked = [c for c in candidates if c.name in runs and c.kind != "edge"]
        if linked:
            runs[min(linked, key=lambda c: (c.looks is not None, c.up_bytes)).name](0)
        expected = {c.name: c.predicted.total for c in candidates}
        kept = replace(constraints or Constraints(), latency_s=None)
        found = race(
            runs,
            expected=expected,
            beside={c.name for c in candidates if c.refused or broken(c, kept)},
            rounds=rounds,
            eliminate=eliminate,
            seed=seed,
            failed=failed,
            progress=progress,
            budget=budget,
        )
        if linked and all(c.name in failed for c in linked):
            raise failed[linked[0].name]
    finally:
        for hop in hops.values():
            hop.close()
    return tuple(
        replace(c, refused=f"it failed: {failed[c.name].message[:500]}")
        if c.name in failed
        else replace(c, measured=found.get(c.name))
        for c in candidates
    )


def _unreachable(urls: Sequence[str]) -> dict[str, IsthmusError]:
    """The error of each function to whose address nothing connects: a mistyped URL need not be waited for."""
    found: dict[str, IsthmusError] = {}
    for url in dict.fromkeys(urls):
        parts = urlsplit(url)
        address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection(address, timeout=_CONNECT_S).close()
        except OSError as e:
            found[url] = HopUnavailable(f"{url} cannot be reached: {e.strerror or e}", hop=url)
    return found


def requester(
    candidate: Candidate,
    digest: str,
    bundle: Bundle,
    hops: tuple[HttpHop, HttpHop],
    examples: Sequence[Example],
    tables: Tables,
    variant: Callable[[str], Bundle],
) -> Run:
    """What runs one request of a candidate, from the photo on where there is one, and says what its parts took.

    Closer looks are all taken every time, and count for their shares: a few inputs do not say how often they are. So
    one that could not be taken is a request that failed.
    """
    route = planned_route(candidate, digest, bundle, hops, tables, variant)
    if route.looks is not None:
        always = tuple(replace(look, margin=math.inf) for look in route.looks.looks)
        route = replace(route, looks=replace(route.looks, looks=always))
    photo = photo_input(candidate, bundle, hops)
    longest_s = min(_MAX_S, max(_MIN_S, 10 * candidate.predicted.total))

    ordered = _typical_first(examples)

    def run(n: int) -> Mapping[str, float]:
        example = ordered[n % len(ordered)]
        context = Context.from_headers({}, longest_s=longest_s)
        start = time.perf_counter()
        if photo is not None and example.photo is not None:
            made_s = 0.0
            result = _looked(execute(route, {}, context, photo.encode(example.photo)))
        else:
            arrays = _inputs(bundle, example)
            made_s = time.perf_counter() - start
            result = _looked(execute(route, arrays, context))
        total = time.perf_counter() - start
        return {"total": total - _not_counted(candidate, result), "preprocess": made_s, **_parts(candidate, result)}

    return run


def _looked(result: Result) -> Result:
    """The result, with every closer look that was to be taken.

    Raises:
        IsthmusError: one failed, or there was no time for it; without it the candidate would look quicker than it is.
    """
    looked = result.closer_looks
    if looked is not None and looked.error is not None:
        raise looked.error
    if looked is not None and looked.outcome == "late":
        raise DeadlineExceeded(f"there was no time for closer look {looked.taken + 1}", looks=looked.taken)
    return result


def _typical_first(examples: Sequence[Example]) -> list[Example]:
    """Those of middling size first: who drops out early has run with them, and predictions are of medians."""

    def size(example: Example) -> int:
        return len(example.photo) if example.photo is not None else sum(a.nbytes for a in example.arrays.values())

    middle = statistics.median_low(map(size, examples))
    return sorted(examples, key=lambda e: abs(size(e) - middle))


def _inputs(bundle: Bundle, example: Example) -> Mapping[str, Array]:
    """The input arrays, made of the photo as the router would."""
    if example.photo is None or bundle.preprocess is None:
        return example.arrays
    taken = next(s for s in bundle.inputs if s.name == bundle.preprocess["input"])
    return {taken.name: preprocess(example.photo, bundle.preprocess, input=taken, max_pixels=MAX_PIXELS)}


def _parts(candidate: Candidate, result: Result) -> dict[str, float]:
    names = {"edge": ("edge",), "cloud": ("cloud",), "split": ("edge", "cloud")}[candidate.kind]
    found = dict.fromkeys(("pack", *names, *(f"{name}_run" for name in names)), 0.0)
    counts = _counts(candidate, result)
    for i, (stage, count) in enumerate(zip(result.runs, counts, strict=True)):
        name = names[min(i, len(names) - 1)]
        found["pack"] += count * stage.encode_s
        found[name] += count * stage.total_s
        found[f"{name}_run"] += count * stage.run_s
    return found


def _not_counted(candidate: Candidate, result: Result) -> float:
    """Seconds of those closer looks that only a share of the requests would take."""
    counts = _counts(candidate, result)
    return sum((1 - count) * (s.encode_s + s.total_s) for s, count in zip(result.runs, counts, strict=True))


def _counts(candidate: Candidate, result: Result) -> list[float]:
    """How often a request has each of the result's stages, on average."""
    once = len(candidate.cuts) + 1
    counts = [1.0] * min(once, len(result.runs))
    if candidate.looks is not None and result.closer_looks is not None and result.closer_looks.taken:
        each = (len(result.runs) - once) // result.closer_looks.taken
        counts += [share for share in candidate.looks.shares[: result.closer_looks.taken] for _ in range(each)]
    return counts
