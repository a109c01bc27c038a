"""One model over the grid of networks: its functions on two unequal machines, and what the planner's choice takes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real
from functions import lay_out
from quota import share_of_a_cpu
from real import REGISTRY, Real, calibrated_version
from report import STATE, Report

from isthmus.artifacts.bundle import Bundle, Cut
from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Candidate
from isthmus.artifacts.profile import Profile
from isthmus.processing.image import MAX_PIXELS
from isthmus.registry import Registry, SegmentCache, open_cache, open_registry
from isthmus.runtime.tables import Tables
from isthmus.serving.profiling import SECRET
from isthmus.settings import RegistrySettings
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.candidates import CLOUD, EDGE, CandidateSet
from isthmus_tools.planner.choice import choose, violations, with_measurements
from isthmus_tools.planner.enumeration import enumerate_candidates
from isthmus_tools.planner.inputs import TrialInput, from_arrays, from_photos
from isthmus_tools.planner.measurement import LinkedFunctions, contenders, measure
from isthmus_tools.usecases.functions import FunctionUrls
from isthmus_tools.usecases.profile import ProfileRequest, profile

SLOWER = 4
RATES, ROUND_TRIPS = (1e6, 10e6, 100e6), (0.001, 0.02, 0.08)
TOKEN = "bench"  # noqa: S105 - it opens functions that live as long as this benchmark
LIMITS = Constraints()
BASELINES = {"edge-only": "edge-float", "cloud-only, JPEG": "cloud-photo", "cloud-only, raw": "cloud-raw"}
EDGE_RAW = "edge-only, raw"
"""The edge alone where the input needs no decoding: `edge-float` without the photo's pre-processing."""
_FAR = 2.5
"""A baseline that took so many times what the choice takes keeps the figure of the first race."""
_BOUND = 0.7
"""A cut is left out of a cell only where 0.7 times its predicted computing, and its bytes' time on the link (which no
measurement can undercut), already exceed the best that was measured there."""


@dataclass(frozen=True)
class Bench:
    """One model's functions and what is known of it; `every` holds all its cuts, `planned` those of the planner, and
    `calibrated` those that it finds where the codec was calibrated."""

    real: Real
    registry: Registry
    cache: SegmentCache
    functions: Mapping[Conditions, LinkedFunctions]
    planned: CandidateSet
    every: CandidateSet
    calibrated: CandidateSet | None
    digests: Mapping[int, str]
    edge_pids: Sequence[int]
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
        """What the candidates take over the cell's link, the edge and this process at a quarter of a CPU."""
        tables = Tables(self.registry.bundle, self.registry.blob, MAX_PIXELS)
        digest = self.digests[id(candidate_set)]
        with share_of_a_cpu(1 / SLOWER, [*self.edge_pids, os.getpid()]):
            return measure(
                candidates,
                digest,
                candidate_set.bundle,
                self.functions[cell],
                candidate_set.inputs,
                tables,
                self.variant,
                rounds=rounds,
                eliminate=eliminate,
            )

    def variant(self, digest: str) -> Bundle:
        """The bundle of a quantised variant."""
        return self.registry.bundle(digest)


@dataclass(frozen=True)
class Cell:
    """What came of one model and one network; seconds by name, the choice and the best cut among them."""

    model: str
    conditions: Conditions
    chosen: str
    best: str
    seconds: Mapping[str, float]
    tried: int
    preprocess: float = 0.0
    apart: Sequence[float] = field(default_factory=tuple)

    @property
    def regret(self) -> float:
        """How much longer the choice takes than the best of all."""
        return self.seconds[self.chosen] / self.seconds[self.best] - 1

    def speedup(self, over: str) -> float | None:
        """How many times faster than a baseline; None where there is none such."""
        if over == EDGE_RAW:
            return (self.seconds[BASELINES["edge-only"]] - self.preprocess) / self.seconds[self.chosen]
        name = BASELINES[over]
        return self.seconds[name] / self.seconds[self.chosen] if name in self.seconds else None


@contextlib.contextmanager
def prepared(model: Real, report: Report) -> Iterator[Bench]:
    """The model published, its functions and links running, profiled on both tiers, its candidates tried."""
    report.say(f"{model.name}: publishing it with every cut, once")
    found = real.published(model)
    at = some_cuts(found.bundle, 5 if report.quick else 9)
    reference = calibrated_version(model, found, report) if model.calibrate else None
    settings = RegistrySettings(registry=str(REGISTRY), cache_dir=str(STATE / "plan-cache"))
    registry = open_registry(settings)
    cache = open_cache(settings, registry)
    laid = lay_out("edge-head", "cloud-tail", registry=REGISTRY, model=model.name)
    grid = [Conditions(bps, bps, rtt) for bps in RATES for rtt in ROUND_TRIPS]
    with contextlib.ExitStack() as held:
        secrets = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-")))
        (secrets / SECRET).write_text(TOKEN)
        env = {"threads": "1", "preload": "", "secrets_dir": str(secrets), "deadline_s": "120", "exec_timeout": "130s"}
        edge = held.enter_context(laid["edge-head"].start(**env, cache_dir=str(STATE / "plan-edge")))
        cloud = held.enter_context(laid["cloud-tail"].start(**env, cache_dir=str(STATE / "plan-cloud")))
        edge.wait_ready()
        cloud.wait_ready()
        functions = {}
        for cell in grid:
            far = held.enter_context(
                link_to(cloud.url, uplink_bps=cell.uplink_bps, downlink_bps=cell.downlink_bps, rtt_s=cell.rtt_s)
            )
            functions[cell] = LinkedFunctions(edge.url, far, cloud.url)
        runs = 7 if report.quick else 15
        profiles: dict[str, Profile] = {}
        with share_of_a_cpu(1 / SLOWER, [edge.process.pid]):
            profiles |= profiled(report, model, at, {EDGE: edge.url}, runs)
        profiles |= profiled(report, model, at, {CLOUD: cloud.url}, runs)
        examples, kind = inputs(model, registry)
        digests: dict[int, str] = {}

        def tried(reference: str, **more: Any) -> CandidateSet:
            found = enumerate_candidates(registry, cache, reference, profiles, examples, kind, links=grid, **more)
            candidate_set = held.enter_context(found)
            digests[id(candidate_set)] = candidate_set.stage(registry)
            return candidate_set

        report.say(f"{model.name}: trying candidates")
        planned = tried(model.name)
        report.say(f"{model.name}: trying every cut")
        every = tried(model.name, all_prefixes=True, int8=False)
        calibrated = None
        if reference is not None:
            report.say(f"{model.name}: trying candidates, the codec calibrated")
            calibrated = tried(reference)
        rounds = 7 if report.quick else 15
        pids = [edge.process.pid]
        yield Bench(model, registry, cache, functions, planned, every, calibrated, digests, pids, rounds)


