"""A model over the grid of networks: functions on two unequal machines, the planner's choice, the best split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from functions import PROFILE_TOKEN, tiers_to_profile
from harness import STATE, Report
from models import PLAN_REGISTRY, PlannedModel, calibrated_version, published

from isthmus.artifacts.bundle import Bundle, Cut
from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Candidate
from isthmus.artifacts.profile import Profile
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus.registry import Registry, SegmentCache, open_cache, open_registry
from isthmus.runtime.tables import Tables
from isthmus.settings import RegistrySettings
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.choice import choose, violations, with_measurements
from isthmus_tools.planner.enumeration import enumerate_candidates
from isthmus_tools.planner.inputs import TrialInput, from_arrays, from_photos
from isthmus_tools.planner.measurement import LinkedFunctions, contenders, measure
from isthmus_tools.profiling.slow_edge import SlowEdge
from isthmus_tools.usecases.function_urls import FunctionUrls
from isthmus_tools.usecases.profile import ProfileRequest, profile
from isthmus_tools.zoo.photos import varied_photos

# How many times the edge is slower than the cloud's CPU.
SLOWDOWNS, QUICK_SLOWDOWNS = (4.0, 8.0, 16.0, 32.0), (8.0, 16.0, 32.0)
RATES, ROUND_TRIPS = (0.1e6, 1e6, 2e6, 10e6, 100e6), (0.02, 0.08)
# A fraction of the cells, where a split may be best, and their duels alone: a few minutes for each slowdown.
QUICK_RATES, QUICK_ROUND_TRIPS = (1e6, 2e6, 5e6, 10e6), (0.02,)
LIMITS = Constraints()
BASELINES = {"edge-only": "edge-float", "cloud-only, JPEG": "cloud-photo", "cloud-only, raw": "cloud-raw"}
# `edge-float` without the photo's pre-processing: the edge alone with an input that needs no decoding.
EDGE_RAW = "edge-only, raw"
# A baseline slower than the choice by this factor keeps its figure of the first race.
_FAR = 2.5
# A cut is pruned from a cell only where 0.7 times its predicted computation plus its time on the link, which no
# measurement can undercut, already exceed the best measurement.
_BOUND = 0.7


@dataclass(frozen=True)
class Bench:
    """A model's functions and candidate sets: the planner's, all cuts', the planner's with a calibrated codec."""

    model: PlannedModel
    edge: SlowEdge
    registry: Registry
    cache: SegmentCache
    functions: Mapping[Conditions, LinkedFunctions]
    by_planner: CandidateSet
    every: CandidateSet | None
    calibrated: CandidateSet | None
    digests: Mapping[int, str]
    rounds: int

    def measure(
        self,
        candidate_set: CandidateSet,
        candidates: Sequence[Candidate],
        cell: Conditions,
        *,
        eliminate: bool,
        rounds: int,
    ) -> tuple[Candidate, ...]:
        """Measure the candidates over the cell's link, with the edge's and this thread's CPU time multiplied."""
        tables = Tables(self.registry.bundle, self.registry.blob, MAX_PIXELS)
        return measure(
            candidates,
            self.digests[id(candidate_set)],
            candidate_set.bundle,
            self.functions[cell],
            candidate_set.inputs,
            tables,
            self.variant,
            edge=self.edge,
            rounds=rounds,
            eliminate=eliminate,
        )

    def variant(self, digest: str) -> Bundle:
        """The bundle of a quantised variant."""
        return self.registry.bundle(digest)


@dataclass(frozen=True)
class Cell:
    """The result of a model in a network: seconds by candidate, with the choice and the best cut."""

    model: str
    slowdown: float
    conditions: Conditions
    chosen: str
    best: str
    seconds: Mapping[str, float]
    tried: int
    preprocess: float = 0.0
    apart: Sequence[float] = field(default_factory=tuple)

    @property
    def regret(self) -> float:
        """The choice's time over the best candidate's, minus 1."""
        return self.seconds[self.chosen] / self.seconds[self.best] - 1

    def speedup(self, over: str) -> float | None:
        """The choice's speedup over a baseline; None without that baseline."""
        if over == EDGE_RAW:
            return (self.seconds[BASELINES["edge-only"]] - self.preprocess) / self.seconds[self.chosen]
        name = BASELINES[over]
        return self.seconds[name] / self.seconds[self.chosen] if name in self.seconds else None


