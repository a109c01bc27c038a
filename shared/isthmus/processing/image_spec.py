"""The schema of a manifest's `preprocess`, without Pillow. Source: docs/reference/api.md, "Photos"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import MediaUnsupported, ModelError

STEPS = ("resize", "center_crop", "normalize", "layout")
"""The steps in their order, each at most once."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
DTYPES = ("float32", "float16", "bfloat16", "float64", "uint8")


def validate_spec(spec: Mapping[str, Any]) -> None:
    """Check a `preprocess`.

    Raises:
        ModelError: an unknown or missing kind, step, key or value, or steps out of order; the message names the fault.
    """
    _require(isinstance(spec, Mapping), "preprocess is not an object")
    _keys(spec, "preprocess", {"kind", "input", "steps", "dtype"})
    _require(spec["kind"] == "image", f"preprocess kind is {spec['kind']!r}; this version knows 'image'")
    _require(isinstance(spec["input"], str), "preprocess input is not a tensor's name")
    _one_of(spec["dtype"], DTYPES, "preprocess dtype")
    steps = spec["steps"]
    _require(isinstance(steps, list | tuple) and all(isinstance(s, Mapping) for s in steps), "steps is not a list")
    ops = [step.get("op") for step in steps]
    for step, op in zip(steps, ops, strict=True):
        _one_of(op, STEPS, "preprocess step")
        _CHECKS[str(op)](step)
    _require(
        ops == [op for op in STEPS if op in ops],
        f"preprocess steps are {', '.join(map(str, ops))}; each comes at most once, in the order {', '.join(STEPS)}",
    )
    _require("layout" in ops, "preprocess has no layout step; it says NCHW or NHWC")
    _require(not ("normalize" in ops and spec["dtype"] == "uint8"), "preprocess normalizes into uint8")


def photos_refused(bundle: Bundle, lacks: str, instead: str) -> MediaUnsupported:
    """The refusal of a photo: what the bundle lacks for it, and what takes its inputs instead.

    A model of texts has a protocol of its own, and its tensors are of no use to those who have a photo or a text.
    """
    if bundle.text is not None:
        lacks, instead = "is a language model", f"talk with it: isthmus chat {bundle.name}, or /v1/chat/completions"
    elif bundle.embedding is not None:
        lacks, instead = "is an encoder of texts", "send texts to /v1/embeddings"
    else:
        return MediaUnsupported(f"{bundle.name} {lacks}; {instead}", accepted=["Open Inference Protocol"])
    return MediaUnsupported(f"{bundle.name} {lacks} and takes no photos; {instead}", accepted=["OpenAI API"])


def photo_tensor(bundle: Bundle) -> TensorSpec:
    """The input that the bundle's pre-processing computes from a photo.

    Raises:
        MediaUnsupported: the bundle declares no pre-processing.
    """
    if bundle.preprocess is None:
        raise photos_refused(bundle, "declares no pre-processing of photos", "give it tensors")
    name = bundle.preprocess["input"]
    return next(spec for spec in bundle.inputs if spec.name == name)


def made_shape(spec: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of every pre-processed photo; None if that depends on the photo's size."""
    steps = {step["op"]: step for step in spec["steps"]}
    size = steps["center_crop"]["size"] if "center_crop" in steps else steps.get("resize", {}).get("size")
    if size is None:
        return None
    height, width = (int(n) for n in size)
    return (1, 3, height, width) if steps["layout"]["to"] == "NCHW" else (1, height, width, 3)


def has_canvas(spec: Mapping[str, Any]) -> bool:
    """Whether `as_jpeg` can keep the model's part of every image: a crop that no image's resized side cuts."""
    steps = {step["op"]: step for step in spec["steps"]}
    resize, crop = steps.get("resize", {}), steps.get("center_crop")
    if "short_side" in resize:
        return crop is not None and min(crop["size"]) <= resize["short_side"]
    return (
        crop is None or "size" not in resize or all(c <= s for c, s in zip(crop["size"], resize["size"], strict=True))
    )


def _check_resize(step: Mapping[str, Any]) -> None:
    kind = "size" if "size" in step else "short_side"
    _keys(step, "resize", {"op", kind, "interpolation"})
    _one_of(step["interpolation"], INTERPOLATIONS, "interpolation")
    for side in _size(step, "resize") if kind == "size" else [step["short_side"]]:
        _require(_is_side(side), f"resize {kind} is {step[kind]!r}; a side is 1 to 65535 pixels")


def _check_crop(step: Mapping[str, Any]) -> None:
    _keys(step, "center_crop", {"op", "size"})
    _require(all(map(_is_side, _size(step, "center_crop"))), f"center_crop size is {step['size']!r}")


def _check_normalize(step: Mapping[str, Any]) -> None:
    _keys(step, "normalize", {"op", "mean", "std"})
    for key in ("mean", "std"):
        value = step[key]
        good = isinstance(value, list | tuple) and len(value) == 3 and all(_is_finite(v) for v in value)
        _require(good, f"normalize {key} is {value!r}; it is three numbers, red, green and blue, of 0 to 255")
    _require(all(step["std"]), "normalize std holds a zero")


def _check_layout(step: Mapping[str, Any]) -> None:
    _keys(step, "layout", {"op", "to"})
    _one_of(step["to"], ("NCHW", "NHWC"), "layout")


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "resize": _check_resize,
    "center_crop": _check_crop,
    "normalize": _check_normalize,
    "layout": _check_layout,
}


def _size(step: Mapping[str, Any], where: str) -> list[Any]:
    size = step["size"]
    _require(isinstance(size, list | tuple) and len(size) == 2, f"{where} size is {size!r}; it is [height, width]")
    return list(size)


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 65535


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _keys(doc: Mapping[str, Any], where: str, keys: set[str]) -> None:
    _require(not (lacks := keys - set(doc)), f"{where} lacks {', '.join(sorted(lacks))}")
    _require(not (more := set(doc) - keys), f"{where} has unknown keys: {', '.join(sorted(map(str, more)))}")


def _one_of(value: Any, allowed: tuple[str, ...], what: str) -> None:
    _require(isinstance(value, str) and value in allowed, f"{what} is {value!r}; it is one of {', '.join(allowed)}")


def _require(good: bool, sentence: str) -> None:
    if not good:
        raise ModelError(sentence)
