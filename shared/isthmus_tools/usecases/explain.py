"""Explanation of a plan: the runners-up, and every refusal with the reason and its figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.artifacts.choice import PHOTO_ID, Choice
from isthmus.artifacts.fidelity import Fidelity, read_fidelity
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.errors import CalibrationError
from isthmus.registry import Resolved, open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.planner.choice import VALUES
from isthmus_tools.usecases.publication import published_plan


@dataclass(frozen=True)
class RunnerUp:
    """A candidate that the plan could have chosen; `behind` is how much worse its value is, as a share."""

    candidate: str
    what: str
    behind: float


@dataclass(frozen=True)
class Refusal:
    """A candidate, or a codec at a cut, that may not serve.

    `agreement` is the share of `inputs` with an unchanged prediction, None without a measurement; `asked` is the least
    share that may serve, None where no share was asked.
    """

    name: str
    what: str
    reason: str
    agreement: float | None
    inputs: int
    asked: float | None
    is_candidate: bool = True


@dataclass(frozen=True)
class PlanExplanation:
    """A version's plan, the runners-up from the best on, and every refusal."""

    version: Resolved
    plan: Plan
    runners_up: tuple[RunnerUp, ...]
    refusals: tuple[Refusal, ...]

    def document(self) -> dict[str, Any]:
        """The runners-up and the refusals, JSON-ready."""
        return {
            "chosen": self.plan.chosen,
            "what": in_words(self.plan.choice),
            "runners_up": [asdict(each) for each in self.runners_up],
            "refused": [asdict(each) for each in self.refusals],
        }


def explain(model: str, registry: RegistrySettings) -> PlanExplanation:
    """Why the model is served as its plan says.

    Raises:
        Missing: unknown model, or a model without a plan.
        PlanMalformed, PlanMismatch: the plan cannot be read, or is for another bundle.
    """
    version, plan = published_plan(model, registry)
    try:
        fidelity = read_fidelity(version.bundle, open_registry(registry).blob)
    except CalibrationError:
        # A fidelity of another version of Isthmus; the plan is valid without.
        fidelity = None
    refusals = [*_candidates(plan, fidelity), *(_codecs(plan, fidelity) if fidelity is not None else ())]
    return PlanExplanation(version, plan, tuple(_runners_up(plan)), tuple(refusals))


def in_words(candidate: Candidate) -> str:
    """A candidate in words: `int8 at the edge`, or `a split at 65, int4/1, 75% exit at the edge`."""
    model = "int8" if candidate.variant is not None else candidate.head or "the whole model"
    if candidate.kind == "edge":
        return f"{model} at the edge"
    if candidate.kind == "split":
        codecs = sorted({str(Choice(coding.codec, coding.quality)) for coding in candidate.codecs.values()})
        head = f" with the head {candidate.head}" if candidate.head else ""
        looks = ", with closer looks" if candidate.looks is not None else ""
        exits = f", {candidate.exit.share:.0%} exit at the edge" if candidate.exit is not None else ""
        return f"a split at {'/'.join(candidate.cuts)}{head}, {' and '.join(codecs) or 'raw'}{looks}{exits}"
    if candidate.generation is not None:
        return "the whole model in the cloud, to which token ids cross"
    photo = next((coding for coding in candidate.codecs.values() if coding.codec == PHOTO_ID), None)
    if photo is not None and photo.quality < 1:
        return f"a JPEG of quality {photo.quality * 100:.0f} to the cloud"
    return "the photo as it came to the cloud" if candidate.input == "photo" else "the model's input to the cloud"


def _runners_up(plan: Plan) -> Iterator[RunnerUp]:
    value = VALUES[plan.objective]
    # As the choice was made: a measurement goes before any prediction.
    rivals = [c for c in plan.candidates if not c.refused and c.name != plan.chosen]
    if plan.measured:
        rivals = [c for c in rivals if c.measured is not None]
    best = value(plan.choice)
    for candidate in sorted(rivals, key=value):
        yield RunnerUp(candidate.name, in_words(candidate), value(candidate) / best - 1 if best else 0.0)


def _candidates(plan: Plan, fidelity: Fidelity | None) -> Iterator[Refusal]:
    for candidate in plan.candidates:
        if not candidate.refused:
            continue
        error, share = candidate.error, plan.constraints.max_disagreement
        limits = [1 - share] if share is not None else []
        limits += [fidelity.limit] if error.calibrated and fidelity is not None else []
        agreement = 1 - error.disagreement if error.inputs else None
        asked = max(limits, default=None)
        yield Refusal(candidate.name, in_words(candidate), candidate.refused, agreement, error.inputs, asked)


def _codecs(plan: Plan, fidelity: Fidelity) -> Iterator[Refusal]:
    """Codecs without any quality on offer at the plan's cuts, or at every cut of a plan without a split."""
    held_out, limit = fidelity.inputs.held_out, fidelity.limit
    for cut in plan.choice.cuts or fidelity.cuts():
        entries = [entry for entry in fidelity.entries if entry.cut == cut]
        for codec in dict.fromkeys(entry.codec for entry in entries):
            own = [entry for entry in entries if entry.codec == codec]
            if any(entry.offered for entry in own):
                continue
            best = max(own, key=lambda entry: entry.agreement)
            reason = f"it keeps {best.agreement:.1%} of {held_out} predictions, {limit:.1%} asked"
            what = f"{codec} at the cut {cut}"
            yield Refusal(what, what, reason, best.agreement, held_out, limit, is_candidate=False)
