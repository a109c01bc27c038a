"""Trials of variants at the edge: compressed heads and models of the bundle, and an int8 bundle of its own."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from isthmus.artifacts.bundle import SegmentVariant
from isthmus.artifacts.conditions import MAX_ERROR
from isthmus.artifacts.fidelity import LIMIT
from isthmus.artifacts.plan import Error
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.registry import Registry, SegmentCache
from isthmus_tools.budget import Budget
from isthmus_tools.planner.candidates import CandidateSet, Option
from isthmus_tools.planner.evaluation import Evaluation, Evaluator
from isthmus_tools.planner.offered import Offer, split_name
from isthmus_tools.planner.variant import int8_variant
from isthmus_tools.progress import Progress

_INT8 = "edge-int8"


@dataclass(frozen=True)
class VariantTrials:
    """Adds options with a variant to `candidates`, and a note for each variant that cannot be loaded or run."""

    candidates: CandidateSet
    evaluator: Evaluator
    offer: Offer
    progress: Progress
    budget: Budget

    def whole(self) -> None:
        """Evaluate the bundle's variants of the whole model, at the edge."""
        for variant in self.candidates.bundle.variants_of(WHOLE):
            head = variant.name
            self.progress(f"trying the variant {head} at the edge")
            with self.candidates.or_note(f"edge-{head}"):
                evaluation = self._judged(variant, self.evaluator.whole_variant(variant.segment), Error(0.0, 0))
                self.candidates.add(Option(f"edge-{head}", "edge", head=head), evaluation)

    def heads(self, cut: str) -> None:
        """Evaluate the variants of the head at `cut` with every codec that is a candidate without a variant."""
        variants = self.candidates.bundle.variants_of(SegmentId(stop=cut))
        if variants and self.offer.leak is not None:
            self.candidates.notes.append(f"variants of the head at {cut} were left out: their leaks were not measured")
            return
        for variant in variants:
            head = variant.name
            with self.candidates.or_note(f"the head {variant.segment.id}"):
                ratio = self.evaluator.head_ratio(cut, head)
                for choice in self.offer.codecs(cut):
                    beside = self.candidates.evaluations.get(split_name(cut, choice))
                    # Closer looks were calibrated with the head as it was extracted.
                    if beside is None or choice.looks or (tried := self.evaluator.split(cut, choice, head)) is None:
                        continue
                    evaluation = self._judged(variant, replace(tried, head_ratio=ratio), beside.error)
                    name = split_name(cut, choice, head=head)
                    self.candidates.add(Option(name, "split", (cut,), choice, head=head), evaluation)

    def int8(self, registry: Registry, cache: SegmentCache, whole: Path, folder: Path, threads: int) -> None:
        """Build and evaluate the int8 bundle, unless the bundle has its own int8 variant of the whole model."""
        candidates = self.candidates
        if any(option.name == _INT8 for option in candidates.options):
            return
        if self.budget.spent:
            candidates.notes.append(f"{_INT8} was left out: the time limit left no time to quantise the model")
            return
        self.progress("quantising the model to int8")
        with candidates.or_note(_INT8):
            variant = int8_variant(candidates.bundle, registry, whole, [i.arrays for i in candidates.inputs], folder)
            with contextlib.closing(variant.pool(cache, threads)) as pool:
                evaluation = self.evaluator.variant(variant.digest, variant.bundle, pool)
            # Only now: a variant that fails must not be uploaded with the candidates.
            candidates.variant = variant
            candidates.add(Option(_INT8, "edge", variant=True), evaluation)

    def _judged(self, variant: SegmentVariant, evaluation: Evaluation, beside: Error) -> Evaluation:
        """The evaluation with the error of the variant's held-out inputs, beside that of the codec without it."""
        fidelity = self.offer.fidelity
        limit = LIMIT if fidelity is None else fidelity.limit
        lost = min(1.0, 1 - variant.agreement + beside.disagreement)
        # As for calibrated codecs the share of predictions decides, and no error of the outputs.
        is_measured = beside.calibrated or beside.relative <= MAX_ERROR
        error = Error(evaluation.error.relative, variant.inputs, lost, calibrated=is_measured)
        refused = ""
        if variant.agreement < limit:
            refused = f"{variant.agreement:.1%} of {variant.inputs} predictions agree, of {limit:.1%}"
        return replace(evaluation, error=error, refused=refused)
