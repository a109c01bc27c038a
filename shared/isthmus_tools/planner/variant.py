"""The int8 variant of a model: a bundle of its own, NAME-int8, that the edge can run in place of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, digest_of, is_model_name, to_json
from isthmus.artifacts.profile import content_of
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import Missing, ModelError
from isthmus.registry import Registry, SegmentCache
from isthmus_tools.graph import build
from isthmus_tools.graph.quantise import quantise
from isthmus_tools.planner.segment_pool import SegmentPool


@dataclass(frozen=True)
class Variant:
    """A bundle to run in place of the model, with the files that the registry lacks, by digest."""

    bundle: Bundle
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        return digest_of(to_json(self.bundle))

    def pool(self, cache: SegmentCache, threads: int) -> SegmentPool:
        """Sessions of the variant's segments, for the caller to close."""
        return SegmentPool(self.bundle, self.digest, self.files, cache, threads=threads)


def int8_variant(
    bundle: Bundle, registry: Registry, whole: Path, inputs: Sequence[Mapping[str, Array]], folder: Path
) -> Variant:
    """The int8 variant of `bundle`, from the uncut graph at `whole`, calibrated with `inputs`.

    A variant of the same content and inputs in the registry is used as it is.

    Raises:
        ModelError: onnxruntime's tools cannot quantise the model, or change its inputs or outputs.
    """
    name = f"{bundle.name}-int8"
    if not is_model_name(name):
        raise ModelError(f"{name!r} cannot name a model")
    origin = {"quantised_from": content_of(bundle), "calibrated_with": _digest(inputs)}
    try:
        published = registry.resolve(name)
        if origin.items() <= published.bundle.source.items():
            return Variant(published.bundle)
    except Missing:
        pass  # no variant published yet
    out = folder / "int8"
    out.mkdir()
    variant, files = build(
        quantise(whole, inputs, out / "quantised.onnx"),
        name,
        out,
        # Whole only: a variant is never split.
        partitions=[[]],
        # A request that the model accepts: where shapes depend on values, invented values may be refused.
        examples=inputs[0],
        preprocess=bundle.preprocess,
        postprocess=bundle.postprocess,
        source={"model": bundle.source.get("model", bundle.name), **origin},
    )
    if any(_kinds(a) != _kinds(b) for a, b in ((variant.inputs, bundle.inputs), (variant.outputs, bundle.outputs))):
        raise ModelError("the quantised model takes or gives other tensors than the model itself")
    return Variant(variant, files)


def _kinds(specs: Sequence[TensorSpec]) -> list[tuple[str, str, int]]:
    # Names, dtypes and ranks: sizes that inference knows depend on a graph's operators.
    return [(s.name, s.dtype, len(s.shape)) for s in specs]


def _digest(inputs: Sequence[Mapping[str, Array]]) -> str:
    digest = hashlib.sha256()
    for arrays in inputs:
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
            digest.update(array.tobytes())
    return f"sha256:{digest.hexdigest()}"
