"""From a sentence encoder's folder to a bundle with its tokenizer, cut between layers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec import structs

from isthmus.artifacts.bundle import Blob, Bundle, TextEmbedding, digest_of
from isthmus.artifacts.cuts import layer_cut, layer_numbers
from isthmus_tools.graph.bundler import add_cuts, build
from isthmus_tools.graph.encoder import graph
from isthmus_tools.graph.encoder.folder import EncoderSource
from isthmus_tools.graph.model import open_model
from isthmus_tools.progress import Progress, silent

# Two rows of different lengths, small enough that the bundle keeps them for the rehearsals of later cuts.
_EXAMPLE = {
    graph.IDS: np.arange(3, 19, dtype=np.int64).reshape(2, 8),
    graph.MASK: np.array([[1] * 8, [1] * 5 + [0] * 3], np.int64),
}


def build_encoder(
    source: EncoderSource,
    name: str,
    out: Path,
    *,
    cuts: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[Bundle, dict[str, Path]]:
    """Build version one of a sentence encoder's bundle in `out`; returns the bundle and each digest's file.

    `cuts` are partitions, each numbers of layers in order separated by `/`, such as `2/4`; the first is the default.
    Without any, the model is cut in its middle.

    Raises:
        ModelError: the encoder cannot be written or run.
        CutError: a cut is no layer, or the layers are not in order.
    """
    layers = source.config.num_hidden_layers
    default = [str(layers // 2)] if layers > 1 else []
    partitions = [layer_cuts(layers, text) for text in cuts or default]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-", dir=out) as folder:
        progress(f"writing the graph of {name}")
        graph.write(source, path := Path(folder) / "encoder.onnx")
        model = open_model(path, examples=_EXAMPLE)
        progress(f"cutting {name}")
        origin = {"file": source.folder.name, "layers": layers, **source.origin}
        bundle, files = build(model, name, out, partitions=partitions, source=origin)
    tokenizer = out / "tokenizer.json"
    tokenizer.write_bytes(source.tokenizer)
    blob = Blob(digest_of(source.tokenizer), len(source.tokenizer))
    embedding = TextEmbedding(
        blob,
        graph.IDS,
        graph.MASK,
        graph.VECTOR,
        max_tokens=source.max_tokens,
        pooling=source.pooling,
        normalized=source.normalized,
        pad=source.config.pad_token_id,
    )
    return structs.replace(bundle, embedding=embedding), {**files, blob.digest: tokenizer}


def add_encoder_cuts(
    bundle: Bundle, whole: Path, cuts: Sequence[str], out: Path, *, default: bool = False
) -> tuple[Bundle, dict[str, Path]]:
    """Add partitions to a sentence encoder's bundle, as `add_cuts` does; `cuts` are as in `build_encoder`.

    Raises:
        CutError: as `build_encoder`.
    """
    layers = int(bundle.source.get("layers", 0))
    return add_cuts(bundle, whole, [layer_cuts(layers, text) for text in cuts], out, default=default)


def layer_cuts(layers: int, text: str) -> list[str]:
    """The cuts of a partition's text, such as `2/4` or `layer_2/layer_4`, as texts for `resolve_cut`.

    Raises:
        CutError: a part is no number of layers.
    """
    names = map(layer_cut, layer_numbers(text, layers))
    return [f"{name}={name},{graph.MASK}" for name in names]
