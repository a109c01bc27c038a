"""The fit of exits at candidate cuts: heads and the choice of cuts on the fitting inputs, gates on the held-out ones.

The held-out inputs decide thresholds alone: a choice of cuts among measured bounds would weaken these. Several exits
divide the risk of error among themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from isthmus.artifacts.bundle import Bundle, Cut
from isthmus.errors import LearningError
from isthmus_tools.graph.exit_branch import branch_segment
from isthmus_tools.learning.classes import ModelClasses
from isthmus_tools.learning.exits.head import ExitRisk, FittedHead, fit_head
from isthmus_tools.learning.exits.measurement import BranchGraph, MeasuredExit, run_held_out
from isthmus_tools.learning.exits.observation import ActivationObserver, ObservedInputs, observe
from isthmus_tools.learning.exits.threshold import inputs_needed
from isthmus_tools.learning.labelled import LabelledData
from isthmus_tools.progress import Progress

# Of a default run: a plan chooses among several by its devices, and each takes a part of the confidence.
_MAX_EXITS = 3
MIN_SHARE = 0.05
"""Of inputs that exit, and of the work that this spares: below, an exit costs each request a branch for nothing."""


@dataclass(frozen=True, kw_only=True)
class ExitSpec:
    """A model's graph, candidate cuts in the order of work, and the risk to bound.

    `every` publishes an exit at each cut that keeps the bound; else at the cuts that spare the most work.
    """

    bundle: Bundle
    whole: Path
    cuts: Sequence[Cut]
    classes: ModelClasses
    risk: ExitRisk
    threads: int = 0
    every: bool = False


@dataclass(frozen=True, eq=False)
class ExitCandidate:
    """A cut as a place for an exit: its head, and the gate on held-out inputs.

    `reason` says why it is not published, empty otherwise. `head`, `branch` and `measured` are None where no tensor can
    be pooled. `left_out` says of boundary tensors why these are no features.
    """

    cut: Cut
    reason: str
    head: FittedHead | None = None
    branch: BranchGraph | None = None
    measured: MeasuredExit | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedExits:
    """All candidates, and the numbers of inputs. `confidence` is that of each gate alone."""

    candidates: Sequence[ExitCandidate]
    fitted: int
    held_out: int
    confidence: float

    @property
    def published(self) -> list[tuple[BranchGraph, MeasuredExit]]:
        """Branches with gates to publish."""
        return [
            (each.branch, each.measured)
            for each in self.candidates
            if not each.reason and each.branch is not None and each.measured is not None
        ]


def fit_exits(
    spec: ExitSpec, fitting: LabelledData, held_out: LabelledData, folder: Path, progress: Progress
) -> FittedExits:
    """Fit an exit at each candidate cut, with a gate by `held_out`; `folder` takes features while the fit runs.

    Raises:
        LearningError: too few inputs for the bound, or inputs of a single class.
        ModelError: the graph lacks a value, or a branch computes other numbers than the fit.
    """
    risk = spec.risk
    check_enough(len(held_out), risk)
    # One session for all cuts: a run gives every boundary tensor at once.
    observer = ActivationObserver(spec.whole, spec.bundle, spec.cuts, spec.classes, spec.threads)
    observed = observe(observer, spec.cuts, fitting, folder, progress)
    if len(set(observed.logits.argmax(axis=1).tolist())) < 2:
        raise LearningError(
            "the model predicts one class for all inputs; two are the least", hint="add inputs of the other classes"
        )
    heads: dict[str, FittedHead] = {}
    for done, cut in enumerate(observed.pools):
        progress("fitting exits", done, len(observed.pools))
        heads[cut] = fit_head(observed.features[cut], observed.logits, fitting.labels, risk)
    selected = list(heads) if spec.every else preferred(spec.cuts, heads, _affordable(len(held_out), risk))
    confidence = _divided(risk, max(1, len(selected)))
    branches = {cut: _branch(spec, observed, cut, head) for cut, head in heads.items()}
    exits, model_classes = run_held_out(observer, branches, held_out, progress)
    measured = {
        cut: each.measure(model_classes, held_out.labels, risk, spec.classes.output.name, confidence)
        for cut, each in exits.items()
    }
    candidates = [
        ExitCandidate(cut, reason, left_out=observed.left_out.get(cut.name, {}))
        if (reason := observed.refused.get(cut.name)) is not None
        else ExitCandidate(
            cut,
            _reason(measured[cut.name], cut.name in selected, risk),
            heads[cut.name],
            branches[cut.name],
            measured[cut.name],
            observed.left_out[cut.name],
        )
        for cut in spec.cuts
    ]
    return FittedExits(candidates, len(fitting), len(held_out), confidence)


def check_enough(held_out: int, risk: ExitRisk) -> None:
    """Refuse fewer held-out inputs than a bound without a single failure would need.

    Raises:
        LearningError: says how many are missing.
    """
    needed = inputs_needed(risk.limit, risk.confidence)
    if held_out >= needed:
        return
    missing = needed - held_out
    reachable = 1 - (1 - risk.confidence) ** (1 / held_out) if held_out else 1.0
    raise LearningError(
        f"a limit of {risk.limit:.2%} with {risk.confidence:.0%} confidence needs {needed} held-out inputs, even if"
        f" none fails: of {held_out} held out {missing} are missing",
        held_out=held_out,
        needed=needed,
        missing=missing,
        hint=f"half of --data is held out: give {2 * missing} more inputs; or inputs to fit by --training, so that all"
        f" of --data is held out; or a limit that {held_out} can show: --limit {_percent_above(reachable)}",
    )


def preferred(cuts: Sequence[Cut], heads: Mapping[str, FittedHead], most: int) -> list[str]:
    """Cuts by the work that exits there would spare, by estimates from the fitting inputs.

    A later cut is there only where more inputs exit than at every earlier cut.
    """
    # The Pareto front of early cuts and large shares.
    front, share = list[tuple[float, str]](), 0.0
    for cut in cuts:
        if (head := heads.get(cut.name)) is not None and head.share > share:
            share = head.share
            front.append((head.share * (1 - cut.macs_before), cut.name))
    return [name for spared, name in sorted(front, reverse=True)[:most] if spared >= MIN_SHARE]


def _affordable(held_out: int, risk: ExitRisk) -> int:
    """How many exits may share the confidence before these inputs are too few for a bound."""
    counts = (n for n in range(_MAX_EXITS, 0, -1) if inputs_needed(risk.limit, _divided(risk, n)) <= held_out)
    return next(counts, 1)


def _divided(risk: ExitRisk, exits: int) -> float:
    # By Bonferroni all bounds then hold together with the confidence of the risk.
    return 1 - (1 - risk.confidence) / exits


def _branch(spec: ExitSpec, observed: ObservedInputs, cut: str, head: FittedHead) -> BranchGraph:
    pools = observed.pools[cut]
    tensors = {tensor.name: tensor for tensor in spec.bundle.cuts[cut].tensors}
    graph, segment = branch_segment(
        cut,
        [tensors[name] for name in dict.fromkeys(name for pool in pools for name in pool.tensors)],
        pools,
        head.branch,
        spec.classes.output,
        probabilities=observed.are_probabilities,
    )
    return BranchGraph(graph, segment, pools, head.branch)


def _reason(measured: MeasuredExit, is_chosen: bool, risk: ExitRisk) -> str:
    if measured.gate is None:
        return (
            f"even the surest inputs fail too often for {risk.limit:.2%}: {measured.agreement.value:.1%} agree in all"
        )
    if measured.gate.share < MIN_SHARE:
        return f"only {measured.gate.share:.1%} of inputs would exit; {MIN_SHARE:.0%} are the least"
    return "" if is_chosen else "other cuts spare more work"


def _percent_above(share: float) -> str:
    """A share as a percentage of two digits, rounded up."""
    # 2.95% would round to a limit just out of reach.
    digits = 1 - int(np.floor(np.log10(share * 100)))
    factor = 10.0**digits
    return f"{np.ceil(share * 100 * factor) / factor:g}%"
