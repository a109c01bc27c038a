"""The graph that a runtime made of a segment's: its nodes and what joins them, without weights."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from isthmus.errors import ModelError


@dataclass(frozen=True)
class OptimisedNode:
    """One node; names of values and nodes are the original's where the runtime kept them."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_optimised(data: bytes) -> tuple[OptimisedNode, ...]:
    """The nodes of an ONNX model's graph, in its order; weights beside it are not looked for.

    Raises:
        ModelError: not an ONNX model.
    """
    try:
        graph = onnx.ModelProto.FromString(data).graph
    except DecodeError as e:
        raise ModelError(f"the optimised graph is not an ONNX model: {e}") from e
    return tuple(
        OptimisedNode(n.name, n.op_type, tuple(i for i in n.input if i), tuple(o for o in n.output if o))
        for n in graph.node
    )
