"""A tensor of the Open Inference Protocol: datatypes, shapes, JSON and binary data to arrays and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import RequestMalformed, ShapeMismatch

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_JSON = json.JSONEncoder(separators=(",", ":"))
# Numbers written at a time; their Python objects and text take some ten times their size.
_PIECE = 2**14
# Python types of JSON elements by the kind of dtype: a float tensor may hold integers, an integer's no booleans.
_ELEMENTS: Mapping[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}
_DATATYPES = {dtype.name: datatype for datatype, dtype in _DTYPES.items()}


def datatype_of(dtype: str) -> str:
    """The protocol's name of a dtype, e.g. FP32 of float32.

    Raises:
        ShapeMismatch: the protocol has none that is offered here.
    """
    if dtype not in _DATATYPES:
        raise ShapeMismatch(
            f"the Open Inference Protocol has no datatype for {dtype}", expected=sorted(_DATATYPES), got=dtype
        )
    return _DATATYPES[dtype]


@lru_cache(64)
def datatype_of_array(dtype: np.dtype[Any]) -> str:
    """`datatype_of` an array's dtype; cached, since numpy composes the name at each access."""
    return datatype_of(dtype.name)


def describe(spec: TensorSpec) -> str:
    """A tensor in the protocol's words: `input FP32 [batch,3,224,224]`."""
    return f"{spec.name} {datatype_of(spec.dtype)} [{','.join(map(str, spec.shape))}]"


