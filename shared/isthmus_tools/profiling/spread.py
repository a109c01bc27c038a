"""Which cuts are worth measuring, before anything was: those that no earlier one beats, and some of every part."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus_tools.graph.cuts import CutInfo, cuts
from isthmus_tools.graph.model import Model

MAX_CUTS = 16


def spread_cuts(model: Model, most: int = MAX_CUTS) -> list[CutInfo]:
    """At most `most` prefix cuts, in order.

    The narrowest of each of `most` / 2 parts of the work, then those that fewer bytes cross than any earlier cut, the
    narrowest first.
    """
    every = cuts(model)
    chosen = {c.name: c for c in _narrowest_of_parts(every, len(model.nodes), max(1, most // 2))}
    front: list[CutInfo] = []
    for cut in every:
        if not front or cut.bytes < front[-1].bytes:
            front.append(cut)
    for cut in reversed(front):
        if len(chosen) >= most:
            break
        chosen.setdefault(cut.name, cut)
    return sorted(chosen.values(), key=lambda c: c.position or 0)


def _narrowest_of_parts(every: Sequence[CutInfo], nodes: int, parts: int) -> list[CutInfo]:
    found: dict[int, CutInfo] = {}
    for cut in every:
        # Half by multiply-accumulates, half by nodes: neither alone is time.
        done = (cut.macs_before + ((cut.position or 0) + 1) / nodes) / 2
        part = min(parts - 1, int(done * parts))
        if part not in found or cut.bytes < found[part].bytes:
            found[part] = cut
    return list(found.values())
