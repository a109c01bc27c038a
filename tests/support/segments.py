"""Segments of a bundle in out_dir, run as the router runs them: it holds every value and hands each what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.runtime.ort import ort
from isthmus.runtime.ort_runner import OrtRunner


def runner(segment: Segment, files: Mapping[str, Path]) -> OrtRunner:
    return OrtRunner(files[segment.graph.digest], segment, providers=("CPUExecutionProvider",), threads=1)


def run_partition(
    bundle: Bundle, files: Mapping[str, Path], cuts: Sequence[str], inputs: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The model's outputs for each of `inputs`, through the segments between `cuts`."""
    runners = [runner(segment, files) for segment in bundle.partition(cuts)]
    results = []
    for arrays in inputs:
        values = dict(arrays)
        for each in runners:
            values.update(each.run({spec.name: values[spec.name] for spec in each.segment.inputs}))
        results.append({spec.name: values[spec.name] for spec in bundle.outputs})
    return results


def run_whole(path: Path, inputs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The outputs of the ONNX file at `path`, run as it is."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken, given = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
    return [dict(zip(given, session.run(given, {n: a[n] for n in taken}), strict=True)) for a in inputs]


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The largest difference of any output, relative to that output's largest magnitude."""
    assert a.keys() == b.keys()
    found = 0.0
    for name, whole in a.items():
        assert whole.shape == b[name].shape
        assert whole.dtype == b[name].dtype
        scale = float(np.abs(whole.astype(np.float64)).max(initial=0)) or 1.0
        found = max(found, float(np.abs(whole.astype(np.float64) - b[name]).max(initial=0)) / scale)
    return found
