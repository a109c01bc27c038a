"""From a decoder to a bundle: its graph, the weights file, the segments of the requested cuts, and a rehearsal.

The rehearsal generates from a few tokens with the whole model and with the segments of each partition, and compares
the scores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, digest_of
from isthmus.artifacts.cuts import layer_cut, layer_numbers
from isthmus.artifacts.segment_id import partition_ids
from isthmus.errors import CutError, ModelError
from isthmus_tools.graph import weights as weights_file
from isthmus_tools.graph.cuts import CutInfo, cut_at
from isthmus_tools.graph.decoder import graph
from isthmus_tools.graph.decoder.config import DecoderSource, layer_precisions
from isthmus_tools.graph.decoder.rehearsal import StepRehearsal
from isthmus_tools.graph.decoder.text_model import text_model
from isthmus_tools.graph.extract import check_order, extract, partition
from isthmus_tools.graph.model import Model
from isthmus_tools.progress import Progress, silent

# Fusions differ between the whole graph and its segments; measured for SmolLM2 at 7e-5 of logits up to 32.
_EXACT = 1e-4


def build_decoder(
    decoder: DecoderSource,
    name: str,
    out: Path,
    *,
    cuts: Sequence[str] = (),
    weights: str = "float32",
    progress: Progress = silent,
) -> tuple[Bundle, dict[str, Path]]:
    """Build version one of a decoder's bundle in `out`; returns the bundle and each digest's file.

    `cuts` are partitions, each numbers of layers in order separated by `/`, such as `10/20`; the first is the default.
    Without any, the model is cut in its middle. `weights` is the precision of all layers, or one for each segment of
    the first partition, such as `int4/float16`: a layer has one precision, whichever partition it runs in.

    Raises:
        ModelError: the decoder cannot be written or run, or the precisions do not fit the first partition.
        CutError: a cut is no layer, or the layers are not in order.
    """
    c = decoder.config
    partitions = [layer_numbers(text, c.layers) for text in cuts or (str(max(1, c.layers // 2)),)]
    text, tokenizer = text_model(decoder, graph.LOGITS)
    precisions = layer_precisions(weights, partitions[0], c)
    out.mkdir(parents=True, exist_ok=True)
    state = graph.declared_state(c)
    with tempfile.TemporaryDirectory(prefix="isthmus-", dir=out) as folder:
        progress(f"writing the graph of {name}")
        graph.write(
            decoder,
            precisions,
            path := Path(folder) / "decoder.onnx",
            lambda done, total: progress("tensors", done, total),
        )
        model = graph.opened(path, state, c.width, c.vocabulary, (c.kv_heads, c.head_size))
        stored = weights_file.write(
            model.initialisers(), out / weights_file.LOCATION, lambda done, total: progress("weights", done, total)
        )
    whole = extract(model, stored, None, None)
    files = {stored.blob.digest: out / weights_file.LOCATION}
    files[whole.segment.graph.digest] = _store(out, whole.graph, "onnx")
    files[digest_of(tokenizer)] = _store(out, tokenizer, "json")
    bundle = Bundle(
        name=name,
        inputs=whole.inputs,
        outputs=whole.outputs,
        weights=stored,
        segment_list=(whole.segment,),
        cut_list=(),
        source={
            "file": Path(decoder.source).name,
            "family": c.family,
            **decoder.origin,
            "precisions": [[name, len(list(layers))] for name, layers in groupby(precisions)],
        },
        state=state,
        text=text,
    )
    rehearsal = StepRehearsal(state, model.specs[graph.LOGITS], out)
    bundle, graphs = _cut(bundle, model, partitions, out, rehearsal, progress)
    return structs.replace(bundle, default_cuts=_names(partitions[0])), files | graphs


def add_layer_cuts(
    bundle: Bundle,
    whole: Path,
    cuts: Sequence[str],
    out: Path,
    *,
    default: bool = False,
    progress: Progress = silent,
) -> tuple[Bundle, dict[str, Path]]:
    """Add partitions to a decoder's bundle under the same weights; the only new files are the new segments' graphs.

    `whole` is the graph of the bundle's uncut segment, with the weights file beside it. Returns the bundle, without its
    plan if anything changed, and the new files by digest.

    Raises:
        CutError: as `build_decoder`.
    """
    if bundle.state is None:
        raise CutError(f"{bundle.name} is no language model, so it has no cuts between layers")
    past = next(spec for spec in bundle.inputs if spec.name == bundle.state.pairs[0].past)
    partitions = [layer_numbers(text, len(bundle.state.pairs) // 2) for text in cuts]
    # Read from the manifest: the file that the model was imported from may be gone.
    (width, vocabulary) = (int(spec.shape[-1]) for spec in (bundle.cut_list[0].tensors[0], bundle.outputs[-1]))
    model = graph.opened(
        whole, bundle.state, width, vocabulary, (int(past.shape[1]), int(past.shape[3])), normalise=False
    )
    out.mkdir(parents=True, exist_ok=True)
    rehearsal = StepRehearsal(bundle.state, model.specs[graph.LOGITS], whole.parent)
    extended, files = _cut(bundle, model, partitions, out, rehearsal, progress)
    if default and partitions:
        extended = structs.replace(extended, default_cuts=_names(partitions[0]))
    return extended if extended == bundle else structs.replace(extended, plan=None), files


def _cut(
    bundle: Bundle,
    model: Model,
    partitions: Sequence[Sequence[int]],
    out: Path,
    rehearsal: StepRehearsal,
    progress: Progress,
) -> tuple[Bundle, dict[str, Path]]:
    """The bundle with the segments of these partitions, each rehearsed against the whole model, and the new files."""
    segments, cuts, files = dict(bundle.segments), dict(bundle.cuts), dict[str, Path]()
    expected: Array | None = None
    for layers in partitions:
        infos = [_cut_info(model, layer) for layer in layers]
        check_order(model, infos)
        cuts |= {info.name: info.manifest() for info in infos}
        # Published segments were rehearsed when they were made.
        if segments.keys() >= set(partition_ids(_names(layers))):
            continue
        if expected is None:
            progress("rehearsing the whole model")
            expected = rehearsal.scores([extract(model, bundle.weights, None, None)])
            if not np.isfinite(expected).all():
                raise ModelError("the model's scores are no finite numbers: its weights are damaged")
        progress(f"rehearsing the cut {'/'.join(_names(layers))}")
        parts = partition(model, bundle.weights, infos)
        difference = float(np.abs(rehearsal.scores(parts) - expected).max() / np.abs(expected).max())
        if not difference <= _EXACT:
            raise CutError(
                f"the segments at {'/'.join(_names(layers))} do not compute what the model does: scores differ by"
                f" {difference:.1g}",
                cut=infos[0].name,
            )
        for part in parts:
            if part.id not in segments:
                segments[part.id] = part.segment
                files[part.segment.graph.digest] = _store(out, part.graph, "onnx")
    extended = structs.replace(bundle, segment_list=tuple(segments.values()), cut_list=tuple(cuts.values()))
    return extended, files


def _cut_info(model: Model, layer: int) -> CutInfo:
    """The cut behind the first `layer` layers; its bytes are those of a token, and it has no position but the layer."""
    cut = cut_at(model, [layer_cut(layer)], layer_cut(layer))
    return replace(cut, bytes=cut.bytes // graph.EXAMPLE_TOKENS, position=None)


def _names(layers: Sequence[int]) -> tuple[str, ...]:
    return tuple(layer_cut(layer) for layer in layers)


def _store(out: Path, data: bytes, suffix: str) -> Path:
    path = out / f"{digest_of(data)[7:]}.{suffix}"
    path.write_bytes(data)
    return path
