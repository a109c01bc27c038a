"""The int8 variant of a model: a bundle of its own, NAME-int8, that the edge can run instead of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, digest_of, is_model_name, to_json
from isthmus.artifacts.profile import content_of
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import IsthmusError, Missing, ModelError, RunFailed
from isthmus.registry import Registry
from isthmus.registry.cache import SegmentCache
from isthmus.runtime.ort_runner import OrtRunner, Runner
from isthmus_tools.graph import build
from isthmus_tools.graph.quantise import quantise


@dataclass(frozen=True)
class Variant:
    """A bundle that runs instead, what is new of it by digest, and a session of it here."""

    bundle: Bundle
    runner: Runner
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The digest of its manifest."""
        return digest_of(to_json(self.bundle))


def int8_variant(
    bundle: Bundle,
    registry: Registry,
    cache: SegmentCache,
    whole: Path,
    inputs: Sequence[Mapping[str, Array]],
    folder: Path,
    *,
    threads: int,
) -> Variant:
    """The int8 variant of `bundle`, whose uncut graph lies at `whole`, calibrated with `inputs`.

    One that the registry has of this very content and inputs is taken from there.

    Raises:
        ModelError: onnxruntime's tools cannot quantise it, or what they make of it takes or gives something else.
        RunFailed: what they make of it cannot be loaded.
    """
    name = f"{bundle.name}-int8"
    if not is_model_name(name):
        raise ModelError(f"{name!r} cannot name a model")
    made_of = {"quantised_from": content_of(bundle), "calibrated_with": _digest(inputs)}
    try:
        found = registry.resolve(name)
        if made_of.items() <= found.bundle.source.items():
            located = cache.locate(found.digest, WHOLE)
            return Variant(found.bundle, _session(located.path, found.bundle, threads))
    except Missing:
        pass  # not made yet
    out = folder / "int8"
    out.mkdir()
    quantised = quantise(whole, inputs, out / "quantised.onnx")
    made, files = build(
        quantised,
        name,
        out,
        # Whole, and nothing else: it never splits.
        partitions=[[]],
        # A request that the model takes: where shapes depend on values, made-up ones need not do.
        examples=inputs[0],
        preprocess=bundle.preprocess,
        postprocess=bundle.postprocess,
        source={"model": bundle.source.get("model", bundle.name), **made_of},
    )
    if any(_kinds(a) != _kinds(b) for a, b in ((made.inputs, bundle.inputs), (made.outputs, bundle.outputs))):
        raise ModelError("the quantised model takes or gives other tensors than the model itself")
    path = files[made.segment(WHOLE).graph.digest]
    return Variant(made, _session(path, made, threads), files)


def _kinds(specs: Sequence[TensorSpec]) -> list[tuple[str, str, int]]:
    """Names, dtypes and ranks: what can be told of sizes depends on a graph's operators."""
    return [(s.name, s.dtype, len(s.shape)) for s in specs]


def why_not(error: IsthmusError) -> str:
    """Why there is no variant, as a plan's reasons tell it."""
    return f"edge-int8 was left out: {error.message}"


FAILURES = (ModelError, RunFailed)
"""What may keep a model from having a variant; no reason to have no plan."""


def _session(path: Path, bundle: Bundle, threads: int) -> Runner:
    return OrtRunner(path, bundle.segment(WHOLE), providers=("CPUExecutionProvider",), threads=threads)


def _digest(inputs: Sequence[Mapping[str, Array]]) -> str:
    found = hashlib.sha256()
    for arrays in inputs:
        for name, array in sorted(arrays.items()):
            found.update(f"{name} {array.dtype.name} {array.shape}".encode())
            found.update(array.tobytes())
    return f"sha256:{found.hexdigest()}"
