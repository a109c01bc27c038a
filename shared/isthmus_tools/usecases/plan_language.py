"""Plans of language models: steps profiled, every cut between layers weighed, the best measured by real generations."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from isthmus.artifacts.plan import Candidate
from isthmus.artifacts.profile import Profile
from isthmus.registry import Registry, Resolved, open_cache
from isthmus_tools.planner.choice import choose, with_measurements
from isthmus_tools.planner.generation_runs import GenerationTask
from isthmus_tools.planner.language_candidates import LanguageCandidates
from isthmus_tools.planner.language_choice import generation_contenders, language_plan, without_unknown_errors
from isthmus_tools.planner.language_enumeration import language_candidates
from isthmus_tools.planner.segment_pool import codec_tables
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.answer_size import prompt_ids
from isthmus_tools.usecases.functions import measure_answers
from isthmus_tools.usecases.plan_request import PlanRequest, PlanResult
from isthmus_tools.usecases.profile_language import with_layer_cuts


def plan_language_model(
    request: PlanRequest,
    store: Registry,
    version: Resolved,
    profiles: Mapping[str, Profile],
    progress: Progress = silent,
) -> PlanResult:
    """The plan of a language model by the `profiles` of its tiers; nothing that serves changes until it is published.

    `request` has passed `check_language_request`.

    Raises:
        Infeasible: no candidate meets the constraints.
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    # A plan belongs to one bundle, and these candidates may be for the next.
    base = Resolved(version.name, version.version, version.digest, replace(version.bundle, plan=None))
    tables = codec_tables(store)
    candidate_set = language_candidates(
        base,
        profiles,
        request.answer.load(version.bundle),
        store.blob,
        private_layers=request.constraints.private_depth,
    )
    candidates = candidate_set.predict(request.conditions, request.prices)
    functions = request.functions
    if functions is None or request.predict_only:
        # Functions load the choice's segments once the plan is published.
        judged = without_unknown_errors(candidates, request.constraints)
        _, best, _ = choose(judged, request.objective, request.constraints)
        _cut(request, store, base, candidate_set, [best], progress)
    else:
        if functions.edge.slowdown != 1:
            # A plan for a slower edge must not pass for one of this machine's own speed.
            candidate_set.notes.append(f"the edge's times are {functions.edge.method}")
        contenders = generation_contenders(candidates, request.objective, request.constraints)
        digest = _cut(request, store, base, candidate_set, contenders, progress)
        prompt = prompt_ids(store, base.bundle, request.photos, candidate_set.load.prompt)
        measured = measure_answers(
            functions,
            contenders,
            digest,
            candidate_set.bundle,
            GenerationTask(prompt, candidate_set.load, candidate_set.growth),
            tables,
            request.conditions,
            objective=request.objective,
            constraints=request.constraints,
            progress=progress,
            budget=request.budget,
        )
        candidates = with_measurements(candidates, measured)
    plan = language_plan(
        candidate_set, candidates, request.conditions, request.objective, request.constraints, request.prices
    )
    return PlanResult(plan, candidate_set, store, request.registry, contextlib.ExitStack())


def _cut(
    request: PlanRequest,
    registry: Registry,
    model: Resolved,
    candidate_set: LanguageCandidates,
    candidates: Sequence[Candidate],
    progress: Progress,
) -> str:
    """Upload the bundle with the segments of these candidates, without a version; its digest."""
    cuts = [cut for candidate in candidates for cut in candidate.cuts]
    staged = with_layer_cuts(registry, open_cache(request.registry, registry), model, cuts, False, progress)
    candidate_set.bundle = staged.bundle
    return staged.digest
