"""From an ONNX file to a bundle: the weights file, the segments of the cuts asked for, and the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from isthmus.bundle import WHOLE, Blob, Bundle, Cut, Segment, digest_of, is_model_name
from isthmus.errors import CutError, ModelError
from isthmus.graph import weights as weights_file
from isthmus.graph.cuts import CutInfo, cuts, published_cut, resolve_cut, resolve_partition
from isthmus.graph.extract import AnyCut, Extracted, extract, partition
from isthmus.graph.model import Binding, Examples, Model, open_model

Partition: TypeAlias = str | Sequence[str | CutInfo]
Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is: bytes of weights, or segments."""

_SHARE = (0.1, 0.9)
_SMALL_EXAMPLE = 16


def _silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


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
    progress: Progress = _silent,
) -> tuple[Bundle, dict[str, Path]]:
    """Make version one of a bundle in `out_dir`; returns it, and where the content of each digest lies.

    `partitions` are texts such as `20/40` (docs/cuts.md), or ordered lists of cuts, each a position, tensors (see
    `resolve_cut`) or a CutInfo; the first is the default. Without any, the model is parted at its narrowest cut (see
    `narrowest`); one that has none is left whole.
    `bind`, `examples`, `freeze`: see `open_model`; a Model that is already open takes none of them.

    Raises:
        ModelError: the model cannot be imported.
        CutError: a cut cannot be made, or the cuts of a partition are not in order.
    """
    if not is_model_name(name):
        raise ModelError(f"{name!r} cannot name a model", hint="use 1 to 63 of a-z, 0-9, '.', '_' and '-'")
    if not isinstance(model, Model):
        model = open_model(model, bind=bind, examples=examples, freeze=freeze)
    elif bind or examples or freeze:
        raise TypeError("bind, examples and freeze belong to open_model when the model is already open")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    weights = weights_file.write(
        model.initialisers(), out / weights_file.LOCATION, lambda done, total: progress("weights", done, total)
    )
    files = {weights.blob.digest: out / weights_file.LOCATION}
    chosen: Sequence[Partition] = partitions
    if not chosen:
        found = narrowest(model)
        chosen = [[found]] if found is not None else []
    whole = extract(model, weights, None, None)
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
    resolved = [_resolve(model, p, {}) for p in chosen]
    bundle = _cut(bundle, model, resolved, out, files, progress)
    return replace(bundle, default_cuts=tuple(c.name for c in resolved[0]) if resolved else ()), files


def add_cuts(
    bundle: Bundle,
    whole: str | os.PathLike[str],
    partitions: Sequence[Partition],
    out_dir: str | os.PathLike[str] | None = None,
    *,
    default: bool = False,
    progress: Progress = _silent,
) -> tuple[Bundle, dict[str, Path]]:
    """Cut a published bundle anew; the weights file stays as it is, so only small graphs are new.

    `whole` is the bundle's uncut segment's graph, with weights.bin beside it; only the weights' length is looked at.
    The new graphs are written to `out_dir`, or beside it. Cuts may also be named as in the bundle. Returns the bundle
    with the new segments and cuts, and the new files by digest. `default` makes the first partition the default. A plan
    is for exactly one bundle, so what differs from it has none.

    Raises:
        ModelError: the graph is not one that this package wrote.
        CutError: a cut cannot be made, or the cuts of a partition are not in order.
    """
    whole = Path(whole)
    binding = bundle.source.get("bind", {})
    model = open_model(whole, bind=binding, examples=_examples(bundle), normalise=False)
    out = whole.parent if out_dir is None else Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    resolved = [_resolve(model, p, bundle.cuts) for p in partitions]
    more = _cut(bundle, model, resolved, out, files, progress)
    if default and resolved:
        more = replace(more, default_cuts=tuple(c.name for c in resolved[0]))
    return more if more == bundle else replace(more, plan=None), files


def narrowest(model: Model) -> CutInfo | None:
    """The prefix cut that the fewest bytes cross, of those with 10% to 90% of the work before it; None without one.

    The work is counted in multiply-accumulates, or in nodes where no cut lies in that range or a model has none. Where
    that finds nothing either, all cuts are looked at. The first of equals wins.
    """
    every = cuts(model)
    low, high = _SHARE
    by_macs = [c for c in every if low <= c.macs_before <= high]
    by_nodes = [c for c in every if c.position is not None and low <= (c.position + 1) / len(model.nodes) <= high]
    return min(by_macs or by_nodes or every, key=lambda c: c.bytes, default=None)


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
    model: Model,
    partitions: Sequence[Sequence[AnyCut]],
    out: Path,
    files: dict[str, Path],
    progress: Progress,
) -> Bundle:
    segments, found = dict(bundle.segments), dict(bundle.cuts)
    total = sum(len(p) + 1 for p in partitions)
    done = 0
    for cuts_ in partitions:
        for cut in cuts_:
            made = cut.manifest() if isinstance(cut, CutInfo) else cut
            if _differs(found.setdefault(cut.name, made), made):
                raise CutError(
                    f"the bundle has another cut of the name {cut.name}", cut=cut.name, hint="give it a name: NAME=a,b"
                )
        for extracted in partition(model, bundle.weights, cuts_):
            done += 1
            if extracted.id not in segments:
                segments[extracted.id] = _store(extracted, out, files)
            progress("segments", done, total)
    return replace(bundle, segments=segments, cuts=found)


def _differs(a: Cut, b: Cut) -> bool:
    return a.position != b.position or {t.name for t in a.tensors} != {t.name for t in b.tensors}


def _store(extracted: Extracted, out: Path, files: dict[str, Path]) -> Segment:
    start, _, stop = extracted.id.partition("..")
    path = out / f"{start or 'inputs'}-to-{stop or 'outputs'}.onnx"
    digest = digest_of(extracted.graph)
    path.write_bytes(extracted.graph)
    files[digest] = path
    return Segment(
        id=extracted.id,
        graph=Blob(digest, len(extracted.graph)),
        inputs=extracted.inputs,
        outputs=extracted.outputs,
        weights=extracted.weights,
        macs=extracted.macs,
    )


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


def _examples(bundle: Bundle) -> Examples:
    return {n: np.asarray(e["value"], np.dtype(e["dtype"])) for n, e in bundle.source.get("examples", {}).items()}
