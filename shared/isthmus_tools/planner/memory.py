"""Memory of a segment: its weights, and the peak of its live values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.profile import Profile

if TYPE_CHECKING:
    from isthmus_tools.graph.model import Model


def peak_bytes(model: Model, nodes: Collection[int]) -> int:
    """The peak of live bytes while `nodes` run in order.

    A value lives from computation, or arrival, to the last reader among `nodes`; the segment's outputs live to the end.
    """
    return max(live_bytes(model, sorted(nodes)), default=0)


def live_bytes(model: Model, order: Sequence[int]) -> list[int]:
    """Bytes of live values during each node of `order`, as a segment of its own."""
    within = set(order)
    last_reader = {str(v.name): i for i in order for v in model.uses[i] if not model.is_static(v)}
    outputs = {str(v.name) for v in model.outputs}
    outputs |= {str(v.name) for i, used in enumerate(model.uses) if model.dynamic[i] and i not in within for v in used}
    computed = {str(v.name) for i in order for v in model.nodes[i].outputs}
    live = sum(_size(model, name) for name in last_reader if name not in computed)
    curve = []
    for i in order:
        live += sum(_size(model, str(v.name)) for v in model.nodes[i].outputs)
        curve.append(live)
        # A value without a reader in the segment is freed at once, as is an input after the last reader.
        candidates = {str(v.name) for v in (*model.uses[i], *model.nodes[i].outputs)} - outputs
        live -= sum(_size(model, name) for name in candidates if last_reader.get(name, i) == i)
    return curve


def _size(model: Model, name: str) -> int:
    return model.nbytes(model.values[name]) if name in model.specs and name in model.values else 0


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of segments on the profile's device: as measured where timed, else scaled from the whole model."""

    model: Model
    bundle: Bundle
    profile: Profile
    same_graph: Callable[[str], bool]
    """Whether the profile timed the same graph under a segment id."""

    def segment(self, segment: Segment, nodes: Collection[int]) -> int:
        """Bytes of one segment with the nodes `nodes`."""
        if segment.id in self.profile.segments and self.same_graph(segment.id):
            return self.profile.segments[segment.id].memory_bytes
        weights = sum(t.length for t in self.bundle.weight_ranges(segment))
        return self._scaled(weights, peak_bytes(self.model, nodes))

    def heads(self) -> dict[int, int]:
        """Bytes of the head of every prefix cut, by position, scaled; in time linear in the graph.

        The live values up to a node are the same in a head as in the whole model: a head's outputs have later readers.
        """
        order = [i for i, dynamic in enumerate(self.model.dynamic) if dynamic]
        loaded: set[str] = set()
        lengths = {t.name: t.length for t in self.bundle.weights.tensors}
        sizes, weights, peak = {}, 0, 0
        for i, live in zip(order, live_bytes(self.model, order), strict=True):
            added = _initialisers(self.model, i) - loaded
            loaded |= added
            weights += sum(lengths.get(name, 0) for name in added)
            peak = max(peak, live)
            sizes[i] = self._scaled(weights, peak)
        return sizes

    def variant(self, weights_bytes: int, nodes: Collection[int]) -> int:
        """Bytes of a segment with the nodes `nodes` and other weights."""
        return self._scaled(weights_bytes, peak_bytes(self.model, nodes))

    def _scaled(self, weights: int, live: int) -> int:
        # The runtime's copies of weights (repacked kernels) grow with the weights, its arena with the values.
        whole = self.profile.whole
        per_weight = max(1.0, (whole.memory_bytes - whole.activation_bytes) / max(1, whole.weights_bytes))
        return int(weights * per_weight + live * whole.activation_bytes / max(1, self._whole_peak))

    @cached_property
    def _whole_peak(self) -> int:
        return peak_bytes(self.model, [i for i, dynamic in enumerate(self.model.dynamic) if dynamic])


def _initialisers(model: Model, node: int) -> set[str]:
    """Names of the weights that a node needs, also through static nodes before."""
    # Static nodes are part of every segment that needs their values.
    names, stack = set(), list(model.uses[node])
    while stack:
        value = stack.pop()
        if not model.is_static(value):
            continue
        if (producer := value.producer()) is None:
            names.add(str(value.name))
        else:
            stack.extend(model.uses[model.positions[producer]])
    return names
