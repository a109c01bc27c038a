"""The Open Inference Protocol (KServe v2), without HTTP: bodies to arrays, arrays to bodies, metadata documents.

JSON tensors and the binary tensor extension. Reading a request checks it against the model's tensors, so that
a size is known to fit before memory of that size is allocated.

Source: docs/reference/api.md, "Open Inference Protocol".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ShapeMismatch
from isthmus.oip.request import (
    HEADER_LENGTH,
    MAX_JSON_BYTES,
    InferRequest,
    OutputRequest,
    parse_document,
    parse_request,
    read_document,
)
from isthmus.oip.tensor import datatype_of, datatype_of_array, to_binary, to_json

__all__ = [
    "EXTENSIONS",
    "HEADER_LENGTH",
    "MAX_JSON_BYTES",
    "PLATFORM",
    "InferRequest",
    "InferResponse",
    "OutputRequest",
    "build_response",
    "model_metadata",
    "parse_document",
    "parse_request",
    "read_document",
    "response_bytes",
    "server_metadata",
]

EXTENSIONS = ("binary_tensor_data",)
PLATFORM = "onnx_onnxv1"
# The longest float64 with its comma, in its piece and in the body.
JSON_NUMBER_BYTES = 2 * 25
# Compact: separators with spaces add a tenth to a response of numbers.
_JSON = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True)
class InferResponse:
    """A response's body; `header_length` is the length of its JSON part if binary tensors follow."""

    body: bytes
    header_length: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Content-Type, and Inference-Header-Content-Length where binary tensors follow."""
        if self.header_length is None:
            return {"Content-Type": "application/json"}
        return {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(self.header_length)}


def build_response(
    arrays: Mapping[str, np.ndarray],
    request: InferRequest,
    *,
    model_name: str,
    model_version: str,
    parameters: Mapping[str, Any] | None = None,
) -> InferResponse:
    """The response that `request` asked for, from the model's outputs; JSON data is flat, in row-major order.

    Raises:
        RequestMalformed: an output asked for as JSON holds NaN or infinity, which JSON cannot express; ask for binary.
        ShapeMismatch: the model gave no array of an output's name, or the protocol lacks its dtype.
    """
    documents: list[bytes] = []  # in parts, to be joined at the end
    chunks: list[bytes] = []
    for output in request.outputs:
        if (array := arrays.get(output.name)) is None:
            raise ShapeMismatch(
                f"there is no output {output.name!r}", tensor=output.name, expected=output.name, got=sorted(arrays)
            )
        document: dict[str, Any] = {
            "name": output.name,
            "shape": list(array.shape),
            "datatype": datatype_of_array(array.dtype),
        }
        if output.binary:
            chunks.append(to_binary(array))
            document["parameters"] = {"binary_data_size": len(chunks[-1])}
            documents += [b",", _JSON.encode(document).encode()]
        else:
            numbers = to_json(array, output.name)
            documents += [b",", _JSON.encode(document).encode()[:-1], b',"data":[', *numbers, b"]}"]
    doc = {"model_name": model_name, "model_version": model_version}
    head = doc | ({"id": request.id} if request.id else {}) | ({"parameters": dict(parameters)} if parameters else {})
    text = [_JSON.encode(head).encode()[:-1], b',"outputs":[', *documents[1:], b"]}"]
    # The header is for responses with binary tensors alone: clients take its presence as a sign of these.
    header_length = sum(map(len, text)) if any(output.binary for output in request.outputs) else None
    return InferResponse(b"".join([*text, *chunks]), header_length)


def response_bytes(arrays: Mapping[str, np.ndarray], request: InferRequest) -> int:
    """Upper bound on the memory of `build_response`, in bytes."""
    outputs = [(arrays[output.name], output.binary) for output in request.outputs if output.name in arrays]
    return sum(2 * array.nbytes if binary else array.size * JSON_NUMBER_BYTES for array, binary in outputs)


def server_metadata(name: str, version: str) -> dict[str, Any]:
    """The body of GET /v2."""
    return {"name": name, "version": version, "extensions": list(EXTENSIONS)}


def model_metadata(
    name: str, versions: Sequence[str], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> dict[str, Any]:
    """The body of GET /v2/models/NAME; a free dimension is -1.

    Raises:
        ShapeMismatch: the protocol lacks a tensor's dtype.
    """
    return {
        "name": name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [_tensor_metadata(spec) for spec in inputs],
        "outputs": [_tensor_metadata(spec) for spec in outputs],
    }


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    shape = [-1 if isinstance(n, str) else n for n in spec.shape]
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": shape}
