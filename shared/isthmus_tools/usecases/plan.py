"""Planning: profiles read or measured, candidates tried, measured over the link and chosen from; the plan published."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from isthmus.artifacts.conditions import GENERATION_OBJECTIVES
from isthmus.artifacts.profile import Profile
from isthmus.errors import ConstraintMalformed, RequestMalformed
from isthmus.registry import open_cache, open_registry
from isthmus_tools.planner.choice import build_plan, check_prices, sweep_links, with_measurements
from isthmus_tools.planner.enumeration import check_private, enumerate_candidates
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.function_urls import FunctionUrls
from isthmus_tools.usecases.functions import measure_candidates
from isthmus_tools.usecases.plan_language import plan_language_model
from isthmus_tools.usecases.plan_request import AnswerSize, PlanRequest, PlanResult, check_language_request
from isthmus_tools.usecases.profile import tier_profiles
from isthmus_tools.usecases.profile_request import ProfileRequest
from isthmus_tools.usecases.publication import refuse_encrypted
from isthmus_tools.usecases.sources import example_requests, further_photos

__all__ = ["AnswerSize", "PlanRequest", "PlanResult", "check_graph", "check_inputs", "plan"]

# Random inputs show speeds alone, for which a few are enough.
_RANDOM_REQUESTS = 3
# Shares of the time limit for profiling and for the trial of cuts; the rest is for measurements over the link.
_PROFILING_SHARE, _TRIALS_SHARE = 0.4, 0.7


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
    refuse_encrypted(store, model)
    if model.bundle.text is not None:
        check_language_request(request, model.bundle)
        return plan_language_model(request, store, model, _profiles(request, progress), progress)
    _check_request(request)
    # Profiling takes minutes: a document that is not there fails before.
    check_private(store, model.bundle, request.constraints.private_ssim)
    kind, examples = example_requests(
        model.bundle, request.photos, request.tensors, random=_RANDOM_REQUESTS, samples=True
    )
    functions = request.functions
    profiles = _profiles(request, progress)
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
                private_ssim=request.constraints.private_ssim,
                edge_memory_bytes=request.constraints.edge_memory_bytes,
                int8=request.int8,
                jpeg_photos=further_photos(model.bundle, request.photos, request.tensors),
                own_photos=bool(request.photos),
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
        return PlanResult(best, candidate_set, store, request.registry, files.pop_all())


def _profiles(request: PlanRequest, progress: Progress) -> Mapping[str, Profile]:
    """The profiles of both tiers, which predictions need."""
    profile = ProfileRequest(
        model=request.model,
        registry=request.registry,
        functions=request.functions or FunctionUrls(),
        # Candidates are staged by digest; only a published plan makes a version.
        new_version=False,
        budget=request.budget.share(_PROFILING_SHARE),
    )
    return tier_profiles(profile, progress)


def check_inputs(request: PlanRequest) -> None:
    """Read the model and the inputs of a request, before functions start.

    Raises:
        Missing, RequestError: as `plan`.
    """
    store = open_registry(request.registry)
    bundle = store.resolve(request.model).bundle
    if bundle.text is not None:
        check_language_request(request, bundle)
        return
    _check_request(request)
    check_private(store, bundle, request.constraints.private_ssim)
    example_requests(bundle, request.photos, request.tensors, random=_RANDOM_REQUESTS)


def check_graph(request: PlanRequest) -> None:
    """Refuse a language model where curves along the graph or cells of the map are asked for.

    Raises:
        RequestMalformed: the model is one.
    """
    if open_registry(request.registry).resolve(request.model).bundle.text is not None:
        raise RequestMalformed(
            f"{request.model} is a language model: its plan has no curves along the graph, and no cells are measured",
            hint="draw the map of the link: --sweep --picture FILE",
        )


def _check_request(request: PlanRequest) -> None:
    """Refuse options that language models alone have."""
    limits = request.constraints
    if (
        request.objective in GENERATION_OBJECTIVES
        or (limits.first_token_s, limits.per_token_s) != (None, None)
        or not request.answer.is_default
    ):
        raise ConstraintMalformed(
            f"{request.model} is no language model: first and further tokens, prompts and sessions are of those alone",
            what="answer",
        )
