"""Cuts of graphs nobody drew: for any graph and any upstream half, what crosses is enough and nothing leaks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus_tools.graph import build, cut_at, cuts, open_model
from isthmus_tools.graph.cuts import ancestors, boundary_values
from support.random_graphs import graphs
from support.segments import difference, run_partition, run_whole


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(graphs(), st.data())
def test_any_cut_of_any_graph_is_the_whole(proto: onnx.ModelProto, data: st.DataObject) -> None:
    inputs = [{"x": np.array([0.3], np.float32), "z": np.array([-0.7], np.float32)}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.onnx"
        onnx.save(proto, path)
        model = open_model(path)
        every = cuts(model)
        partitions = [[c] for c in every[::3]]
        if len(every) > 1:
            partitions.append([every[0], every[-1]])
        made = [v for node, keep in zip(model.nodes, model.dynamic, strict=True) if keep for v in node.outputs]
        if made:
            upstream = ancestors(model, [data.draw(st.sampled_from(made))])
            crossing = boundary_values(model, upstream)
            if crossing and ancestors(model, crossing) == upstream:
                partitions.append([cut_at(model, [str(v.name) for v in crossing], "drawn")])
        bundle, files = build(model, "random", folder, partitions=partitions)
        whole = run_whole(path, inputs)[0]
        for partition in [[], *partitions]:
            split = run_partition(bundle, files, [c.name for c in partition], inputs)[0]
            assert difference(whole, split) < 1e-6
