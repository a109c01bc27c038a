"""The layers of a language model's bundle: its cuts, and what a session keeps of a token in each.

A cut between layers is `layer_N`, N layers before it. Source: docs/reference/bundle.md, "State".
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from isthmus.arrays import DTYPES
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.cuts import LAYER_PREFIX, layer_cut
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.state import State
from isthmus.errors import ModelError

_CUT = re.compile(rf"{LAYER_PREFIX}([1-9][0-9]{{0,6}})")


def layers_before(cut: str) -> int:
    """The number of layers before a cut.

    Raises:
        ModelError: no cut between layers.
    """
    if (match := _CUT.fullmatch(cut)) is None:
        raise ModelError(f"the cut {cut!r} is not between two layers", cut=cut, hint="layers are cut as layer_N")
    return int(match[1])


def layer_cuts(names: Iterable[str]) -> list[str]:
    """Those of `names` that are cuts between layers, in order."""
    return sorted((name for name in names if _CUT.fullmatch(name)), key=layers_before)


@dataclass(frozen=True)
class DecoderLayers:
    """A language model's layers. Units: `state_bytes` of a token in one layer, `context` in tokens.

    `width` is that of hidden states. `changes` are the numbers of layers before each change of the weights' precision:
    between two of them layers are alike.
    """

    count: int
    state_bytes: int
    context: int
    width: int
    state: State
    changes: tuple[int, ...] = ()

    @classmethod
    def of(cls, bundle: Bundle) -> DecoderLayers:
        """The layers of a bundle.

        Raises:
            ModelError: the bundle is no language model, or was never cut.
        """
        state = bundle.state
        if state is None or bundle.text is None:
            raise ModelError(f"{bundle.name} is no language model: it declares no state")
        # Keys and values of a layer are a pair each.
        count = max(1, len(state.pairs) // 2)
        specs = {spec.name: spec for spec in bundle.segment(WHOLE).inputs}
        pasts = [specs[pair.past] for pair in state.pairs]
        # Free sizes are the batch and the length, of which a token has one.
        token = sum(math.prod(n for n in s.shape if isinstance(n, int)) * DTYPES[s.dtype].itemsize for s in pasts)
        # The groups of layers of one precision, as docs/reference/bundle.md has them.
        groups = [int(size) for _, size in bundle.source.get("precisions", ())]
        changes = tuple(n for n in itertools.accumulate(groups) if 0 < n < count)
        return cls(count, token // count, state.context, _width(bundle), state, changes)

    @property
    def telling_cuts(self) -> tuple[str, ...]:
        """Cuts whose heads, or tails, tell the times of all others: two in each group of alike layers."""
        # Neither end alone: the first and the last layers load with embeddings and scores.
        first = max(1, (self.changes[0] if self.changes else self.count) // 4)
        last = self.count - max(1, (self.count - (self.changes[-1] if self.changes else 0)) // 4)
        return tuple(layer_cut(n) for n in sorted({first, *self.changes, last}) if 0 < n < self.count)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Every cut between two layers, in order."""
        return tuple(layer_cut(n) for n in range(1, self.count))


def _width(bundle: Bundle) -> int:
    # The manifest has it at any cut; reading the graph would take seconds.
    for cut in layer_cuts(bundle.cuts):
        width = bundle.cuts[cut].tensors[0].shape[-1]
        if isinstance(width, int):
            return width
    raise ModelError(
        f"no cut between layers of {bundle.name} tells the width of its hidden states", hint="import the model again"
    )
