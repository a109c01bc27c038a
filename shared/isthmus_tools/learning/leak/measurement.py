"""Measurement of leakage at cuts: attackers trained on half of the inputs reconstruct the other half.

Source: docs/how-to/leak.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import RAW, Choice
from isthmus.artifacts.fidelity import TOP1, Measure, measure_for, model_digest
from isthmus.artifacts.leak import LINEAR, MEAN, NETWORK, SSIM, Leak, LeakEntry, LeakInputs, Likeness, table_digests
from isthmus.errors import LearningError
from isthmus.pipeline.agreement import classes
from isthmus_tools.calibration.boundary import CutBoundary, SegmentExecutor
from isthmus_tools.calibration.scoring import CodecSender, codec_senders
from isthmus_tools.learning.leak.activations import Crossings, FeatureFiles
from isthmus_tools.learning.leak.attack_data import AttackData, refuse_texts
from isthmus_tools.learning.leak.likeness import likeness, similarity
from isthmus_tools.learning.leak.linear import reconstruct_linearly
from isthmus_tools.learning.leak.network import TrainedInverse, TrainingBudget, train_network
from isthmus_tools.learning.leak.targets import TargetLayout, Units, layout
from isthmus_tools.progress import Progress, silent

MIN_INPUTS = 32
"""Half train attackers; training on fewer than 16 would understate the leak."""
# Reconstructions that results carry for pictures.
PICTURED = 6
# Compared arrays of all inputs are in memory: 10,000 photos at 64 pixels take half a gigabyte.
MAX_INPUTS = 10_000


@dataclass(frozen=True)
class LeakSpec:
    """Parameters of a measurement: cuts by name, codecs beside raw, the compared `side` of photos in pixels.

    `steps` and `seconds` (0 for no limit) bound the training of each network.
    """

    cuts: Sequence[str]
    codecs: Mapping[str, Sequence[Choice]]
    steps: int = 400
    seconds: float = 0.0
    side: int = 64
    seed: int = 0

    def budget(self, is_first: bool) -> TrainingBudget:
        """The budget of a network: half the steps for a codec, whose network starts from the raw one."""
        return TrainingBudget(self.steps if is_first else max(1, self.steps // 2), self.seconds, self.seed)


@dataclass(frozen=True)
class Reconstructions:
    """Some held-out inputs and their reconstructions by cut and codec, for a picture; values from 0 to 1 of images.

    Shapes: (inputs, channels, height, width).
    """

    originals: Array
    baseline: Array
    by_choice: Mapping[tuple[str, str], Array]


@dataclass(frozen=True)
class Classifier:
    """The classifier that reconstructions are shown to; `measure` names its output of classes."""

    executor: SegmentExecutor
    measure: Measure

    @classmethod
    def of(cls, executor: SegmentExecutor) -> Classifier | None:
        """The classifier of a bundle; None without classes."""
        measure = measure_for(executor.bundle)
        return cls(executor, measure) if measure.kind == TOP1 else None

    def classes(self, inputs: Mapping[str, Array]) -> Array:
        """The class of each row of an input."""
        return classes(self.executor.predict(inputs)[self.measure.output])


def measure_leak(
    executor: SegmentExecutor,
    data: AttackData,
    spec: LeakSpec,
    tables: Mapping[str, object],
    classifier: Classifier | None = None,
    progress: Progress = silent,
) -> tuple[Leak, Reconstructions]:
    """Measure how well the held-out inputs are reconstructed at each cut under each codec.

    `tables` are decoded codec tables by tensor. The same data and budget give the same document.

    Raises:
        LearningError: too few inputs, values that are not finite, or a model whose inputs no attacker here
            reconstructs.
        Missing: the bundle has no cut of that name.
    """
    refuse_texts(executor.bundle)
    boundaries = [CutBoundary.at(executor.bundle, cut) for cut in spec.cuts]
    subject = _Subject.read(executor, data, spec.side, classifier, progress)
    entries, pictures = [], dict[tuple[str, str], Array]()
    for boundary in boundaries:
        network = None
        choices = list(dict.fromkeys((RAW, *spec.codecs.get(boundary.cut, ()))))
        for sender in codec_senders(boundary, choices, tables):
            with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
                crossings = _crossings(subject, executor, data, boundary, sender, Path(folder), progress)
                budget = spec.budget(network is None)
                attack = _attack(subject, crossings, budget, network, f"{boundary.cut} {sender.name}", progress)
            network = network or attack.network
            entries.append(attack.entry(boundary.cut, sender.choice))
            pictures[boundary.cut, str(sender.choice)] = attack.reconstructions[subject.pictured]
    # The mean input is what remains to an attacker at a cut that reveals nothing.
    leak = Leak(
        subject=model_digest(executor.bundle),
        measure=subject.into.measure,
        tensor=subject.into.tensor,
        shape=subject.into.shape,
        inputs=LeakInputs(data.name, data.files, subject.trained, len(subject.originals)),
        baseline=subject.likeness(subject.mean),
        original=subject.likeness(subject.originals),
        entries=tuple(entries),
        tables=table_digests(executor.bundle),
    )
    return leak, Reconstructions(subject.originals[subject.pictured], subject.mean[:1], pictures)


@dataclass(frozen=True)
class _Attack:
    """The reconstructions of the stronger attacker."""

    network: TrainedInverse
    attacker: str
    likeness: Likeness
    linear: Likeness
    reconstructions: Array

    def entry(self, cut: str, choice: Choice) -> LeakEntry:
        return LeakEntry(
            cut, choice.codec, choice.quality, self.attacker, self.likeness, self.linear, self.network.steps
        )


@dataclass(frozen=True)
class _Subject:
    """The inputs under attack, in compared arrays and units; the last `len(expected)` are held out."""

    into: TargetLayout
    units: Units
    targets: Array
    trained: int
    classifier: Classifier | None
    expected: Sequence[Array]
    held_out: Sequence[Mapping[str, Array]]
    dtype: np.dtype[np.generic]

    @classmethod
    def read(
        cls, executor: SegmentExecutor, data: AttackData, side: int, classifier: Classifier | None, progress: Progress
    ) -> _Subject:
        """Read all inputs once, and classify the held-out part."""
        into, small, others = None, list[Array](), list[Mapping[str, Array]]()
        expected: list[Array] = []
        dtype = np.dtype(np.float32)
        trained = 0
        for held_out, rows in ((False, data.training()), (True, data.held_out())):
            for index, arrays in enumerate(islice(rows, MAX_INPUTS)):
                progress("reading inputs", len(small), data.count)
                into = into or layout(executor.bundle, arrays, side)
                _check_input(arrays, into, len(small))
                dtype = arrays[into.tensor].dtype
                small.append(into.small(arrays[into.tensor][0]))
                if not held_out:
                    trained += 1
                    continue
                # Further inputs of the model stay as in the data.
                others.append({name: array for name, array in arrays.items() if name != into.tensor})
                if classifier is not None:
                    own = None if data.labels is None else np.array([data.labels[index]])
                    expected.append(classifier.classes(arrays) if own is None else own)
        if into is None or min(trained, len(small) - trained) < MIN_INPUTS // 2:
            raise LearningError(
                f"{data.name} has {len(small)} inputs; {MIN_INPUTS} are the least, half of them to train attackers",
                inputs=len(small),
                least=MIN_INPUTS,
                missing=MIN_INPUTS - len(small),
                hint="raise --inputs or add files; an attacker trained on few inputs shows too little",
            )
        if not np.ptp(np.stack(small), axis=0).any():
            raise LearningError(f"all inputs in {data.name} are the same in {into.tensor}", tensor=into.tensor)
        units = Units.of(executor.bundle, into, np.stack(small[:trained]))
        return cls(into, units, units.to_unit(np.stack(small)), trained, classifier, expected, others, dtype)

    @property
    def originals(self) -> Array:
        """The held-out inputs."""
        return self.targets[self.trained :]

    @property
    def pictured(self) -> Array:
        """Indices of held-out inputs for a picture, far apart: neighbours may be parts of one photo."""
        count = len(self.originals)
        return np.linspace(0, count - 1, min(PICTURED, count)).round().astype(int)

    @property
    def mean(self) -> Array:
        """The mean of the training inputs, once for each held-out input."""
        return np.repeat(self.targets[: self.trained].mean(axis=0, keepdims=True), len(self.originals), axis=0)

    def similarity(self, reconstructions: Array) -> float:
        """The mean similarity of reconstructions of the held-out inputs."""
        return float(similarity(self.into.measure, self.originals, self.bounded(reconstructions)).mean())

    def bounded(self, reconstructions: Array) -> Array:
        """Reconstructions within the range that pixels have."""
        limits = (0.0, 1.0) if self.into.measure == SSIM else (-np.inf, np.inf)
        return np.asarray(reconstructions.clip(*limits), np.float32)

    def likeness(self, reconstructions: Array) -> Likeness:
        """The likeness of reconstructions of the held-out inputs, their classes compared where there are some."""
        same = None if self.classifier is None else self._same_classes(reconstructions, self.classifier)
        return likeness(self.into.measure, self.originals, self.bounded(reconstructions), same)

    def _same_classes(self, reconstructions: Array, classifier: Classifier) -> list[bool]:
        same = []
        for row, others, expected in zip(
            self.units.from_unit(reconstructions), self.held_out, self.expected, strict=True
        ):
            array = self.into.full_size(row)[None].astype(self.dtype)
            same.append(bool(np.array_equal(classifier.classes({**others, self.into.tensor: array}), expected)))
        return same


def _check_input(arrays: Mapping[str, Array], into: TargetLayout, index: int) -> None:
    array = arrays[into.tensor]
    if tuple(array.shape) != (1, *into.full):
        raise LearningError(
            f"input {index} has the shape {list(array.shape)}, and the first one {[1, *into.full]}; leak takes inputs"
            " of one shape, each a batch of one",
            input=index,
        )
    if not np.isfinite(array.astype(np.float32)).all():
        raise LearningError(f"input {index} holds NaN or infinity in {into.tensor}", input=index, tensor=into.tensor)


def _crossings(
    subject: _Subject,
    executor: SegmentExecutor,
    data: AttackData,
    boundary: CutBoundary,
    sender: CodecSender,
    folder: Path,
    progress: Progress,
) -> Crossings:
    """Run the head on every input, and encode and decode the boundary tensors as a cloud would receive the tensors."""
    files = FeatureFiles(folder, subject.into, len(subject.targets), subject.trained)
    parts = ((data.training, subject.trained), (data.held_out, len(subject.originals)))
    for rows, count in parts:
        for arrays in islice(rows(), count):
            progress(f"running the head to {boundary.cut}", files.written, len(subject.targets))
            tensors = executor.execute(boundary.head, arrays).tensors
            files.add(sender.send(boundary.select(tensors)).tensors)
    return files.crossings(subject.targets)


def _attack(
    subject: _Subject,
    crossings: Crossings,
    budget: TrainingBudget,
    start: TrainedInverse | None,
    name: str,
    progress: Progress,
) -> _Attack:
    progress(f"linear attack at {name}")
    linear = subject.bounded(reconstruct_linearly(crossings, subject.similarity, budget.seed))
    network = train_network(
        crossings, subject.into.measure, budget, start=start, progress=progress, stage=f"inverse network at {name}"
    )
    learned = subject.bounded(network.reconstruct(crossings, crossings.held_out))
    # Whoever has the activations may also guess as if without.
    tried = {NETWORK: learned, LINEAR: linear, MEAN: subject.mean}
    likenesses = {attacker: subject.likeness(guess) for attacker, guess in tried.items()}
    strongest = max(tried, key=lambda attacker: likenesses[attacker].similarity)
    return _Attack(network, strongest, likenesses[strongest], likenesses[LINEAR], tried[strongest])