def profiled(report: Report, model: Real, at: Sequence[str], urls: Mapping[str, str], runs: int) -> dict[str, Profile]:
    """The profile of one tier, measured now, at some cuts; a user's bundle has no more of them either."""
    photo = STATE / f"{model.name}.jpg"
    if model.photo is not None:
        photo.write_bytes(model.photo())
    request = ProfileRequest(
        model=model.name,
        registry=RegistrySettings(registry=str(REGISTRY), cache_dir=str(STATE / "plan-cache")),
        functions=FunctionUrls(urls.get(EDGE, ""), urls.get(CLOUD, ""), TOKEN),
        cuts=at,
        runs=runs,
        photos=[photo] if model.photo is not None else [],
        again=True,
    )
    return dict(profile(request, lambda stage, *_: report.say(stage)).profiles)


def some_cuts(bundle: Bundle, count: int) -> list[str]:
    """The narrowest cut of each of so many parts of the work."""
    parts: dict[int, Cut] = {}
    for cut in bundle.cuts.values():
        part = min(count - 1, int(cut.macs_before * count))
        if part not in parts or cut.bytes < parts[part].bytes:
            parts[part] = cut
    return [parts[part].name for part in sorted(parts)]


def inputs(model: Real, registry: Registry) -> tuple[list[TrialInput], str]:
    """The request that everything is measured with."""
    bundle = registry.resolve(model.name).bundle
    if model.photo is not None:
        return from_photos(bundle, [model.photo()]), "photo"
    return from_arrays(bundle, [model.input() if model.input else {}]), "tensors"


def one_cell(bench: Bench, cell: Conditions) -> Cell:
    """The planner's choice, then every cut that could beat it, then both and the baselines by turns."""
    predicted = bench.planned.predict(cell)
    some = contenders(predicted, "latency", LIMITS)
    seen = bench.measure(bench.planned, some, cell, eliminate=True, rounds=bench.rounds)
    _, chosen, _ = choose(with_measurements(predicted, seen), "latency", LIMITS)
    others = could_be_better(bench.every.predict(cell), chosen.seconds)
    found = [c for c in bench.measure(bench.every, others, cell, eliminate=True, rounds=bench.rounds) if c.measured]
    best = min(found, key=lambda c: c.seconds, default=chosen)
    baselines = [c for c in seen if c.name in BASELINES.values() and c.measured]
    near = [c for c in baselines if c.seconds <= _FAR * chosen.seconds]
    # The best of many noisy figures looks better than it is: only a duel says by how much.
    duellists = {c.name: c for c in (*near, chosen, *([best] if best.seconds < chosen.seconds else []))}
    duel = bench.measure(bench.planned, list(duellists.values()), cell, eliminate=False, rounds=2 * bench.rounds)
    seconds = {c.name: c.seconds for c in (*baselines, *duel) if c.measured}
    best_name = min(seconds, key=lambda name: seconds[name])
    apart = [abs(c.seconds / c.predicted.total - 1) for c in duel if c.measured]
    decoding = next((c.measured.parts["preprocess"] for c in (*duel, *baselines) if c.kind == "edge" and c.measured), 0)
    return Cell(bench.real.name, cell, chosen.name, best_name, seconds, len(others), decoding, apart)


def could_be_better(candidates: Sequence[Candidate], seconds: float) -> list[Candidate]:
    """Those that keep the constraints and may take less than `seconds`, the most promising first."""
    allowed = [c for c in candidates if not c.refused and c.kind == "split" and not violations(c, LIMITS)]
    p = [
        (c, c.predicted.up + c.predicted.rtt + _BOUND * (c.predicted.edge_busy + c.predicted.cloud_run))
        for c in allowed
    ]
    return [c for c, bound in sorted(p, key=lambda pair: pair[1]) if bound <= seconds]


def text(cell: Conditions) -> str:
    """`10 Mbit/s, 20 ms`."""
    return f"{cell.uplink_bps / 1e6:g} Mbit/s, {cell.rtt_s * 1000:g} ms"
