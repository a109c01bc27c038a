"""Where a model can be cut, and what crosses there.

A *prefix cut* lies after one node in topological order and is named by that node's position. Any other cut is given by
its tensors. Static values never cross, nor do outputs that the head has made: the router holds those. A graph input
that the tail still needs crosses like any other tensor, and is listed in `passing`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from isthmus.artifacts import bundle
from isthmus.artifacts.cuts import CutText, is_cut_name, parse_cut, parse_partition
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import CutError, UnboundedCut, UnknownValue
from isthmus.wire.frame import entry_bytes, why_not_together
from isthmus_tools.graph.model import Model

_SIMILAR = 5
_MAX_LEAKS = 20
_MAX_FUSED = 3
"""Operators between a DequantizeLinear and a QuantizeLinear that are looked at as one group."""


@dataclass(frozen=True)
class CutInfo:
    """One cut of one model.

    `bytes` are those of all tensors under the model's binding; `passing` names the graph inputs among them, which no
    segment has to produce. `position`, `node` and `op` tell the last node upstream in topological order; `position` is
    None where the cut is no prefix of that order.
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
        """This cut as a manifest holds it."""
        return bundle.Cut(self.name, self.tensors, self.bytes, self.macs_before, self.position)


def cuts(model: Model) -> list[CutInfo]:
    """Every prefix cut, in order; where something crosses that no frame carries there is no cut.

    Takes time linear in the graph and in the tensors that it lists.
    """
    last = _last_uses(model)
    live = {v: None for v in model.inputs if last.get(v, -1) >= 0}
    weight, uncarried = sum(model.nbytes(v) for v in live), 0
    entries = _entries(model, (*model.outputs, *live))
    found, macs = [], 0
    for i, node in enumerate(model.nodes):
        if not model.dynamic[i]:
            continue
        macs += model.macs[i]
        for value in node.outputs:
            if last.get(value, -1) > i:
                live[value] = None
                carried = value.name in model.specs
                weight += model.nbytes(value) if carried else 0
                entries += _entries(model, [value])
                uncarried += not carried
        for value in model.uses[i]:
            if value in live and last[value] <= i:
                del live[value]
                carried = value.name in model.specs
                weight -= model.nbytes(value) if carried else 0
                entries -= _entries(model, [value])
                uncarried -= not carried
        if live and not uncarried and not why_not_together(len(live) + len(model.outputs), entries):
            found.append(_info(model, str(i), live, weight, macs, i))
    return found


def within_quantised_operators(model: Model) -> frozenset[ir.Value]:
    """Values between a DequantizeLinear and the QuantizeLinear after it.

    onnxruntime makes one integer operator of DequantizeLinear, operator and QuantizeLinear. A cut at such a value parts
    them: the segments compute in float what the whole graph computes in integers, and differ by its rounding.
    """
    found: set[ir.Value] = {
        v for i, n in enumerate(model.nodes) if model.dynamic[i] and n.op_type == "DequantizeLinear" for v in n.outputs
    }
    for i, node in enumerate(model.nodes):
        if not model.dynamic[i] or node.op_type != "QuantizeLinear":
            continue
        # An operator, and perhaps an activation after it, is what one group holds.
        level, path = [v for v in node.inputs[:1] if v is not None], list[ir.Value]()
        for _ in range(_MAX_FUSED):
            path += level
            producers = [p for v in level if (p := v.producer()) is not None and model.dynamic[model.positions[p]]]
            if any(p.op_type == "QuantizeLinear" for p in producers):
                break
            level = [v for p in producers for v in p.inputs if v is not None and not model.is_static(v)]
            if any(v in found for v in level):
                found.update(path)
                break
    return frozenset(found)


