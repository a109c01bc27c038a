"""Cuts of a model: sets of boundary tensors that separate the graph, their bytes, and the work before them.

A *prefix cut* lies after a node in topological order and is named by that node's position. Any other cut is given by
its boundary tensors, a vertex cut of the data-flow graph: every path from inputs to later nodes passes through them.
Where a single tensor suffices, its producer is an articulation point, and dominates all later nodes. Static values
never cross, nor do outputs that the head computes: the router holds those. A graph input that the tail reads is a
boundary tensor like any other, listed in `passing`.

Source: docs/explanation/cuts.md; Hu et al., "Dynamic Adaptive DNN Surgery" (INFOCOM 2019), for cuts of a DAG.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import onnx_ir as ir

from isthmus.artifacts import bundle
from isthmus.artifacts.cuts import SYNTAX, CutText, is_cut_name, parse_cut, parse_partition
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import CutError, UnboundedCut, UnknownValue
from isthmus.wire.frame import entry_bytes, why_not_together
from isthmus_tools.graph.model import Model

# Of suggestions and of names in a message: more would hide the reason.
_MAX_SIMILAR = 5
_MAX_LISTED = 20
# onnxruntime fuses an operator, and perhaps an activation after it, between a DequantizeLinear and a QuantizeLinear.
_MAX_FUSED = 3
# Default cuts leave each side at least a tenth of the work: a head of a few nodes saves no bytes worth a hop.
_DEFAULT_SHARE = (0.1, 0.9)


@dataclass(frozen=True)
class CutInfo:
    """A cut of a model.

    `bytes` are those of all boundary tensors under the model's binding; `passing` names the graph inputs among the
    tensors, which no segment produces. `position`, `node` and `op` describe the last upstream node in topological
    order; `position` is None for cuts that are no prefix of that order.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    bytes: int
    macs_before: float
    position: int | None
    node: str
    op: str
    passing: tuple[str, ...] = ()

    def manifest(self) -> bundle.Cut:
        """The cut as a bundle's manifest holds it."""
        return bundle.Cut(self.name, self.tensors, self.bytes, self.macs_before, self.position)


AnyCut: TypeAlias = CutInfo | bundle.Cut


def cuts(model: Model) -> list[CutInfo]:
    """Every prefix cut, in order, except where no frame carries the boundary tensors.

    Time: linear in the graph and in the listed tensors, by a sweep over live values.
    """
    last = _last_uses(model)
    live = {v: None for v in model.inputs if last.get(v, -1) >= 0 and v.name not in model.local}
    weight, uncarried = sum(model.nbytes(v) for v in live), 0
    outputs = _carried_outputs(model)
    entries = _entries(model, (*outputs, *live))
    infos, macs = [], 0

    def count(value: ir.Value, sign: int) -> None:
        nonlocal weight, uncarried, entries
        is_carried = value.name in model.specs
        weight += sign * (model.nbytes(value) if is_carried else 0)
        entries += sign * _entries(model, [value])
        uncarried += sign * (not is_carried)

    for i, node in enumerate(model.nodes):
        if not model.dynamic[i]:
            continue
        macs += model.macs[i]
        for value in node.outputs:
            if last.get(value, -1) > i:
                live[value] = None
                count(value, 1)
        for value in model.uses[i]:
            if value in live and last[value] <= i:
                del live[value]
                count(value, -1)
        if live and not uncarried and not why_not_together(len(live) + len(outputs), entries):
            infos.append(_info(model, str(i), live, weight, macs, i))
    return infos


def default_cuts(model: Model) -> list[CutInfo]:
    """Candidates for a bundle's default cut, the narrowest first; cuts inside fused quantised operators come last.

    Prefix cuts with 10% to 90% of the MACs before them, else of the nodes, else all: a model may have no MACs.
    """
    every = cuts(model)
    low, high = _DEFAULT_SHARE
    by_macs = [c for c in every if low <= c.macs_before <= high]
    by_nodes = [c for c in every if c.position is not None and low <= (c.position + 1) / len(model.nodes) <= high]
    fused = {str(v.name) for v in within_quantised_operators(model)}
    return sorted(by_macs or by_nodes or every, key=lambda c: (any(t.name in fused for t in c.tensors), c.bytes))


