"""Early exits: a route ends behind its first segment where the exit's prediction is sure.

The function of the head runs the exit's branch in the same call, so that a request that ends there sends nothing over
the link. Source: docs/explanation/routing.md, "Early exits".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES, Gate
from isthmus.artifacts.tensors import TensorSpec
from isthmus.runtime.early_exit import stands
from isthmus.wire.frame import MAX_EXIT


@dataclass(frozen=True)
class ExitBranch:
    """The exit of a route behind its first segment: its branch, and when the early prediction stands."""

    segment: Segment
    gate: Gate
    inputs: tuple[TensorSpec, ...] = ()
    """The model's."""

    def rows_of(self, inputs: Mapping[str, Array]) -> int | None:
        """The rows of a request; None where no input at hand has the free dimension of the exit's rows."""
        name = next(spec.shape[0] for spec in self.segment.outputs if spec.name == EXIT_CONFIDENCE)
        # A fixed number of rows is checked with the shapes.
        batches = [spec.name for spec in self.inputs if spec.shape[:1] == (name,) and isinstance(name, str)]
        return next((len(inputs[each]) for each in batches if each in inputs), None)

    @property
    def cut(self) -> str:
        """The name of its cut."""
        return self.segment.id.start

    def forced(self, *, taken: bool) -> ExitBranch:
        """The same exit with a threshold that every confidence meets, or none: for measurements of each way."""
        return replace(self, gate=structs.replace(self.gate, threshold=-MAX_EXIT if taken else MAX_EXIT))


@dataclass(frozen=True)
class ExitOutcome:
    """What a request met at its route's exit.

    `confidence` is that of its least sure row, `is_taken` whether the early prediction is the result. `scores` stand
    for the model's output `output`.
    """

    cut: str
    confidence: float
    threshold: float
    is_taken: bool
    output: str
    scores: Array

    def facts(self) -> dict[str, str | float]:
        """The exit as responses state it: its confidence, and its cut where it gave the prediction."""
        # JSON has no NaN, which is the confidence of inputs that are no numbers.
        confidence = self.confidence if np.isfinite(self.confidence) else 0.0
        taken: dict[str, str | float] = {"exit": self.cut} if self.is_taken else {}
        return {**taken, "exit_confidence": round(confidence, 6)}


def exit_branch(bundle: Bundle, cut: str) -> ExitBranch | None:
    """The exit at a cut; None without a classifier's, or where the model has outputs that no exit gives."""
    found = bundle.exit_at(cut)
    if found is None or found.gate is None or [spec.name for spec in bundle.outputs] != [found.gate.output]:
        return None
    return ExitBranch(found.segment, found.gate, bundle.inputs)


def exit_outcome(
    branch: ExitBranch, tensors: Mapping[str, Array], inputs: Mapping[str, Array], is_alone: bool
) -> ExitOutcome:
    """The outcome by the tensors of the branch; `is_alone` says that the function sent no boundary tensors.

    `inputs` are the head's, as far as they are at hand as arrays.

    Raises:
        ValueError: the function sent none, and the early prediction is not sure; or predictions of other rows.
    """
    confidence, threshold = tensors[EXIT_CONFIDENCE], branch.gate.threshold
    rows = branch.rows_of(inputs)
    if rows is not None and rows != len(confidence):
        raise ValueError(f"early predictions of {len(confidence)} rows, and the request has {rows}")
    is_taken = stands(tensors, threshold)
    if is_alone and not is_taken:
        raise ValueError("an exit that is not sure, and no boundary tensors")
    least = float(np.min(confidence)) if confidence.size else float("nan")
    return ExitOutcome(branch.cut, least, threshold, is_taken, branch.gate.output, tensors[EXIT_SCORES])


def expected_outputs(
    branch: ExitBranch, outputs: tuple[TensorSpec, ...], tensors: Mapping[str, Array]
) -> tuple[TensorSpec, ...]:
    """The tensors that a head with this exit may answer with: the branch's alone, or beside the head's own."""
    own = branch.segment.outputs
    return own if tensors.keys() == {spec.name for spec in own} else (*outputs, *own)
