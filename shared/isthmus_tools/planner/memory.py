"""What memory a segment needs: its weights, and the most that its values take at one time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.profile import Profile
from isthmus_tools.graph.model import Model


def live_bytes(model: Model, nodes: Collection[int]) -> int:
    """The most bytes of values that live at once while `nodes` run in order.

    A value lives from when it is made, or taken, to its last reader among them; one that leaves them, to their end.
    """
    return max(live_along(model, sorted(nodes)), default=0)


def live_along(model: Model, order: Sequence[int]) -> list[int]:
    """Bytes of the values that live while each of the nodes in `order` runs, were these a segment of their own."""
    within = set(order)
    last = {str(v.name): i for i in order for v in model.uses[i] if not model.is_static(v)}
    leaving = {str(v.name) for v in model.outputs}
    leaving |= {str(v.name) for i, used in enumerate(model.uses) if model.dynamic[i] and i not in within for v in used}
    made = {str(v.name) for i in order for v in model.nodes[i].outputs}
    live = sum(_size(model, name) for name in last if name not in made)
    found = []
    for i in order:
        live += sum(_size(model, str(v.name)) for v in model.nodes[i].outputs)
        found.append(live)
        gone = {str(v.name) for v in (*model.uses[i], *model.nodes[i].outputs)} - leaving
        live -= sum(_size(model, name) for name in gone if last.get(name, i) == i)
    return found


def _size(model: Model, name: str) -> int:
    return model.nbytes(model.values[name]) if name in model.specs and name in model.values else 0


@dataclass(frozen=True)
class Memory:
    """Bytes that segments need on the profile's device: measured ones where it timed them, else scaled to the whole."""

    model: Model
    bundle: Bundle
    profile: Profile
    same: Callable[[str], bool]

    def segment(self, segment: Segment, nodes: Collection[int]) -> int:
        """Bytes of one segment, whose nodes are `nodes`."""
        if segment.id in self.profile.segments and self.same(segment.id):
            return self.profile.segments[segment.id].memory_bytes
        weights = sum(t.length for t in self.bundle.weight_ranges(segment))
        return self._scaled(weights, live_bytes(self.model, nodes))

    def heads(self) -> dict[int, int]:
        """Bytes of the head of every prefix cut, by its position, scaled; in time linear in the graph.

        Up to a node the same values live in a head as in the whole model: those that leave it are read later there.
        """
        order = [i for i, dynamic in enumerate(self.model.dynamic) if dynamic]
        seen: set[str] = set()
        lengths = {t.name: t.length for t in self.bundle.weights.tensors}
        found, weights, most = {}, 0, 0
        for i, live in zip(order, live_along(self.model, order), strict=True):
            fresh = _initialisers(self.model, i) - seen
            seen |= fresh
            weights += sum(lengths.get(name, 0) for name in fresh)
            most = max(most, live)
            found[i] = self._scaled(weights, most)
        return found

    def variant(self, weights_bytes: int) -> int:
        """Bytes of the whole model with other weights."""
        return self._scaled(weights_bytes, self._every)

    def _scaled(self, weights: int, live: int) -> int:
        # What the runtime lays out anew grows with the weights, what it reserves with the values.
        whole = self.profile.whole
        kept = max(1.0, (whole.memory_bytes - whole.activation_bytes) / max(1, whole.weights_bytes))
        return int(weights * kept + live * whole.activation_bytes / max(1, self._every))

    @cached_property
    def _every(self) -> int:
        return live_bytes(self.model, [i for i, dynamic in enumerate(self.model.dynamic) if dynamic])


def _initialisers(model: Model, node: int) -> set[str]:
    """What a node needs of the weights, static nodes before it included."""
    found, stack = set(), list(model.uses[node])
    while stack:
        value = stack.pop()
        if not model.is_static(value):
            continue
        if (producer := value.producer()) is None:
            found.add(str(value.name))
        else:
            stack.extend(model.uses[model.positions[producer]])
    return found
