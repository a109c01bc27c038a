"""Leakage at a model's cuts: measured by attackers on public inputs, and published in the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import TRANSFORM_ID, Choice
from isthmus.artifacts.fidelity import read_fidelity
from isthmus.artifacts.leak import Leak, read_leak, to_json
from isthmus.errors import CalibrationError, LearningError, ModelError, RequestMalformed
from isthmus.registry import Registry, Resolved, open_cache
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.calibration.calibrate import write_blob
from isthmus_tools.learning.leak.attack_data import AttackData, open_folder, parts_of_photos, refuse_texts
from isthmus_tools.planner.segment_pool import codec_tables
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.codec_choice import best_entry
from isthmus_tools.usecases.publication import Publication, open_predecessor, publish_version

if TYPE_CHECKING:
    from isthmus_tools.learning.leak.measurement import Reconstructions


@dataclass(frozen=True, kw_only=True)
class LeakRequest:
    """A bundle under attack, and the public inputs.

    `model` is NAME or NAME:VERSION. `data` is a folder of photos or arrays, or `photos` are files of photos; half of
    the `inputs` train attackers, the other half measure. `labels` is a file of classes; without labels, classes
    are compared with the inputs' own. `cuts` are partitions as texts, all cuts of the bundle if none. `codecs` are
    measured beside raw, as settings write codecs; if none, a plan's choice at each calibrated cut.
    `classifier` is another bundle of the registry with the same inputs, that classifies reconstructions; the model
    itself if none. Units: `seconds` bound the training of a network, 0 for none; `side` in pixels. `alias` moves to
    the new version, as in `publish_version`.
    """

    model: str
    registry: RegistrySettings
    data: Path | None = None
    photos: Sequence[Path] = ()
    labels: Path | None = None
    cuts: Sequence[str] = ()
    codecs: Sequence[str] = ()
    classifier: str = ""
    inputs: int = 600
    steps: int = 400
    seconds: float = 120.0
    side: int = 64
    seed: int = 0
    threads: int = 0
    alias: str = "prod"
    drop_plan: bool = False


@dataclass(frozen=True)
class LeakResult:
    """The published version, its leak document, and some reconstructions for a picture."""

    publication: Publication
    leak: Leak
    reconstructions: Reconstructions


def leak(request: LeakRequest, progress: Progress = silent) -> LeakResult:
    """Measure how well inputs are reconstructed from the boundary tensors of each cut, and publish the document.

    Measurements of other cuts with the same inputs stay. A valid plan stays in force.

    Raises:
        LearningError: the data do not fit, are too few, or are not finite; or a model whose inputs no attacker here
            reconstructs.
        RequestMalformed: an unknown codec.
        ModelError: torch is not installed.
        RegistryError: unknown model or cut, or the registry cannot be read or written.
    """
    try:
        from isthmus_tools.learning.leak.measurement import Classifier, LeakSpec, measure_leak
    except ImportError as e:
        raise ModelError("inverse networks need torch", hint="pip install 'isthmus_tools[torch]'") from e
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    store, model = open_predecessor(settings, request.model, request.alias)
    bundle = model.bundle
    # Refusals come before data are read, which may take minutes.
    refuse_texts(bundle)
    if not bundle.cuts:
        raise LearningError(
            f"{bundle.name} has no cut, so nothing crosses",
            model=bundle.name,
            hint=f"publish one with: isthmus cut {bundle.name} --cut CUT",
        )
    names = [name for text in request.cuts for name in bundle.cut_names(text)]
    cuts = list(dict.fromkeys(names)) or sorted(bundle.cuts, key=lambda name: (bundle.cuts[name].macs_before, name))
    codecs = _codecs(request, store, bundle, cuts)
    executor = _executor(settings, store, model)
    other = store.resolve(request.classifier) if request.classifier else None
    if other is not None and other.bundle.inputs != bundle.inputs:
        raise LearningError(f"{other.name} takes other inputs than {bundle.name}, and cannot classify these")
    classifier = Classifier.of(executor if other is None else _executor(settings, store, other))
    if other is not None and classifier is None:
        raise LearningError(f"{other.name} has no classes", classifier=other.name)
    found, reconstructions = measure_leak(
        executor,
        _data(request, store, bundle),
        LeakSpec(cuts, codecs, request.steps, request.seconds, request.side, request.seed),
        _tables(store, model),
        classifier,
        progress,
    )
    document = _with_earlier(found, store, bundle)
    progress("publishing")
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        files: dict[str, Path] = {}
        blob = write_blob(to_json(document), Path(folder), files)
        publication = publish_version(
            store,
            replace(bundle, leak=blob, plan=None),
            files,
            request.alias,
            settings=request.registry,
            before=model,
            drop_plan=request.drop_plan,
        )
    return LeakResult(publication, found, reconstructions)


def _executor(settings: SegmentSettings, store: Registry, model: Resolved) -> SegmentExecutor:
    return SegmentExecutor(model.digest, model.bundle, open_cache(settings, store), settings)


def _codecs(
    request: LeakRequest, store: Registry, bundle: Bundle, cuts: Sequence[str]
) -> Mapping[str, Sequence[Choice]]:
    """The codecs of each cut beside raw."""
    try:
        named = [Choice.parse(text) for text in request.codecs]
    except ValueError as e:
        raise RequestMalformed(str(e), what="codec") from e
    if named:
        return dict.fromkeys(cuts, named)
    try:
        fidelity = read_fidelity(bundle, store.blob)
    except CalibrationError:
        fidelity = None  # of another version of Isthmus, unusable for plans too
    entries = {cut: best_entry(fidelity, cut) if fidelity is not None else None for cut in cuts}
    return {cut: [entry.choice.last] for cut, entry in entries.items() if entry is not None}


def _tables(store: Registry, model: Resolved) -> Mapping[str, object]:
    read = codec_tables(store)
    return {tensor: read(model.digest, tensor, TRANSFORM_ID) for tensor in model.bundle.tables}


def _data(request: LeakRequest, store: Registry, bundle: Bundle) -> AttackData:
    if request.data is None:
        return parts_of_photos(bundle, request.photos, "photos", request.inputs, request.seed)
    # Of a foreign classifier the labels' meaning is unknown.
    blob = None if request.classifier else store.blob
    return open_folder(bundle, request.data, blob, request.labels, request.inputs, request.seed)


def _with_earlier(found: Leak, store: Registry, bundle: Bundle) -> Leak:
    """The document with earlier measurements of other cuts, where inputs and shape are the same."""
    try:
        earlier = read_leak(bundle, store.blob)
    except LearningError:
        return found
    if earlier is None or (earlier.inputs, earlier.shape) != (found.inputs, found.shape):
        return found
    others = tuple(entry for entry in earlier.entries if entry.cut not in found.cuts())
    # In the order of depth, as a picture and a table show.
    order = {name: (cut.macs_before, name) for name, cut in bundle.cuts.items()}
    entries = sorted((*others, *found.entries), key=lambda entry: order.get(entry.cut, (1.0, entry.cut)))
    return replace(found, entries=tuple(entries))
