"""Members of a fusion of models: versions with the same classes, and their scores for the same inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import LearningError
from isthmus.pipeline.agreement import are_probabilities
from isthmus.registry import Registry, Resolved, SegmentCache
from isthmus.settings import SegmentSettings
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.graph.merge import input_name
from isthmus_tools.learning.classes import ModelClasses, classes_of
from isthmus_tools.learning.fusion import MemberScores
from isthmus_tools.learning.labelled import LabelledData
from isthmus_tools.progress import Progress

# Each member is a session of the edge or the cloud, and its scores are columns of one regression.
MAX_MEMBERS = 8


@dataclass(frozen=True)
class FusionMember:
    """A classifier of the registry; `name` is the prefix of its names in the fused graph."""

    name: str
    model: Resolved
    classes: ModelClasses


@dataclass(frozen=True)
class Members:
    """The members in order; with `shared` all take the same inputs."""

    each: tuple[FusionMember, ...]
    shared: bool

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty where no member has any."""
        return next((member.classes.names for member in self.each if member.classes.names), ())

    @property
    def first(self) -> Bundle:
        """The first member's bundle."""
        return self.each[0].model.bundle

    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the fused model."""
        specs = {
            (name := input_name(member.name, spec.name, shared=self.shared)): structs.replace(spec, name=name)
            for member in self.each
            for spec in member.model.bundle.inputs
        }
        return tuple(specs.values())

    def data_bundle(self, name: str) -> Bundle:
        """A bundle with the fused model's inputs, to read data for: photos where all members share these."""
        return structs.replace(
            self.first, name=name, inputs=self.inputs(), preprocess=self.first.preprocess if self.shared else None
        )

    def scores(
        self, cache: SegmentCache, settings: SegmentSettings, data: LabelledData, progress: Progress
    ) -> MemberScores:
        """Every member's scores for all inputs, each by its own uncut segment.

        Raises:
            LearningError: data without labels, or an input that cannot be used.
        """
        if data.labels is None:
            raise LearningError(f"{data.name} has no labels", hint="--labels FILE, or a folder for each class")
        # Uncut: a member's own cuts play no part in the fusion.
        executors = [SegmentExecutor(m.model.digest, m.model.bundle, cache, settings) for m in self.each]
        rows: list[list[Array]] = [[] for _ in self.each]
        for index, inputs in enumerate(data.inputs()):
            progress("running the members", index, len(data))
            for member, executor, scores in zip(self.each, executors, rows, strict=True):
                outputs = executor.predict(self._own(member, inputs))
                scores.append(np.asarray(outputs[member.classes.output.name].reshape(-1), np.float64))
        stacked = tuple(np.stack(scores) for scores in rows)
        # By the scores themselves: models without a post-processing do not say.
        shares = tuple(are_probabilities(scores) for scores in stacked)
        return MemberScores(tuple(member.name for member in self.each), stacked, shares, data.labels)

    def _own(self, member: FusionMember, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = [spec.name for spec in member.model.bundle.inputs]
        return {name: inputs[input_name(member.name, name, shared=self.shared)] for name in names}


def open_members(registry: Registry, models: Sequence[Resolved], *, shared: bool) -> Members:
    """The members of a fusion.

    Raises:
        LearningError: fewer than two, no classifiers, or members with classes or inputs that do not go together.
    """
    if not 2 <= len(models) <= MAX_MEMBERS:
        raise LearningError(
            f"a fusion has 2 to {MAX_MEMBERS} members, not {len(models)}", hint="--members NAME,NAME, in order"
        )
    counts = Counter(model.name for model in models)
    # Versions of one model tell each other apart by their numbers.
    names = [m.name if counts[m.name] == 1 else f"{m.name}-{m.version}" for m in models]
    if len(set(names)) < len(names):
        raise LearningError(f"a fusion of {', '.join(names)} has a member twice", members=names)
    # Refuses models without scores of classes, by name.
    members = [
        FusionMember(name, model, classes_of(model.bundle, registry.blob))
        for name, model in zip(names, models, strict=True)
    ]
    _check_classes(members)
    _check_batches(members)
    if shared:
        _check_shared(members)
    _check_redaction(members, shared=shared)
    return Members(tuple(members), shared)


def _check_classes(members: Sequence[FusionMember]) -> None:
    counts = {member.name: member.classes.count for member in members}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise LearningError(
            f"the members predict different classes: {listed}",
            classes=counts,
            hint="a weighted sum needs scores of the same classes in the same order",
        )
    # Members without names take those of the others on trust; the gain would show another order.
    labelled = [member for member in members if member.classes.names]
    for member in labelled[1:]:
        pairs = zip(labelled[0].classes.names, member.classes.names, strict=True)
        if (index := next((i for i, (a, b) in enumerate(pairs) if a != b), None)) is not None:
            raise LearningError(
                f"the members predict different classes: class {index} is {labelled[0].classes.names[index]!r} of"
                f" {labelled[0].name}, and {member.classes.names[index]!r} of {member.name}",
                index=index,
                hint="import a member again with its labels in the order of the others",
            )


def _check_batches(members: Sequence[FusionMember]) -> None:
    """Members of different batches would be summed by broadcasting a single row."""
    sizes = {m.name: m.classes.output.shape[0] for m in members}
    if len({size if isinstance(size, int) else "free" for size in sizes.values()}) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise LearningError(
            f"the members take different batches: {listed}",
            sizes=sizes,
            hint="import those of a fixed batch again with --free-batch, or the others with --freeze",
        )


def _check_shared(members: Sequence[FusionMember]) -> None:
    # The same pre-processing too: a photo becomes a single tensor.
    first = members[0].model.bundle
    for member in members[1:]:
        bundle = member.model.bundle
        pairs = list(zip(_sorted(bundle), _sorted(first), strict=False))
        is_same = len(bundle.inputs) == len(first.inputs) and all(_go_together(a, b) for a, b in pairs)
        if not is_same or bundle.preprocess != first.preprocess:
            raise LearningError(
                f"{member.name} takes other inputs than {members[0].name}, or makes these of photos in another way",
                member=member.name,
                inputs=[spec.name for spec in bundle.inputs],
                expected=[spec.name for spec in first.inputs],
                hint="without --shared each member takes inputs of its own",
            )


def _sorted(bundle: Bundle) -> list[TensorSpec]:
    return sorted(bundle.inputs, key=lambda spec: spec.name)


def _go_together(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether an array can fit both: sizes that inference left open depend on a graph's operators."""
    if (one.name, one.dtype, len(one.shape)) != (other.name, other.dtype, len(other.shape)):
        return False
    sizes = zip(one.shape, other.shape, strict=True)
    return all(a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int))


def _check_redaction(members: Sequence[FusionMember], *, shared: bool) -> None:
    """A fusion must not pass inputs unredacted to a member with a redaction."""
    redactions = [member.model.bundle.redaction for member in members]
    if any(redactions) and not (shared and all(each == redactions[0] for each in redactions)):
        named = next(m.name for m, redaction in zip(members, redactions, strict=True) if redaction)
        raise LearningError(
            f"{named} redacts its inputs, and the fusion could not do the same",
            member=named,
            hint="give all members the same redaction (isthmus redact), and --shared",
        )
