"""An inference request of the Open Inference Protocol, read and checked against a model's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from isthmus.artifacts.json_documents import refuse_constant
from isthmus.artifacts.tensors import ANY, TensorSpec
from isthmus.errors import RequestMalformed, RequestTooLarge, ShapeMismatch
from isthmus.oip.tensor import describe, from_binary, from_json, shape_of
from isthmus.wire.json_bounds import parsed_bytes

HEADER_LENGTH = "Inference-Header-Content-Length"
EXIT_PARAMETER = "isthmus.exit"
"""The parameter of a request, a bool, that allows exits; false asks for the full model."""
# Bound on the JSON part, without binary tensors; parsed, JSON can take thirty times its length.
MAX_JSON_BYTES = 16 * 2**20
# The id returns in the response; clients use UUIDs.
MAX_ID_LENGTH = 256
# Reserves memory of that many bytes, and raises where too little is left.
Reserve: TypeAlias = Callable[[int], object]


def _reserve_nothing(count: int) -> None:
    """No-op default."""


@dataclass(frozen=True)
class OutputRequest:
    """An output that the response holds, as binary or as JSON numbers."""

    name: str
    binary: bool = False


@dataclass(frozen=True)
class InferRequest:
    """An inference request, checked against the model; `outputs` are the outputs of the response, in order.

    Arrays of binary tensors are read-only views of the body, and may be unaligned.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: tuple[OutputRequest, ...]
    id: str = ""
    may_exit: bool = True
    """Whether the prediction of an exit will do; False asks for the full model."""

    @property
    def own_bytes(self) -> int:
        """Bytes of the arrays that are no views of the body."""
        return sum(array.nbytes for array in self.inputs.values() if array.flags.writeable)


def parse_request(
    body: bytes | memoryview,
    header_length: str | int | None,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_json_bytes: int = MAX_JSON_BYTES,
    reserve: Reserve = _reserve_nothing,
) -> InferRequest:
    """Read an inference request for a model with these inputs and outputs; every byte must be accounted for.

    `header_length` is the header Inference-Header-Content-Length as received, None without the header. Dimensions
    that share a symbolic name must be equal across inputs. Binary tensors are not copied. `reserve` is called before
    the JSON is parsed, with an upper bound of the bytes that parsing and the arrays take; its errors pass unchanged.

    Raises:
        RequestMalformed: not JSON, not the protocol, lengths that disagree, numbers outside the datatype, or a feature
            that is not offered (BYTES, shared memory, classification, sequences).
        RequestTooLarge: the JSON part exceeds `max_json_bytes`; nothing was parsed.
        ShapeMismatch: an input is missing, unknown, or of another datatype or shape; facts: `expected`, `got`.
    """
    view = memoryview(body)
    split = _header_length(header_length, len(view))
    doc = read_document(view[:split], max_json_bytes, reserve)
    binary = None if header_length is None else view[split:]
    return parse_document(doc, binary, inputs=inputs, outputs=outputs)


