"""From an ONNX file to a bundle: the weights file, the segments of the requested cuts, and the manifest."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Cut, Segment, Weights, digest_of, is_model_name
from isthmus.artifacts.segment_id import partition_ids
from isthmus.artifacts.tensors import TensorSpec, describe
from isthmus.errors import CutError, IsthmusError, ModelError
from isthmus.processing import classify, classify_spec, image_spec
from isthmus_tools.graph import weights as weights_file
from isthmus_tools.graph.cuts import (
    AnyCut,
    CutInfo,
    default_cuts,
    published_cut,
    resolve_cut,
    resolve_partition,
    within_quantised_operators,
)
from isthmus_tools.graph.dry_run import Case, DryRun, recorded
from isthmus_tools.graph.extract import Extracted, check_order, extract, partition
from isthmus_tools.graph.inputs import agrees
from isthmus_tools.graph.model import Binding, Examples, Model, open_model
from isthmus_tools.progress import Progress, silent

Partition: TypeAlias = str | Sequence[str | CutInfo]
Spec: TypeAlias = Mapping[str, Any]
"""Pre- or post-processing as a bundle declares it: docs/reference/bundle.md."""

# Integers of at most this many elements are stored as examples: lengths and token ids that later cuts need to run.
_MAX_STORED_VALUES = 16
# Each candidate for the default cut costs a dry run.
_MAX_DEFAULT_CANDIDATES = 8
# Height and width of the test picture for models whose input shape does not tell.
_PICTURE_SIDE = 256
_MAX_PICTURE_SIDE = 4096


def build(
    model: Model | str | os.PathLike[str],
    name: str,
    out_dir: str | os.PathLike[str],
    *,
    partitions: Sequence[Partition] = (),
    bind: Binding | None = None,
    examples: Examples | None = None,
    freeze: bool = False,
    free_batch: bool = False,
    preprocess: Spec | None = None,
    postprocess: Spec | None = None,
    labels: Sequence[str] | None = None,
    source: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> tuple[Bundle, dict[str, Path]]:
    """Build version one of a bundle in `out_dir`; returns the bundle and each digest's file.

    Every segment first passes a dry run, which compares its predictions with the whole model's; runs left out and
    differences are recorded in `source["dry_run"]`.

    `partitions` are texts such as `20/40` (docs/explanation/cuts.md) or ordered lists of cuts, each a position, tensors
    (see `resolve_cut`) or a CutInfo; the first is the default. Without partitions the model is cut at its narrowest
    cut (see `default_cuts`), and a model without a cut is left whole. `bind`, `examples`, `freeze`, `free_batch`: see
    `open_model`; an open Model takes none of these.

    Raises:
        ModelError: the model cannot be imported or run, or its processing disagrees with its inputs and outputs.
        CutError: a cut is impossible, its segments do not run or compute another function, or a partition's cuts are
            not in order.
    """
    if not is_model_name(name):
        raise ModelError(f"{name!r} cannot name a model", hint="use 1 to 63 of a-z, 0-9, '.', '_' and '-'")
    if not isinstance(model, Model):
        model = open_model(model, bind=bind, examples=examples, freeze=freeze, free_batch=free_batch)
    elif bind or examples or freeze or free_batch:
        raise TypeError("bind, examples, freeze and free_batch belong to open_model when the model is already open")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(postprocess, Mapping):
        # A bundle's document always has the key; callers may omit it.
        postprocess = {"labels": None, **postprocess}
    _check_processing(model, preprocess, postprocess, labels)
    # Before the dry run: its sessions map the weights from this file.
    weights = weights_file.write(
        model.initialisers(), out / weights_file.LOCATION, lambda done, total: progress("weights", done, total)
    )
    files = {weights.blob.digest: out / weights_file.LOCATION}
    run = DryRun(model, out, weights.tensors)
    whole = _run_whole(run, weights, preprocess, postprocess, labels)
    bundle = Bundle(
        name=name,
        inputs=whole.inputs,
        outputs=whole.outputs,
        weights=weights,
        segment_list=(_store(whole, out, files),),
        cut_list=(),
        preprocess=preprocess,
        postprocess=_with_labels(postprocess, labels, out, files),
        source={**(source or {}), **_binding_document(run.model)},
    )
    resolved = [_resolve(run.model, p, {}) for p in partitions]
    defaults = [] if partitions else _default_partition(run, weights)
    bundle = _cut(bundle, run, resolved or defaults, out, files, progress)
    default = defaults[0].cuts if defaults else resolved[0] if resolved else []
    return structs.replace(bundle, default_cuts=tuple(c.name for c in default)), files


def add_cuts(
    bundle: Bundle,
    whole: str | os.PathLike[str],
    partitions: Sequence[Partition],
    out_dir: str | os.PathLike[str] | None = None,
    *,
    default: bool = False,
    progress: Progress = silent,
    on_refusal: Callable[[CutError], None] | None = None,
) -> tuple[Bundle, dict[str, Path]]:
    """Add cuts to a published bundle; the weights file is unchanged, so the only new files are small graphs.

    `whole` is the graph of the bundle's uncut segment, with weights.bin beside it. New segments pass a dry run as in
    `build`; with `on_refusal`, refused partitions are reported to it and left out. Graphs are written to `out_dir`, or
    beside `whole`. Cuts may be named as in the bundle. `default` makes the first partition the default. Returns the
    bundle with new segments and cuts, without its plan if anything changed (a plan is valid for a single version), and
    the new files by digest.

    Raises:
        ModelError: the graph was not written by this package.
        CutError: as `build`.
    """
    whole = Path(whole)
    model = open_whole(bundle, whole)
    out = whole.parent if out_dir is None else Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    resolved = [_resolve(model, p, bundle.cuts) for p in partitions]
    run = DryRun(model, whole.parent, bundle.weights.tensors)
    if any(not bundle.has_segments(c.name for c in cuts) for cuts in resolved):
        # No examples can be given here, so a model that needs particular inputs is cut without a comparison.
        run.whole(extract(model, bundle.weights, None, None), must_run=False)
    extended = _cut(bundle, run, resolved, out, files, progress, on_refusal)
    if default and resolved:
        extended = structs.replace(extended, default_cuts=tuple(c.name for c in resolved[0]))
    return extended if extended == bundle else structs.replace(extended, plan=None), files


def open_whole(bundle: Bundle, whole: Path) -> Model:
    """The model of a published bundle, from the graph of its uncut segment.

    Raises:
        ModelError: the graph was not written by this package.
    """
    binding = bundle.source.get("bind", {})
    model = open_model(whole, bind=binding, examples=stored_examples(bundle), normalise=False)
    # The import's dry run corrected the output shapes for every size; tails must promise the same.
    return replace(model, specs={**model.specs, **{s.name: s for s in bundle.outputs}})


def stored_examples(bundle: Bundle) -> Examples:
    """The example inputs of the bundle's import, limited to small integer arrays."""
    return {n: np.asarray(e["value"], np.dtype(e["dtype"])) for n, e in bundle.source.get("examples", {}).items()}


