"""From a decoder to a bundle: its graph, the weights file, the segments of the requested cuts, and a rehearsal.

The rehearsal generates from a few tokens with the whole model and with the segments of each partition, their state
kept apart, and compares the scores.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, Bundle, Cut, Segment, TextModel, digest_of
from isthmus.artifacts.state import State, StatePair
from isthmus.errors import CutError, ModelError, SegmentError
from isthmus.runtime.ort import cpu_limit
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus_tools.graph import weights as weights_file
from isthmus_tools.graph.cuts import CutInfo, cut_at
from isthmus_tools.graph.decoder import graph
from isthmus_tools.graph.decoder.config import DecoderSource
from isthmus_tools.graph.extract import Extracted, extract, partition
from isthmus_tools.graph.model import Model, open_model
from isthmus_tools.progress import Progress, silent

# Fusions differ between the whole graph and its segments; measured for SmolLM2 at 7e-5 of logits up to 32.
_EXACT = 1e-4
_PREFILL, _STEPS = 5, 3
_PAST = 3


def build_decoder(
    decoder: DecoderSource,
    name: str,
    out: Path,
    *,
    cuts: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[Bundle, dict[str, Path]]:
    """Build version one of a decoder's bundle in `out`; returns the bundle and each digest's file.

    `cuts` are partitions, each numbers of layers in order separated by `/`, such as `10/20`; the first is the default.
    Without any, the model is cut in its middle.

    Raises:
        ModelError: the decoder cannot be written or run.
        CutError: a cut is no layer, or the layers are not in order.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-", dir=out) as folder:
        progress(f"writing the graph of {name}")
        graph.write(decoder, path := Path(folder) / "decoder.onnx")
        model = open_model(path, examples=_examples(decoder), state=_state(decoder))
        weights = weights_file.write(
            model.initialisers(), out / weights_file.LOCATION, lambda done, total: progress("weights", done, total)
        )
    whole = extract(model, weights, None, None)
    partitions = [_cuts(decoder, model, text) for text in cuts or (str(max(1, decoder.config.layers // 2)),)]
    rehearsal = _StepRehearsal(decoder, out)
    expected = rehearsal.scores([whole])
    # The uncut model first: its scores are what those of each partition are compared with.
    parts, named = [whole], dict[str, Cut]()
    for chosen in partitions:
        progress(f"rehearsing the cut {'/'.join(c.name for c in chosen)}")
        segments = partition(model, weights, chosen)
        difference = float(np.abs(rehearsal.scores(segments) - expected).max() / np.abs(expected).max())
        if not difference <= _EXACT:
            raise CutError(
                f"the segments at {chosen[0].name} do not compute what the model does:"
                f" scores differ by {difference:.1g}",
                cut=chosen[0].name,
            )
        parts += segments
        named |= {cut.name: cut.manifest() for cut in chosen}
    files = {weights.blob.digest: out / weights_file.LOCATION}
    stored: dict[str, Segment] = {}
    for part in parts:
        if part.id not in stored:
            stored[part.id] = part.segment
            files[part.segment.graph.digest] = _store(out, part.graph, "onnx")
    tokenizer = json.dumps(decoder.tokenizer, ensure_ascii=False).encode()
    files[digest_of(tokenizer)] = _store(out, tokenizer, "json")
    bundle = Bundle(
        name=name,
        inputs=whole.inputs,
        outputs=whole.outputs,
        weights=weights,
        segment_list=tuple(stored.values()),
        cut_list=tuple(named.values()),
        default_cuts=tuple(cut.name for cut in partitions[0]),
        source={"file": Path(decoder.source).name, "family": decoder.config.family},
        state=model.state,
        text=TextModel(
            Blob(digest_of(tokenizer), len(tokenizer)), graph.LOGITS, decoder.chat_template, decoder.bos, decoder.eos
        ),
    )
    return bundle, files


def _state(decoder: DecoderSource) -> State:
    pairs = tuple(StatePair(past, present) for past, present in graph.state_pairs(decoder.config.layers))
    return State(pairs, graph.IDS, graph.LENGTHS, graph.TOTAL, decoder.config.context)


def _cuts(decoder: DecoderSource, model: Model, text: str) -> list[CutInfo]:
    layers = decoder.config.layers
    chosen = []
    for part in text.split("/"):
        if not (part.isdecimal() and 0 < int(part) < layers):
            raise CutError(
                f"{part[:80]!r} is no cut of this model; its cuts are 1 to {layers - 1}, the number of layers before",
                cut=part[:80],
            )
        chosen.append(cut_at(model, [graph.boundary(int(part))], graph.boundary(int(part))))
    return chosen


def _examples(decoder: DecoderSource) -> dict[str, Array]:
    c = decoder.config
    past = np.zeros((1, c.kv_heads, _PAST, c.head_size), np.float32)
    pairs = graph.state_pairs(c.layers)
    return {
        graph.IDS: np.zeros((1, _PREFILL), np.int64),
        graph.LENGTHS: np.array([_PAST + _PREFILL - 1], np.int32),
        graph.TOTAL: np.array(_PAST + _PREFILL, np.int32),
        **{name: past for name, _ in pairs},
    }


class _StepRehearsal:
    """Generates a few tokens with segments, their state in this process."""

    def __init__(self, decoder: DecoderSource, folder: Path) -> None:
        self._config, self._folder = decoder.config, folder
        generator = np.random.default_rng(0)
        tokens = generator.integers(0, decoder.config.vocabulary, (1, _PREFILL + _STEPS))
        self._chunks = [tokens[:, :_PREFILL], *(tokens[:, i : i + 1] for i in range(_PREFILL, _PREFILL + _STEPS))]

    def scores(self, parts: Sequence[Extracted]) -> Array:
        """The logits of all tokens, in chunks. Shapes: (1, tokens, vocabulary)."""
        runs: list[Array | dict[str, Array]] = list(self._chunks)
        for part in parts:
            # One session at a time, as a model may take most of the memory.
            runs = list(self._through(part, runs))
        return np.concatenate([values[graph.LOGITS] for values in runs if isinstance(values, dict)], axis=1)

    def _through(self, part: Extracted, runs: Sequence[Array | dict[str, Array]]) -> Iterator[dict[str, Array]]:
        c = self._config
        try:
            runner = UnpublishedRunner(part.graph, part.segment, self._folder, threads=cpu_limit(), repack=True)
        except SegmentError as e:
            raise ModelError(f"onnxruntime cannot load segment {part.id}: {e.message}", segment=part.id) from e
        state = {
            spec.name: np.zeros((1, c.kv_heads, 0, c.head_size), np.float32)
            for spec in part.inputs
            if spec.name.startswith("past_")
        }
        count = 0
        for given in runs:
            values = {graph.IDS: given} if not isinstance(given, dict) else given
            count += next(a.shape[1] for n, a in values.items())
            supplied = {graph.LENGTHS: np.array([count - 1], np.int32), graph.TOTAL: np.array(count, np.int32), **state}
            arrays = {spec.name: {**values, **supplied}[spec.name] for spec in part.inputs}
            outputs = runner.run(arrays)
            state = {past: outputs[present] for past, present in graph.state_pairs(c.layers) if present in outputs}
            yield {name: array for name, array in outputs.items() if not name.startswith("present_")}


def _store(out: Path, data: bytes, suffix: str) -> Path:
    path = out / f"{digest_of(data)[7:]}.{suffix}"
    path.write_bytes(data)
    return path
