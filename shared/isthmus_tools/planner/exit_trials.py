"""Exits in plans: the share of requests that end at the edge, and splits with a tail for the rest alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.fidelity import measure_for
from isthmus.artifacts.gate import EXIT_SCORES, Gate
from isthmus.artifacts.plan import CloserLooks, Error, PlannedExit, PlannedLook
from isthmus.pipeline.agreement import agrees, output_error
from isthmus.routing.efficient import EXACT_ERROR
from isthmus.runtime.early_exit import stands
from isthmus_tools.planner.costs import CallBytes
from isthmus_tools.planner.evaluation import MAX_OUTPUT_ERROR, BranchRuns, Evaluation

# The standard error of a share over 50 inputs is at most 0.07. Below that the gate's held-out inputs tell more.
MIN_INPUTS = 50


@dataclass(frozen=True)
class ExitTrial:
    """An exit on the trial inputs.

    `disagreement` is the share of requests that exit with another prediction than the model's: the gate's bound, or,
    where the gate bounds a loss of accuracy, at least the share among the trial inputs. `near` is the mean call to the
    head with its branch, `branch_s` the run of the branch in this process.
    """

    gate: Gate
    planned: PlannedExit
    disagreement: float
    near: CallBytes
    branch_s: float

    def applied(self, split: Evaluation) -> Evaluation:
        """A split's evaluation with this exit: transmissions count by the share of requests that goes on.

        Closer looks keep their shares, at most that share: unclear inputs go on.
        """
        travels = 1 - self.planned.share
        looks = None if split.looks is None else _at_most(split.looks, travels)
        evaluation = split.weighted((travels, *(looks.shares if looks is not None else ())))
        error = split.error
        return replace(
            evaluation,
            near=self.near,
            looks=looks,
            exit=self.planned,
            branch_s=self.branch_s,
            error=Error(
                error.relative,
                self.gate.inputs,
                min(1.0, error.disagreement + self.disagreement),
                # The gate's bound is from held-out inputs; so is the codec's error, or there is none.
                calibrated=error.calibrated or error.relative <= EXACT_ERROR,
            ),
        )


def try_exit(bundle: Bundle, gate: Gate, runs: BranchRuns, further: Sequence[Mapping[str, Array]] = ()) -> ExitTrial:
    """The trial of a classifier's exit, by the runs of its branch; `further` are tensors for the share alone."""
    measure = measure_for(bundle, gate.output)
    every = [stands(answer, gate.threshold) for answer in (*runs.answers, *further)]
    exits = every[: len(runs.answers)]
    early = [{**e, gate.output: a[EXIT_SCORES]} for e, a in zip(runs.expected, runs.answers, strict=True)]
    pairs = list(zip(runs.expected, early, strict=True))
    error = statistics.fmean(min(MAX_OUTPUT_ERROR, output_error(measure, *pair)) for pair in pairs)
    is_enough = len(every) >= MIN_INPUTS
    share = statistics.fmean(every) if is_enough else gate.share
    differing = sum(leaves and not agrees(measure, *pair) for leaves, pair in zip(exits, pairs, strict=True))
    return ExitTrial(
        gate,
        PlannedExit(share, len(every) if is_enough else gate.inputs, is_enough, error),
        disagreement=gate.bound if gate.risk == "disagreement" else max(gate.bound, differing / len(exits)),
        near=CallBytes(runs.sure.sent, round(share * runs.sure.received + (1 - share) * runs.unsure.received)),
        branch_s=runs.run_s,
    )


def _at_most(looks: CloserLooks, share: float) -> CloserLooks:
    steps = tuple(PlannedLook(s.quality, s.margin, min(s.share, share)) for s in looks.steps)
    return structs.replace(looks, steps=steps)
