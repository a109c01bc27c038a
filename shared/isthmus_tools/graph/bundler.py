"""From an ONNX file to a bundle: the weights file, the segments of the cuts asked for, and the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from isthmus.artifacts.bundle import Bundle, Cut, Segment, Weights, digest_of, is_model_name
from isthmus.artifacts.segment_id import WHOLE, partition_ids
from isthmus.errors import CutError, ModelError
from isthmus_tools.graph import weights as weights_file
from isthmus_tools.graph.cuts import (
    CutInfo,
    cuts,
    published_cut,
    resolve_cut,
    resolve_partition,
    within_quantised_operators,
)
from isthmus_tools.graph.dry_run import DryRun, recorded
from isthmus_tools.graph.extract import AnyCut, Extracted, check_order, extract, partition
from isthmus_tools.graph.model import Binding, Examples, Model, open_model
from isthmus_tools.graph.processing import check_classes, check_specs, grey_picture
from isthmus_tools.progress import Progress, silent

Partition: TypeAlias = str | Sequence[str | CutInfo]
_SHARE = (0.1, 0.9)
_SMALL_EXAMPLE = 16
_MAX_TRIED = 8
"""Cuts that are run to find a default whose segments compute what the model does."""


def build(
    model: Model | str | os.PathLike[str],
    name: str,
    out_dir: str | os.PathLike[str],
    *,
    partitions: Sequence[Partition] = (),
    bind: Binding | None = None,
    examples: Examples | None = None,
    freeze: bool = False,
    preprocess: Mapping[str, Any] | None = None,
    postprocess: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    source: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> tuple[Bundle, dict[str, Path]]:
    """Make version one of a bundle in `out_dir`; returns it, and where the content of each digest lies.

    Every segment is loaded and run here first, and compared with the whole model (`dry_run`); what could not be run and
    what differs stands in `source["dry_run"]`.

    `partitions` are texts such as `20/40` (docs/cuts.md), or ordered lists of cuts, each a position, tensors (see
    `resolve_cut`) or a CutInfo; the first is the default. Without any, the model is parted at its narrowest cut (see
    `narrowest`); one that has none is left whole.
    `bind`, `examples`, `freeze`: see `open_model`; a Model that is already open takes none of them.

    Raises:
        ModelError: the model cannot be imported, or does not run; or its processing does not fit it.
        CutError: a cut cannot be made, or its segments do not run or do not compute what the model does; or the cuts of
            a partition are not in order.
    """
    if not is_model_name(name):
        raise ModelError(f"{name!r} cannot name a model", hint="use 1 to 63 of a-z, 0-9, '.', '_' and '-'")
    if not isinstance(model, Model):
        model = open_model(model, bind=bind, examples=examples, freeze=freeze)
    elif bind or examples or freeze:
        raise TypeError("bind, examples and freeze belong to open_model when the model is already open")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    postprocess = _with_labels_key(postprocess)
    check_specs(model, preprocess, postprocess, labels)
    weights = weights_file.write(
        model.initialisers(), out / weights_file.LOCATION, lambda done, total: progress("weights", done, total)
    )
    files = {weights.blob.digest: out / weights_file.LOCATION}
    run = DryRun(model, out, weights.tensors)
    model, whole = _run_whole(run, weights, preprocess, postprocess, labels)
    bundle = Bundle(
        name=name,
        inputs=whole.inputs,
        outputs=whole.outputs,
        weights=weights,
        segments={WHOLE: _store(whole, out, files)},
        cuts={},
        preprocess=preprocess,
        postprocess=_with_labels(postprocess, labels, out, files),
        source={**(source or {}), **_counted_with(model)},
    )
    resolved = [_resolve(model, p, {}) for p in partitions]
    tried = [] if partitions else _by_default(run, weights)
    bundle = _cut(bundle, run, resolved or tried, out, files, progress)
    first = tried[0].cuts if tried else resolved[0] if resolved else []
    return replace(bundle, default_cuts=tuple(c.name for c in first)), files


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
    """Cut a published bundle anew; the weights file stays as it is, so only small graphs are new.

    `whole` is the bundle's uncut segment's graph, with weights.bin beside it. New segments are run first, as by
    `build`; `on_refusal` is told of a partition that the dry run refuses, which is then left out.
    The new graphs are written to `out_dir`, or beside it. Cuts may also be named as in the bundle. Returns the bundle
    with the new segments and cuts, and the new files by digest. `default` makes the first partition the default. A plan
    is for exactly one bundle, so what differs from it has none.

    Raises:
        ModelError: the graph is not one that this package wrote.
        CutError: as `build`.
    """
    whole = Path(whole)
    binding = bundle.source.get("bind", {})
    model = open_model(whole, bind=binding, examples=stored_examples(bundle), normalise=False)
    # As they held for every size that was tried at the import: what the whole promises, its tails promise.
    model = replace(model, specs={**model.specs, **{s.name: s for s in bundle.outputs}})
    out = whole.parent if out_dir is None else Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    resolved = [_resolve(model, p, bundle.cuts) for p in partitions]
    run = DryRun(model, whole.parent, bundle.weights.tensors)
    if any(not bundle.has_segments(c.name for c in cuts_) for cuts_ in resolved):
        # Its inputs cannot be given here, so a model that asks for certain ones is still cut.
        run.whole(extract(model, bundle.weights, None, None), must_run=False)
    more = _cut(bundle, run, resolved, out, files, progress, on_refusal)
    if default and resolved:
        more = replace(more, default_cuts=tuple(c.name for c in resolved[0]))
    return more if more == bundle else replace(more, plan=None), files


def narrowest(model: Model) -> CutInfo | None:
    """The prefix cut that the fewest bytes cross, of those with 10% to 90% of the work before it; None without one.

    The work is counted in multiply-accumulates, or in nodes where no cut lies in that range or a model has none. Where
    that finds nothing either, all cuts are looked at. The first of equals wins. A cut between a DequantizeLinear and
    the QuantizeLinear after it comes last.
    """
    return next(iter(_narrow(model)), None)


def _narrow(model: Model) -> list[CutInfo]:
    """The cuts that may be the default, the narrowest first; after them those that part what onnxruntime fuses."""
    every = cuts(model)
    low, high = _SHARE
    by_macs = [c for c in every if low <= c.macs_before <= high]
    by_nodes = [c for c in every if c.position is not None and low <= (c.position + 1) / len(model.nodes) <= high]
    fused = {str(v.name) for v in within_quantised_operators(model)}
    return sorted(by_macs or by_nodes or every, key=lambda c: (any(t.name in fused for t in c.tensors), c.bytes))


def _by_default(run: DryRun, weights: Weights) -> list[_Rehearsed]:
    """The narrowest cut whose segments compute what the model does; where all differ, the one that differs least."""
    found: list[_Rehearsed] = []
    refused: list[str] = []
    for cut in _narrow(run.model)[:_MAX_TRIED]:
        try:
            tried = _rehearsed(run, weights, [cut])
        except CutError as e:
            refused.append(e.message)
            continue
        if tried.difference <= run.tolerance:
            return [tried]
        found.append(tried)
    if refused and not found:
        run.notes.append(f"left whole: {refused[0]}")
    return sorted(found, key=lambda r: r.difference)[:1]


def _resolve(model: Model, cuts_: Partition, known: Mapping[str, Cut]) -> list[AnyCut]:
    if isinstance(cuts_, str):
        return resolve_partition(model, cuts_, known)
    found: list[AnyCut] = []
    for cut in cuts_:
        if isinstance(cut, CutInfo):
            found.append(cut)
        elif cut in known:
            found.append(published_cut(model, known[cut]))
        else:
            found.append(resolve_cut(model, cut))
    return found


def _cut(
    bundle: Bundle,
    run: DryRun,
    partitions: Sequence[Sequence[AnyCut] | _Rehearsed],
    out: Path,
    files: dict[str, Path],
    progress: Progress,
    on_refusal: Callable[[CutError], None] | None = None,
) -> Bundle:
    segments, found = dict(bundle.segments), dict(bundle.cuts)
    differences: dict[str, float] = {}
    fused = {str(v.name) for v in within_quantised_operators(run.model)}
    total = sum(len(p.cuts if isinstance(p, _Rehearsed) else p) + 1 for p in partitions)
    done = 0
    for asked in partitions:
        try:
            tried = asked if isinstance(asked, _Rehearsed) else _tried(run, bundle.weights, asked, segments)
        except CutError as e:
            if on_refusal is None:
                raise
            on_refusal(e)
            continue
        name = "/".join(c.name for c in tried.cuts)
        if tried.difference > run.tolerance:
            differences[name] = recorded(tried.difference)
        elif tried.parts and fused & {t.name for c in tried.cuts for t in c.tensors}:
            run.notes.append(
                f"the cut {name} parts operators that onnxruntime fuses to integer ones: predictions may differ by"
                " their rounding, though those of the dry run do not"
            )
        for cut in tried.cuts:
            made = cut.manifest() if isinstance(cut, CutInfo) else cut
            if _differs(found.setdefault(cut.name, made), made):
                raise CutError(
                    f"the bundle has another cut of the name {cut.name}", cut=cut.name, hint="give it a name: NAME=a,b"
                )
        for extracted in tried.parts:
            if extracted.id not in segments:
                segments[extracted.id] = _store(extracted, out, files)
        done += len(tried.cuts) + 1
        progress("segments", done, total)
    return replace(bundle, segments=segments, cuts=found, source=_with_findings(bundle.source, differences, run.notes))


class _Rehearsed(NamedTuple):
    """A partition after its dry run: cuts and segments with shapes that held for every size, and the difference."""

    cuts: Sequence[AnyCut]
    parts: Sequence[Extracted]
    difference: float


def _tried(run: DryRun, weights: Weights, cuts_: Sequence[AnyCut], known: Collection[str]) -> _Rehearsed:
    """A partition after its dry run, unless all of its segments are `known`: those had theirs.

    Raises:
        CutError: as `_rehearsed`.
    """
    check_order(run.model, cuts_)
    ids = partition_ids(c.name for c in cuts_)
    return _rehearsed(run, weights, cuts_) if set(ids) - set(known) else _Rehearsed(cuts_, (), 0.0)


def _rehearsed(run: DryRun, weights: Weights, cuts_: Sequence[AnyCut]) -> _Rehearsed:
    """A partition after its dry run.

    Raises:
        CutError: as `partition` and `DryRun.partition`.
    """
    cuts_ = [_with_specs(cut, run.model) for cut in cuts_]
    while True:
        parts = partition(run.model, weights, cuts_)
        seen = run.partition(parts)
        if not seen.specs:
            return _Rehearsed(cuts_, parts, seen.difference)
        # Each round frees at least one dimension, so the rounds end.
        run.model = replace(run.model, specs={**run.model.specs, **seen.specs})
        cuts_ = [_with_specs(cut, run.model) for cut in cuts_]


def _with_specs(cut: AnyCut, model: Model) -> AnyCut:
    return replace(cut, tensors=tuple(model.specs.get(t.name, t) for t in cut.tensors))


def _run_whole(
    run: DryRun,
    weights: Weights,
    preprocess: Mapping[str, Any] | None,
    postprocess: Mapping[str, Any] | None,
    labels: Sequence[str] | None,
) -> tuple[Model, Extracted]:
    """The model with its outputs' shapes as they hold for every size, and its uncut segment.

    Raises:
        ModelError: it does not run, or its pre- and post-processing do not fit it.
    """
    whole = extract(run.model, weights, None, None)
    picture = None if preprocess is None else grey_picture(run.model, preprocess)
    specs, shown = run.whole(whole, picture)
    if specs:
        run.model = replace(run.model, specs={**run.model.specs, **specs})
        whole = extract(run.model, weights, None, None)
    outputs = run.example_outputs if shown is None else shown
    if postprocess is not None and outputs is not None:
        check_classes(outputs, postprocess, labels)
    return run.model, whole


def _with_findings(source: Mapping[str, Any], differences: Mapping[str, float], notes: Sequence[str]) -> dict[str, Any]:
    before = source.get("dry_run", {})
    found = {
        "differences": {**before.get("differences", {}), **differences},
        "notes": list(dict.fromkeys([*before.get("notes", []), *notes])),
    }
    kept = {key: value for key, value in found.items() if value}
    return {**{k: v for k, v in source.items() if k != "dry_run"}, **({"dry_run": kept} if kept else {})}


def _differs(a: Cut, b: Cut) -> bool:
    return a.position != b.position or {t.name for t in a.tensors} != {t.name for t in b.tensors}


def _store(extracted: Extracted, out: Path, files: dict[str, Path]) -> Segment:
    path = out / f"{extracted.id.start or 'inputs'}-to-{extracted.id.stop or 'outputs'}.onnx"
    path.write_bytes(extracted.graph)
    files[extracted.segment.graph.digest] = path
    return extracted.segment


def _with_labels_key(postprocess: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """`labels` may be left out where there are none."""
    return {"labels": None, **postprocess} if isinstance(postprocess, Mapping) else postprocess


def _with_labels(
    postprocess: Mapping[str, Any] | None, labels: Sequence[str] | None, out: Path, files: dict[str, Path]
) -> Mapping[str, Any] | None:
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


def _counted_with(model: Model) -> dict[str, Any]:
    """What a later cut of this bundle needs to count bytes for the same input: shapes, and small whole numbers."""
    facts: dict[str, Any] = {"bind": {name: list(shape) for name, shape in model.binding.items()}}
    small = {
        name: {"dtype": str(np.asarray(a).dtype), "value": np.asarray(a).tolist()}
        for name, a in model.examples.items()
        if np.asarray(a).dtype.kind in "iub" and np.asarray(a).size <= _SMALL_EXAMPLE
    }
    return {**facts, "examples": small} if small else facts


def stored_examples(bundle: Bundle) -> Examples:
    """The example inputs that the bundle's model was imported with, as far as they are small and whole numbers."""
    return {n: np.asarray(e["value"], np.dtype(e["dtype"])) for n, e in bundle.source.get("examples", {}).items()}
