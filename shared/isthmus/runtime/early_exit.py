"""A head and the exit behind it in one call: the branch runs on the head's outputs, and decides what is sent back.

The only place that runs the two together: segment functions, hops in this process and trials of plans all call it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Segment
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import RequestMalformed

if TYPE_CHECKING:  # a router with remote hops alone never loads onnxruntime
    from isthmus.runtime.ort_runner import Runner

_OUTPUTS = frozenset((EXIT_SCORES, EXIT_CONFIDENCE))


def sure_rows(confidence: Array, threshold: float) -> Array:
    """For each row whether its early prediction stands; a confidence of NaN is not sure.

    Compared in float64: numpy would round the threshold to the confidence's float32, to either side.
    """
    sure: Array = np.asarray(confidence, np.float64) >= threshold
    return sure


def is_sure(confidence: Array, threshold: float) -> bool:
    """Whether every row of a request is sure; a request without rows is not."""
    return bool(confidence.size and sure_rows(confidence, threshold).all())


def stands(early: Mapping[str, Array], threshold: float) -> bool:
    """Whether the branch's answer is the result: every row is sure, and no score is NaN."""
    return is_sure(early[EXIT_CONFIDENCE], threshold) and not np.isnan(early[EXIT_SCORES]).any()


def branch_id(segment: str) -> SegmentId:
    """The id of the exit's branch at the end of a segment, or of a variant of the segment.

    Raises:
        RequestMalformed: the segment ends the model, so that no exit is behind it.
    """
    cut = SegmentId.parse(segment).stop
    if not cut:
        raise RequestMalformed(f"the frame names an exit behind segment {segment}, which ends the model")
    return SegmentId(cut, cut)


def checked_branch(branch: Segment) -> Segment:
    """A branch, provided that it is a classifier's.

    Raises:
        RequestMalformed: the branch gives no scores with their confidence, as that of a language model.
    """
    if {spec.name for spec in branch.outputs} != _OUTPUTS:
        raise RequestMalformed(f"the frame names an exit, and the branch {branch.id} drafts tokens: it answers nothing")
    return branch


def run_exit(
    branch: Runner, inputs: Mapping[str, Array], outputs: Mapping[str, Array], threshold: float
) -> tuple[dict[str, Array], float]:
    """What a head with an exit gives, and the seconds of the branch.

    `inputs` are the head's, for a boundary tensor that is the model's own input; `outputs` are the head's. Where every
    row is sure the result is the branch's scores and confidence alone: no activations are sent back.

    Raises:
        SegmentError: as `Runner.run`.
    """
    began = time.perf_counter()
    tensors = {**inputs, **outputs}
    early = branch.run({spec.name: tensors[spec.name] for spec in branch.segment.inputs if spec.name in tensors})
    seconds = time.perf_counter() - began
    return (early if stands(early, threshold) else {**outputs, **early}), seconds
