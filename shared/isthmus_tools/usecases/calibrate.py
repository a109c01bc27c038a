"""Calibration: codec tables learned from inputs, the fidelity of every codec measured, both published in the bundle.

Of a language model the fidelity alone, on a text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from isthmus.artifacts.bundle import TextModel
from isthmus.artifacts.fidelity import Fidelity, measure_for, read_fidelity
from isthmus.errors import CalibrationError
from isthmus.generation import TextCodec
from isthmus.registry import Registry, Resolved, open_cache, open_registry
from isthmus.runtime.session_store import open_store
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.calibration import calibrate as calibration
from isthmus_tools.calibration import texts
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.calibration.calibrate import Calibrated, CalibrationSpec
from isthmus_tools.calibration.inputs import open_source
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publication import Publication, open_predecessor, planned_cuts, publish_version
from isthmus_tools.zoo.calibration import PROSE

INPUTS, TOKENS = 400, 3200
"""Default numbers of inputs, and of a text's tokens."""
# A text is tokenised as a whole; a megabyte holds far more tokens than are measured in an hour.
_MAX_TEXT_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class CalibrateRequest:
    """A bundle to calibrate and its inputs.

    `model` is NAME or NAME:VERSION. `files` are photos, for a model with pre-processing, or .npy and .npz files named
    after its inputs; `data` is their name in documents. `inputs` counts all inputs: half calibrate, half are held out.
    A language model takes a `text` instead, by default a text in the package: `inputs` bounds its tokens, and nothing
    is learned. None takes INPUTS, or TOKENS of a text.
    `cuts` are partitions as texts; without any, the default cuts and those of plans in force, or with `all_cuts` every
    cut of the bundle. A codec is offered from a share `limit` of equal
    predictions on. `classes` names the output whose last axis holds classes, where the bundle does not; without classes
    predictions up to a relative error of `tolerance` are equal. `alias` moves to the new version, as in
    `publish_version`.
    """

    model: str
    registry: RegistrySettings
    files: Sequence[Path] = ()
    data: str = ""
    text: Path | None = None
    cuts: Sequence[str] = ()
    all_cuts: bool = False
    limit: float = 0.99
    inputs: int | None = None
    classes: str = ""
    tolerance: float = 0.05
    threads: int = 0
    alias: str = "prod"
    drop_plan: bool = False


@dataclass(frozen=True)
class CalibrateResult:
    """The published version and its calibration."""

    publication: Publication
    calibrated: Calibrated


def calibrate(request: CalibrateRequest, progress: Progress = silent) -> CalibrateResult:
    """Calibrate a bundle's codecs, measure each codec's fidelity at every cut, and publish the next version.

    A valid plan stays in force.

    Raises:
        CalibrationError: the inputs do not fit the model, or are too few.
        RegistryError: unknown model or cut, or the registry cannot be read or written.
    """
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    store, model = open_predecessor(settings, request.model, request.alias)
    bundle = model.bundle
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        cuts = calibrated_cuts(request, store, model)
        if bundle.text is not None and bundle.state is not None:
            calibrated = _calibrate_text(request, settings, store, model, bundle.text, cuts, Path(folder), progress)
        else:
            calibrated = _calibrate(request, settings, store, model, cuts, Path(folder), progress)
        publication = publish_version(
            store,
            calibrated.bundle,
            calibrated.files,
            request.alias,
            settings=request.registry,
            before=model,
            drop_plan=request.drop_plan,
        )
    return CalibrateResult(publication, calibrated)


def _calibrate(
    request: CalibrateRequest,
    settings: SegmentSettings,
    registry: Registry,
    model: Resolved,
    cuts: Sequence[str],
    folder: Path,
    progress: Progress,
) -> Calibrated:
    if request.text is not None or not request.files:
        raise CalibrationError(
            f"{model.name} is no language model: calibrate it with inputs", hint="give a folder: --data FOLDER"
        )
    inputs = INPUTS if request.inputs is None else request.inputs
    return calibration.calibrate(
        SegmentExecutor(model.digest, model.bundle, open_cache(settings, registry), settings),
        open_source(model.bundle, request.files, request.data, inputs),
        CalibrationSpec(cuts, inputs, request.limit, measure_for(model.bundle, request.classes, request.tolerance)),
        folder,
        progress,
    )


def _calibrate_text(
    request: CalibrateRequest,
    settings: SegmentSettings,
    registry: Registry,
    model: Resolved,
    text_model: TextModel,
    cuts: Sequence[str],
    folder: Path,
    progress: Progress,
) -> Calibrated:
    if request.files:
        raise CalibrationError(
            f"{model.name} is a language model: its codecs are measured on a text",
            hint="leave --data out, or give a file: --text FILE",
        )
    path = request.text or PROSE
    tokens = TextCodec(registry.blob(text_model.tokenizer), text_model).encode(_read_text(path))
    # A session for each codec of a window, beside the head's.
    store = open_store(open_cache(settings, registry), replace(settings, max_sessions=2 * len(texts.CHOICES)))
    try:
        spec = texts.TextSpec(tokens[: request.inputs or TOKENS], path.name, request.limit, cuts)
        return texts.calibrate_text(model.digest, model.bundle, store, spec, folder, progress)
    finally:
        store.store.close()


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path} is no text in UTF-8: {e}", source=str(path)) from e
    if len(data) > _MAX_TEXT_BYTES:
        raise CalibrationError(f"{path} has more than {_MAX_TEXT_BYTES} bytes", source=str(path), hint="give a part")
    return text


def calibrated_cuts(request: CalibrateRequest, store: Registry, model: Resolved) -> list[str]:
    """The names of the cuts that a request calibrates.

    Cuts of a plan in force are always included: without new measurements there, the plan could not stay.

    Raises:
        Missing: a cut that the bundle lacks.
    """
    bundle = model.bundle
    planned = [cut for cut in planned_cuts(store, model, request.alias) if cut in bundle.cuts]
    if request.all_cuts:
        return sorted(bundle.cuts)
    named = [name for text in request.cuts for name in bundle.cut_names(text)]
    return list(dict.fromkeys([*(named or bundle.default_cuts), *planned])) or sorted(bundle.cuts)


def published_fidelity(model: str, registry: RegistrySettings) -> tuple[Resolved, Fidelity]:
    """A calibrated bundle of the registry and its fidelity.

    Raises:
        CalibrationError: the bundle was not calibrated.
        RegistryError: unknown model, or the registry cannot be read.
    """
    store = open_registry(registry)
    version = store.resolve(model)
    fidelity = read_fidelity(version.bundle, store.blob)
    if fidelity is None:
        raise CalibrationError(
            f"{version.name}:{version.version} was not calibrated",
            model=version.name,
            version=version.version,
            hint=f"isthmus calibrate {version.name}" + (" --data FOLDER" if version.bundle.text is None else ""),
        )
    return version, fidelity
