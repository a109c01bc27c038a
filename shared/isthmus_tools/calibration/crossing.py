"""A cut as calibration sees it: the segments before it, those after it, and what goes from one side to the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import CalibrationError, Missing

Run: TypeAlias = Callable[[Segment, Mapping[str, Array]], Mapping[str, Array]]
"""Runs one segment."""


@dataclass(frozen=True)
class Crossing:
    """The sides of one cut; `tensors` is everything that the tail needs, inputs of the model that pass by included."""

    cut: str
    head: tuple[Segment, ...]
    tail: tuple[Segment, ...]
    tensors: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]

    def before(self, run: Run, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """What crosses for these inputs, and the outputs that the head has given already."""
        values = dict(inputs)
        for segment in self.head:
            values |= run(segment, {s.name: values[s.name] for s in segment.inputs})
        early = {name: values[name] for name in self.outputs if name in values}
        return {s.name: values[s.name] for s in self.tensors}, early

    def after(
        self, run: Run, crossed: Mapping[str, Array], early: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The model's outputs from what crossed; without `early`, those that the tail gives."""
        values = dict(crossed)
        given: dict[str, Array] = dict(early or {})
        for segment in self.tail:
            made = run(segment, {s.name: values[s.name] for s in segment.inputs})
            values |= made
            given |= {name: array for name, array in made.items() if name in self.outputs}
        return given


def crossing(bundle: Bundle, cut: str) -> Crossing:
    """The sides of `cut`, of as few segments as the bundle has for them.

    Raises:
        Missing: no such cut.
        CalibrationError: the bundle's segments do not lead to it and on from it.
    """
    if cut not in bundle.cuts:
        raise Missing(
            f"bundle {bundle.name} has no cut {cut!r}",
            kind="cut",
            name=cut,
            exists=sorted(bundle.cuts),
            hint=f"publish it with: isthmus cut {bundle.name} --cut …",
        )
    head, tail = _path(bundle, "", cut), _path(bundle, cut, "")
    needed: dict[str, TensorSpec] = {}
    made: set[str] = set()
    for segment in tail:
        needed |= {s.name: s for s in segment.inputs if s.name not in made and s.name not in needed}
        made |= {s.name for s in segment.outputs}
    return Crossing(cut, head, tail, tuple(needed.values()), tuple(s.name for s in bundle.outputs))


def _path(bundle: Bundle, start: str, stop: str) -> tuple[Segment, ...]:
    """The fewest segments from one cut to another; `..` leads past every cut, so it is no part of any."""
    parts = [segment for segment in bundle.segments.values() if segment.id != WHOLE]
    ways: dict[str, tuple[Segment, ...]] = {}
    frontier: list[tuple[str, tuple[Segment, ...]]] = [(start, ())]
    while frontier:
        reached: list[tuple[str, tuple[Segment, ...]]] = []
        for place, way in frontier:
            for segment in parts:
                end = segment.id.stop
                if segment.id.start != place or end in ways or (not end and stop):
                    continue
                ways[end] = (*way, segment)
                reached.append((end, ways[end]))
        if stop in ways:
            return ways[stop]
        frontier = reached
    raise CalibrationError(
        f"{bundle.name} has no segments from {start or 'its inputs'} to {stop or 'its outputs'}",
        cut=stop or start,
        exists=sorted(bundle.segments),
        hint=f"publish it with: isthmus cut {bundle.name} --cut {stop or start}",
    )
