"""Redaction of a bundle's inputs: publish the version whose router blurs faces, fills regions and masks patterns."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from isthmus.artifacts.bundle import Blob, Bundle, digest_of
from isthmus.artifacts.redaction import (
    BUILTIN_PATTERNS,
    MAX_DETECTOR_BYTES,
    BuiltinPattern,
    FaceBlur,
    Redaction,
    Region,
    TextPattern,
)
from isthmus.errors import ModelError, RequestMalformed, RunFailed
from isthmus.processing.text_masking import TextMasker
from isthmus.runtime.face_detector import OrtFaceDetector
from isthmus.settings import RegistrySettings
from isthmus_tools.graph.face_detector import centerface
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publication import Publication, open_predecessor, publish_version
from isthmus_tools.zoo.models import FACE_DETECTOR


@dataclass(frozen=True, kw_only=True)
class RedactRequest:
    """The redaction of a bundle in the registry, in place of the one that it has.

    `model` is NAME or NAME:VERSION. `faces` blurs faces by the graph in `detector`, else by CenterFace on a square of
    `side` pixels. `patterns` are names of built-in patterns, `expressions` the bundle's own by name. `remove` takes the
    redaction away. `alias` moves to the new version, as in `publish_version`.
    """

    model: str
    registry: RegistrySettings
    faces: bool = False
    detector: Path | None = None
    side: int = 480
    threshold: float = 0.3
    margin: float = 0.2
    regions: Sequence[Region] = ()
    patterns: Sequence[str] = ()
    expressions: Sequence[tuple[str, str]] = ()
    remove: bool = False
    alias: str = "prod"
    drop_plan: bool = False


@dataclass(frozen=True)
class RedactResult:
    """The published bundle."""

    publication: Publication
    bundle: Bundle


def redact(request: RedactRequest, progress: Progress = silent) -> RedactResult:
    """Publish a bundle with another redaction as its next version; calibration and plan stay.

    Raises:
        RequestMalformed: nothing to redact, an unknown pattern, a region beyond the photo, or a kind of input that the
            model does not take.
        ModelError: the detector or an expression cannot be used.
        RegistryError: unknown model, or the registry cannot be read or written.
    """
    store, model = open_predecessor(request.registry, request.model, request.alias)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        redaction, files = (None, {}) if request.remove else _redaction(request, Path(folder), progress)
        if redaction is not None:
            _check_takes(model.bundle, redaction)
        # The plan is for the bundle before; publishing finds whether it suits this one.
        bundle = structs.replace(model.bundle, redaction=redaction, plan=None)
        progress("publishing")
        publication = publish_version(
            store,
            bundle,
            files,
            request.alias,
            settings=request.registry,
            before=model,
            drop_plan=request.drop_plan,
            keeps_redaction=False,
        )
    return RedactResult(publication, bundle)


def _redaction(request: RedactRequest, folder: Path, progress: Progress) -> tuple[Redaction, dict[str, Path]]:
    """The redaction, and the file of its detector by digest."""
    if unknown := [name for name in request.patterns if name not in BUILTIN_PATTERNS]:
        raise RequestMalformed(
            f"there is no pattern {unknown[0][:80]!r}",
            exists=list(BUILTIN_PATTERNS),
            hint="--pattern NAME=EXPRESSION adds a pattern of your own",
        )
    faces, files = None, dict[str, Path]()
    if request.faces:
        progress("reading the face detector")
        faces, files = _faces(request, folder)
    # In the order of the built-in ones, so that the same choice gives the same digest.
    names: list[BuiltinPattern] = [name for name in BUILTIN_PATTERNS if name in request.patterns]
    own = [TextPattern(name, expression) for name, expression in request.expressions]
    # Floats, since 1 and 1.0 are equal and give different documents, and so digests.
    regions = tuple(Region(*map(float, structs.astuple(region))) for region in request.regions)
    redaction = Redaction(faces, regions, (*names, *own))
    try:
        redaction.check()
    except ValueError as e:
        raise RequestMalformed(
            f"the version {e}", hint="name at least one of --faces, --region, --patterns and --pattern"
        ) from e
    # Of the functions' own engine, before a router refuses the version.
    TextMasker(redaction.patterns)
    return redaction, files


def _faces(request: RedactRequest, folder: Path) -> tuple[FaceBlur, dict[str, Path]]:
    if request.detector is None:
        graph = centerface(FACE_DETECTOR.path, request.side)
    # A bundle of a larger detector would be refused by every function.
    elif request.detector.stat().st_size > MAX_DETECTOR_BYTES:
        raise ModelError(f"{request.detector} has more than {MAX_DETECTOR_BYTES} bytes", path=str(request.detector))
    else:
        graph = request.detector.read_bytes()
    # Loaded as a router loads it: a version that no router can serve is not published.
    try:
        OrtFaceDetector(graph, threads=1)
    except RunFailed as e:
        raise ModelError(e.message, hint="docs/how-to/redaction.md says what a detector's graph takes and gives") from e
    path = folder / "faces.onnx"
    path.write_bytes(graph)
    digest = digest_of(graph)
    return FaceBlur(Blob(digest, len(graph)), float(request.threshold), float(request.margin)), {digest: path}


def _check_takes(bundle: Bundle, redaction: Redaction) -> None:
    """Refuse a redaction of inputs that a model does not take."""
    # The manifest is checked for the same when it is read; here the sentence is about the command.
    if redaction.of_photos and bundle.preprocess is None:
        raise RequestMalformed(f"{bundle.name} takes no photos: it declares no pre-processing", model=bundle.name)
    if redaction.patterns and bundle.text is None and bundle.embedding is None:
        raise RequestMalformed(f"{bundle.name} takes no texts", model=bundle.name)
