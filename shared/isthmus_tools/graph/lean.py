"""ONNX files read without the weights inside them.

protobuf reads a file whole and then copies it, and every later step that writes the graph copies the weights again: an
import took up to five times the file. Here each large tensor is left where it lies and becomes one of external data,
whose file is the model's own. Nothing of onnx or protobuf reads a message in part, hence the few lines of wire format.

Source: protobuf.dev/programming-guides/encoding; field numbers of onnx/onnx.proto3.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import onnx

MIN_BYTES: Final = 1024
"""Tensors, and messages around them, that are shorter stay as they are."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
# Bodies within bodies; protobuf's own bound on nested messages.
_MAX_DEPTH = 100
# The fields of each message that lead to tensors.
_GRAPH, _NODE, _ATTRIBUTE, _FUNCTION, _TENSOR = "graph", "node", "attribute", "function", "tensor"
_WITHIN: Mapping[str, Mapping[int, str]] = {
    "model": {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR},
    _FUNCTION: {7: _NODE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 11: _GRAPH},
}
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14


class _OtherFormatError(Exception):
    """The bytes are no message of this form; protobuf says what they are instead."""


def read(path: Path) -> onnx.ModelProto:
    """The model at `path`; tensors of 1 KiB and more lie outside, in the file itself.

    Raises:
        OSError: the file cannot be read.
        DecodeError: it is no ONNX model.
    """
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                small = _without_weights(data, path.name)
        except (_OtherFormatError, ValueError):
            file.seek(0)
            small = file.read()
    proto = onnx.ModelProto()
    proto.ParseFromString(small)
    return proto


def _without_weights(data: mmap.mmap, name: str) -> bytes:
    return b"".join(_message(data, 0, len(data), "model", name, 0))


def _message(data: mmap.mmap, start: int, end: int, kind: str, name: str, depth: int) -> Iterator[bytes]:
    """The pieces of the message between `start` and `end`, with the tensors within it moved out."""
    if depth > _MAX_DEPTH:
        raise _OtherFormatError
    copied = start
    for field, first, begin, stop in _fields(data, start, end):
        within = _WITHIN[kind].get(field)
        if within is None or stop - begin < MIN_BYTES:
            continue
        if within == _TENSOR:
            made = _tensor(data, begin, stop, name)
        else:
            made = b"".join(_message(data, begin, stop, within, name, depth + 1))
        if len(made) < stop - begin:
            yield data[copied:first]
            yield _bytes_field(field, made)
            copied = stop
    yield data[copied:end]


def _tensor(data: mmap.mmap, start: int, end: int, name: str) -> bytes:
    """The TensorProto with its raw data as a place in the file; as it is where it has none of 1 KiB, or several."""
    fields = list(_fields(data, start, end))
    raw = [(first, begin, stop) for field, first, begin, stop in fields if field == _RAW_DATA]
    if len(raw) != 1 or any(f == _DATA_LOCATION for f, *_ in fields) or raw[0][2] - raw[0][1] < MIN_BYTES:
        return data[start:end]
    first, begin, stop = raw[0]
    place = {"location": name, "offset": str(begin), "length": str(stop - begin)}
    entries = [onnx.StringStringEntryProto(key=k, value=v).SerializeToString() for k, v in place.items()]
    return b"".join(
        (
            data[start:first],
            data[stop:end],
            *(_bytes_field(_EXTERNAL_DATA, entry) for entry in entries),
            _varint(_DATA_LOCATION << 3 | _VARINT) + _varint(onnx.TensorProto.EXTERNAL),
        )
    )


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field's number, where it starts, and where its content starts and ends."""
    at = start
    while at < end:
        first = at
        key, at = _read_varint(data, at, end)
        wire = key & 7
        if wire == _LENGTH:
            length, at = _read_varint(data, at, end)
        elif wire == _VARINT:
            length = _read_varint(data, at, end)[1] - at
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise _OtherFormatError
        if at + length > end:
            raise _OtherFormatError
        yield key >> 3, first, at, at + length
        at += length


def _read_varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for i in range(min(_MAX_VARINT_BYTES, end - at)):
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise _OtherFormatError


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _bytes_field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _LENGTH) + _varint(len(content)) + content
