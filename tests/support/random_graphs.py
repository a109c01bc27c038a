"""Random graphs, as a Hypothesis strategy."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """A graph of 2 to 12 additions and products of two inputs, two weights and each other; several outputs."""
    values = ["x", "z", "small", "large"]
    nodes = []
    for i in range(draw(st.integers(2, 12))):
        a, b = draw(st.sampled_from(values)), draw(st.sampled_from(values[-6:]))
        nodes.append(helper.make_node(draw(st.sampled_from(["Add", "Mul", "Max"])), [a, b], [f"v{i}"]))
        values.append(f"v{i}")
    used = {name for node in nodes for name in node.input}
    outputs = [n.output[0] for n in nodes if n.output[0] not in used or (draw(st.booleans()) and draw(st.booleans()))]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "random",
        [value("x", 1, [1]), value("z", 1, [1])],
        [value(o, 1, None) for o in outputs],
        [
            numpy_helper.from_array(np.array([0.5], np.float32), "small"),
            numpy_helper.from_array(np.linspace(-1, 1, 300, dtype=np.float32), "large"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
