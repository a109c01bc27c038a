"""How the tensors of one hop are encoded under a choice of codec."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isthmus.artifacts.choice import LOSSLESS_ID, PHOTO_ID, RAW_ID, SPARSE_ID, Choice
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import Encoding, find_codec

SIDE = LOSSLESS_ID
"""How tensors travel that are no activations: ids, masks, states of a counter."""
_EXACT = frozenset({RAW_ID, LOSSLESS_ID, PHOTO_ID})
_ACTIVATIONS = frozenset({"float16", "bfloat16", "float32"})


def is_exact(encoding: Choice | Encoding) -> bool:
    """Whether it gives back the very bits, so that no answer can differ."""
    return encoding.codec in _EXACT or (encoding.codec == SPARSE_ID and encoding.quality >= 1)


def encodings(
    specs: Iterable[TensorSpec], choice: Choice, table: Callable[[str], object] | None = None
) -> dict[str, Encoding]:
    """How each tensor of one hop is packed: activations as `choice` says, everything else without a change.

    `table` gives a tensor's table by its name; it is asked for calibrated codecs only, and what it has none for is no
    activation: an attention mask, say, which calibration found to hold two values.
    """
    if choice.codec == "raw":
        return {}
    calibrated = find_codec(choice.codec).calibrated
    made = {}
    for spec in specs:
        found = table(spec.name) if calibrated and table is not None and is_activation(spec) else None
        exact = not is_activation(spec) or (calibrated and found is None)
        made[spec.name] = Encoding(SIDE) if exact else Encoding(choice.codec, choice.quality, found)
    return made


def is_activation(spec: TensorSpec) -> bool:
    """Whether a codec that changes values may have this tensor: floats of at most 32 bits."""
    return spec.dtype in _ACTIVATIONS
