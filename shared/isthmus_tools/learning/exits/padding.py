"""Which of a cut's tensors marks padded tokens: an attention mask of zeros and ones, or the bias made of it.

The usual bias is the smallest float32 for padding, so that a mean of it overflows: a mask, and no feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.tensors import TensorSpec
from isthmus_tools.graph.exit_branch import TokenMask

# Biases in use are -1e4, -65504, -1e9, the smallest float32 and -inf; no other tensor has these beside zeros alone.
_BIAS = -1e3


def token_masks(specs: Sequence[TensorSpec], batches: Iterable[Mapping[str, Array]]) -> list[TokenMask]:
    """The masks among tensors, the smallest first; `batches` are runs, read until none of the tensors may be a mask.

    A tensor is a mask where all its values are, and some token is padding: without padding nothing shows it.
    """
    # (mask, elements), its batches' real tokens; an activation leaves with the first batch, so that memory is bounded.
    open_kinds: dict[tuple[TokenMask, int], list[Array]] = {}
    for index, arrays in enumerate(batches):
        if index == 0:
            kinds = [kind for spec in specs for kind in _kinds(spec, arrays[spec.name])]
            open_kinds = {kind: [] for kind in kinds}
        for kind, seen in list(open_kinds.items()):
            mask = kind[0]
            if _has_values(mask, arrays[mask.tensor]):
                seen.append(real_tokens(mask, arrays[mask.tensor]))
            else:
                del open_kinds[kind]
        if not open_kinds:
            return []
    found = [kind for kind, seen in open_kinds.items() if _is_padding(seen)]
    return [mask for mask, _ in sorted(found, key=lambda kind: kind[1])]


def real_tokens(mask: TokenMask, array: Array) -> Array:
    """Whether each token is real. Shapes: (batch, …, tokens), or (batch, tokens, 1), to (batch, tokens) bool."""
    x = array.astype(np.float32)
    if mask.is_trailing:
        x = x[..., 0]
    # A token is real where any other attends to it, under a causal bias too.
    real: Array = x.max(axis=tuple(range(1, x.ndim - 1))) > mask.above
    return real


def _kinds(spec: TensorSpec, array: Array) -> list[tuple[TokenMask, int]]:
    """The masks that a tensor of this shape could be, with its number of elements."""
    if array.ndim < 2:
        return []
    of_ones = TokenMask(spec.name, spec.dtype, 0.0, is_trailing=array.ndim == 3 and array.shape[2] == 1)
    return [(mask, array.size) for mask in (TokenMask(spec.name, spec.dtype, _BIAS), of_ones)]


def _has_values(mask: TokenMask, array: Array) -> bool:
    padded = array <= mask.above if mask.above < 0 else array == 1
    return bool(((array == 0) | padded).all())


def _is_padding(seen: Sequence[Array]) -> bool:
    """Whether tokens are padded at one end of all texts; segment ids and one-hot features do not look so."""
    if all(rows.all() for rows in seen):
        return False
    follows, precedes = (all((np.diff(rows[:, ::step].astype(int)) <= 0).all() for rows in seen) for step in (1, -1))
    starts, ends = (all(rows[:, place].all() for rows in seen) for place in (0, -1))
    return (follows and starts) or (precedes and ends)
