"""What `isthmus plan` does: profiles found or made, candidates tried, measured and chosen from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import TRANSFORM_ID
from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.artifacts.profile import Profile
from isthmus.errors import Missing, ModelError, RequestMalformed
from isthmus.processing.image import MAX_PIXELS
from isthmus.registry import Registry, SegmentCache, open_cache, open_registry
from isthmus.runtime.tables import Tables, tables_of
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.cli.console import registry_settings
from isthmus_tools.cli.functions import Places
from isthmus_tools.cli.publishing import Publication, version_of
from isthmus_tools.cli.tensors import read_tensors
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.choose import check_prices
from isthmus_tools.planner.draft import CLOUD, EDGE, Draft
from isthmus_tools.planner.drafting import drafting
from isthmus_tools.planner.examples import Example, from_arrays, from_photos, random_examples
from isthmus_tools.planner.grid import RATES
from isthmus_tools.planner.make import make_plan, merged
from isthmus_tools.planner.measuring import Functions, contenders, measure
from isthmus_tools.planner.prices import Prices
from isthmus_tools.planner.published import publish_plan
from isthmus_tools.profiling import profiles
from isthmus_tools.progress import Progress
from isthmus_tools.zoo.photos import read_photo, sample_photos

MAX_EXAMPLES = 8
_RANDOM, _RUNS = 3, 15
_PROFILED, _DRAFTED = 0.4, 0.7
"""Shares of the time limit after which no segment is profiled, and no further cut tried: the rest is for the link."""


@dataclass(frozen=True)
class Wish:
    """What was asked for."""

    model: str
    conditions: Conditions
    constraints: Constraints
    objective: Objective
    prices: Prices | None
    sweep: bool
    measure: bool
    int8: bool
    budget: Budget = UNLIMITED


@dataclass(frozen=True)
class Made:
    """The plan, the draft that it stands on, and the registry that both are for."""

    plan: Plan
    draft: Draft
    registry: Registry

    def publish(self, alias: str) -> Publication:
        """Publish the plan as the model's next version, and the int8 variant as a model of its own."""
        draft, name = self.draft, self.draft.bundle.name
        was = version_of(self.registry, name, alias)
        if draft.variant is not None:
            self.registry.publish(draft.variant.bundle, draft.variant.files)
        version = publish_plan(self.registry, draft.bundle, draft.files, self.plan, alias=alias or None)
        return Publication(version, alias, was, moved=bool(alias))


@contextlib.contextmanager
def planned(
    wish: Wish,
    registry: str,
    cache_dir: str,
    places: Places | None,
    photos: Sequence[Path],
    tensors: Sequence[str],
    step: Progress,
) -> Iterator[Made]:
    """The plan that was asked for, with its draft's files there for as long as the block lasts.

    Raises:
        Missing: no such model, or a tier has no profile of it; says how to make one.
        Infeasible: nothing keeps the constraints.
        And what measuring and the registry raise.
    """
    settings = registry_settings(registry, cache_dir)
    store = open_registry(settings)
    check_prices(wish.objective, wish.constraints, wish.prices)
    found = store.resolve(wish.model)
    bundle = found.bundle
    kind, examples = read_examples(bundle, photos, tensors)
    known = _profiles(store, wish.model, bundle, registry, cache_dir, places, step, wish.budget.share(_PROFILED))
    cache = open_cache(settings, store)
    tables = Tables(store.bundle, store.blob, MAX_PIXELS)
    links = [wish.conditions, *(Conditions(rate, rate) for rate in RATES if wish.sweep)]
    with drafting(
        store,
        cache,
        wish.model,
        known,
        examples,
        kind,
        links=links,
        private_depth=wish.constraints.private_depth,
        edge_memory_bytes=wish.constraints.edge_memory_bytes,
        int8=wish.int8,
        table=tables_of(bundle, found.digest, TRANSFORM_ID, tables),
        progress=step,
        budget=wish.budget.share(_DRAFTED),
    ) as draft:
        candidates = draft.predict(wish.conditions, wish.prices)
        if places is not None and wish.measure:
            candidates = _measured(draft, candidates, wish, places, store, cache, tables, step)
        plan = make_plan(draft, candidates, wish.conditions, wish.objective, wish.constraints, wish.prices)
        yield Made(plan, draft, store)


