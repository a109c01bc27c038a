"""Early exits of classifiers: branches fitted at candidate cuts, gates bounded on held-out data, the best published."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from isthmus.artifacts.bundle import Bundle, Exit
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CutError, LearningError
from isthmus.registry import Registry, Resolved, open_cache
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.graph import CutInfo, add_cuts, open_whole
from isthmus_tools.graph.cuts import AnyCut
from isthmus_tools.learning.classes import ModelClasses, classes_of
from isthmus_tools.learning.exits.candidates import candidate_cuts
from isthmus_tools.learning.exits.fit import ExitSpec, FittedExits, fit_exits
from isthmus_tools.learning.exits.head import ACCURACY, ExitRisk
from isthmus_tools.learning.labelled import LabelledData, open_labelled
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publication import Publication, open_predecessor, publish_exits

INPUTS = 20_000
"""Inputs at most, by default: half of these bound a risk of 1% within a tenth."""


@dataclass(frozen=True, kw_only=True)
class ExitsRequest:
    """A classifier of the registry, and the inputs that its exits are fitted and bounded on.

    `model` is NAME or NAME:VERSION. `data` is a folder or file as `open_labelled` reads, `labels` a file of labels.
    With the folder `training` heads are fitted on its inputs, perhaps the model's own training data, and
    all of `data` is held out; else half of `data` each. `cuts` are candidates, published or new, and each that keeps
    the bound gets an exit. Without, the cuts of a spread that spare the most work get exits, and exits of earlier
    runs go. `classes` names the output of scores where the bundle does not. `alias` moves to the new
    version, as in `publish_version`. Units: at most `inputs` inputs of each folder; `threads` of one run, 0 for the
    CPUs available.
    """

    model: str
    data: Path
    registry: RegistrySettings
    labels: Path | None = None
    training: Path | None = None
    cuts: Sequence[str] = ()
    risk: ExitRisk = field(default_factory=ExitRisk)
    classes: str = ""
    inputs: int = INPUTS
    threads: int = 0
    alias: str = "prod"


@dataclass(frozen=True)
class ExitsResult:
    """The published version, all candidates, whether there were labels, and the first of the default cuts."""

    publication: Publication
    fitted: FittedExits
    labelled: bool
    default_cut: str


def exits(request: ExitsRequest, progress: Progress = silent) -> ExitsResult:
    """Fit exits at candidate cuts of a classifier, and publish the best in its next version.

    Raises:
        LearningError: no classifier, data that does not fit, too few inputs, or no cut where an exit would pay.
        CutError: a cut is impossible.
        RegistryError: unknown model or cut, or the registry cannot be read or written.
    """
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    registry, model = open_predecessor(settings, request.model, request.alias)
    classes = classes_of(model.bundle, registry.blob, request.classes)
    fitting, held_out = _data(request, model.bundle, classes)
    with (
        open_cache(settings, registry).locate(model.digest, WHOLE) as whole,
        tempfile.TemporaryDirectory(prefix="isthmus-") as name,
    ):
        progress(f"reading {model.name}:{model.version}")
        cuts = candidate_cuts(open_whole(model.bundle, whole.path), model.bundle, request.cuts)
        extended = _with_cuts(model.bundle, whole.path, cuts, Path(name), strict=bool(request.cuts))[0]
        candidates = [extended.cuts[cut.name] for cut in cuts if cut.name in extended.cuts]
        spec = ExitSpec(
            bundle=extended,
            whole=whole.path,
            cuts=candidates,
            classes=classes,
            risk=request.risk,
            threads=request.threads,
            every=bool(request.cuts),
        )
        fitted = fit_exits(spec, fitting, held_out, Path(name), progress)
        if not fitted.published:
            raise _useless(model.name, fitted)
        progress("publishing")
        publication = _publish(registry, request, model, whole.path, cuts, fitted, Path(name))
    default_cut = next(iter(model.bundle.default_cuts), "")
    return ExitsResult(publication, fitted, held_out.labels is not None, default_cut)


def _publish(
    registry: Registry,
    request: ExitsRequest,
    model: Resolved,
    whole: Path,
    cuts: Sequence[AnyCut],
    fitted: FittedExits,
    folder: Path,
) -> Publication:
    # A run over the whole model replaces all exits: an earlier limit beside the new would surprise.
    base = model.bundle if request.cuts else structs.replace(model.bundle, exits=(), fusion=None)
    names = {branch.segment.id.start for branch, _ in fitted.published}
    # Anew from the published bundle, so that cuts without an exit are not added.
    bundle, files = _with_cuts(base, whole, [cut for cut in cuts if cut.name in names], folder, strict=True)
    for branch, _ in fitted.published:
        path = folder / f"{branch.segment.graph.digest[7:]}.onnx"
        path.write_bytes(branch.graph)
        files[branch.segment.graph.digest] = path
    published = [Exit(branch.segment, each.agreement.value, each.gate) for branch, each in fitted.published]
    return publish_exits(registry, bundle, published, files, request.alias, settings=request.registry, before=model)


def _data(request: ExitsRequest, bundle: Bundle, classes: ModelClasses) -> tuple[LabelledData, LabelledData]:
    """The inputs to fit on, and the held-out ones."""
    # Disagreement with the model needs no labels; with labels the accuracies are measured too.
    required = request.risk.kind == ACCURACY
    data = open_labelled(bundle, request.data, classes, labels=request.labels, required=required)
    data = data.sample(request.inputs)
    if request.training is None:
        fitting, held_out = data.parts((0.5, 0.5))
        return fitting, held_out
    training = open_labelled(bundle, request.training, classes, required=required).sample(request.inputs)
    return training, data


def _with_cuts(
    bundle: Bundle, whole: Path, cuts: Sequence[AnyCut], folder: Path, *, strict: bool
) -> tuple[Bundle, dict[str, Path]]:
    """The bundle with segments at each of `cuts`, after their dry run; with `strict` a refused cut is an error."""
    refused: list[CutError] = []
    partitions = [[cut if isinstance(cut, CutInfo) else cut.name] for cut in cuts]
    return add_cuts(bundle, whole, partitions, folder, on_refusal=None if strict else refused.append)


def _useless(name: str, fitted: FittedExits) -> LearningError:
    reasons = {each.cut.name: each.reason for each in fitted.candidates}
    return LearningError(
        f"no cut of {name} has an exit worth publishing: "
        + "; ".join(f"at {cut} {reason}" for cut, reason in reasons.items()),
        reasons=reasons,
        hint="try later cuts with --cut, more inputs, or a higher --limit",
    )
