"""The frames of split learning: operations, names of tensors, and codecs of activations and gradients.

A frame names the operation in `segment`, the run (a digest of its configuration) in `bundle`, the edge's process in
`request`, and in `step` the number of optimiser steps before it. Source: docs/reference/training.md, "Split learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.arrays import Array
from isthmus.artifacts.choice import RAW, TRANSFORM_ID, Choice
from isthmus.codecs import Encoding
from isthmus.errors import LearningError, RequestMalformed
from isthmus.pipeline import encode_tensors
from isthmus.wire.frame import Frame, Step

# The vanilla shape has a single call a step, `STEP`; the U-shape two, `FORWARD` and `BACKWARD`.
STEP, FORWARD, BACKWARD = "split/step", "split/forward", "split/backward"
JOIN, SAVE, MARK, PREDICT, WEIGHTS = (f"split/{name}" for name in ("join", "save", "mark", "predict", "weights"))
ACTIVATIONS, GRADIENTS, TARGETS, ROW_WEIGHTS, LOSS = "activations", "gradients", "targets", "weights", "loss"
CHECKPOINTS, INPUT_SHAPE, CLASSES, EPOCH_STEPS = "checkpoints", "input_shape", "classes", "epoch_steps"


@dataclass(frozen=True)
class SplitTerms:
    """The agreement of both sides; `run` is a digest of the configuration, these terms among it.

    With `labels_stay` the last layers, the labels and the loss are at the edge: the U-shape.
    """

    run: str
    labels_stay: bool = False
    activations: Choice = RAW
    gradients: Choice = RAW

    def __post_init__(self) -> None:
        for choice in (self.activations, self.gradients):
            if choice.codec == TRANSFORM_ID or choice.looks:
                raise LearningError(
                    f"{choice} is a codec of calibrated activations, and training changes these with every step",
                    hint="take raw, lossless/3, half/1, bfloat16/1, int8/1, int8-token/1 or int4/1",
                )


def message(operation: str, terms: SplitTerms, position: int, tensors: Mapping[str, Array], process: str) -> Frame:
    """A frame of a run; activations and gradients are encoded as the terms say."""
    choices = {ACTIVATIONS: terms.activations, GRADIENTS: terms.gradients}
    # A tensor whose values a codec cannot represent travels raw.
    encoded = encode_tensors(tensors, {name: Encoding(each.codec, each.quality) for name, each in choices.items()})
    raw = {name: array for name, array in tensors.items() if name not in encoded}
    return Frame(raw, terms.run, operation, process, encoded, step=Step(terms.run, position))


def array_of(tensor: Tensor) -> Array:
    """The tensor's values for a frame."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def tensor_of(frame: Frame, name: str) -> Tensor:
    """The tensor of that name, with memory of its own.

    Raises:
        RequestMalformed: there is none, NaN or infinity in the tensor, or its dtype is bfloat16.
    """
    if (array := frame.tensors.get(name)) is None:
        raise RequestMalformed(f"the frame {frame.segment!r} has no tensor {name!r}", tensor=name)
    try:
        # A copy: the arrays of a frame are views of read-only bytes.
        tensor = torch.from_numpy(array.copy())
    except TypeError as e:  # numpy's bfloat16 is no dtype of torch's
        raise RequestMalformed(f"{name} of the frame {frame.segment!r} is {array.dtype}", tensor=name) from e
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise RequestMalformed(
            f"{name} of the frame {frame.segment!r} hold NaN or infinity",
            tensor=name,
            hint="the training diverged: a lower training.rate, or a finer codec of gradients",
        )
    return tensor


def numbers_of(frame: Frame, name: str) -> list[int]:
    """The whole numbers of that name, an int64 tensor with a single axis.

    Raises:
        RequestMalformed: there are none.
    """
    array = frame.tensors.get(name)
    if array is None or array.dtype != np.int64 or array.ndim != 1:
        raise RequestMalformed(f"the frame {frame.segment!r} has no int64 tensor {name!r} of one axis", tensor=name)
    return [int(number) for number in array]


def number_of(frame: Frame, name: str) -> int:
    """The only number of that name.

    Raises:
        RequestMalformed: there are none, or several.
    """
    numbers = numbers_of(frame, name)
    if len(numbers) != 1:
        raise RequestMalformed(f"{name} of the frame {frame.segment!r} are {len(numbers)} numbers, not 1", tensor=name)
    return numbers[0]


def position_of(frame: Frame) -> int:
    """The number of optimiser steps before the frame.

    Raises:
        RequestMalformed: the frame has no step.
    """
    if frame.step is None:
        raise RequestMalformed(f"the frame {frame.segment!r} names no step of a training")
    return frame.step.position
