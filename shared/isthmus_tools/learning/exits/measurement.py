"""Exits on held-out inputs: the branch's own graph runs, and its gate is threshold and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bounds import wilson
from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES, Gate
from isthmus.errors import ModelError
from isthmus.runtime.ort_runner import OrtRunner
from isthmus_tools.graph.exit_branch import BranchWeights, TensorPool
from isthmus_tools.learning.exits.confidence import ConfidenceRule
from isthmus_tools.learning.exits.features import features_of
from isthmus_tools.learning.exits.head import ACCURACY, ExitRisk
from isthmus_tools.learning.exits.observation import ActivationObserver
from isthmus_tools.learning.exits.ridge import LinearHead
from isthmus_tools.learning.exits.threshold import choose_threshold, upper_bound
from isthmus_tools.learning.labelled import LabelledData
from isthmus_tools.progress import Progress

# Of the largest magnitude: graph and numpy compute in float32 and sum in other orders.
_TOLERANCE = 1e-3
# In nats; confidences are tens.
_MAX_COMPARED = 1e8


@dataclass(frozen=True)
class MeasuredShare:
    """A share of held-out inputs with its Wilson interval at 95%."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: Array) -> MeasuredShare:
        """The share of true values."""
        share = float(hits.mean())
        return cls(share, *wilson(share, len(hits)))


@dataclass(frozen=True)
class ExitAccuracies:
    """Accuracy on labels: of the exit's classes for all inputs, of the model's, and of the gated pair's."""

    alone: MeasuredShare
    model: MeasuredShare
    gated: MeasuredShare


@dataclass(frozen=True)
class MeasuredExit:
    """An exit on held-out inputs. `gate` and `exits` are None where no threshold keeps the bound.

    `agreement` is the share of classes that are the model's, over all inputs, exited or not. `floor` is the bound
    without a failing input, the least that these inputs can show.
    """

    agreement: MeasuredShare
    gate: Gate | None
    exits: MeasuredShare | None
    accuracies: ExitAccuracies | None
    floor: float


@dataclass(frozen=True, eq=False)
class HeldOutExit:
    """Classes and confidences of an exit for held-out inputs. Shapes: (inputs,) both."""

    classes: Array
    confidences: Array

    def measure(
        self, model_classes: Array, labels: Array | None, risk: ExitRisk, output: str, confidence: float
    ) -> MeasuredExit:
        """The gate at `confidence`, and the shares at its threshold. Shapes: (inputs,) both."""
        fails = risk.failures(self.classes, model_classes, labels)
        count = len(fails)
        threshold = choose_threshold(self.confidences, fails, risk.limit, confidence)
        gate, exiting = None, np.zeros(count, bool)
        if threshold is not None:
            exiting = self.confidences >= threshold.threshold
            gate = Gate(
                output=output,
                threshold=threshold.threshold,
                risk=risk.kind,
                limit=risk.limit,
                confidence=confidence,
                inputs=count,
                exiting=threshold.exiting,
                failing=threshold.failing,
                bound=threshold.bound,
                # A wrong exit beside a wrong model counts for the router's guard alone, which sees no labels.
                differing=int((self.classes != model_classes)[exiting].sum()) if risk.kind == ACCURACY else None,
            )
        return MeasuredExit(
            agreement=MeasuredShare.of(self.classes == model_classes),
            gate=gate,
            exits=MeasuredShare.of(exiting) if gate is not None else None,
            accuracies=None if labels is None else self._accuracies(exiting, model_classes, labels),
            floor=upper_bound(0, count, confidence),
        )

    def _accuracies(self, exiting: Array, model_classes: Array, labels: Array) -> ExitAccuracies:
        # The gated pair: the exit's class where it stands, else the model's.
        gated = np.where(exiting, self.classes, model_classes)
        return ExitAccuracies(
            MeasuredShare.of(self.classes == labels),
            MeasuredShare.of(model_classes == labels),
            MeasuredShare.of(gated == labels),
        )


@dataclass(frozen=True, eq=False)
class BranchGraph:
    """A branch as a graph, and the numbers inside."""

    graph: bytes
    segment: Segment
    pools: Sequence[TensorPool]
    weights: BranchWeights

    def reference(self, tensors: Mapping[str, Array]) -> tuple[Array, Array]:
        """Logits and confidences of a batch, by numpy. Shapes: (batch, classes), (batch,)."""
        weights = self.weights
        head = LinearHead(weights.mean, weights.scale, weights.weights, weights.bias)
        logits = head(features_of(self.pools, tensors))
        return logits, ConfidenceRule(weights.statistics, weights.offset)(logits)


class BranchRunner:
    """A branch in onnxruntime; its first batch is compared with numpy."""

    def __init__(self, branch: BranchGraph) -> None:
        self._branch, self._is_checked = branch, False
        self._runner = OrtRunner(branch.graph, branch.segment, providers=("CPUExecutionProvider",), threads=1)

    def __call__(self, tensors: Mapping[str, Array]) -> tuple[Array, Array]:
        """Classes and confidences of a batch. Shapes: (batch,) both.

        Raises:
            ModelError: the graph computes other confidences than numpy.
        """
        outputs = self._runner.run({spec.name: tensors[spec.name] for spec in self._branch.segment.inputs})
        scores, confidences = outputs[EXIT_SCORES], outputs[EXIT_CONFIDENCE]
        classes = scores.reshape(len(scores), -1).argmax(axis=1)
        if not self._is_checked:
            self._check(tensors, classes, confidences)
        return classes, confidences

    def _check(self, tensors: Mapping[str, Array], classes: Array, confidences: Array) -> None:
        logits, expected = self._branch.reference(tensors)
        # float32 sums of a thousand features differ in the fifth digit; near ties may then change the class.
        # Near the largest float32 either may overflow: such rows are counted on held-out inputs, and not compared.
        comparable = np.abs(expected) < _MAX_COMPARED
        if not comparable.any():
            return
        logits, classes, expected = logits[comparable], classes[comparable], expected[comparable]
        worst = float(np.abs(confidences[comparable] - expected).max() / (1 + np.abs(expected).max()))
        tolerance = _TOLERANCE * (1 + np.abs(logits).max())
        rows = np.arange(len(classes))
        if not worst < _TOLERANCE or (logits[rows, classes] < logits.max(axis=1) - tolerance).any():
            raise ModelError(
                f"the branch at {self._branch.segment.id.start} computes in onnxruntime what it does not in numpy: its"
                f" confidences differ by {worst:.2g}"
            )
        self._is_checked = True


def run_held_out(
    observer: ActivationObserver, branches: Mapping[str, BranchGraph], data: LabelledData, progress: Progress
) -> tuple[dict[str, HeldOutExit], Array]:
    """Each branch's classes and confidences by cut, and the model's classes. Shapes: (inputs,).

    Raises:
        LearningError: as `ActivationObserver.batches`.
        ModelError: a branch's graph computes other numbers than the fit.
    """
    runners = {cut: BranchRunner(branch) for cut, branch in branches.items()}
    # Classes and confidences alone: scores of 1,000 classes would fill memory.
    model_classes = np.empty(len(data), np.int64)
    exits = {cut: HeldOutExit(np.empty(len(data), np.int64), np.empty(len(data), np.float32)) for cut in runners}
    for rows, tensors, scores in observer.batches(data, progress, "running the model on held-out inputs"):
        model_classes[rows] = scores.argmax(axis=1)
        for cut, run in runners.items():
            exits[cut].classes[rows], exits[cut].confidences[rows] = run(tensors)
    return exits, model_classes
