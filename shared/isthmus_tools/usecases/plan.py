"""Planning: profiles read or measured, candidates tried, measured over the link and chosen from; the plan published."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.artifacts.plan_document import read_plan
from isthmus.artifacts.profile import Profile
from isthmus.errors import Missing
from isthmus.processing.image import MAX_PIXELS
from isthmus.registry import Registry, Resolved, open_cache, open_registry
from isthmus.registry.registry import check_alias
from isthmus.runtime.tables import Tables
from isthmus.settings import RegistrySettings
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.candidates import CLOUD, EDGE, CandidateSet
from isthmus_tools.planner.choice import RATES, build_plan, check_prices, with_measurements
from isthmus_tools.planner.costs import Prices
from isthmus_tools.planner.enumeration import enumerate_candidates
from isthmus_tools.planner.inputs import TrialInput
from isthmus_tools.planner.measurement import LinkedFunctions, contenders, measure
from isthmus_tools.planner.publishing import publish_plan
from isthmus_tools.profiling import profiles
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.functions import FunctionUrls
from isthmus_tools.usecases.profile import ProfileRequest, profile
from isthmus_tools.usecases.publication import Publication, version_of
from isthmus_tools.usecases.sources import example_requests

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
    """A plan and its candidate set, whose files exist until the result is closed; a context manager."""

    plan: Plan
    candidate_set: CandidateSet
    registry: Registry
    _files: contextlib.ExitStack

    def publish(self, alias: str = "prod") -> Publication:
        """Publish the plan as the model's next version, and the int8 variant, if any, as a model of its own.

        Raises:
            RegistryError: the alias cannot be one, or the registry cannot be written.
        """
        if alias:
            check_alias(alias)
        candidate_set, name = self.candidate_set, self.candidate_set.bundle.name
        was = version_of(self.registry, name, alias)
        if candidate_set.variant is not None:
            self.registry.publish(candidate_set.variant.bundle, candidate_set.variant.files)
        version = publish_plan(self.registry, candidate_set.bundle, candidate_set.files, self.plan, alias=alias or None)
        return Publication(version, alias, was, moved=bool(alias))

    def close(self) -> None:
        """Remove the candidates' files; `publish` needs them."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def plan(request: PlanRequest, progress: Progress = silent) -> PlanResult:
    """Find the best way to serve a model over a link; nothing that serves changes until the result is published.

    Raises:
        Missing: no such model, or a tier has no profile.
        Infeasible: no candidate meets the constraints.
        RequestError: the inputs do not fit the model.
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    store = open_registry(request.registry)
    check_prices(request.objective, request.constraints, request.prices)
    model = store.resolve(request.model)
    kind, examples = _examples(request, model.bundle)
    tier_profiles = _profiles(request, store, model.bundle, progress)
    tables = Tables(store.bundle, store.blob, MAX_PIXELS)
    with contextlib.ExitStack() as files:
        candidate_set = files.enter_context(
            enumerate_candidates(
                store,
                open_cache(request.registry, store),
                request.model,
                tier_profiles,
                examples,
                kind,
                links=[request.conditions, *(Conditions(rate, rate) for rate in RATES if request.sweep)],
                private_depth=request.constraints.private_depth,
                edge_memory_bytes=request.constraints.edge_memory_bytes,
                int8=request.int8,
                progress=progress,
                budget=request.budget.share(_TRIALS_SHARE),
            )
        )
        candidates = candidate_set.predict(request.conditions, request.prices)
        if request.functions is not None and not request.predict_only:
            candidates = _measured(request, request.functions, candidate_set, candidates, store, tables, progress)
        best = build_plan(
            candidate_set, candidates, request.conditions, request.objective, request.constraints, request.prices
        )
        return PlanResult(best, candidate_set, store, files.pop_all())


def check_inputs(request: PlanRequest) -> None:
    """Read the model and the inputs of a request, before functions are started for it.

    Raises:
        Missing, RequestError: as `plan`.
    """
    _examples(request, open_registry(request.registry).resolve(request.model).bundle)


def published_plan(model: str, registry: RegistrySettings) -> tuple[Resolved, Plan]:
    """A bundle of the registry and its plan.

    Raises:
        Missing: no such model, or the bundle has no plan.
        PlanMalformed, PlanMismatch: the plan cannot be read, or is for another bundle.
    """
    store = open_registry(registry)
    version = store.resolve(model)
    plan = read_plan(version.bundle, store.blob)
    if plan is None:
        raise Missing(
            f"{version.name}:{version.version} has no plan",
            kind="plan",
            name=version.name,
            exists=[],
            hint=f"make one: isthmus plan {version.name} --uplink 10mbit --rtt 20ms --local",
        )
    return version, plan


def _examples(request: PlanRequest, bundle: Bundle) -> tuple[str, list[TrialInput]]:
    return example_requests(bundle, request.photos, request.tensors, random=_RANDOM_REQUESTS, samples=True)


def _profiles(request: PlanRequest, store: Registry, bundle: Bundle, progress: Progress) -> dict[str, Profile]:
    """Both tiers' profiles: measured where the request has a token for its functions, else the newest stored ones."""
    if request.functions is not None and request.functions.token:
        measured = profile(
            ProfileRequest(
                model=request.model,
                registry=request.registry,
                functions=request.functions,
                new_version=False,
                budget=request.budget.share(_PROFILING_SHARE),
            ),
            progress,
        )
        return dict(measured.profiles)
    stored = profiles.newest(store, bundle)
    if lacking := [tier for tier in (EDGE, CLOUD) if tier not in stored]:
        raise Missing(
            f"there is no profile of {bundle.name} for the tier {' or '.join(lacking)}",
            kind="profile",
            name=bundle.name,
            exists=sorted(stored),
            hint=f"measure it: isthmus profile {bundle.name} --head URL --tail URL; or plan with --local",
        )
    return {tier: stored[tier] for tier in (EDGE, CLOUD)}


def _measured(
    request: PlanRequest,
    functions: FunctionUrls,
    candidate_set: CandidateSet,
    candidates: tuple[Candidate, ...],
    store: Registry,
    tables: Tables,
    progress: Progress,
) -> tuple[Candidate, ...]:
    """The candidates, the promising ones measured on the functions behind an emulated link."""
    progress("uploading the candidates' cuts")
    digest = candidate_set.stage(store)
    promising = contenders(candidates, request.objective, request.constraints)
    c = request.conditions
    with contextlib.ExitStack() as link:
        tail = functions.tail
        if not c.adds_nothing:
            tail = link.enter_context(
                link_to(tail, uplink_bps=c.uplink_bps, downlink_bps=c.downlink_bps, rtt_s=c.rtt_s)
            )
        measured = measure(
            promising,
            digest,
            candidate_set.bundle,
            LinkedFunctions(functions.head, tail, functions.tail),
            candidate_set.inputs,
            tables,
            store.bundle,
            constraints=request.constraints,
            progress=progress,
            budget=request.budget,
        )
    if unseen := [m.name for m in measured if m.measured is None and not m.refused]:
        candidate_set.notes.append(f"the time limit left {len(unseen)} candidates unmeasured: {', '.join(unseen)}")
    return with_measurements(candidates, measured)
