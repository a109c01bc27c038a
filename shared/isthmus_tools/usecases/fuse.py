"""Fusion of a model's exit and its tail: weights learned on held-out inputs, published in the next version."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from isthmus.artifacts.choice import RAW, Choice
from isthmus.artifacts.fusion import Fusion
from isthmus.pipeline import LocalHop, LoopbackHop
from isthmus.registry import open_cache
from isthmus.runtime.store import SegmentStore
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.learning.classes import classes_of
from isthmus_tools.learning.fusion import FittedFusion, fit_fusion, require_gain
from isthmus_tools.learning.labelled import LabelledData, open_labelled
from isthmus_tools.planner.segment_pool import codec_tables
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.exit_scores import ObservedExit, exit_cut, fitting_route, observe_exit, planned_choice
from isthmus_tools.usecases.publication import Publication, open_predecessor, publish_version

INPUTS = 20_000
"""Inputs at most, by default: most inputs exit, and the rest decides."""


@dataclass(frozen=True, kw_only=True)
class FuseRequest:
    """A model with an exit, and the held-out inputs that its fusion is learned from.

    `model` is NAME or NAME:VERSION; `cut` that of the exit, empty where there is a single exit. `labels` is a file for
    `open_labelled`; without labels, agreement with the model's own predictions is learned. `codec` is that of the
    boundary tensors: None for the plan's at this cut, raw without a plan. `inputs` bounds the number of inputs.
    """

    model: str
    data: Path
    registry: RegistrySettings
    labels: Path | None = None
    cut: str = ""
    codec: Choice | None = None
    inputs: int = INPUTS
    threads: int = 0
    alias: str = "prod"


@dataclass(frozen=True)
class FuseResult:
    """The published version with its fusion; of `inputs` the exit took `exited`, outside of the fusion."""

    publication: Publication
    fusion: Fusion
    inputs: int
    exited: int


def fuse(request: FuseRequest, progress: Progress = silent) -> FuseResult:
    """Learn the weights of a model's exit and its tail, and publish the version with these weights for routers.

    Raises:
        LearningError: no exit at the cut, unusable data, or no gain beyond chance; nothing was published.
        RegistryError: unknown model or cut, or the registry cannot be read or written.
    """
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    registry, model = open_predecessor(settings, request.model, request.alias)
    cut = exit_cut(model.bundle, request.cut)
    classes = classes_of(model.bundle, registry.blob)
    data = open_labelled(model.bundle, request.data, classes, labels=request.labels).sample(request.inputs)
    planned = planned_choice(registry, model.bundle, cut) if request.codec is None else None
    # Without an earlier fusion, so that runs give both members' own scores.
    plain = replace(model, bundle=structs.replace(model.bundle, fusion=None))
    store = SegmentStore(open_cache(settings, registry), settings)
    with closing(store):
        tables = codec_tables(registry)
        hop = LoopbackHop(LocalHop(store), tables)
        route = fitting_route(plain, cut, planned, request.codec or RAW, hop, tables)
        observed = observe_exit(route, data, classes.output.name, progress)
    progress("learning the weights")
    fitted = fit_fusion(observed.scores, reference=1)
    require_gain(fitted, observed.scores, _hint(data, model.name))
    fusion = _fusion(cut, classes.output.name, fitted, observed, is_labelled=data.labels is not None)
    progress("publishing")
    # No plan of its own: that of the version before is carried over.
    bundle = structs.replace(model.bundle, fusion=fusion, plan=None)
    publication = publish_version(registry, bundle, {}, request.alias, settings=request.registry, before=model)
    return FuseResult(publication, fusion, len(data), observed.exited)


def _fusion(cut: str, output: str, fitted: FittedFusion, observed: ObservedExit, *, is_labelled: bool) -> Fusion:
    exit_weights, model_weights = (tuple(float(weight) for weight in each) for each in fitted.weights)
    return Fusion(
        cut=cut,
        output=output,
        kind=fitted.recipe.kind,
        output_kind="probabilities" if observed.scores.probabilities[1] else "logits",
        exit_weights=exit_weights,
        model_weights=model_weights,
        scale=fitted.scale,
        target="labels" if is_labelled else "agreement",
        codec=observed.codec,
        penalty=fitted.recipe.penalty,
        gain=fitted.gain,
    )


def _hint(data: LabelledData, name: str) -> str:
    if data.labels is None:
        # The model agrees with itself wherever no codec is in between.
        return "without labels a fusion can only repair what a codec changed: give --labels FILE, or --codec CODEC"
    return f"where the exit errs as {name} does it adds nothing; further inputs narrow the interval"