def cut_at(model: Model, tensors: Iterable[str], name: str | None = None) -> CutInfo:
    """The cut whose crossing tensors are exactly `tensors`; the head is all that they are computed from.

    Where that is no cut, the head is that of the first prefix cut which these tensors cross.

    `name` is derived from the tensors if it is not given.

    Raises:
        UnknownValue: the graph has no such value.
        UnboundedCut: values that the tail needs reach it around the cut; names them.
        CutError: a tensor is static, needed by nothing after the cut, or nothing a frame can carry; or a bad name.
    """
    names = list(dict.fromkeys(tensors))
    if not names:
        raise CutError("the cut names no tensor and no position", hint="list the cuts with: isthmus cuts MODEL")
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
    crossing = crossing_values(model, upstream)
    if name is not None and not is_cut_name(name):
        raise CutError(f"{name!r} cannot name a cut", hint="use 1 to 63 letters, digits, '_' and '-'")
    if leaks := [str(v.name) for v in crossing if v not in values]:
        # A prefix may also hold the nodes that make outputs of what leaks, which these tensors are not computed from.
        for cut in cuts(model):
            if {t.name for t in cut.tensors} == set(names):
                return replace(cut, name=name or derived_name(names))
        raise UnboundedCut(
            f"a cut at {', '.join(names)} does not separate the graph; around it goes {_listed(leaks)}",
            leaks=leaks,
            hint="add them to the cut, or cut where fewer paths run side by side: isthmus cuts MODEL",
        )
    if unused := [n for n, v in zip(names, values, strict=True) if v not in crossing]:
        raise CutError(
            f"nothing after the cut needs {_listed(unused)}", unused=unused, hint="leave it out, or cut earlier"
        )
    _check_together(model, values)
    if not upstream:
        raise CutError("only inputs cross this cut, so nothing would run before it", tensors=names)
    macs = sum(model.macs[i] for i in upstream)
    end = max(upstream)
    prefix = len(upstream) == sum(model.dynamic[: end + 1])
    weight = sum(model.nbytes(v) for v in crossing)
    info = _info(model, name or derived_name(names), crossing, weight, macs, end)
    return info if prefix else CutInfo(**{**info.__dict__, "position": None})


def resolve_cut(model: Model, text: str) -> CutInfo:
    """The cut that a person means: a position such as `31`, or tensors such as `a` or `a,b`, or `NAME=a,b`.

    A text that is a value's name is that value, whatever it holds; only a number is a position first.

    Raises:
        UnknownValue: no prefix cut lies there, or no such value.
        CutError, UnboundedCut: as `cut_at`.
    """
    return _cut_of(model, parse_cut(text, model.values.keys()))


def resolve_partition(model: Model, text: str, published: Mapping[str, bundle.Cut]) -> list[CutInfo | bundle.Cut]:
    """The cuts of a whole partition such as `20/40`: each as in `resolve_cut`, or the name of a `published` one.

    Raises:
        UnknownValue, CutError, UnboundedCut: as `resolve_cut`.
    """
    found: list[CutInfo | bundle.Cut] = []
    for cut in parse_partition(text, {*model.values, *published}):
        known = published.get(cut.parts[0]) if len(cut.parts) == 1 and cut.name is None else None
        found.append(_cut_of(model, cut) if known is None else published_cut(model, known))
    return found


def published_cut(model: Model, cut: bundle.Cut) -> CutInfo | bundle.Cut:
    """A cut of the model's bundle, as the functions of this module take it."""
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
            hint=f"positions of cuts in order are separated by '/': {'/'.join(text.parts)}",
        )
    return cut_at(model, text.parts, text.name)


def cut_after(model: Model, position: int) -> CutInfo:
    """The prefix cut after the node at `position`.

    Raises:
        UnknownValue: there is no cut: no such node, a static one, or nothing crosses behind it.
        CutError: something crosses that no frame carries.
    """
    if position >= len(model.nodes) or not model.dynamic[position]:
        raise _no_cut(model, position)
    upstream = prefix(model, position)
    crossing = crossing_values(model, upstream)
    if not crossing:
        raise _no_cut(model, position)
    for value in crossing:
        _check_carried(model, value)
    _check_together(model, crossing)
    macs = sum(model.macs[i] for i in upstream)
    return _info(model, str(position), crossing, sum(model.nbytes(v) for v in crossing), macs, position)