def narrowest(model: Model) -> CutInfo | None:
    """The first of `default_cuts`; None for a model without a cut."""
    return next(iter(default_cuts(model)), None)


def within_quantised_operators(model: Model) -> frozenset[ir.Value]:
    """Values between a DequantizeLinear and the following QuantizeLinear.

    onnxruntime fuses DequantizeLinear, operator and QuantizeLinear to a single integer operator. A cut at such a value
    prevents the fusion: segments compute in float, the whole graph in integers, and predictions differ by rounding.
    """
    values: set[ir.Value] = {
        v for i, n in enumerate(model.nodes) if model.dynamic[i] and n.op_type == "DequantizeLinear" for v in n.outputs
    }
    for i, node in enumerate(model.nodes):
        if not model.dynamic[i] or node.op_type != "QuantizeLinear":
            continue
        level, path = [v for v in node.inputs[:1] if v is not None], list[ir.Value]()
        for _ in range(_MAX_FUSED):
            path += level
            producers = [p for v in level if (p := v.producer()) is not None and model.dynamic[model.positions[p]]]
            if any(p.op_type == "QuantizeLinear" for p in producers):
                break
            level = [v for p in producers for v in p.inputs if v is not None and not model.is_static(v)]
            if any(v in values for v in level):
                values.update(path)
                break
    return frozenset(values)


def cut_at(model: Model, tensors: Iterable[str], name: str | None = None) -> CutInfo:
    """The cut with exactly the boundary `tensors`; the head is their ancestors.

    If the ancestors alone leave other paths open, the head is that of the first prefix cut with these boundary tensors.
    Without `name`, the name derives from the tensors.

    Raises:
        UnknownValue: the graph has no such value.
        UnboundedCut: the tensors are no vertex cut; names the values on other paths.
        CutError: a tensor is static, unused after the cut, or not carried by frames; or an invalid name.
    """
    names = list(dict.fromkeys(tensors))
    if not names:
        raise CutError("the cut names no tensor and no position", hint=f"{SYNTAX}; list them: isthmus cuts MODEL")
    values = [_value(model, n) for n in names]
    for value in values:
        if model.is_static(value):
            raise CutError(
                f"{value.name} is the same for every input, so it never crosses a cut",
                tensor=value.name,
                hint="leave it out: each segment that needs it has its own",
            )
        _check_carried(model, value)
    upstream = ancestors(model, values)
    boundary = boundary_values(model, upstream)
    if name is not None and not is_cut_name(name):
        raise CutError(f"{name!r} cannot name a cut", hint="use 1 to 63 letters, digits, '_' and '-'")
    if leaks := [str(v.name) for v in boundary if v not in values]:
        # A prefix also holds nodes that turn leaking values into outputs, which are no ancestors of these tensors.
        for cut in cuts(model):
            if {t.name for t in cut.tensors} == set(names):
                return replace(cut, name=name or derived_name(names))
        raise UnboundedCut(
            f"a cut at {', '.join(names)} does not separate the graph; around it goes {_listed(leaks)}",
            leaks=leaks,
            hint="add them to the cut, or cut where fewer paths run side by side: isthmus cuts MODEL",
        )
    if unused := [n for n, v in zip(names, values, strict=True) if v not in boundary]:
        raise CutError(
            f"nothing after the cut needs {_listed(unused)}", unused=unused, hint="leave it out, or cut earlier"
        )
    _check_together(model, values)
    # A head without nodes would return its inputs: the tail alone is the whole model.
    if not upstream:
        raise CutError("only inputs cross this cut, so nothing would run before it", tensors=names)
    macs = sum(model.macs[i] for i in upstream)
    end = max(upstream)
    # Equal counts: all dynamic nodes up to the last upstream node are upstream, so the position names the cut.
    weight = sum(model.nbytes(v) for v in boundary)
    info = _info(model, name or derived_name(names), boundary, weight, macs, end)
    is_prefix = len(upstream) == sum(model.dynamic[: end + 1])
    return info if is_prefix else replace(info, position=None)


