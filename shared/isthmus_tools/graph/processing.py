"""Whether a model's declared pre- and post-processing fit it, tried with a grey picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.tensors import TensorSpec, describe
from isthmus.errors import IsthmusError, ModelError
from isthmus.processing import classify, image_spec
from isthmus_tools.graph.dry_run import Case
from isthmus_tools.graph.model import Model

_SIDE = 256
"""Of the grey picture, where the model does not say how large a picture it takes."""
_MAX_SIDE = 4096


def check_specs(
    model: Model,
    preprocess: Mapping[str, Any] | None,
    postprocess: Mapping[str, Any] | None,
    labels: Sequence[str] | None,
) -> None:
    """Refuse processing that cannot be carried out as written, or names tensors that the model does not have.

    Raises:
        ModelError: says what is wrong.
    """
    if preprocess is not None:
        image_spec.validate_spec(preprocess)
        inputs = [str(v.name) for v in model.inputs]
        if (named := preprocess["input"]) not in inputs:
            raise ModelError(
                f"preprocess makes the input {named!r}; the model takes {', '.join(inputs)}", exists=inputs
            )
        if others := [n for n in inputs if n != named]:
            raise ModelError(
                f"preprocess makes {named} of a photo, and nothing makes {', '.join(others)}",
                inputs=inputs,
                hint="leave preprocess out: such a model takes tensors",
            )
    if labels is not None and not (labels and all(isinstance(label, str) for label in labels)):
        raise ModelError("the labels are not a list of at least one class name")
    if postprocess is not None:
        classify.validate_spec(postprocess)
        outputs = [str(v.name) for v in model.outputs]
        if (named := postprocess["output"]) not in outputs:
            raise ModelError(
                f"postprocess reads the output {named!r}; the model gives {', '.join(outputs)}", exists=outputs
            )


def grey_picture(model: Model, preprocess: Mapping[str, Any]) -> Case:
    """The model's input as `preprocess` makes it of a grey picture.

    Raises:
        ModelError: what it makes is not what the model takes.
    """
    from isthmus.processing import image

    spec = model.specs[preprocess["input"]]
    made = image_spec.made_shape(preprocess)
    if made is not None and math.prod(made) > 3 * image.MAX_PIXELS:
        raise ModelError(
            f"preprocess makes {math.prod(made) // 3} pixels of any picture; at most {image.MAX_PIXELS} are decoded",
            limit=image.MAX_PIXELS,
        )
    if made is not None and not _fits(made, spec):
        raise ModelError(
            f"preprocess does not fit the model: it makes {describe(preprocess['dtype'], made, spec.name)}; the model"
            f" takes {describe(spec.dtype, spec.shape, spec.name)}",
            tensor=spec.name,
        )
    picture = image.grey_picture(*_sides(model, spec, preprocess))
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused below
            array: Array = image.preprocess(picture, preprocess, input=spec, max_pixels=image.MAX_PIXELS)
    except IsthmusError as e:
        raise ModelError(f"preprocess does not fit the model: {e.message}", **e.facts) from e
    if not np.isfinite(np.asarray(array, np.float64)).all():
        raise ModelError("preprocess makes numbers that are not finite of a grey picture", tensor=spec.name)
    return Case("a grey picture", {spec.name: array})


def _fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        isinstance(dim, str) or dim == n for dim, n in zip(spec.shape, shape, strict=True)
    )


def check_classes(outputs: Mapping[str, Array], postprocess: Mapping[str, Any], labels: Sequence[str] | None) -> None:
    """Refuse post-processing that the model's own output does not suit.

    Raises:
        ModelError: the output is no table of classes, or has another number of them than there are labels.
    """
    try:
        classify.table_of(outputs[postprocess["output"]], postprocess, labels)
    except IsthmusError as e:
        raise ModelError(f"postprocess does not fit the model: {e.message}", **e.facts) from e


def _sides(model: Model, spec: TensorSpec, preprocess: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a picture like those that the model takes."""
    layout = next(step["to"] for step in preprocess["steps"] if step["op"] == "layout")
    shape = model.binding[spec.name]
    if len(shape) != 4:
        return _SIDE, _SIDE
    height, width = shape[2:] if layout == "NCHW" else shape[1:3]
    return min(max(height, 1), _MAX_SIDE), min(max(width, 1), _MAX_SIDE)