def upstream_of(model: Model, cut: CutInfo | bundle.Cut) -> frozenset[int]:
    """Positions of the dynamic nodes that run before `cut`.

    Raises:
        UnknownValue: the cut is not of this model.
    """
    if cut.position is not None:
        return prefix(model, cut.position)
    return ancestors(model, [_value(model, t.name) for t in cut.tensors])


def prefix(model: Model, position: int) -> frozenset[int]:
    """Positions of the dynamic nodes up to and including `position`."""
    return frozenset(i for i, dynamic in enumerate(model.dynamic[: position + 1]) if dynamic)


def ancestors(model: Model, values: Iterable[ir.Value]) -> frozenset[int]:
    """Positions of the dynamic nodes that `values` are computed by."""
    found: set[int] = set()
    stack = list(values)
    while stack:
        producer = stack.pop().producer()
        if producer is None:
            continue
        i = model.positions[producer]
        if i not in found and model.dynamic[i]:
            found.add(i)
            stack.extend(model.uses[i])
    return frozenset(found)


def crossing_values(model: Model, upstream: Collection[int]) -> dict[ir.Value, None]:
    """Dynamic values that the nodes outside `upstream` read and do not make, in the order in which they are made."""
    needed = {
        v
        for i, used in enumerate(model.uses)
        if model.dynamic[i] and i not in upstream
        for v in used
        if not model.is_static(v)
    }
    made = (v for i in sorted(upstream) for v in model.nodes[i].outputs)
    return dict.fromkeys(v for v in (*model.inputs, *made) if v in needed)


def derived_name(tensors: Sequence[str]) -> str:
    """A cut's name made from its tensors' names: one plain name as it is, else a readable part and a short hash."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", tensors[0]).strip("-_")[:40] or "cut"
    if len(tensors) == 1 and readable == tensors[0] and not readable.isdecimal():
        return readable
    return f"{readable}-{hashlib.sha256(chr(0).join(sorted(tensors)).encode()).hexdigest()[:8]}"


def _last_uses(model: Model) -> dict[ir.Value, int]:
    return {v: i for i, used in enumerate(model.uses) if model.dynamic[i] for v in used}


def _info(model: Model, name: str, crossing: Iterable[ir.Value], weight: int, macs: int, last: int) -> CutInfo:
    values = tuple(crossing)
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
    similar = difflib.get_close_matches(name, [n for n in model.values if n], _SIMILAR, 0.5)
    if not similar:
        similar = [n for n in model.values if name.lower() in n.lower()][:_SIMILAR]
    raise UnknownValue(
        f"the graph has no value {name!r}",
        unknown=name,
        similar=similar,
        hint=f"did you mean {' or '.join(similar)}?" if similar else "list them with: isthmus cuts MODEL",
    )


def _no_cut(model: Model, position: int) -> UnknownValue:
    last = _last_uses(model)
    there = [i for i, node in enumerate(model.nodes) if model.dynamic[i] and i < max(last.values(), default=-1)]
    near = [str(i) for i in sorted(sorted(there, key=lambda i: abs(i - position))[:_SIMILAR])]
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
    # A head gives what crosses and the model's outputs that it has made.
    together = (*model.outputs, *values)
    if reason := why_not_together(len(together), _entries(model, together)):
        raise CutError(
            f"one frame would carry what crosses and the model's outputs: {reason}",
            tensors=len(together),
            hint="cut where fewer paths run side by side: isthmus cuts MODEL",
        )


def _entries(model: Model, values: Iterable[ir.Value]) -> int:
    """Bytes that the entries of `values` take in a frame's header, of those that one carries."""
    specs = (model.specs.get(str(v.name)) for v in values)
    return sum(entry_bytes(spec.name, len(spec.shape)) for spec in specs if spec is not None)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LEAKS
    return ", ".join(names[:_MAX_LEAKS]) + (f" and {more} more" if more > 0 else "")