@dataclass(frozen=True)
class Rivals:
    """The best candidate of each kind (edge, cloud, split) in a network, measured interleaved.

    `predicted` is the kind of the best candidate by prediction.
    """

    model: str
    slowdown: float
    conditions: Conditions
    best: Mapping[str, Candidate]
    predicted: str

    @property
    def kind(self) -> str:
        """The kind of the measured best; "" without a split or without another."""
        return "" if self.gain is None else min(self.best, key=lambda kind: self.best[kind].seconds)

    @property
    def gain(self) -> float | None:
        """The time of the best of the rest over the split's, minus 1: above 0 where the split is best."""
        rest = [c.seconds for kind, c in self.best.items() if kind != "split"]
        return min(rest) / self.best["split"].seconds - 1 if rest and "split" in self.best else None

    @property
    def private_gain(self) -> float | None:
        """The same over the whole model at the edge alone, the only other where inputs may not leave."""
        if not {"edge", "split"} <= self.best.keys():
            return None
        return self.best["edge"].seconds / self.best["split"].seconds - 1


def rivals(bench: Bench, cell: Conditions) -> Rivals:
    """Measure the promising candidates, of the calibrated model where there is one, then the best of each kind."""
    candidate_set = bench.calibrated or bench.by_planner
    predictions = candidate_set.predict(cell)
    _, favourite, _ = choose(predictions, "latency", LIMITS)
    some = contenders(predictions, "latency", LIMITS)
    ran = bench.measure(candidate_set, some, cell, eliminate=True, rounds=bench.rounds)
    able = sorted((c for c in ran if c.measured and not violations(c, LIMITS)), key=lambda c: -c.seconds)
    # The fastest of a kind is its last.
    duellists = {c.kind: c for c in able}
    duel = bench.measure(candidate_set, list(duellists.values()), cell, eliminate=False, rounds=2 * bench.rounds)
    best = {c.kind: c for c in duel if c.measured}
    return Rivals(bench.model.name, bench.edge.slowdown, cell, best, favourite.kind)


@contextlib.contextmanager
def prepared(model: PlannedModel, slowdown: float, report: Report) -> Iterator[Bench]:
    """Publish and profile the model on running functions and links, and try its candidates."""
    report.say(f"{model.name}: publishing it with every cut, once")
    version = published(model)
    at = some_cuts(version.bundle, 5 if report.quick else 9)
    reference = calibrated_version(model, version, report) if model.calibrate else None
    settings = RegistrySettings(registry=str(PLAN_REGISTRY), cache_dir=str(STATE / "plan-cache"))
    registry = open_registry(settings)
    cache = open_cache(settings, registry)
    rates, round_trips = (QUICK_RATES, QUICK_ROUND_TRIPS) if report.quick else (RATES, ROUND_TRIPS)
    grid = [Conditions(bps, bps, rtt) for bps in rates for rtt in round_trips]
    with contextlib.ExitStack() as resources:
        edge, cloud = resources.enter_context(tiers_to_profile(PLAN_REGISTRY, model.name))
        functions = {}
        for cell in grid:
            far = resources.enter_context(
                link_to(cloud.url, uplink_bps=cell.up_bps, downlink_bps=cell.down_bps, rtt_s=cell.rtt_s)
            )
            functions[cell] = LinkedFunctions(edge.url, far, cloud.url)
        runs = 7 if report.quick else 15
        slow = SlowEdge(slowdown, [edge.process.pid])
        profiles = profiled(report, model, at, FunctionUrls(edge.url, cloud.url, PROFILE_TOKEN, slow), runs)
        examples, kind = inputs(model, registry)
        # A share of agreement takes more photos than times do.
        photos = [path.read_bytes() for path in varied_photos()] if model.photo is not None else []
        digests: dict[int, str] = {}

        def enumerated(reference: str, **more: Any) -> CandidateSet:
            more |= {"links": grid, "jpeg_photos": photos}
            candidates = enumerate_candidates(registry, cache, reference, profiles, examples, kind, **more)
            candidate_set = resources.enter_context(candidates)
            digests[id(candidate_set)] = candidate_set.stage(registry)
            return candidate_set

        calibrated = None
        if reference is not None:
            report.say(f"{model.name}: trying candidates with the calibrated codec")
            calibrated = enumerated(reference)
        by_planner = calibrated
        if by_planner is None or not report.quick:
            report.say(f"{model.name}: trying candidates")
            by_planner = enumerated(model.name)
        every = None
        if not report.quick:
            report.say(f"{model.name}: trying every cut")
            every = enumerated(model.name, all_prefixes=True, int8=False)
        rounds = 7 if report.quick else 15
        yield Bench(model, slow, registry, cache, functions, by_planner, every, calibrated, digests, rounds)