class _Rehearsal(NamedTuple):
    """A partition after its dry run: cuts and segments with shapes that hold for every size, and the difference."""

    cuts: Sequence[AnyCut]
    parts: Sequence[Extracted]
    difference: float


def _default_partition(run: DryRun, weights: Weights) -> list[_Rehearsal]:
    """The first default cut within tolerance, else the candidate with the smallest difference; empty without any."""
    rehearsals: list[_Rehearsal] = []
    refusals: list[str] = []
    for cut in default_cuts(run.model)[:_MAX_DEFAULT_CANDIDATES]:
        try:
            rehearsal = _rehearse(run, weights, [cut])
        except CutError as e:
            refusals.append(e.message)
            continue
        if rehearsal.difference <= run.tolerance:
            return [rehearsal]
        rehearsals.append(rehearsal)
    if refusals and not rehearsals:
        run.notes.append(f"left whole: {refusals[0]}")
    return sorted(rehearsals, key=lambda r: r.difference)[:1]


def _resolve(model: Model, spec: Partition, published: Mapping[str, Cut]) -> list[AnyCut]:
    if isinstance(spec, str):
        return resolve_partition(model, spec, published)
    resolved: list[AnyCut] = []
    for cut in spec:
        if isinstance(cut, CutInfo):
            resolved.append(cut)
        elif cut in published:
            resolved.append(published_cut(model, published[cut]))
        else:
            resolved.append(resolve_cut(model, cut))
    return resolved