def resolve_cut(model: Model, text: str) -> CutInfo:
    """Parse a cut: a position such as `31`, tensors such as `a` or `a,b`, or `NAME=a,b`.

    A text that equals a value's name is that value; a number is first tried as a position.

    Raises:
        UnknownValue: no prefix cut at that position, or no such value.
        CutError, UnboundedCut: as `cut_at`.
    """
    return _cut_of(model, parse_cut(text, model.values.keys()))


def resolve_partition(model: Model, text: str, published: Mapping[str, bundle.Cut]) -> list[AnyCut]:
    """Parse a partition such as `20/40`: each cut as in `resolve_cut`, or the name of a `published` cut.

    Raises:
        UnknownValue, CutError, UnboundedCut: as `resolve_cut`.
    """
    resolved: list[AnyCut] = []
    for cut in parse_partition(text, {*model.values, *published}):
        existing = published.get(cut.parts[0]) if len(cut.parts) == 1 and cut.name is None else None
        resolved.append(_cut_of(model, cut) if existing is None else published_cut(model, existing))
    return resolved


def published_cut(model: Model, cut: bundle.Cut) -> AnyCut:
    """A cut of the model's bundle; cuts without a position are located in the graph by their tensors."""
    return cut if cut.position is not None else cut_at(model, [t.name for t in cut.tensors], cut.name)


def _cut_of(model: Model, text: CutText) -> CutInfo:
    # Exporters that number their values give a graph names such as "497": a position where there is that node.
    number = text.position
    if number is not None and (number < len(model.nodes) or text.parts[0] not in model.values):
        return cut_after(model, number)
    if len(text.parts) > 1 and all(p.isdecimal() and p not in model.values for p in text.parts):
        raise UnknownValue(
            f"{','.join(text.parts)} is one cut through tensors of these names, and the graph has none of them",
            unknown=",".join(text.parts),
            hint=SYNTAX,
        )
    return cut_at(model, text.parts, text.name)


def cut_after(model: Model, position: int) -> CutInfo:
    """The prefix cut after the node at `position`.

    Raises:
        UnknownValue: no such node, a static node, or no boundary tensor behind the node.
        CutError: no frame carries a boundary tensor.
    """
    if position >= len(model.nodes) or not model.dynamic[position]:
        raise _no_cut(model, position)
    upstream = prefix(model, position)
    boundary = boundary_values(model, upstream)
    if not boundary:
        raise _no_cut(model, position)
    for value in boundary:
        _check_carried(model, value)
    _check_together(model, boundary)
    macs = sum(model.macs[i] for i in upstream)
    return _info(model, str(position), boundary, sum(model.nbytes(v) for v in boundary), macs, position)


def upstream_of(model: Model, cut: AnyCut) -> frozenset[int]:
    """Positions of the dynamic nodes before `cut`.

    Raises:
        UnknownValue: the cut belongs to another model.
    """
    if cut.position is not None:
        return prefix(model, cut.position)
    return ancestors(model, [_value(model, t.name) for t in cut.tensors])


def prefix(model: Model, position: int) -> frozenset[int]:
    """Positions of the dynamic nodes up to and including `position`."""
    return frozenset(i for i, dynamic in enumerate(model.dynamic[: position + 1]) if dynamic)


def ancestors(model: Model, values: Iterable[ir.Value]) -> frozenset[int]:
    """Positions of the dynamic nodes from which `values` are computed."""
    positions: set[int] = set()
    stack = list(values)
    while stack:
        producer = stack.pop().producer()
        if producer is None:
            continue
        i = model.positions[producer]
        if i not in positions and model.dynamic[i]:
            positions.add(i)
            stack.extend(model.uses[i])
    return frozenset(positions)