def shape_of(tensor: Mapping[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    """The shape that an input declares, after its datatype and shape were found to fit `spec`.

    Raises:
        RequestMalformed: no shape, no datatype, BYTES, or a dimension that is no whole number from 0.
        ShapeMismatch: not the datatype or the shape of `spec`.
    """
    shape, datatype = tensor.get("shape"), tensor.get("datatype")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise RequestMalformed(
            f"the input {spec.name!r} has no shape, a list of whole numbers from 0", tensor=spec.name
        )
    if datatype == "BYTES":
        raise RequestMalformed(
            "BYTES tensors are not offered", tensor=spec.name, expected=describe(spec), hint="send numbers"
        )
    if not isinstance(datatype, str) or datatype not in _DTYPES:
        raise RequestMalformed(
            f"the input {spec.name!r} has no known datatype", tensor=spec.name, expected=describe(spec)
        )
    is_fitting = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or want == n for want, n in zip(spec.shape, shape, strict=False)
    )
    if datatype != datatype_of(spec.dtype) or not is_fitting:
        got = f"{spec.name} {datatype} [{','.join(map(str, shape[:32]))}]"
        raise ShapeMismatch(
            f"the model takes {describe(spec)}, the request holds {got}",
            tensor=spec.name,
            expected=describe(spec),
            got=got,
        )
    if math.prod(max(1, n) for n in shape) >= 2**60:  # numpy's own bound holds beside a 0, too
        raise RequestMalformed(f"the shape of the input {spec.name!r} is beyond all bounds", tensor=spec.name)
    return tuple(shape)


def from_binary(data: memoryview, size: Any, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """The first `size` bytes of `data` as an array: a view, read-only where `data` is.

    Raises:
        RequestMalformed: `size` is not the size of that shape, `data` is shorter, or a BOOL is neither 0 nor 1.
    """
    dtype = _DTYPES[datatype_of(spec.dtype)]
    needed = math.prod(shape) * dtype.itemsize
    if type(size) is not int or size != needed:
        raise RequestMalformed(
            f"binary_data_size of {spec.name!r} is {str(size)[:32]}; its shape takes {needed} bytes",
            tensor=spec.name,
            expected=needed,
        )
    if size > len(data):
        raise RequestMalformed(
            f"the body ends {size - len(data)} bytes before the binary data of {spec.name!r} does",
            tensor=spec.name,
            expected=size,
            got=len(data),
        )
    if dtype.kind == "b" and size and np.frombuffer(data[:size], np.uint8).max() > 1:
        raise RequestMalformed(f"{spec.name!r} holds a BOOL that is neither 0 nor 1", tensor=spec.name)
    return np.frombuffer(data[:size], dtype).reshape(shape)


def from_json(tensor: Mapping[str, Any], spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """An input's `data`, flat in row-major order or nested as its shape is.

    Raises:
        RequestMalformed: no data, another number of elements than the shape says, an element that is not of the
            datatype, or BF16, which has no JSON form.
    """
    dtype = _DTYPES[datatype_of(spec.dtype)]
    data = tensor.get("data")
    if not isinstance(data, list):
        raise RequestMalformed(f"the input {spec.name!r} has no list of data", tensor=spec.name)
    if dtype.kind == "V":  # ml_dtypes' kind of bfloat16
        raise RequestMalformed("BF16 is sent as binary data only", tensor=spec.name, hint="set binary_data_size")
    flat = _flatten(data, spec.name, shape)
    allowed = _ELEMENTS[dtype.kind]
    if not set(map(type, flat)) <= allowed:
        at = next(i for i, value in enumerate(flat) if type(value) not in allowed)
        raise _bad_element(spec, at, f"is a {type(flat[at]).__name__}")
    try:
        with np.errstate(over="ignore"):  # overflows become infinite, and are refused below
            array = np.array(flat, dtype)
    except OverflowError:
        low, high = _limits(dtype)
        at = next(i for i, value in enumerate(flat) if not low <= value <= high)
        raise _bad_element(spec, at, "is out of range") from None
    if dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        raise _bad_element(spec, int(np.argmin(finite)), "is out of range")
    return array.reshape(shape)


def to_binary(array: np.ndarray) -> bytes:
    """Row-major, little-endian, without padding."""
    return array.astype(_DTYPES[datatype_of_array(array.dtype)], copy=False).tobytes()


def to_json(array: np.ndarray, name: str) -> list[bytes]:
    """JSON numbers with commas between them, in row-major order; reading restores the same values.

    In pieces, since Python's numbers and texts of the whole array would take ten times its memory.

    Raises:
        RequestMalformed: NaN or infinity, which JSON cannot express.
    """
    if array.dtype.kind == "V":  # bfloat16: every value is a float32
        array = array.astype(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestMalformed(
            f"the output {name!r} holds NaN or infinity, which JSON cannot say",
            tensor=name,
            hint='ask for it as binary: "parameters": {"binary_data_output": true}',
        )
    flat = array.reshape(-1)
    pieces = [_JSON.encode(flat[at : at + _PIECE].tolist())[1:-1].encode() for at in range(0, flat.size, _PIECE)]
    return [part for piece in pieces for part in (b",", piece)][1:]


def _flatten(data: list[Any], name: str, shape: tuple[int, ...]) -> list[Any]:
    if data and type(data[0]) is list:
        for depth in range(len(shape)):
            if len(data) != math.prod(shape[: depth + 1]):
                break
            if depth == len(shape) - 1:
                return data
            if not (set(map(type, data)) <= {list} and set(map(len, data)) <= {shape[depth + 1]}):
                break
            data = list(chain.from_iterable(data))
        raise RequestMalformed(
            f"the data of {name!r} is nested otherwise than its shape {list(shape)}", tensor=name, expected=list(shape)
        )
    if len(data) != math.prod(shape):
        raise RequestMalformed(
            f"{name!r} holds {len(data)} elements; its shape {list(shape)} takes {math.prod(shape)}",
            tensor=name,
            expected=math.prod(shape),
            got=len(data),
        )
    return data


def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return float(np.finfo(dtype).min), float(np.finfo(dtype).max)


def _bad_element(spec: TensorSpec, at: int, what: str) -> RequestMalformed:
    return RequestMalformed(
        f"element {at} of {spec.name!r} {what}; the datatype is {datatype_of(spec.dtype)}",
        tensor=spec.name,
        element=at,
        expected=datatype_of(spec.dtype),
    )
