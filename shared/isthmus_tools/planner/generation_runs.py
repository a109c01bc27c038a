"""Measurement of a language model's candidates: real generations on the deployed functions, over the link.

Steps run through the router's pipeline. Every candidate continues the same text, the uncut model's, so that each step
compares: seconds as of equal lengths, and the share of tokens that a codec changes.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import numpy as np
from msgspec import structs

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Constraints, Objective
from isthmus.artifacts.plan import Candidate, Error, GenerationLoad, Measured
from isthmus.artifacts.sampling import TOKENS, Sampling
from isthmus.codecs import Tables
from isthmus.context import Context
from isthmus.errors import IsthmusError
from isthmus.pipeline import HttpHop, Result, Route, execute, planned_route
from isthmus.wire.frame import Step
from isthmus_tools.budget import UNLIMITED, Budget, Pace
from isthmus_tools.planner.choice import VALUES, violations, without_deadlines
from isthmus_tools.planner.elimination import Run, quartiles, successive_elimination
from isthmus_tools.planner.measurement import LinkedFunctions, longest_seconds, refused_for, unreachable_urls
from isthmus_tools.profiling.slow_edge import AT_FULL_SPEED, SlowEdge
from isthmus_tools.progress import Progress, silent

# An answer takes seconds, and its steps are measurements of their own.
ROUNDS = 3
MAX_STEPS = 16
"""Measured tokens of an answer: further ones take as long, but for attention, by which the mean is scaled."""
_COMPARED = {"first-token": "first_token", "per-token": "per_token"}
_WARM_UP_SHARE = 0.7


@dataclass(frozen=True)
class GenerationTask:
    """A prompt's token ids, the answer's size, and by candidate the growth of a step's seconds beyond the measured ones
    (see `LanguageCandidates.growth`).
    """

    prompt: Sequence[int]
    load: GenerationLoad
    growth: Callable[[Candidate, int], float]

    @property
    def steps(self) -> int:
        """Further tokens that are measured."""
        return min(MAX_STEPS, self.load.tokens - 1)


def measure_generations(
    candidates: Sequence[Candidate],
    digest: str,
    bundle: Bundle,
    functions: LinkedFunctions,
    task: GenerationTask,
    tables: Tables,
    *,
    objective: Objective = "latency",
    constraints: Constraints | None = None,
    edge: SlowEdge = AT_FULL_SPEED,
    rounds: int = ROUNDS,
    progress: Progress = silent,
    budget: Budget = UNLIMITED,
) -> tuple[Candidate, ...]:
    """`candidates` with measurements of answers and the share of tokens that differ from the uncut model's.

    The first candidate without a cut is the uncut model. A candidate that fails is refused, with the reason, and the
    rest go on; candidates beyond the budget return without a measurement.

    Raises:
        HopError: the functions cannot be reached, so that no candidate runs.
    """
    with functions.hops as hops:

        def answer(candidate: Candidate, tail: str) -> _Answer:
            to = (hops[functions.head], hops[tail])
            route = planned_route(candidate, digest, bundle, to, tables, lambda _: bundle)
            return _Answer(candidate, route, task, edge)

        failed = _beyond_reach(candidates, functions)
        within_reach = [c for c in candidates if c.name not in failed]
        warm_up = budget.share(_WARM_UP_SHARE)
        ready, errors = _warm_up(within_reach, lambda c: answer(c, functions.tail_direct), failed, progress, warm_up)
        if failed and not ready:
            raise next(iter(failed.values()))
        judged = [structs.replace(c, error=errors.get(c.name, c.error)) for c in candidates]
        limits = without_deadlines(constraints or Constraints())
        excluded = {c.name for c in judged if c.refused or violations(c, limits)}
        # Splits that may not serve are not worth the seconds; the model whole on one side is, for comparison.
        timed = [c for c in ready if not c.cuts or c.name not in excluded]
        answers = {c.name: answer(c, functions.tail) for c in timed}
        compared = _COMPARED.get(objective, "total")
        runs: dict[str, Run] = {name: partial(each.timed, compared) for name, each in answers.items()}
        measured = successive_elimination(
            runs,
            expected={c.name: VALUES[objective](c) if objective in _COMPARED else c.predicted.total for c in timed},
            excluded=excluded,
            rounds=rounds,
            failed=failed,
            progress=progress,
            budget=budget,
        )
    return tuple(
        refused_for(c, failed[c.name])
        if c.name in failed
        else structs.replace(c, measured=answers[c.name].measured(measured[c.name]) if c.name in measured else None)
        for c in judged
    )


def _beyond_reach(candidates: Sequence[Candidate], functions: LinkedFunctions) -> dict[str, IsthmusError]:
    """The candidates with a function whose address refuses connections: none waits as for a cold start."""
    errors = unreachable_urls((functions.head, functions.tail_direct))
    failed: dict[str, IsthmusError] = {}
    for candidate in candidates:
        used = {"edge": (functions.head,), "cloud": (functions.tail_direct,)}
        for url in used.get(candidate.kind, (functions.head, functions.tail_direct)):
            if url in errors:
                failed[candidate.name] = errors[url]
    return failed


def _warm_up(
    candidates: Sequence[Candidate],
    answer: Callable[[Candidate], _Answer],
    failed: dict[str, IsthmusError],
    progress: Progress,
    budget: Budget,
) -> tuple[list[Candidate], dict[str, Error]]:
    """The candidates that gave an answer, and the error of each by the uncut model's tokens."""
    # Tokens of all positions cost the last segment a sampling each, so these runs are not timed.
    ready: list[Candidate] = []
    errors: dict[str, Error] = {}
    expected: Sequence[int] | None = None
    pace = Pace(len(candidates))
    # The uncut model first: its text is the one that all continue.
    for i, candidate in enumerate(sorted(candidates, key=lambda c: (bool(c.cuts), c.predicted.total))):
        if budget.spent and ready:
            break
        progress(f"warming up {candidate.name}, {i + 1} of {len(candidates)}{pace.left(i)}")
        try:
            tokens = answer(candidate).tokens(expected)
        except IsthmusError as e:
            failed[candidate.name] = e
            continue
        ready.append(candidate)
        if expected is None:
            expected = tokens
        if not candidate.error.calibrated:
            errors[candidate.name] = _error(tokens, expected)
    return ready, errors


