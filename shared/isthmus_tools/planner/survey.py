"""What every tensor of a model packs to under every codec, from runs of the uncut model on real inputs.

So the search weighs the bytes that would cross, and not those before any codec: a ReLU's output is half zeros, a
bottleneck's is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.choice import RAW_ID, Choice
from isthmus.codecs import EncodedTensor, encode_tensor
from isthmus.codecs.choice import encodings, is_activation
from isthmus_tools.graph.cuts import cuts
from isthmus_tools.graph.model import Model
from isthmus_tools.graph.probe import values

BUDGET_S = 15.0
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Survey:
    """Bytes of tensors, and seconds here to pack and unpack them, by codec and by the tensor's name.

    A tensor that is not in it was not looked at, or goes raw: it weighs what it weighs.
    """

    bytes: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, Mapping[str, float]]


def survey(model: Model, arrays: Mapping[str, Array], choices: Sequence[Choice], budget_s: float = BUDGET_S) -> Survey:
    """Pack every tensor that crosses a prefix cut, as it is for these inputs, under each of `choices`.

    Where the time is used up, the tensors that are left go by the share that the codec saved on those before. Codecs
    that were calibrated need tables and are left out.
    """
    wanted = [c for c in choices if c.codec != RAW_ID]
    sizes: dict[str, dict[str, float]] = {c.codec: {} for c in wanted}
    seconds: dict[str, dict[str, float]] = {c.codec: {} for c in wanted}
    if not wanted:
        return Survey(sizes, seconds)
    until = time.monotonic() + budget_s
    skipped: list[tuple[str, int]] = []
    for name, array in _tensors(model, arrays):
        if time.monotonic() > until:
            skipped.append((name, array.nbytes))
            continue
        for choice in wanted:
            start = time.perf_counter()
            encoded = encode_tensor(array, encodings([model.specs[name]], choice)[name])
            took = time.perf_counter() - start
            sizes[choice.codec][name] = float(encoded.nbytes)
            # Unpacking takes about as long; trials measure both.
            seconds[choice.codec][name] = 2 * took if isinstance(encoded, EncodedTensor) else took
    for choice in wanted:
        known = [(n, model.nbytes(model.values[n])) for n in sizes[choice.codec] if is_activation(model.specs[n])]
        whole = sum(n for _, n in known)
        share = sum(sizes[choice.codec][n] for n, _ in known) / whole if whole else 1.0
        for name, nbytes in skipped:
            sizes[choice.codec][name] = nbytes * (share if is_activation(model.specs[name]) else 1.0)
    return Survey(sizes, seconds)


def _tensors(model: Model, arrays: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """The crossing tensors, a few at a time, so that not all lie in memory at once."""
    crossing = dict.fromkeys(t.name for cut in cuts(model) for t in cut.tensors)
    batch: list[str] = []
    weight = 0
    for name in [*crossing, ""]:
        size = model.nbytes(model.values[name]) if name else 0
        if batch and (not name or weight + size > _MAX_BYTES):
            found = values(model.document, batch, arrays)
            yield from ((n, np.ascontiguousarray(a)) for n, a in found.items())
            batch, weight = [], 0
        # numpy has no bfloat16 that onnxruntime would give.
        if name and model.specs[name].dtype != "bfloat16":
            batch.append(name)
            weight += size