def boundary_values(model: Model, upstream: Collection[int]) -> dict[ir.Value, None]:
    """Dynamic values that nodes outside `upstream` read from inside or from the inputs, in topological order."""
    reads = {
        v
        for i, used in enumerate(model.uses)
        if model.dynamic[i] and i not in upstream
        for v in used
        if not model.is_static(v)
    }
    results = (v for i in sorted(upstream) for v in model.nodes[i].outputs)
    return dict.fromkeys(v for v in (*model.inputs, *results) if v in reads and v.name not in model.local)


def derived_name(tensors: Sequence[str]) -> str:
    """A cut's name from its tensors' names: a single plain name unchanged, else a readable part and a short hash."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", tensors[0]).strip("-_")[:40] or "cut"
    if len(tensors) == 1 and readable == tensors[0] and not readable.isdecimal():
        return readable
    # Sorted, so that the order of the tensors does not change the name.
    return f"{readable}-{hashlib.sha256(chr(0).join(sorted(tensors)).encode()).hexdigest()[:8]}"


def _last_uses(model: Model) -> dict[ir.Value, int]:
    return {v: i for i, used in enumerate(model.uses) if model.dynamic[i] for v in used}


def _info(model: Model, name: str, boundary: Iterable[ir.Value], weight: int, macs: int, last: int) -> CutInfo:
    values = tuple(boundary)
    node = model.nodes[last]
    return CutInfo(
        name=name,
        tensors=tuple(model.specs[str(v.name)] for v in values),
        bytes=weight,
        macs_before=macs / model.total_macs if model.total_macs else 0.0,
        position=last,
        node=str(node.name),
        op=node.op_type,
        passing=tuple(str(v.name) for v in values if v.is_graph_input()),
    )


def _value(model: Model, name: str) -> ir.Value:
    if (value := model.values.get(name)) is not None:
        return value
    # Misspelt names first; else names that contain the text, such as a layer's.
    similar = difflib.get_close_matches(name, [n for n in model.values if n], _MAX_SIMILAR, 0.5)
    if not similar:
        similar = [n for n in model.values if name.lower() in n.lower()][:_MAX_SIMILAR]
    raise UnknownValue(
        f"the graph has no value {name!r}",
        unknown=name,
        similar=similar,
        hint=f"did you mean {' or '.join(similar)}?" if similar else f"{SYNTAX}; list them: isthmus cuts MODEL",
    )


def _no_cut(model: Model, position: int) -> UnknownValue:
    last = max(_last_uses(model).values(), default=-1)
    positions = [i for i, dynamic in enumerate(model.dynamic) if dynamic and i < last]
    near = [str(i) for i in sorted(sorted(positions, key=lambda i: abs(i - position))[:_MAX_SIMILAR])]
    return UnknownValue(
        f"there is no cut after node {position}; the graph's nodes are 0 to {len(model.nodes) - 1}",
        unknown=str(position),
        similar=near,
        hint=f"cuts near it: {', '.join(near)}" if near else "this graph has no cut",
    )


def _check_carried(model: Model, value: ir.Value) -> None:
    if value.name not in model.specs:
        reason = model.refused.get(str(value.name), "it is no plain tensor of numbers")
        raise CutError(
            f"no frame carries {str(value.name)[:200]}: {reason}",
            tensor=value.name,
            hint="cut before it is made or after it is used up",
        )


def _check_together(model: Model, values: Collection[ir.Value]) -> None:
    # A head's frame holds the boundary tensors and the model's outputs that the head computes.
    together = (*_carried_outputs(model), *values)
    if reason := why_not_together(len(together), _entries(model, together)):
        raise CutError(
            f"one frame would carry what crosses and the model's outputs: {reason}",
            tensors=len(together),
            hint="cut where fewer paths run side by side: isthmus cuts MODEL",
        )


def _carried_outputs(model: Model) -> list[ir.Value]:
    return [v for v in model.outputs if v.name not in model.local]


def _entries(model: Model, values: Iterable[ir.Value]) -> int:
    """Bytes of the frame header's entries for those of `values` that frames carry."""
    specs = (model.specs.get(str(v.name)) for v in values)
    return sum(entry_bytes(spec.name, len(spec.shape)) for spec in specs if spec is not None)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