def _cut(
    bundle: Bundle,
    run: DryRun,
    partitions: Sequence[Sequence[AnyCut] | _Rehearsal],
    out: Path,
    files: dict[str, Path],
    progress: Progress,
    on_refusal: Callable[[CutError], None] | None = None,
) -> Bundle:
    segments, cuts = dict(bundle.segments), dict(bundle.cuts)
    differences: dict[str, float] = {}
    fused = {str(v.name) for v in within_quantised_operators(run.model)}
    total = sum(len(p.cuts if isinstance(p, _Rehearsal) else p) + 1 for p in partitions)
    done = 0
    for entry in partitions:
        try:
            rehearsal = entry if isinstance(entry, _Rehearsal) else _rehearse_new(run, bundle.weights, entry, segments)
        except CutError as e:
            if on_refusal is None:
                raise
            on_refusal(e)
            continue
        name = "/".join(c.name for c in rehearsal.cuts)
        if rehearsal.difference > run.tolerance:
            differences[name] = recorded(rehearsal.difference)
        elif rehearsal.parts and fused & {t.name for c in rehearsal.cuts for t in c.tensors}:
            run.notes.append(
                f"the cut {name} parts operators that onnxruntime fuses to integer ones: predictions may differ by"
                " their rounding, though those of the dry run do not"
            )
        for cut in rehearsal.cuts:
            manifest = cut.manifest() if isinstance(cut, CutInfo) else cut
            if _differs(cuts.setdefault(cut.name, manifest), manifest):
                raise CutError(
                    f"the bundle has another cut of the name {cut.name}", cut=cut.name, hint="give it a name: NAME=a,b"
                )
        for part in rehearsal.parts:
            if part.id not in segments:
                segments[part.id] = _store(part, out, files)
        done += len(rehearsal.cuts) + 1
        progress("segments", done, total)
    return structs.replace(
        bundle,
        segment_list=tuple(segments.values()),
        cut_list=tuple(cuts.values()),
        source=_with_findings(bundle.source, differences, run.notes),
    )


def _rehearse_new(run: DryRun, weights: Weights, cuts: Sequence[AnyCut], existing: Collection[str]) -> _Rehearsal:
    """A partition after its dry run, which is skipped where all segments are among the `existing` ones."""
    check_order(run.model, cuts)
    is_new = not set(existing).issuperset(partition_ids(c.name for c in cuts))
    return _rehearse(run, weights, cuts) if is_new else _Rehearsal(cuts, (), 0.0)


def _with_specs(cut: AnyCut, model: Model) -> AnyCut:
    tensors = tuple(model.specs.get(t.name, t) for t in cut.tensors)
    return structs.replace(cut, tensors=tensors) if isinstance(cut, Cut) else replace(cut, tensors=tensors)


def _rehearse(run: DryRun, weights: Weights, cuts: Sequence[AnyCut]) -> _Rehearsal:
    while True:
        cuts = [_with_specs(cut, run.model) for cut in cuts]
        parts = partition(run.model, weights, cuts)
        comparison = run.partition(parts)
        if not comparison.specs:
            return _Rehearsal(cuts, parts, comparison.difference)
        # Each round frees at least one dimension, so the loop ends.
        run.model = replace(run.model, specs={**run.model.specs, **comparison.specs})


def _run_whole(
    run: DryRun,
    weights: Weights,
    preprocess: Spec | None,
    postprocess: Spec | None,
    labels: Sequence[str] | None,
) -> Extracted:
    """Run the uncut model and return its segment; `run.model` then has output shapes that hold for every size.

    Raises:
        ModelError: the model does not run, or its pre- or post-processing disagrees with it.
    """
    whole = extract(run.model, weights, None, None)
    picture = None if preprocess is None else _grey_picture(run.model, preprocess)
    specs, prediction = run.whole(whole, picture)
    if specs:
        run.model = replace(run.model, specs={**run.model.specs, **specs})
        whole = extract(run.model, weights, None, None)
    outputs = run.example_outputs if prediction is None else prediction
    if postprocess is not None and outputs is not None:
        try:
            classify.table_of(outputs[postprocess["output"]], postprocess, labels)
        except IsthmusError as e:
            raise ModelError(f"postprocess does not fit the model: {e.message}", **e.facts) from e
    return whole


def _with_findings(source: Mapping[str, Any], differences: Mapping[str, float], notes: Sequence[str]) -> dict[str, Any]:
    before = source.get("dry_run", {})
    findings = {
        "differences": {**before.get("differences", {}), **differences},
        "notes": list(dict.fromkeys([*before.get("notes", []), *notes])),
    }
    document = {key: value for key, value in findings.items() if value}
    # A bundle without findings has no entry, so that equal bundles have equal digests.
    others = {k: v for k, v in source.items() if k != "dry_run"}
    return {**others, "dry_run": document} if document else others


def _differs(a: Cut, b: Cut) -> bool:
    return a.position != b.position or {t.name for t in a.tensors} != {t.name for t in b.tensors}


def _store(part: Extracted, out: Path, files: dict[str, Path]) -> Segment:
    path = out / f"{part.id.start or 'inputs'}-to-{part.id.stop or 'outputs'}.onnx"
    path.write_bytes(part.graph)
    files[part.segment.graph.digest] = path
    return part.segment


