"""Planning: profiles read or measured, candidates tried, measured over the link and chosen from; the plan published."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from isthmus.arrays import Array
from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Plan
from isthmus.registry import Registry, open_cache, open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.choice import build_plan, check_prices, sweep_links, with_measurements
from isthmus_tools.planner.costs import Prices
from isthmus_tools.planner.enumeration import enumerate_candidates
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.functions import FunctionUrls, measure_candidates
from isthmus_tools.usecases.profile import ProfileRequest, tier_profiles
from isthmus_tools.usecases.publication import Publication, publish_candidate
from isthmus_tools.usecases.sources import example_requests, further_photos

# Random inputs show speeds alone, for which a few are enough.
_RANDOM_REQUESTS = 3
# Shares of the time limit for profiling and for the trial of cuts; the rest is for measurements over the link.
_PROFILING_SHARE, _TRIALS_SHARE = 0.4, 0.7


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A model to plan for: the link, the objective and its constraints, the functions and the inputs to measure with.

    `model` is NAME or NAME:VERSION. Without functions the plan is predicted from stored profiles; with functions and a
    token both tiers are profiled first; `predict_only` measures nothing over the link. `sweep` tries cuts for other
    links too. `int8` tries the model quantised at the edge. Candidates run on `photos` or `tensors`, else on the sample
    photos or random numbers.
    """

    model: str
    registry: RegistrySettings
    conditions: Conditions
    constraints: Constraints = field(default_factory=Constraints)
    objective: Objective = "latency"
    prices: Prices | None = None
    functions: FunctionUrls | None = None
    predict_only: bool = False
    photos: Sequence[Path] = ()
    tensors: Mapping[str, Array] = field(default_factory=dict)
    sweep: bool = False
    int8: bool = True
    budget: Budget = UNLIMITED


@dataclass(frozen=True)
class PlanResult:
    """A plan and its candidate set, with files that exist until the result is closed; a context manager."""

    plan: Plan
    candidate_set: CandidateSet
    registry: Registry
    _files: contextlib.ExitStack

    def publish(self, alias: str = "prod") -> Publication:
        """Publish the plan as the model's next version, and the int8 variant, if any, as a model of its own.

        Raises:
            RegistryError: the alias is malformed, or the registry cannot be written.
        """
        return publish_candidate(self.registry, self.candidate_set, self.plan, alias)

    def close(self) -> None:
        """Remove the candidates' files, without which `publish` fails."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def plan(request: PlanRequest, progress: Progress = silent) -> PlanResult:
    """Find the best way to serve a model over a link; nothing that serves changes until the result is published.

    Raises:
        Missing: unknown model, or a tier has no profile.
        Infeasible: no candidate meets the constraints.
        RequestError: the inputs do not fit the model.
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    store = open_registry(request.registry)
    # Before anything runs: cost and energy are nothing without prices.
    check_prices(request.objective, request.constraints, request.prices)
    model = store.resolve(request.model)
    kind, examples = example_requests(
        model.bundle, request.photos, request.tensors, random=_RANDOM_REQUESTS, samples=True
    )
    functions = request.functions
    # Predictions need the profiles of both tiers.
    profiles = tier_profiles(
        ProfileRequest(
            model=request.model,
            registry=request.registry,
            functions=functions or FunctionUrls(),
            # Candidates are staged by digest; only a published plan makes a version.
            new_version=False,
            budget=request.budget.share(_PROFILING_SHARE),
        ),
        progress,
    )
    with contextlib.ExitStack() as files:
        candidate_set = files.enter_context(
            enumerate_candidates(
                store,
                open_cache(request.registry, store),
                request.model,
                profiles,
                examples,
                kind,
                links=[request.conditions, *(sweep_links() if request.sweep else [])],
                objective=request.objective,
                private_depth=request.constraints.private_depth,
                edge_memory_bytes=request.constraints.edge_memory_bytes,
                int8=request.int8,
                jpeg_photos=further_photos(model.bundle, request.photos, request.tensors),
                progress=progress,
                budget=request.budget.share(_TRIALS_SHARE),
            )
        )
        if functions is not None and functions.edge.slowdown != 1:
            # A plan for a slower edge must not pass for one of this machine's own speed.
            candidate_set.notes.append(f"the edge's times are {functions.edge.method}")
        if kind == "photo" and not request.photos:
            candidate_set.notes.append("the photos are samples that come with packages; --input takes yours")
        candidates = candidate_set.predict(request.conditions, request.prices)
        if functions is not None and not request.predict_only:
            measured = measure_candidates(
                functions,
                candidate_set,
                candidates,
                store,
                request.conditions,
                objective=request.objective,
                constraints=request.constraints,
                progress=progress,
                budget=request.budget,
            )
            candidates = with_measurements(candidates, measured)
        best = build_plan(
            candidate_set, candidates, request.conditions, request.objective, request.constraints, request.prices
        )
        # The files outlive this call: the result removes the files.
        return PlanResult(best, candidate_set, store, files.pop_all())


def check_inputs(request: PlanRequest) -> None:
    """Read the model and the inputs of a request, before functions start.

    Raises:
        Missing, RequestError: as `plan`.
    """
    bundle = open_registry(request.registry).resolve(request.model).bundle
    example_requests(bundle, request.photos, request.tensors, random=_RANDOM_REQUESTS)
