"""Compression of a head for the edge: variants made, measured beside the head itself, published in the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec import structs

from isthmus.artifacts.bundle import Bundle, Segment, SegmentVariant
from isthmus.artifacts.fidelity import measure_for
from isthmus.errors import CalibrationError, ModelError, RequestMalformed
from isthmus.registry import open_cache
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.calibration.inputs import MIN_INPUTS, open_source, split
from isthmus_tools.graph.variant_graphs import standalone
from isthmus_tools.learning.compression.choice import THE_SEGMENT, choose_variant, dominated_by, parse_target
from isthmus_tools.learning.compression.measurement import PlainFigures, measure_variants
from isthmus_tools.learning.compression.methods import KEEP, METHODS, CompressionSpec, make_candidates
from isthmus_tools.learning.compression.subject import HeadSubject, head_boundary, store_samples, with_scales
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publication import Publication, open_predecessor, publish_version


@dataclass(frozen=True, kw_only=True)
class CompressRequest:
    """A head to compress, and the inputs that calibrate and measure.

    `model` is NAME or NAME:VERSION. `cut` ends the head, the bundle's first default cut if empty; with `whole` the
    whole model is compressed. `files`, `data`, `inputs`, `classes` and `tolerance` are as in `CalibrateRequest`: half
    of the files calibrate, half are held out. `methods` are names of METHODS, those of DEFAULTS that apply if none;
    `keep` the shares of the head's MACs that pruning leaves. int8 keeps its first layers in float below the share
    `limit` of predictions.
    With `targets`, texts as of `parse_target`, the variant that meets all is published alone; else all that none
    dominates, and with `publish_dominated` those too. `reduce_range` is for an edge without VNNI instructions; None
    asks this machine. `alias` moves to the new version, as in `publish_version`.
    """

    model: str
    registry: RegistrySettings
    files: Sequence[Path]
    data: str = ""
    cut: str = ""
    whole: bool = False
    methods: Sequence[str] = ()
    keep: Sequence[float] = KEEP
    targets: Sequence[str] = ()
    publish_dominated: bool = False
    limit: float = 0.99
    inputs: int = 200
    classes: str = ""
    tolerance: float = 0.05
    threads: int = 1
    reduce_range: bool | None = None
    alias: str = "prod"


@dataclass(frozen=True)
class CompressResult:
    """The segment's own figures, the variants measured, and what became of each.

    `dominated` names what is no worse in everything, by variant; `refused` says why a method does not apply.
    `publication` is None where nothing was worth it.
    """

    segment: Segment
    plain: PlainFigures
    variants: Sequence[SegmentVariant]
    published: Sequence[str]
    dominated: dict[str, str]
    refused: dict[str, str]
    publication: Publication | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def document(self) -> dict[str, Any]:
        """The figures, JSON-ready."""
        return {
            "segment": str(self.segment.id),
            "plain": {"bytes": self.plain.size, "seconds": self.plain.seconds, "memory_bytes": self.plain.memory_bytes},
            "variants": [
                {
                    "name": each.name,
                    "method": each.method,
                    "bytes": each.segment.graph.size,
                    "macs": each.segment.macs,
                    "seconds": each.seconds,
                    "seconds_ratio": each.seconds_ratio,
                    "memory_bytes": each.memory_bytes,
                    "agreement": each.agreement,
                    "low": each.low,
                    "high": each.high,
                    "inputs": each.inputs,
                    "error": each.error,
                    "published": each.name in self.published,
                    "dominated_by": self.dominated.get(each.name, ""),
                }
                for each in self.variants
            ],
            "refused": self.refused,
        }


def compress(request: CompressRequest, progress: Progress = silent) -> CompressResult:
    """Make variants of a head, measure each beside the head itself, and publish the useful ones.

    Raises:
        CalibrationError: inputs do not fit, are too few or not finite; or no variant meets the targets.
        ModelError: the model or a named method does not allow it.
        RequestMalformed: an unknown method, share or target.
        RegistryError: unknown model or cut, or the registry cannot be read or written.
    """
    # Mistakes of the request come to light before minutes of work.
    targets = [parse_target(text) for text in request.targets]
    _check(request)
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    registry, model = open_predecessor(settings, request.model, request.alias)
    bundle = model.bundle
    segment, tail = head_boundary(bundle, _cut(request, bundle))
    cache = open_cache(settings, registry)
    executor = SegmentExecutor(model.digest, bundle, cache, settings)
    source = open_source(bundle, request.files, request.data, request.inputs)
    calibrating, held_out = split(source, request.inputs)
    half = request.inputs // 2
    with tempfile.TemporaryDirectory(prefix="isthmus-compress-") as name:
        folder = Path(name)
        samples = store_samples(source.examples(calibrating, half), folder, progress)
        if len(samples) < MIN_INPUTS // 2:
            raise CalibrationError(
                f"{request.data} has {len(samples)} inputs to calibrate with; {MIN_INPUTS // 2} are the least",
                source=request.data,
                inputs=len(samples),
                least=MIN_INPUTS,
                hint="raise --inputs or add files",
            )
        # Pinned while it is copied: another process may need the cache's space.
        with cache.locate(model.digest, segment.id) as located:
            graph = standalone(located.path, folder / "segment.onnx")
        measure = with_scales(measure_for(bundle, request.classes, request.tolerance), executor, samples)
        subject = HeadSubject(executor, segment, tail, graph, samples, measure, request.threads)
        spec = CompressionSpec(request.methods, request.keep, request.limit, request.reduce_range)
        candidates, refused = make_candidates(subject, spec, folder, progress)
        # Held-out files alone: agreement on inputs that calibrated would flatter.
        plain, variants = measure_variants(
            subject, candidates, source.examples(held_out, request.inputs - half), progress
        )
        dominated = {v.name: by for v in variants if (by := dominated_by(v, variants, plain))}
        if targets:
            best = choose_variant(variants, targets)
            # Slower and larger than the segment, which then meets the target without a loss.
            is_useless = dominated.get(best.name) == THE_SEGMENT and not request.publish_dominated
            chosen = [] if is_useless else [best]
        else:
            chosen = [v for v in variants if request.publish_dominated or v.name not in dominated]
        publication = None
        if chosen:
            names = {v.name for v in chosen}
            files = {
                v.segment.graph.digest: c.path for v, c in zip(variants, candidates, strict=True) if v.name in names
            }
            # The segments of the version before ran already, so that the variants alone run once before the number.
            extended = _with_variants(bundle, chosen)
            publication = publish_version(
                registry, extended, files, request.alias, settings=request.registry, before=model
            )
    return CompressResult(segment, plain, variants, [v.name for v in chosen], dominated, refused, publication)


def _check(request: CompressRequest) -> None:
    if unknown := [name for name in request.methods if name not in METHODS]:
        raise RequestMalformed(
            f"{unknown[0][:40]!r} is no method of compression", option="--method", hint=f"one of {', '.join(METHODS)}"
        )
    if any(not 0.05 <= share < 1 for share in request.keep):
        raise RequestMalformed("pruning keeps a share between 5% and 100% of the work", option="--keep")
    if request.whole and request.cut:
        raise RequestMalformed("--whole compresses the whole model, and --cut a head", option="--whole")
    if not request.files:
        raise CalibrationError("compression needs inputs of the model", hint="give a folder: --data FOLDER")


def _cut(request: CompressRequest, bundle: Bundle) -> str:
    if request.whole:
        return ""
    if request.cut:
        names = bundle.cut_names(request.cut)
        if len(names) != 1:
            raise RequestMalformed("one head at a time is compressed: give one cut", option="--cut")
        return names[0]
    if not bundle.default_cuts:
        raise ModelError(
            f"{bundle.name} is not cut: it has no head", hint=f"isthmus cut {bundle.name} --cut …, or --whole"
        )
    return bundle.default_cuts[0]


def _with_variants(bundle: Bundle, variants: Sequence[SegmentVariant]) -> Bundle:
    """The bundle with further variants; those of the same id are replaced, others stay."""
    # A plan is for one version's content, and is carried over by its publisher where it still holds.
    every = {v.segment.id: v for v in (*bundle.variants, *variants)}
    return structs.replace(bundle, variants=tuple(every[key] for key in sorted(every)), plan=None)
