"""Layers of a language model that each segment of a route runs."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.artifacts.bundle import Bundle, Segment


def layers_of(bundle: Bundle, segments: Sequence[Segment]) -> list[range]:
    """The layers of each segment, counted from 0, for consecutive segments from the model's start.

    A layer has two pairs of state, its keys and its values; a model without state has no layers here.
    """
    pasts = set() if bundle.state is None else {pair.past for pair in bundle.state.pairs}
    layers, first = [], 0
    for segment in segments:
        count = sum(spec.name in pasts for spec in segment.inputs) // 2
        layers.append(range(first, first + count))
        first += count
    return layers