def _with_labels(
    postprocess: Spec | None, labels: Sequence[str] | None, out: Path, files: dict[str, Path]
) -> Spec | None:
    if labels is None:
        return postprocess
    if postprocess is None:
        raise ModelError(
            "labels were given, and no postprocess to use them", hint="give a postprocess of kind classify"
        )
    data = json.dumps(list(labels), ensure_ascii=False).encode()
    digest = digest_of(data)
    files[digest] = out / "labels.json"
    files[digest].write_bytes(data)
    return {**postprocess, "labels": {"digest": digest, "size": len(data)}}


def _binding_document(model: Model) -> dict[str, Any]:
    """The bound shapes and small integer examples: later cuts count bytes for the same input."""
    facts: dict[str, Any] = {"bind": {name: list(shape) for name, shape in model.binding.items()}}
    arrays = {name: np.asarray(a) for name, a in model.examples.items()}
    small = {
        name: {"dtype": str(a.dtype), "value": a.tolist()}
        for name, a in arrays.items()
        if a.dtype.kind in "iub" and a.size <= _MAX_STORED_VALUES
    }
    return {**facts, "examples": small} if small else facts


def _check_processing(
    model: Model, preprocess: Spec | None, postprocess: Spec | None, labels: Sequence[str] | None
) -> None:
    """Refuse processing that is invalid or names tensors that the model lacks."""
    if preprocess is not None:
        image_spec.validate_spec(preprocess)
        inputs = [str(v.name) for v in model.inputs]
        if (name := preprocess["input"]) not in inputs:
            raise ModelError(f"preprocess makes the input {name!r}; the model takes {', '.join(inputs)}", exists=inputs)
        if others := [n for n in inputs if n != name]:
            raise ModelError(
                f"preprocess makes {name} of a photo, and nothing makes {', '.join(others)}",
                inputs=inputs,
                hint="leave preprocess out: such a model takes tensors",
            )
    if labels is not None and not (labels and all(isinstance(label, str) for label in labels)):
        raise ModelError("the labels are not a list of at least one class name")
    if postprocess is not None:
        classify_spec.validate_spec(postprocess)
        outputs = [str(v.name) for v in model.outputs]
        if (name := postprocess["output"]) not in outputs:
            raise ModelError(
                f"postprocess reads the output {name!r}; the model gives {', '.join(outputs)}", exists=outputs
            )


def _grey_picture(model: Model, preprocess: Spec) -> Case:
    """A case with the model input that `preprocess` makes of a grey picture.

    Raises:
        ModelError: that input disagrees with the model's spec.
    """
    # Imported late: Pillow is not needed for models without pictures.
    from isthmus.processing import image

    spec = model.specs[preprocess["input"]]
    shape = image_spec.made_shape(preprocess)
    if shape is not None and math.prod(shape) > 3 * image.MAX_PIXELS:
        raise ModelError(
            f"preprocess makes {math.prod(shape) // 3} pixels of any picture; at most {image.MAX_PIXELS} are decoded",
            limit=image.MAX_PIXELS,
        )
    if shape is not None and not agrees(spec.shape, shape):
        raise ModelError(
            f"preprocess does not fit the model: it makes {describe(preprocess['dtype'], shape, spec.name)}; the model"
            f" takes {describe(spec.dtype, spec.shape, spec.name)}",
            tensor=spec.name,
        )
    picture = image.grey_picture(*_picture_sides(model, spec, preprocess))
    try:
        with np.errstate(all="ignore"):  # non-finite values are refused below
            array: Array = image.preprocess(picture, preprocess, input=spec, max_pixels=image.MAX_PIXELS)
    except IsthmusError as e:
        raise ModelError(f"preprocess does not fit the model: {e.message}", **e.facts) from e
    if not np.isfinite(np.asarray(array, np.float64)).all():
        raise ModelError("preprocess makes numbers that are not finite of a grey picture", tensor=spec.name)
    return Case("a grey picture", {spec.name: array})


def _picture_sides(model: Model, spec: TensorSpec, preprocess: Spec) -> tuple[int, int]:
    layout = next(step["to"] for step in preprocess["steps"] if step["op"] == "layout")
    shape = model.binding[spec.name]
    if len(shape) != 4:
        return _PICTURE_SIDE, _PICTURE_SIDE
    height, width = shape[2:] if layout == "NCHW" else shape[1:3]
    return min(max(height, 1), _MAX_PICTURE_SIDE), min(max(width, 1), _MAX_PICTURE_SIDE)
