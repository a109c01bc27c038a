"""The weights file, shared by all cuts: every initialiser of 1 KiB or more, in order of first use.

That order makes a head's weights a prefix of the file and a tail's a suffix, so a segment fetches few byte ranges.
Smaller initialisers stay in each segment's graph: onnxruntime reads them for its shape inference.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import onnx_ir as ir

from isthmus.artifacts.bundle import Blob, Weights, WeightTensor
from isthmus.errors import ModelError

LOCATION = "weights.bin"
"""The file's name, beside every segment's graph."""
INLINE_BELOW = 1024
# A cache line, and the widest vector register: onnxruntime maps the file and computes on the mapped bytes.
ALIGNMENT = 64
# Large enough that hashing dominates the calls, small enough to bound memory.
_CHUNK = 2**22
_END = 4096


def is_outside(tensor: ir.TensorProtocol) -> bool:
    """Whether `tensor` belongs in the weights file rather than in a segment's graph."""
    return tensor.nbytes >= INLINE_BELOW and tensor.dtype != ir.DataType.STRING


def write(
    values: Iterable[ir.Value], path: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Weights:
    """Write the tensors of `values` in order, each aligned to 64 bytes, in chunks; replaces the file atomically.

    `progress` receives the bytes written and the total.

    Raises:
        ModelError: a tensor's bytes cannot be read, or their number differs from the shape's.
    """
    outside = [(str(v.name), v.const_value) for v in values if v.const_value is not None and is_outside(v.const_value)]
    total = sum(tensor.nbytes for _, tensor in outside)
    tensors: list[WeightTensor] = []
    whole = hashlib.sha256()
    offset = done = 0
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file, ThreadPoolExecutor(1) as hasher:
            for name, tensor in outside:
                padding = b"\0" * (-offset % ALIGNMENT)
                file.write(padding)
                whole.update(padding)
                offset += len(padding)
                digest, length = hashlib.sha256(), 0
                for chunk in _chunks(tensor):
                    # Hashing takes longest and releases the interpreter's lock, so writing overlaps.
                    hashed = hasher.submit(whole.update, chunk)
                    file.write(chunk)
                    digest.update(chunk)
                    hashed.result()
                    length += len(chunk)
                    done += len(chunk)
                    progress(done, total)
                # onnxruntime would read on into the next tensor.
                if length != tensor.nbytes:
                    raise ModelError(
                        f"{name} holds {length} bytes; its shape needs {tensor.nbytes}",
                        tensor=name,
                        hint="save the model with its weights",
                    )
                tensors.append(WeightTensor(name, offset, length, f"sha256:{digest.hexdigest()}"))
                offset += length
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except (OSError, ValueError) as e:
        raise ModelError(f"the weights cannot be copied to {path}: {e}", file=str(path)) from e
    finally:
        Path(temporary).unlink(missing_ok=True)
    return Weights(Blob(f"sha256:{whole.hexdigest()}", offset), tuple(tensors))


def reference(places: Mapping[str, WeightTensor], value: ir.Value) -> ir.ExternalTensor | None:
    """`value`'s tensor as a reference into the weights file; None for inline tensors. `places` are by name.

    Raises:
        ModelError: the weights file lacks that tensor.
    """
    tensor = value.const_value
    if tensor is None or not is_outside(tensor):
        return None
    place = places.get(str(value.name))
    if place is None:
        raise ModelError(f"the weights file has no tensor {value.name!r}", tensor=value.name)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(LOCATION, place.offset, place.length, tensor.dtype, shape=shape, name=str(value.name))


def inline(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """The tensor with its bytes in memory.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    proto = onnx.TensorProto(name=tensor.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    proto.raw_data = _read(tensor, 0, tensor.nbytes)
    return ir.serde.TensorProtoTensor(proto)


def ends(tensor: ir.TensorProtocol) -> bytes:
    """The first and last 4 KiB of a tensor: all bytes of a small tensor, a cheap comparison for a large."""
    if not isinstance(tensor, ir.ExternalTensor):
        data = memoryview(tensor.tobytes())
        return bytes(data) if len(data) <= 2 * _END else bytes(data[:_END]) + bytes(data[-_END:])
    size = tensor.nbytes
    return _read(tensor, 0, min(size, _END)) + _read(tensor, max(_END, size - _END), size)


def same_content(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Whether two tensors of equal dtype, shape and `ends` hold the same bytes."""
    return a.nbytes <= 2 * _END or all(x == y for x, y in zip(_chunks(a), _chunks(b), strict=True))


def read_into(tensor: ir.ExternalTensor, into: memoryview) -> None:
    """Fill `into` with all of the tensor's bytes.

    Raises:
        OSError, ValueError: the file cannot be read, or has been truncated.
    """
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        if file.readinto(into) != len(into):
            raise ValueError(f"{tensor.location} is too short")


def _chunks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    data = None if isinstance(tensor, ir.ExternalTensor) else memoryview(tensor.tobytes())
    for start in range(0, tensor.nbytes, _CHUNK):
        stop = min(start + _CHUNK, tensor.nbytes)
        if isinstance(tensor, ir.ExternalTensor):
            yield _read(tensor, start, stop)
        elif data is not None:
            yield data[start:stop]


def _read(tensor: ir.ExternalTensor, start: int, stop: int) -> bytes:
    # Read, not mapped: the pages of a mapping would count as this process's memory.
    if stop <= start:
        return b""
    with open(tensor.path, "rb") as file:
        file.seek((tensor.offset or 0) + start)
        data = file.read(stop - start)
    if len(data) != stop - start:
        raise ValueError(f"{tensor.location} is too short")
    return data
