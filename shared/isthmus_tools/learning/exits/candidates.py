"""Candidate cuts for exits: the bundle's cuts, and narrow cuts at depths without any."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.artifacts.bundle import Bundle
from isthmus.errors import LearningError
from isthmus_tools.graph import CutInfo, Model, cut_after, cuts, resolve_cut
from isthmus_tools.graph.cuts import AnyCut, published_cut, within_quantised_operators

# Ends of bands of the model's MACs: the work behind an exit is its gain, so bands are finer where much is left.
_BANDS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
# Tensors share the bound on features, and each takes a pool of its own at the edge.
_MAX_TENSORS = 4


def candidate_cuts(model: Model, bundle: Bundle, texts: Sequence[str] = ()) -> list[AnyCut]:
    """The cuts of `texts`, each a published cut's name or a new cut; without, a cut for each band of the model's work.

    In the order of the work before them.

    Raises:
        LearningError: a text names several cuts, or the model has no cut.
        CutError: a cut is impossible.
        Missing: no such cut.
    """
    selected = [_named(model, bundle, text) for text in dict.fromkeys(texts)] if texts else _spread(model, bundle)
    if not selected:
        raise LearningError(f"{bundle.name} has no cut where an exit could be", hint=f"isthmus cuts {bundle.name}")
    return sorted({cut.name: cut for cut in selected}.values(), key=lambda cut: cut.macs_before)


def _named(model: Model, bundle: Bundle, text: str) -> AnyCut:
    if text in bundle.cuts:
        return published_cut(model, bundle.cuts[text])
    if "/" in text:
        raise LearningError(
            f"--cut {text} is a partition of several cuts, and an exit is at one", hint="give --cut once for each"
        )
    return resolve_cut(model, text)


def _spread(model: Model, bundle: Bundle) -> list[AnyCut]:
    fused = {str(value.name) for value in within_quantised_operators(model)}
    published: list[AnyCut] = [cut for cut in bundle.cuts.values() if _is_usable(cut, fused)]
    every = [cut for cut in cuts(model) if _is_usable(cut, fused)]
    selected = list(published)
    for low, high in zip(_BANDS, (*_BANDS[1:], 0.95), strict=True):
        # A model without MACs has all cuts in the first band: then nodes stand for work.
        within = [cut for cut in every if low < _depth(model, cut) <= high]
        if within and not any(low < _depth(model, cut) <= high for cut in published):
            # Of cuts before and behind an activation function, the one behind: its means tell more.
            narrow = min(within, key=lambda cut: (len(cut.tensors), cut.bytes, cut.macs_before, -(cut.position or 0)))
            selected.append(cut_after(model, narrow.position) if narrow.position is not None else narrow)
    return selected


def _is_usable(cut: AnyCut, fused: set[str]) -> bool:
    """Whether a head could be fitted: few tensors, some of floats, none inside an integer operator."""
    names = {tensor.name for tensor in cut.tensors}
    has_floats = any(tensor.dtype.startswith(("float", "bfloat")) for tensor in cut.tensors)
    return has_floats and len(names) <= _MAX_TENSORS and not names & fused


def _depth(model: Model, cut: CutInfo | AnyCut) -> float:
    if model.total_macs or cut.position is None:
        return cut.macs_before
    return (cut.position + 1) / len(model.nodes)