def parse_document(
    doc: Mapping[str, Any],
    binary: memoryview | None = None,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> InferRequest:
    """`parse_request` of parsed JSON and of the bytes after the JSON, None without the header.

    Raises:
        RequestMalformed, ShapeMismatch: as `parse_request`.
    """
    parameters = _object(doc, "parameters", "the request")
    _refuse_sequences(parameters)
    tensors = doc.get("inputs")
    if not isinstance(tensors, list):
        raise RequestMalformed("the request has no list of inputs", hint='send {"inputs": [{"name": …}]}')
    arrays = _read_inputs(tensors, binary, {spec.name: spec for spec in inputs})
    requested = _requested_outputs(doc.get("outputs"), [spec.name for spec in outputs], parameters)
    return InferRequest(arrays, requested, _request_id(doc), _flag(parameters, EXIT_PARAMETER, True))


def read_document(
    part: bytes | memoryview, max_json_bytes: int = MAX_JSON_BYTES, reserve: Reserve = _reserve_nothing
) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no NaN, no infinity; a byte order mark is skipped.

    `reserve` is called as `parse_request` says.

    Raises:
        RequestMalformed: anything else.
        RequestTooLarge: longer than `max_json_bytes`; nothing was parsed.
    """
    if len(part) > max_json_bytes:
        raise RequestTooLarge(
            f"{len(part)} bytes of JSON exceed {max_json_bytes}",
            limit=max_json_bytes,
            bytes=len(part),
            hint="send large tensors as binary data (parameters.binary_data_size), which has no such bound",
        )
    # Half as much again for the arrays, and for lists of numbers that lay nested.
    reserve(parsed_bytes(part) * 3 // 2)
    try:
        doc = _JSON.decode(str(part, "utf-8-sig"))
    except (ValueError, RecursionError) as e:
        # Python's message about too many digits advises a change of this process, which no caller can make.
        reason = "it holds a number of thousands of digits" if "integer string conversion" in str(e) else str(e)[:200]
        reason = "its lists and objects lie too deep in each other" if isinstance(e, RecursionError) else reason
        raise RequestMalformed(
            f"the request is not JSON: {reason}",
            hint="NaN and infinities go in binary tensors; where binary tensors follow the JSON, the header"
            f" {HEADER_LENGTH} says how long it is",
        ) from e
    if not isinstance(doc, dict):
        raise RequestMalformed("the request is not a JSON object")
    return doc


def _header_length(header: str | int | None, length: int) -> int:
    if header is None:
        return length
    text = str(header).strip()
    # Shorter than 20 digits: int() of a long text takes quadratic time.
    if not (text.isascii() and text.isdigit() and len(text) < 20 and 0 < int(text) <= length):
        raise RequestMalformed(
            f"{HEADER_LENGTH} is {text[:32]!r}; it is the JSON part's length, 1 to the body's {length} bytes",
            header=HEADER_LENGTH,
            limit=length,
        )
    return int(text)


_JSON = json.JSONDecoder(parse_constant=refuse_constant)


def _object(doc: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """An optional object; null counts as absent, since clients with typed fields send null."""
    if (value := doc.get(key)) is None:
        return {}
    if not isinstance(value, dict):
        raise RequestMalformed(f"{key} of {where} is not an object")
    return value


def _request_id(doc: Mapping[str, Any]) -> str:
    if (value := doc.get("id")) is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_ID_LENGTH:
        raise RequestMalformed(f"id is not a string of at most {MAX_ID_LENGTH} characters", limit=MAX_ID_LENGTH)
    return value


def _refuse_sequences(parameters: Mapping[str, Any]) -> None:
    if parameters.get("sequence_id") not in (None, 0, ""):
        raise RequestMalformed("sequences are not offered: no state is kept between requests", parameter="sequence_id")


def _read_inputs(
    tensors: list[Any], binary: memoryview | None, specs: Mapping[str, TensorSpec]
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    sizes: dict[str, tuple[int, str]] = {}
    offset = 0
    # Binary data of the inputs follow in their order, without gaps.
    for tensor in tensors:
        spec = _spec_of(tensor, specs)
        if spec.name in arrays:
            raise RequestMalformed(f"the input {spec.name!r} comes twice", tensor=spec.name)
        parameters = _object(tensor, "parameters", f"the input {spec.name!r}")
        shape = shape_of(tensor, spec)
        _bind_free_dimensions(spec, shape, sizes)
        if parameters.get("shared_memory_region") is not None:
            raise RequestMalformed("shared memory is not offered", tensor=spec.name, hint="send the data in the body")
        if parameters.get("binary_data_size") is None:
            arrays[spec.name] = from_json(tensor, spec, shape)
            continue
        if tensor.get("data") is not None:
            raise RequestMalformed(f"the input {spec.name!r} has both data and binary_data_size", tensor=spec.name)
        if binary is None:
            raise RequestMalformed(f"there is binary data, and no header {HEADER_LENGTH}", header=HEADER_LENGTH)
        arrays[spec.name] = from_binary(binary[offset:], parameters["binary_data_size"], spec, shape)
        offset += arrays[spec.name].nbytes
    if missing := [name for name in specs if name not in arrays]:
        raise ShapeMismatch(
            f"the model's input {missing[0]!r} is missing",
            tensor=missing[0],
            expected=[describe(spec) for spec in specs.values()],
            got=list(arrays),
            missing=missing,
        )
    if binary is not None and offset != len(binary):
        raise RequestMalformed(
            f"{len(binary)} bytes follow the JSON and its binary_data_size sum to {offset}",
            expected=offset,
            got=len(binary),
        )
    return arrays


def _spec_of(tensor: Any, specs: Mapping[str, TensorSpec]) -> TensorSpec:
    name = tensor.get("name") if isinstance(tensor, dict) else None
    if not isinstance(name, str):
        raise RequestMalformed("an input is not an object with a name")
    if name not in specs:
        raise ShapeMismatch(
            f"the model has no input {name[:64]!r}; it has {', '.join(map(repr, specs))}",
            tensor=name[:64],
            expected=[describe(spec) for spec in specs.values()],
            got=name[:64],
        )
    return specs[name]


def _bind_free_dimensions(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    for dim, size in zip(spec.shape, shape, strict=True):
        if not isinstance(dim, str) or dim == ANY:
            continue
        bound, where = sizes.setdefault(dim, (size, spec.name))
        if bound != size:
            raise ShapeMismatch(
                f"{dim} is {size} in the input {spec.name!r} and {bound} in {where!r}",
                tensor=spec.name,
                expected=f"{dim} = {bound}, as in {where}",
                got=f"{dim} = {size}",
            )


def _requested_outputs(entries: Any, names: Sequence[str], parameters: Mapping[str, Any]) -> tuple[OutputRequest, ...]:
    binary = _flag(parameters, "binary_data_output", False)
    if entries is None or entries == []:
        return tuple(OutputRequest(name, binary) for name in names)
    if not isinstance(entries, list):
        raise RequestMalformed("outputs is not a list")
    requested: dict[str, OutputRequest] = {}
    for output in entries:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str):
            raise RequestMalformed("an output is not an object with a name")
        if name not in names:
            raise ShapeMismatch(
                f"the model has no output {name[:64]!r}; it has {', '.join(map(repr, names))}",
                tensor=name[:64],
                expected=list(names),
                got=name[:64],
            )
        if name in requested:
            raise RequestMalformed(f"the output {name!r} is asked for twice", tensor=name)
        requested[name] = OutputRequest(name, _flag(_output_parameters(output, name), "binary_data", binary))
    return tuple(requested.values())


def _output_parameters(output: Mapping[str, Any], name: str) -> dict[str, Any]:
    parameters = _object(output, "parameters", f"the output {name!r}")
    if parameters.get("classification"):
        raise RequestMalformed(
            "classification of outputs is not offered",
            parameter="classification",
            hint="POST the photo to / for classes, or take the logits and sort them",
        )
    if parameters.get("shared_memory_region") is not None:
        raise RequestMalformed("shared memory is not offered", tensor=name)
    return parameters


def _flag(parameters: Mapping[str, Any], key: str, default: bool) -> bool:
    if (value := parameters.get(key)) is None:
        return default
    if not isinstance(value, bool):
        raise RequestMalformed(f"the parameter {key} is not true or false", parameter=key)
    return value
