"""Functions to measure on, and candidates measured on them over an emulated link."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Candidate
from isthmus.codecs import Tables
from isthmus.registry import Registry
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.elimination import ROUNDS
from isthmus_tools.planner.generation_runs import GenerationTask, measure_generations
from isthmus_tools.planner.inputs import TrialInput
from isthmus_tools.planner.measurement import LinkedFunctions, contenders, measure
from isthmus_tools.planner.segment_pool import codec_tables
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.function_urls import FunctionUrls


def measure_candidates(
    functions: FunctionUrls,
    candidate_set: CandidateSet,
    candidates: Sequence[Candidate],
    registry: Registry,
    conditions: Conditions,
    *,
    objective: Objective,
    constraints: Constraints,
    progress: Progress,
    budget: Budget,
) -> Sequence[Candidate]:
    """The promising candidates, measured on the functions; the function in the cloud is behind an emulated link.

    Raises:
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    progress("uploading the candidates' cuts")
    measured = measure_over_link(
        functions,
        contenders(candidates, objective, constraints),
        # By digest and without a version: nothing that serves changes before the plan is published.
        candidate_set.stage(registry),
        candidate_set.bundle,
        candidate_set.inputs,
        registry,
        conditions,
        constraints=constraints,
        progress=progress,
        budget=budget,
    )
    if unmeasured := [m.name for m in measured if m.measured is None and not m.refused]:
        names = ", ".join(unmeasured)
        candidate_set.notes.append(f"the time limit left {len(unmeasured)} candidates unmeasured: {names}")
    return measured


def measure_over_link(
    functions: FunctionUrls,
    candidates: Sequence[Candidate],
    digest: str,
    bundle: Bundle,
    inputs: Sequence[TrialInput],
    registry: Registry,
    conditions: Conditions,
    *,
    constraints: Constraints | None = None,
    rounds: int = ROUNDS,
    eliminate: bool = True,
    progress: Progress = silent,
    budget: Budget = UNLIMITED,
) -> tuple[Candidate, ...]:
    """`planner.measurement.measure` with an emulated link of `conditions` before the function in the cloud.

    Raises:
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    with _linked(functions, conditions) as linked:
        return measure(
            candidates,
            digest,
            bundle,
            linked,
            inputs,
            codec_tables(registry),
            registry.bundle,
            constraints=constraints,
            edge=functions.edge,
            rounds=rounds,
            eliminate=eliminate,
            progress=progress,
            budget=budget,
        )


def measure_answers(
    functions: FunctionUrls,
    candidates: Sequence[Candidate],
    digest: str,
    bundle: Bundle,
    task: GenerationTask,
    tables: Tables,
    conditions: Conditions,
    *,
    objective: Objective,
    constraints: Constraints,
    progress: Progress,
    budget: Budget,
) -> tuple[Candidate, ...]:
    """`generation_runs.measure_generations` with an emulated link of `conditions` before the function in the cloud.

    Raises:
        HopError: a function cannot be reached.
    """
    with _linked(functions, conditions) as linked:
        return measure_generations(
            candidates,
            digest,
            bundle,
            linked,
            task,
            tables,
            objective=objective,
            constraints=constraints,
            edge=functions.edge,
            progress=progress,
            budget=budget,
        )


@contextmanager
def _linked(functions: FunctionUrls, conditions: Conditions) -> Iterator[LinkedFunctions]:
    """The functions, that in the cloud behind an emulated link for the block."""
    with ExitStack() as link:
        tail = functions.tail
        # A relay takes time even where it limits nothing.
        if not conditions.adds_nothing:
            up, down, rtt_s = conditions.up_bps, conditions.down_bps, conditions.rtt_s
            tail = link.enter_context(link_to(tail, uplink_bps=up, downlink_bps=down, rtt_s=rtt_s))
        # The tail without the link as well: loading a model over a slow link would only take longer.
        yield LinkedFunctions(functions.head, tail, functions.tail, functions.protection, functions.trust)
