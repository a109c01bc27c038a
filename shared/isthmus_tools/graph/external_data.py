"""External data of ONNX tensors: large tensors stay in their files while a model is read.

protobuf parses a message whole and copies every byte field, and each later serialisation copies the weights again, so
an import would peak at five times the file. `read` therefore turns each large tensor into external data whose file is
the model's own. Neither onnx nor protobuf parses a message in part, hence the few lines of wire format.

Sources: protobuf.dev/programming-guides/encoding; field numbers of onnx/onnx.proto3; ONNX ExternalData.md.
"""

from __future__ import annotations

import mmap
import os
import posixpath
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import onnx
import onnx_ir as ir

from isthmus.errors import ModelError
from isthmus_tools.graph.weights import inline, is_outside

# Shorter tensors, and messages around them, are copied: a reference takes some 60 bytes and a seek.
MIN_BYTES: Final = 1024
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
# A varint holds 64 bits, 7 in a byte.
_MAX_VARINT_BYTES = 10
# protobuf's own bound on nested messages; bodies nest within bodies.
_MAX_DEPTH = 100
_GRAPH, _NODE, _ATTRIBUTE, _FUNCTION, _TENSOR = "graph", "node", "attribute", "function", "tensor"
# The field numbers of each message type that lead to tensors.
_CHILDREN: Mapping[str, Mapping[int, str]] = {
    "model": {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR},
    _FUNCTION: {7: _NODE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 11: _GRAPH},
}
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14


class _OtherFormatError(Exception):
    """The bytes are no message of this schema; protobuf's own parser gives the reason."""


def read(path: Path) -> onnx.ModelProto:
    """Parse the model at `path`; tensors of MIN_BYTES and more refer to their bytes in the file itself.

    Raises:
        OSError: the file cannot be read.
        DecodeError: not an ONNX model.
    """
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                small = b"".join(_message(data, 0, len(data), "model", path.name, 0))
        except (_OtherFormatError, ValueError):
            file.seek(0)
            small = file.read()
    proto = onnx.ModelProto()
    proto.ParseFromString(small)
    return proto


def _message(data: mmap.mmap, start: int, end: int, kind: str, name: str, depth: int) -> Iterator[bytes]:
    """The pieces of the message between `start` and `end`, its tensors replaced by references."""
    if depth > _MAX_DEPTH:
        raise _OtherFormatError
    copied = start
    for field, first, begin, stop in _fields(data, start, end):
        child = _CHILDREN[kind].get(field)
        if child is None or stop - begin < MIN_BYTES:
            continue
        if child == _TENSOR:
            content = _tensor(data, begin, stop, name)
        else:
            content = b"".join(_message(data, begin, stop, child, name, depth + 1))
        # A message without large tensors is unchanged, and joins the next copied range.
        if len(content) < stop - begin:
            yield data[copied:first]
            yield _bytes_field(field, content)
            copied = stop
    yield data[copied:end]


def _tensor(data: mmap.mmap, start: int, end: int, name: str) -> bytes:
    """A TensorProto with its raw data replaced by a file range; unchanged without a single raw field of MIN_BYTES."""
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
    """Each field's number, its start, and the start and end of its content."""
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
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _bytes_field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _LENGTH) + _varint(len(content)) + content


def locate(model: ir.Model, path: Path) -> None:
    """Check every external tensor's range and point the tensor to its real file.

    The location must lie textually in the model's folder, so that a hostile model cannot name other files. Links in
    that folder are followed: model caches and mounted volumes consist of links.

    Raises:
        ModelError: a file is missing, too short or outside the folder, or a length disagrees with the shape.
    """
    for body in model.graphs():
        for value in body.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _located(value.const_value, str(value.name), path)
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for name, attribute in tuple(node.attributes.items()):
                if isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, _located(attribute.value, str(node.name), path))


def _located(tensor: ir.ExternalTensor, name: str, path: Path) -> ir.TensorProtocol:
    location, offset = str(tensor.location), tensor.offset or 0
    length = tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes or offset < 0:
        raise ModelError(
            f"{path.name} says that {name} has {length} bytes at {offset}; its shape needs {tensor.nbytes}",
            model=str(path),
            tensor=name,
        )
    if ".." in PurePosixPath(location.replace("\\", "/")).parts:
        # Textually, before links are followed: the parent of a link's target is not the model's folder.
        location = posixpath.normpath(location.replace("\\", "/"))
    if os.path.isabs(location) or PurePosixPath(location).parts[:1] == ("..",):
        raise ModelError(
            f"{path.name} keeps weights in {location}, outside its own folder",
            model=str(path),
            file=location,
            hint="save the model with its weights beside the .onnx file: onnx.save(…, save_as_external_data=True)",
        )
    try:
        real = _resolved(path, location)
        status = real.stat()
    except (OSError, ValueError, RuntimeError):
        problem = "is missing"
    else:
        end = offset + length
        if not stat.S_ISREG(status.st_mode):
            problem = "is no file"
        elif status.st_size < end:
            problem = f"has {status.st_size} bytes, too few for {name}, which ends at {end}"
        else:
            return _at(tensor, real, offset, length)
    raise ModelError(
        f"{path.name} keeps weights in {location}, which {problem}",
        model=str(path),
        file=location,
        hint="put that file beside the .onnx file, whole",
    )


def _resolved(path: Path, location: str) -> Path:
    try:
        return Path(path.parent, location).resolve(strict=True)
    except FileNotFoundError:
        # Caches link only the .onnx file; its weights then lie beside the link's target.
        return Path(path.resolve().parent, location).resolve(strict=True)


def _at(tensor: ir.ExternalTensor, real: Path, offset: int, length: int) -> ir.TensorProtocol:
    located = ir.ExternalTensor(
        real.name, offset, length, tensor.dtype, shape=tensor.shape, name=str(tensor.name), base_dir=real.parent
    )
    return located if is_outside(located) else inline(located)