def profiled(
    report: Report, model: PlannedModel, at: Sequence[str], functions: FunctionUrls, runs: int
) -> Mapping[str, Profile]:
    """Fresh profiles of the tiers at some cuts, as many as in a user's bundle."""
    photo = STATE / f"{model.name}.jpg"
    if model.photo is not None:
        photo.write_bytes(model.photo())
    request = ProfileRequest(
        model=model.name,
        registry=RegistrySettings(registry=str(PLAN_REGISTRY), cache_dir=str(STATE / "plan-cache")),
        functions=functions,
        cuts=at,
        runs=runs,
        photos=[photo] if model.photo is not None else [],
        again=True,
    )
    return profile(request, report.say).profiles


def some_cuts(bundle: Bundle, count: int) -> list[str]:
    """The narrowest cut in each of `count` parts of the work."""
    parts: dict[int, Cut] = {}
    for cut in bundle.cuts.values():
        part = min(count - 1, int(cut.macs_before * count))
        if part not in parts or cut.bytes < parts[part].bytes:
            parts[part] = cut
    return [parts[part].name for part in sorted(parts)]


def inputs(model: PlannedModel, registry: Registry) -> tuple[list[TrialInput], str]:
    """The request to measure with."""
    bundle = registry.resolve(model.name).bundle
    if model.photo is not None:
        return from_photos(bundle, [model.photo()]), "photo"
    return from_arrays(bundle, [model.input() if model.input else {}]), "tensors"


def one_cell(bench: Bench, every: CandidateSet, cell: Conditions) -> Cell:
    """Measure the planner's choice, then every cut that could beat it, then both and the baselines interleaved."""
    predicted = bench.by_planner.predict(cell)
    some = contenders(predicted, "latency", LIMITS)
    measured = bench.measure(bench.by_planner, some, cell, eliminate=True, rounds=bench.rounds)
    _, choice, _ = choose(with_measurements(predicted, measured), "latency", LIMITS)
    others = could_be_better(every.predict(cell), choice.seconds)
    rivals = [c for c in bench.measure(every, others, cell, eliminate=True, rounds=bench.rounds) if c.measured]
    best = min(rivals, key=lambda c: c.seconds, default=choice)
    baselines = [c for c in measured if c.name in BASELINES.values() and c.measured]
    near = [c for c in baselines if c.seconds <= _FAR * choice.seconds]
    # The best of many noisy figures looks better than it is; a duel measures the difference.
    duellists = {c.name: c for c in (*near, choice, *([best] if best.seconds < choice.seconds else []))}
    duel = bench.measure(bench.by_planner, list(duellists.values()), cell, eliminate=False, rounds=2 * bench.rounds)
    seconds = {c.name: c.seconds for c in (*baselines, *duel) if c.measured}
    best_name = min(seconds, key=lambda name: seconds[name])
    apart = [abs(c.seconds / c.predicted.total - 1) for c in duel if c.measured]
    decoding = next((c.measured.parts["preprocess"] for c in (*duel, *baselines) if c.kind == "edge" and c.measured), 0)
    found = (choice.name, best_name, seconds, len(others), decoding, apart)
    return Cell(bench.model.name, bench.edge.slowdown, cell, *found)


def could_be_better(candidates: Sequence[Candidate], seconds: float) -> list[Candidate]:
    """Splits within the constraints that may take less than `seconds`, the most promising first."""
    allowed = [c for c in candidates if not c.refused and c.kind == "split" and not violations(c, LIMITS)]
    p = [
        (c, c.predicted.up + c.predicted.rtt + _BOUND * (c.predicted.edge_busy + c.predicted.cloud_run))
        for c in allowed
    ]
    return [c for c, bound in sorted(p, key=lambda pair: pair[1]) if bound <= seconds]


def text(cell: Conditions) -> str:
    """`10 Mbit/s, 20 ms`."""
    return f"{cell.up_bps / 1e6:g} Mbit/s, {cell.rtt_s * 1000:g} ms"
