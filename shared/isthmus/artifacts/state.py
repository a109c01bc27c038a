"""Declared state of a model: tensors that each step of a session reads and extends, such as keys and values.

State stays with the segment that computes it; no frame carries it. Source: docs/reference/bundle.md, "State".
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from isthmus.artifacts.constraints import Count, Text

# Two for each layer of the deepest models.
_MAX_PAIRS = 4096


class StatePair(Struct, frozen=True, forbid_unknown_fields=True):
    """An input with the past of a session, and the output that extends it by the new tokens."""

    past: Text
    present: Text


class State(Struct, frozen=True, forbid_unknown_fields=True):
    """The state of a model: its pairs, which grow along `axis`, and the inputs that say how much there is.

    `lengths` (batch,) int32 is the number of tokens of each row, less one; `total` () int32 that of the longest row:
    the convention of onnxruntime's GroupQueryAttention. `tokens` is the model's input of token ids, and `context` the
    largest number of tokens of a session. `scored` () int64 is how many of the last positions get scores; a model
    without this input scores all.
    """

    pairs: Annotated[tuple[StatePair, ...], Meta(min_length=1, max_length=_MAX_PAIRS)]
    tokens: Text
    lengths: Text
    total: Text
    context: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    axis: Count = 2
    # Unset, not empty: documents without the input keep their bytes, and so their digests.
    scored: Text | UnsetType = UNSET

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a runtime supplies by itself."""
        scored = () if self.scored is UNSET else (self.scored,)
        return (self.lengths, self.total, *scored, *(pair.past for pair in self.pairs))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that a runtime keeps."""
        return tuple(pair.present for pair in self.pairs)