def _error(tokens: Sequence[int], expected: Sequence[int]) -> Error:
    differing = sum(a != b for a, b in zip(tokens, expected, strict=True))
    return Error(0.0, len(tokens), differing / len(tokens))


@dataclass
class _Answer:
    """Answers of one candidate to one prompt."""

    candidate: Candidate
    route: Route
    task: GenerationTask
    edge: SlowEdge
    totals: list[float] = field(default_factory=list)

    def tokens(self, expected: Sequence[int] | None) -> list[int]:
        """The likeliest token behind each position of the prompt and of the answer, the answer being the expected."""
        prompt, steps = len(self.task.prompt), self.task.steps
        found: list[int] = []

        def following(step: int) -> int:
            return (found if expected is None else expected)[prompt - 1 + step]

        for result, _ in self._steps(following, every=True):
            found += result.outputs[TOKENS][0].tolist()
        return found[: prompt + steps]

    def timed(self, compared: str, number: int) -> Mapping[str, float]:
        """Seconds of an answer's first token, of a further token, and of the answer's parts in the tiers.

        The `total`, by which elimination compares, is that of the part `compared`.
        """
        sampled: list[int] = []
        seconds: list[dict[str, float]] = []
        for result, parts in self._steps(lambda step: sampled[-1], every=False):
            sampled.append(int(result.outputs[TOKENS][0, -1]))
            seconds.append(parts)
        chunks = -(-len(self.task.prompt) // self.task.load.chunk)
        first, steps, further = seconds[:chunks], seconds[chunks:], self.task.load.tokens - 1
        first_s = sum(each["total"] for each in first)
        # The median: a pause of the machine is no part of a token.
        each_s = statistics.median(s["total"] for s in steps) if steps else 0.0
        each_s *= self.task.growth(self.candidate, max(1, len(steps)))
        names = dict.fromkeys(name for s in seconds for name in s if name != "total")
        parts = {
            name: sum(s.get(name, 0.0) for s in first)
            + (further * statistics.median(s.get(name, 0.0) for s in steps) if steps else 0.0)
            for name in names
        }
        self.totals.append(first_s + further * each_s)
        parts = {**parts, "first_token": first_s, "per_token": each_s}
        return {**parts, "total": parts.get(compared, self.totals[-1])}

    def measured(self, compared: Measured) -> Measured:
        """The elimination's medians, and the quartiles of whole answers."""
        low, high = quartiles(sorted(self.totals))
        return structs.replace(compared, median=statistics.median(self.totals), low=low, high=high)

    def _steps(self, following: Callable[[int], int], *, every: bool) -> Iterator[tuple[Result, dict[str, float]]]:
        """Results of the prompt's chunks and of each further token, with the seconds of their parts."""
        session, load, prompt = secrets.token_hex(16), self.task.load, self.task.prompt
        context = Context.from_headers({}, longest_s=longest_seconds(self.candidate))
        reserve = len(prompt) + self.task.steps + 1
        try:
            for at in range(0, len(prompt), load.chunk):
                chunk = prompt[at : at + load.chunk]
                yield self._step(Step(session, at, Sampling(last=len(chunk) if every else 1), reserve), chunk, context)
            for step in range(self.task.steps):
                at = len(prompt) + step
                yield self._step(Step(session, at, Sampling(), reserve), [following(step)], context)
        finally:
            for hop in self.route.hops:
                if isinstance(hop, HttpHop):
                    hop.end_session(session, context.deadline)

    def _step(self, step: Step, tokens: Sequence[int], context: Context) -> tuple[Result, dict[str, float]]:
        state = self.route.bundle.state
        assert state is not None  # noqa: S101 - candidates of language models
        # Outside the timed part: it waits for the processes at the edge.
        before = self.edge.work()
        start = perf_counter()
        result = execute(self.route, {state.tokens: np.array([tokens], np.int64)}, context, step=step)
        parts = self._parts(result, perf_counter() - start)
        return result, parts if self.edge.slowdown == 1 else dict(self.edge.slowed(parts, before, 0.0))

    def _parts(self, result: Result, total: float) -> dict[str, float]:
        names = {"edge": ("edge",), "cloud": ("cloud",), "split": ("edge", "cloud")}[self.candidate.kind]
        parts = {"total": total, "preprocess": 0.0, "pack": sum(run.encode_s for run in result.runs)}
        for name, run in zip(names, result.runs, strict=True):
            parts |= {name: run.total_s, f"{name}_run": run.run_s}
        return parts
