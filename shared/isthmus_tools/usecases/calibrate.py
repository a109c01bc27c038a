"""Calibration: codec tables learned from inputs, the fidelity of every codec measured, both published in the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.fidelity import Fidelity, measure_for, read_fidelity
from isthmus.errors import CalibrationError
from isthmus.registry import Registry, Resolved, open_cache, open_registry
from isthmus.registry.registry import check_alias
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.calibration import calibrate as calibration
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.calibration.calibrate import Calibrated, CalibrationSpec
from isthmus_tools.calibration.inputs import open_source
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publication import Publication, planned_cuts, publish_version


@dataclass(frozen=True, kw_only=True)
class CalibrateRequest:
    """A bundle to calibrate and its inputs.

    `model` is NAME or NAME:VERSION. `files` are photos, for a model with pre-processing, or .npy and .npz files named
    after its inputs; `data` is their name in documents. `inputs` counts all inputs: half calibrate, half are held out.
    `cuts` are partitions as texts; without any, the default cuts and those of plans in force, or with `all_cuts` every
    cut of the bundle. A codec is offered from a share `limit` of equal
    predictions on. `classes` names the output whose last axis holds classes, where the bundle does not; without classes
    predictions up to a relative error of `tolerance` are equal. `alias` moves to the new version, as in
    `publish_version`.
    """

    model: str
    files: Sequence[Path]
    data: str
    registry: RegistrySettings
    cuts: Sequence[str] = ()
    all_cuts: bool = False
    limit: float = 0.99
    inputs: int = 400
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
    if request.alias:
        check_alias(request.alias)
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    store = open_registry(settings)
    model = store.resolve(request.model)
    bundle = model.bundle
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        cuts = calibrated_cuts(request, store, model)
        measure = measure_for(bundle, request.classes, request.tolerance)
        calibrated = calibration.calibrate(
            SegmentExecutor(model.digest, bundle, open_cache(settings, store), settings),
            open_source(bundle, request.files, request.data, request.inputs),
            CalibrationSpec(cuts, request.inputs, request.limit, measure),
            Path(folder),
            progress,
        )
        publication = publish_version(
            store, calibrated.bundle, calibrated.files, request.alias, before=model, drop_plan=request.drop_plan
        )
    return CalibrateResult(publication, calibrated)


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
            hint=f"isthmus calibrate {version.name} --data FOLDER",
        )
    return version, fidelity
