"""Trials: every option of a candidate set evaluated in this process, within a time budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import Choice
from isthmus.artifacts.plan import CloserLooks, Error
from isthmus.artifacts.segment_id import SegmentId
from isthmus.pipeline import PhotoInput, exit_branch
from isthmus.processing.image_spec import has_canvas, made_shape
from isthmus.runtime.codec_speed import compared, speeds
from isthmus_tools.budget import Budget, Pace
from isthmus_tools.planner.candidates import CandidateSet, Option
from isthmus_tools.planner.evaluation import Evaluation, Evaluator
from isthmus_tools.planner.exit_trials import ExitTrial, try_exit
from isthmus_tools.planner.offered import Offer, short_name, split_name
from isthmus_tools.planner.variant_trials import VariantTrials
from isthmus_tools.progress import Progress

# Pillow's scale. 85 is what cameras and browsers save by; 95 is the highest that its documentation recommends.
JPEG_QUALITIES = (85, 95)


@dataclass
class Trials:
    """Adds every option to `candidates`, each with its evaluation, and notes on options left out.

    JPEGs are judged by `jpeg_photos`, else by the trial's own inputs. `own_photos` says that these are the user's, and
    so tell the share of requests that exit.
    """

    candidates: CandidateSet
    evaluator: Evaluator
    offer: Offer
    progress: Progress
    budget: Budget
    jpeg_photos: Sequence[bytes] = ()
    own_photos: bool = False

    def whole_model(self) -> None:
        """Compare this process with the tiers, then evaluate edge-only, and cloud-only without a private depth."""
        candidates, here = self.candidates, speeds()
        for tier, profile in candidates.profiles.items():
            # The whole model ran here and on each tier: the ratio scales everything that only ran here.
            whole_s = self.evaluator.whole_s
            candidates.slowdown[tier] = profile.whole.run.median / whole_s if whole_s else 1.0
            candidates.codec_slowdown[tier] = compared(profile.codecs, here)
        candidates.add(Option("edge-float", "edge"), self.evaluator.edge())
        if depth := candidates.private_depth:
            candidates.notes.append(
                f"the first {depth} nodes and the inputs stay at the edge, so cloud-only is no candidate"
            )
            return
        if self.offer.leak is not None:
            # The input itself would cross; the offer's notes say so.
            return
        self.progress("trying the whole model in the cloud")
        self._photo()
        for choice in self.offer.codecs(""):
            option = Option(f"cloud-{short_name(choice)}", "cloud", (), choice)
            candidates.add(option, self.evaluator.cloud(choice))

    def splits(self, cuts: Sequence[str]) -> None:
        """Evaluate every codec on offer at each cut, until the budget is spent."""
        pace = Pace(len(cuts))
        for i, cut in enumerate(cuts):
            if self.budget.spent:
                self.candidates.skipped_cuts = tuple(cuts[i:])
                count, names = len(cuts) - i, ", ".join(cuts[i:])
                self.candidates.notes.append(f"the time limit left {count} cuts untried: {names}")
                return
            self.progress(f"trying the cut {cut}, {i + 1} of {len(cuts)}{pace.left(i)}")
            early = self._exit(cut)
            for choice in self.offer.codecs(cut):
                evaluation = self._split(cut, choice)
                self.candidates.add(Option(split_name(cut, choice), "split", (cut,), choice), evaluation)
                if early is not None and evaluation is not None:
                    name = split_name(cut, choice, has_exit=True)
                    self.candidates.add(Option(name, "split", (cut,), choice), early.applied(evaluation))
            self.variants.heads(cut)

    @property
    def variants(self) -> VariantTrials:
        """The trials of variants at the edge."""
        return VariantTrials(self.candidates, self.evaluator, self.offer, self.progress, self.budget)

    def _exit(self, cut: str) -> ExitTrial | None:
        bundle = self.candidates.bundle
        if (branch := exit_branch(bundle, cut)) is None:
            return None
        with self.candidates.or_note(f"the exit at {cut}"):
            runs = self.evaluator.branch(branch.segment)
            further = self.evaluator.branch_on(branch.segment, self.jpeg_photos) if self.own_photos else []
            return try_exit(bundle, branch.gate, runs, further)
        return None

    def _photo(self) -> None:
        candidates, spec = self.candidates, self.candidates.bundle.preprocess
        shape = None if spec is None else made_shape(spec)
        if spec is None:
            candidates.notes.append("cloud-photo: the bundle declares no processing of photos")
        elif shape is None:
            candidates.notes.append("cloud-photo: a photo's size decides the input's, so it must be made at the edge")
        elif any(i.photo is None for i in candidates.inputs):
            candidates.notes.append("cloud-photo: no photos were given")
        else:
            # The last hop must know the input's shape before the photo is decoded: the frame declares it.
            target = PhotoInput(spec["input"], spec["dtype"], shape, preprocess=spec)
            candidates.add(Option("cloud-photo", "cloud", photo=True), self.evaluator.photo(target))
            if has_canvas(spec):
                for quality in JPEG_QUALITIES:
                    self._jpeg(replace(target, jpeg_quality=quality))

    def _jpeg(self, target: PhotoInput) -> None:
        """The photo resized and compressed at the edge; of a calibrated model only where its agreement is as good."""
        evaluation = self.evaluator.photo(target)
        if self.jpeg_photos:
            evaluation = replace(evaluation, error=self.evaluator.photo_error(target, self.jpeg_photos))
        if (fidelity := self.offer.fidelity) is not None:
            error, limit = evaluation.error, fidelity.limit
            agreement = 1 - error.disagreement
            refused = f"{agreement:.1%} of {error.inputs} photos agree, of {limit:.1%}" if agreement < limit else ""
            evaluation = replace(evaluation, error=structs.replace(error, calibrated=True), refused=refused)
        self.candidates.add(Option(f"cloud-jpeg-{target.jpeg_quality}", "cloud", photo=True), evaluation)

    def _split(self, cut: str, choice: Choice) -> Evaluation | None:
        """A split's evaluation; the error is calibration's where available, over more inputs than a trial has."""
        fidelity = self.offer.fidelity
        entry = next((e for e in fidelity.entries if e.cut == cut and e.choice == choice), None) if fidelity else None
        if fidelity is None or entry is None:
            return self.evaluator.split(cut, choice)
        error = Error(entry.error, fidelity.inputs.held_out, 1 - entry.agreement, calibrated=True)
        if entry.looks:
            looks = CloserLooks.of(fidelity.measure.output, entry.looks, entry.shares)
            return self.evaluator.closer_looks(cut, choice, looks, error)
        evaluation = self.evaluator.split(cut, choice)
        return None if evaluation is None else replace(evaluation, error=error)


def prepared_cuts(bundle: Bundle, offer: Offer) -> list[str]:
    """The cuts that were calibrated or are private, or have an exit or variants of the head: tried in any case."""
    calibrated = offer.fidelity.cuts() if offer.fidelity is not None else ()
    exits = [cut for cut in bundle.cuts if exit_branch(bundle, cut) is not None]
    heads = [cut for cut in bundle.cuts if bundle.variants_of(SegmentId(stop=cut))]
    return list(dict.fromkeys((*calibrated, *offer.private_cuts, *exits, *heads)))
