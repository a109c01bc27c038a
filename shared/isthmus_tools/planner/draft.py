"""A plan in the making: one bundle, its candidates tried here, and what they will take under any link."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from isthmus.artifacts.bundle import Bundle, subject_digest
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate, Terms
from isthmus.artifacts.profile import CodecSpeed, Profile
from isthmus.artifacts.segment_id import WHOLE, SegmentId, partition_ids
from isthmus.registry import Registry, Resolved
from isthmus_tools.graph.cuts import upstream_of
from isthmus_tools.graph.model import Model
from isthmus_tools.planner.costs import Load, Work, priced, run_seconds, terms
from isthmus_tools.planner.examples import Example
from isthmus_tools.planner.memory import Memory
from isthmus_tools.planner.prices import Prices
from isthmus_tools.planner.trials import Option, Trial
from isthmus_tools.planner.variant import Variant

EDGE, CLOUD = "edge", "cloud"


@dataclass
class Draft:
    """What is known of one bundle's candidates, whatever the link.

    `bundle` is the one that a plan is for: the published one with the candidates' cuts. `files` holds what is new of
    it, by digest, as long as the draft lives. `same_graph` says, by tier, which segments the profile timed are still
    the bundle's. `crossing_least` are the fewest bytes that any cut lets cross. `slowdown` is how much slower each tier
    is than this process, and `packing` how much slower at each codec. `notes` say what was left out, and why;
    `untried` are the cuts that the time limit left out.
    """

    found: Resolved
    bundle: Bundle
    files: dict[str, Path]
    model: Model
    profiles: Mapping[str, Profile]
    examples: Sequence[Example]
    inputs: str
    same_graph: Mapping[str, Callable[[str], bool]]
    crossing_least: float
    private_depth: int = 0
    options: list[Option] = field(default_factory=list)
    trials: dict[str, Trial] = field(default_factory=dict)
    slowdown: dict[str, float] = field(default_factory=dict)
    packing: dict[str, Mapping[str, CodecSpeed]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    untried: tuple[str, ...] = ()
    variant: Variant | None = None

    @property
    def subject(self) -> str:
        """The digest that a plan of this draft names."""
        return subject_digest(self.bundle)

    def predict(self, conditions: Conditions, prices: Prices | None = None) -> tuple[Candidate, ...]:
        """Every candidate under `conditions`, as predicted."""
        cpus = {tier: profile.device.threads for tier, profile in self.profiles.items()}
        hops = (self.profiles[EDGE].hop, self.profiles[CLOUD].hop)
        made = (replace(c, predicted=terms(load, *hops, conditions)) for c, load in self._known)
        return tuple(priced(c, prices, cpus) for c in made)

    def stage(self, registry: Registry) -> str:
        """Upload the bundle with the candidates' cuts, and the variant, so that functions can load them by digest.

        Neither becomes a version: an interrupted plan leaves the model's versions as they were. Returns the bundle's
        digest.
        """
        if self.variant is not None:
            registry.stage(self.variant.bundle, self.variant.files)
        return registry.stage(self.bundle, self.files)

    @cached_property
    def _known(self) -> list[tuple[Candidate, Load]]:
        """All candidates, without what the link decides, and what each does."""
        return [(self._candidate(o), self._load(o, self.trials[o.name])) for o in self.options]

    def _candidate(self, option: Option) -> Candidate:
        trial = self.trials[option.name]
        edge_bytes, cloud_bytes = self._memory(option)
        return Candidate(
            name=option.name,
            kind=option.kind,
            predicted=Terms(),
            cuts=option.cuts,
            codecs=trial.codecs,
            input="photo" if option.photo else "tensors",
            variant=self.variant.digest if option.variant and self.variant else None,
            up_bytes=trial.far.sent if trial.far else 0,
            down_bytes=trial.far.received if trial.far else 0,
            error=trial.error,
            edge_memory_bytes=edge_bytes,
            cloud_memory_bytes=cloud_bytes,
            looks=trial.looks,
        )

    def _load(self, option: Option, trial: Trial) -> Load:
        edge, cloud = Work(0.0, ""), Work(0.0, "")
        if option.variant:
            edge = Work(trial.run_here_s * self.slowdown[EDGE], "scaled")
        elif option.kind == "edge":
            edge = self._run(EDGE, WHOLE)
        elif option.kind == "cloud":
            cloud = self._run(CLOUD, WHOLE)
        else:
            head, tail = partition_ids(option.cuts)
            edge, cloud = self._run(EDGE, head), self._run(CLOUD, tail)
        return Load(
            near=trial.near,
            far=trial.far,
            edge=edge,
            cloud=cloud,
            preprocess=trial.preprocess_s * self.slowdown[EDGE],
            pack=trial.encode_s * self._slower(EDGE, option).pack_s,
            unpack=trial.decode_s * self._slower(CLOUD, option).unpack_s,
            again=trial.looks.again if trial.looks is not None else 0.0,
        )

    def _slower(self, tier: str, option: Option) -> CodecSpeed:
        """How many times slower a tier packs and unpacks than this process; photos are decoded as models run."""
        whole = CodecSpeed(self.slowdown[tier], self.slowdown[tier])
        return whole if option.photo else self.packing.get(tier, {}).get(option.choice.codec, whole)

    def _run(self, tier: str, segment: SegmentId) -> Work:
        return run_seconds(self.profiles[tier], segment, self._nodes(segment), self.same_graph[tier])

    def _nodes(self, segment: SegmentId) -> list[int]:
        everything = [i for i, dynamic in enumerate(self.model.dynamic) if dynamic]
        cuts = self.bundle.cuts
        after = upstream_of(self.model, cuts[segment.start]) if segment.start else frozenset()
        before = upstream_of(self.model, cuts[segment.stop]) if segment.stop else frozenset(everything)
        return [i for i in everything if i in before and i not in after]

    def _memory(self, option: Option) -> tuple[int, int]:
        edge, cloud = (Memory(self.model, self.bundle, self.profiles[t], self.same_graph[t]) for t in (EDGE, CLOUD))
        whole = self.bundle.segment(WHOLE)
        if option.variant and self.variant is not None:
            return edge.variant(self.variant.bundle.weights.blob.size), 0
        if option.kind == "edge":
            return edge.segment(whole, self._nodes(WHOLE)), 0
        if option.kind == "cloud":
            return 0, cloud.segment(whole, self._nodes(WHOLE))
        head, tail = partition_ids(option.cuts)
        sizes = (edge, head), (cloud, tail)
        one, other = (m.segment(self.bundle.segment(s), self._nodes(s)) for m, s in sizes)
        return one, other