def check_request(registry: str, reference: str, photos: Sequence[Path], tensors: Sequence[str]) -> None:
    """Read what `planned` is to be told, before functions are started for it.

    Raises:
        Missing, RequestMalformed, MediaUnsupported, ShapeMismatch: as `planned`.
    """
    read_examples(open_registry(registry_settings(registry)).resolve(reference).bundle, photos, tensors)


def read_examples(bundle: Bundle, photos: Sequence[Path], tensors: Sequence[str]) -> tuple[str, list[Example]]:
    """What the examples are, and they: the photos or tensors given, else the sample photos, else random numbers.

    Raises:
        RequestMalformed: both were given, or a file cannot be read.
        MediaUnsupported, ShapeMismatch: they do not fit the model.
    """
    if photos and tensors:
        raise RequestMalformed("give --input or --tensor, not both")
    if tensors:
        return "tensors", from_arrays(bundle, [read_tensors(tensors)])
    if not photos and bundle.preprocess is not None:
        with contextlib.suppress(ModelError):  # the sample photos are not installed
            photos = sample_photos()
    if photos:
        return "photo", from_photos(bundle, [read_photo(path) for path in _spread(photos)])
    return "random", random_examples(bundle, _RANDOM)


def _spread(photos: Sequence[Path]) -> list[Path]:
    """At most MAX_EXAMPLES of the files, and of the folders' files, evenly."""
    files = [f for p in photos for f in (sorted(q for q in p.iterdir() if q.is_file()) if p.is_dir() else [p])]
    if not files:
        raise RequestMalformed(f"{photos[0]} holds no files")
    return files[:: math.ceil(len(files) / MAX_EXAMPLES)]


def _profiles(
    store: Registry,
    model: str,
    bundle: Bundle,
    registry: str,
    cache_dir: str,
    places: Places | None,
    step: Progress,
    budget: Budget,
) -> dict[str, Profile]:
    if places is not None and places.token:
        from isthmus_tools.cli.profiling import profile_tiers

        urls = {EDGE: places.head, CLOUD: places.tail}
        made = profile_tiers(
            registry,
            cache_dir,
            model,
            urls,
            places.token,
            runs=_RUNS,
            at=[],
            photo=None,
            tensors=[],
            again=False,
            step=step,
            version=False,
            budget=budget,
        )
        return dict(made.profiles)
    known = profiles.newest(store, bundle)
    if lacking := [tier for tier in (EDGE, CLOUD) if tier not in known]:
        raise Missing(
            f"there is no profile of {bundle.name} for the tier {' or '.join(lacking)}",
            kind="profile",
            name=bundle.name,
            exists=sorted(known),
            hint=f"measure it: isthmus profile {bundle.name} --head URL --tail URL; or plan with --local",
        )
    return {tier: known[tier] for tier in (EDGE, CLOUD)}


def _measured(
    draft: Draft,
    candidates: tuple[Candidate, ...],
    wish: Wish,
    places: Places,
    store: Registry,
    cache: SegmentCache,
    tables: Tables,
    step: Progress,
) -> tuple[Candidate, ...]:
    step("uploading the candidates' cuts")
    digest = draft.stage(store)
    some = contenders(candidates, wish.objective, wish.constraints)
    with contextlib.ExitStack() as held:
        tail = places.tail
        if not wish.conditions.adds_nothing:
            c = wish.conditions
            tail = held.enter_context(
                link_to(tail, uplink_bps=c.uplink_bps, downlink_bps=c.downlink_bps, rtt_s=c.rtt_s)
            )
        found = measure(
            some,
            digest,
            draft.bundle,
            Functions(places.head, tail, places.tail),
            draft.examples,
            tables,
            store.bundle,
            constraints=wish.constraints,
            progress=step,
            budget=wish.budget,
        )
    if unseen := [c.name for c in found if c.measured is None and not c.refused]:
        draft.notes.append(f"the time limit left {len(unseen)} candidates unmeasured: {', '.join(unseen)}")
    return merged(candidates, found)
