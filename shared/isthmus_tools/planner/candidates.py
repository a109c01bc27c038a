"""The candidates of one bundle, evaluated in this process, with predictions for any link."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from isthmus.artifacts.bundle import Bundle, digest_of, subject_digest, to_json
from isthmus.artifacts.choice import RAW, Choice
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate, Terms
from isthmus.artifacts.profile import CodecSpeed, Profile, content_of
from isthmus.artifacts.segment_id import WHOLE, SegmentId, partition_ids
from isthmus.errors import ModelError, PlanMismatch, RunFailed
from isthmus.registry import Registry, Resolved
from isthmus_tools.planner.costs import NO_RUN, Prices, RunTime, Workload, run_seconds, terms, with_prices
from isthmus_tools.planner.evaluation import Evaluation
from isthmus_tools.planner.inputs import TrialInput
from isthmus_tools.planner.memory import MemoryModel

if TYPE_CHECKING:
    from isthmus_tools.graph import Model
    from isthmus_tools.planner.variant import Variant

EDGE, CLOUD = "edge", "cloud"


@dataclass(frozen=True)
class Option:
    """One way to serve the model, before evaluation; `choice` encodes the tensors sent to the cloud.

    `variant` is another bundle at the edge; `head` names the variant of the bundle's own segment there.
    """

    name: str
    kind: str
    cuts: tuple[str, ...] = ()
    choice: Choice = RAW
    photo: bool = False
    variant: bool = False
    head: str = ""


class PlannedBundle:
    """What the candidates of every kind of model have; `input_kind` is that of the plan, as in its document."""

    bundle: Bundle
    profiles: Mapping[str, Profile]
    input_kind: str

    @property
    def subject(self) -> str:
        """The bundle digest that a plan of these candidates names."""
        return subject_digest(self.bundle)

    @property
    def cpus(self) -> dict[str, int]:
        """CPUs of each tier that a request occupies."""
        return {tier: profile.device.threads for tier, profile in self.profiles.items()}


@dataclass
class CandidateSet(PlannedBundle):
    """The evaluated options of one bundle, independent of the link.

    `bundle` is the published bundle plus the candidates' cuts; `files` holds the new files, by digest, as long as the
    set lives. `same_graph` says, by tier, whether the profile timed the bundle's graph under a segment id.
    `min_boundary_bytes` are the fewest bytes of any cut. `slowdown` is the ratio of each tier's run times to those of
    this process, `codec_slowdown` the same for each codec. `notes` explain omissions; `skipped_cuts` are the cuts for
    which the time limit left no time.
    """

    resolved: Resolved
    bundle: Bundle
    files: dict[str, Path]
    model: Model
    profiles: Mapping[str, Profile]
    inputs: Sequence[TrialInput]
    input_kind: str
    same_graph: Mapping[str, Callable[[str], bool]]
    min_boundary_bytes: float
    private_depth: int = 0
    options: list[Option] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    slowdown: dict[str, float] = field(default_factory=dict)
    codec_slowdown: dict[str, Mapping[str, CodecSpeed]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped_cuts: tuple[str, ...] = ()
    variant: Variant | None = None

    def add(self, option: Option, evaluation: Evaluation | None) -> None:
        """Add an option, unless its evaluation found nothing to encode."""
        if evaluation is not None:
            self.options.append(option)
            self.evaluations[option.name] = evaluation

    @contextlib.contextmanager
    def or_note(self, name: str) -> Iterator[None]:
        """A note in place of options that cannot be built, loaded or run: a model without these still has a plan."""
        try:
            yield
        except (ModelError, RunFailed) as e:
            self.notes.append(f"{name} was left out: {e.message}")

    def predict(self, conditions: Conditions, prices: Prices | None = None) -> tuple[Candidate, ...]:
        """Every candidate with predicted costs under `conditions`."""
        hops = (self.profiles[EDGE].hop, self.profiles[CLOUD].hop)
        predictions = (replace(c, predicted=terms(load, *hops, conditions)) for c, load in self._workloads)
        return tuple(with_prices(c, prices, self.cpus) for c in predictions)

    def stage(self, registry: Registry) -> str:
        """Upload the bundle with the candidates' cuts, and the variant, so that functions can load both by digest.

        Neither becomes a version: an interrupted plan leaves the model's versions untouched. Returns the bundle's
        digest.
        """
        if self.variant is not None:
            registry.stage(self.variant.bundle, self.variant.files)
        return registry.stage(self.bundle, self.files)

    @cached_property
    def _workloads(self) -> list[tuple[Candidate, Workload]]:
        candidates = ((option, self._candidate(option)) for option in self.options)
        return [(c, self._workload(o, self.evaluations[o.name], c.calls)) for o, c in candidates]

    def _candidate(self, option: Option) -> Candidate:
        evaluation = self.evaluations[option.name]
        edge_bytes, cloud_bytes = self._memory(option)
        return Candidate(
            name=option.name,
            kind=option.kind,
            predicted=Terms(),  # the link decides: see `predict`
            cuts=option.cuts,
            codecs=evaluation.codecs,
            input="photo" if option.photo else "tensors",
            variant=self.variant.digest if option.variant and self.variant else None,
            up_bytes=evaluation.far.sent if evaluation.far else 0,
            down_bytes=evaluation.far.received if evaluation.far else 0,
            error=evaluation.error,
            edge_memory_bytes=edge_bytes,
            cloud_memory_bytes=cloud_bytes,
            looks=evaluation.looks,
            refused=evaluation.refused,
            exit=evaluation.exit,
            head=option.head,
        )

    def _workload(self, option: Option, evaluation: Evaluation, calls: float) -> Workload:
        edge, cloud = NO_RUN, NO_RUN
        if option.kind == "edge" and (option.variant or option.head):
            # No profile times a variant, so its run here is scaled as the whole model's.
            edge = RunTime(evaluation.run_s * self.slowdown[EDGE], "scaled")
        elif option.kind == "edge":
            edge = self._run_time(EDGE, WHOLE)
        elif option.kind == "cloud":
            cloud = self._run_time(CLOUD, WHOLE)
        else:
            head, tail = partition_ids(option.cuts)
            edge, cloud = self._run_time(EDGE, head), self._run_time(CLOUD, tail)
            if option.head:
                edge = RunTime(edge.seconds * evaluation.head_ratio, "scaled")
            edge = RunTime(edge.seconds + evaluation.branch_s * self.slowdown[EDGE], edge.source)
        return Workload(
            near=evaluation.near,
            far=evaluation.far,
            edge=edge,
            cloud=cloud,
            preprocess_s=evaluation.preprocess_s * self.slowdown[EDGE],
            encode_s=evaluation.encode_s * self._codec_slowdown(EDGE, option).pack_s,
            decode_s=evaluation.decode_s * self._codec_slowdown(CLOUD, option).unpack_s,
            calls=calls,
        )

    def _codec_slowdown(self, tier: str, option: Option) -> CodecSpeed:
        # Profiles time no photo decoding, and a codec of a later version has no time there: both scale as models do.
        default = CodecSpeed(self.slowdown[tier], self.slowdown[tier])
        return default if option.photo else self.codec_slowdown.get(tier, {}).get(option.choice.codec, default)

    def _run_time(self, tier: str, segment: SegmentId) -> RunTime:
        return run_seconds(self.profiles[tier], segment, self._nodes(segment), self.same_graph[tier])

    def _nodes(self, segment: SegmentId) -> list[int]:
        # Not at the top: `explain` and `up` import this module, and onnx-ir takes a second.
        from isthmus_tools.graph.cuts import upstream_of

        # Static nodes are folded into constants and cost nothing at run time.
        dynamic = [i for i, dynamic in enumerate(self.model.dynamic) if dynamic]
        cuts = self.bundle.cuts
        after = upstream_of(self.model, cuts[segment.start]) if segment.start else frozenset()
        before = upstream_of(self.model, cuts[segment.stop]) if segment.stop else frozenset(dynamic)
        return [i for i in dynamic if i in before and i not in after]

    def _memory(self, option: Option) -> tuple[int, int]:
        """Bytes of memory at the edge and in the cloud."""
        edge, cloud = (
            MemoryModel(self.model, self.bundle, self.profiles[t], self.same_graph[t]) for t in (EDGE, CLOUD)
        )
        if option.variant and self.variant is not None:
            return edge.variant(self.variant.bundle.weights.blob.size, self._nodes(WHOLE)), 0

        def size(memory: MemoryModel, segment: SegmentId) -> int:
            return memory.segment(self.bundle.segment(segment), self._nodes(segment))

        def edge_size(segment: SegmentId) -> int:
            if not option.head:
                return size(edge, segment)
            variant = next(each for each in self.bundle.variants_of(segment) if each.name == option.head)
            # Measured as by profiles, weights and the runtime's arena; but for other shapes where some are free.
            is_fixed = all(isinstance(n, int) for spec in self.bundle.inputs for n in spec.shape)
            if variant.memory_bytes and is_fixed:
                return variant.memory_bytes
            return max(variant.memory_bytes, edge.variant(variant.segment.graph.size, self._nodes(segment)))

        if option.kind == "edge":
            return edge_size(WHOLE), 0
        if option.kind == "cloud":
            return 0, size(cloud, WHOLE)
        head, tail = partition_ids(option.cuts)
        # The weights of an exit's branch are in its graph, and its input is there already.
        early = self.bundle.exit_at(option.cuts[0]) if self.evaluations[option.name].exit is not None else None
        return edge_size(head) + (early.segment.graph.size if early is not None else 0), size(cloud, tail)


def check_profile(profile: Profile, bundle: Bundle) -> None:
    """Check that a profile is of this model.

    Raises:
        PlanMismatch: the profile is of another model; names both.
    """
    # The content, not the bundle: cuts and plans of a later version leave a profile valid.
    if profile.content != (content := content_of(bundle)):
        raise PlanMismatch(
            f"the profile of tier {profile.tier} is of {profile.model}, {profile.content[:19]}…, and not of"
            f" {bundle.name}, {content[:19]}…",
            subject=profile.content,
            expected=content,
            hint=f"measure this one: isthmus profile {bundle.name}",
        )


def same_graph(registry: Registry, profile: Profile, bundle: Bundle) -> Callable[[str], bool]:
    """A test of segment ids: whether the profile timed the bundle's graph. A cut's name may have meant another cut."""
    profiled = registry.bundle(profile.bundle) if profile.bundle != digest_of(to_json(bundle)) else bundle

    def test(segment: str) -> bool:
        timed, current = profiled.segments.get(segment), bundle.segments.get(segment)
        return timed is not None and current is not None and timed.graph == current.graph

    return test
