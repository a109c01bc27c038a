"""Learn a codec table for every activation at the cuts of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.fidelity import TOP1, Measure
from isthmus.codecs import is_activation
from isthmus.codecs.transform.rows import RowTable, read_table
from isthmus.codecs.transform.table import PlaneTable
from isthmus.errors import CalibrationError
from isthmus.pipeline.agreement import are_probabilities
from isthmus.wire import frame as frames
from isthmus_tools.calibration.boundary import MAX_FRAME_BYTES, CutBoundary, SegmentExecutor, Spool
from isthmus_tools.calibration.fisher import (
    MAX_SECONDS,
    PROGRESS_UNITS,
    Loss,
    Sensitivity,
    TensorTables,
    equalise_steps,
    measure_sensitivity,
)
from isthmus_tools.calibration.layouts import row_layout
from isthmus_tools.calibration.rate_distortion import learn_table
from isthmus_tools.calibration.rows import RowModel, Rows, learn_rows
from isthmus_tools.calibration.transforms import STEPS
from isthmus_tools.progress import Progress, silent

# Masks, constants and flags: smaller by exact codecs than by a table.
_MAX_DISTINCT = 16
# Rotations grow with the square of the channels: beyond, learning takes minutes and a table has megabytes.
_MAX_TOKEN_CHANNELS = 1024
# Of the channels' variances, added before the KLT: the tokens of a text are few beside the covariances of its channels.
_RIDGE = 0.3
# A first token of thousands of times the others' magnitude would set the unit of all steps.
_MASSIVE = 8
# A part of each sample tells masks from activations, and finding distinct values sorts.
_MAX_VALUES_PER_SAMPLE = 4096


def learn_tables(
    boundaries: Sequence[CutBoundary],
    spool: Spool,
    executor: SegmentExecutor,
    measure: Measure,
    progress: Progress = silent,
    *,
    max_s: float = MAX_SECONDS,
) -> tuple[TensorTables, dict[str, str]]:
    """Learn a table for each activation, at the first of its cuts; the second result gives reasons for tensors without.

    Units: `max_s` bounds the tail runs that estimate a tensor's sensitivity, in seconds.
    """
    tables: TensorTables = {}
    skipped: dict[str, str] = {}
    loss = _loss(measure, spool.prediction)
    for number, boundary in enumerate(boundaries, 1):
        in_tail = any(s.name == measure.output for segment in boundary.tail for s in segment.outputs)
        samples = spool.samples(boundary.cut)
        shuffled, order = samples.shuffled()
        sensitivities: dict[str, Sensitivity] = {}
        activations = [s.name for s in boundary.tensors if is_activation(s)]
        for index, tensor in enumerate(activations):
            if tensor in tables or tensor in skipped:
                continue
            if reason := _no_activation(samples.tensor(tensor)):
                skipped[tensor] = reason
                continue
            try:
                estimate = measure_sensitivity(
                    partial(boundary.tail_outputs, executor),
                    shuffled,
                    tensor,
                    output=measure.output if in_tail else None,
                    loss=loss if in_tail else "values",
                    scales=measure.scales,
                    max_s=max_s,
                    progress=_overall(
                        progress, number - 1 + index / len(activations), len(activations), len(boundaries)
                    ),
                    stage=f"cut {number} of {len(boundaries)}: learning {tensor}",
                )
                sensitivities[tensor] = estimate.in_order(order)
                tables[tensor] = learn_table(samples.tensor(tensor), sensitivities[tensor])
            except CalibrationError as e:
                skipped[tensor] = e.message
        equalise_steps(tables, sensitivities)
    return tables, skipped


def _overall(progress: Progress, cuts_done: float, tensors: int, cuts: int) -> Progress:
    """Progress of one tensor as that of all cuts, so that the time left is that of all cuts."""

    def report(stage: str, done: int = 0, total: int = 0) -> None:
        share = done / total if total else 0.0
        progress(stage, round(PROGRESS_UNITS * (cuts_done + share / tensors)), PROGRESS_UNITS * cuts)

    return report


def learn_token_table(samples: Sequence[Array]) -> RowTable:
    """Learn the table of hidden states, (1, tokens, channels) each: one cluster, since a token may be a whole tensor.

    Without sensitivities: a run of the tail for each channel would take hours on a language model.

    Raises:
        CalibrationError: too many channels, or values that are not finite.
    """
    tokens = np.concatenate([sample[0] for sample in samples])
    if tokens.shape[1] > _MAX_TOKEN_CHANNELS:
        raise CalibrationError(f"it has {tokens.shape[1]} channels; tables are learned for up to {_MAX_TOKEN_CHANNELS}")
    sizes = np.linalg.norm(tokens, axis=1)
    usual = np.ascontiguousarray(tokens[sizes <= _MASSIVE * np.median(sizes)][None])
    return learn_rows(Rows.of([usual], row_layout(usual)), RowModel(1, True, _RIDGE), None, STEPS)


def stored_table(table: PlaneTable | RowTable) -> tuple[bytes, object]:
    """A table's bytes in the bundle, and the table that functions read back: scores must be of the rounded values."""
    data = frames.encode(frames.Frame(table.to_arrays()))
    return data, read_table(frames.decode(data, max_bytes=MAX_FRAME_BYTES).tensors)


def _loss(measure: Measure, prediction: Mapping[str, Array]) -> Loss:
    """The kind of a measure's output; scores of classes may be a softmax's already."""
    if measure.kind != TOP1:
        return "values"
    return "probabilities" if are_probabilities(prediction[measure.output].astype(np.float64)) else "classes"


def _no_activation(samples: Iterable[Array]) -> str:
    """Why a float tensor gets no table; empty for an activation."""
    distinct: set[float] = set()
    for array in samples:
        if not np.isfinite(array).all():
            return "it holds values that are not finite"
        distinct.update(np.unique(array.ravel()[:_MAX_VALUES_PER_SAMPLE]).tolist())
        if len(distinct) > _MAX_DISTINCT:
            return ""
    return f"it holds {len(distinct)} different values"
