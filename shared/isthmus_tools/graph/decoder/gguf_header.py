"""Bounds of a GGUF file's header, checked before the package `gguf` reads it.

Counts, lengths and offsets are the file's own claims: `gguf` would allocate by them, or read on beyond the end.

Source: the specification of GGUF in github.com/ggml-org/ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from isthmus.errors import ModelError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
# Published files have some dozens of keys, and ten tensors a layer.
_MAX_KEYS, _MAX_TENSORS = 2**12, 2**16
# Vocabularies have up to 300,000 tokens, each with a kind, a score and a merge; `gguf` takes some 200 bytes for each.
_MAX_ITEMS = 2**22
_MAX_NAME_BYTES, _MAX_TEXT_BYTES = 2**12, 2**20
_MAX_DIMENSIONS, _MAX_ELEMENTS = 4, 2**40
_SIZES: Final[Mapping[int, int]] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number by its type in the file."""
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_ALIGNMENT_KEY, _ALIGNMENT = b"general.alignment", 32


def check_header(path: Path, quant_sizes: Mapping[int, tuple[int, int]]) -> None:
    """Check that a file's header lies in the file, within bounds, and that its tensors lie behind the header.

    `quant_sizes` are the elements and the bytes of a block by type of tensor.

    Raises:
        ModelError: no GGUF file, a truncated one, or a claim out of bounds.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelError(f"{path} is no GGUF file: it does not begin with GGUF", file=str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _HeaderCursor(path, data, quant_sizes).check()
            except struct.error as e:
                raise ModelError(
                    f"{path} is truncated: its {len(data)} bytes end within the header",
                    file=str(path),
                    bytes=len(data),
                    hint="copy or download the file again",
                ) from e


class _HeaderCursor:
    """A position in a header that moves on with each value."""

    def __init__(self, path: Path, data: mmap.mmap, quant_sizes: Mapping[int, tuple[int, int]]) -> None:
        self._path, self._data, self._quant_sizes = path, data, quant_sizes
        self._at, self._items, self._alignment = len(_MAGIC), 0, _ALIGNMENT

    def check(self) -> None:
        if (version := self._number("<I", 4)) not in _VERSIONS:
            # A big-endian file has its version in the upper bytes.
            raise self._refusal(f"has the version {version}; taken are 2 and 3, little-endian", version=version)
        tensors = self._bounded("tensors", _MAX_TENSORS)
        for _ in range(self._bounded("keys", _MAX_KEYS)):
            key = self._text(_MAX_NAME_BYTES)
            self._value(key, self._number("<I", 4))
        ends = [self._tensor() for _ in range(tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        for name, end in ends:
            if start + end > len(self._data):
                raise self._refusal(
                    f"is truncated: the tensor {name} ends at byte {start + end} of {len(self._data)}",
                    tensor=name,
                    bytes=len(self._data),
                    hint="copy or download the file again",
                )

    def _value(self, key: bytes, kind: int) -> None:
        if kind == _STRING:
            self._text(_MAX_TEXT_BYTES)
        elif kind == _ARRAY:
            self._array(key)
        elif (size := _SIZES.get(kind)) is None:
            raise self._refusal(f"has a value of the unknown type {kind}", key=_name(key))
        elif key == _ALIGNMENT_KEY and kind == _UINT32:
            self._alignment = self._number("<I", 4) or _ALIGNMENT
        else:
            self._skip(size)

    def _array(self, key: bytes) -> None:
        kind = self._number("<I", 4)
        if kind == _ARRAY:
            # No known key has arrays of arrays; their depth would be the depth of recursion.
            raise self._refusal(f"has an array of arrays, {_name(key)}", key=_name(key))
        count = self._number("<Q", 8)
        self._items += count
        if self._items > _MAX_ITEMS:
            raise self._refusal(
                f"has {self._items} elements in its arrays up to {_name(key)}; at most {_MAX_ITEMS} are read",
                key=_name(key),
                limit=_MAX_ITEMS,
            )
        if kind in _SIZES:
            self._skip(count * _SIZES[kind])
            return
        for _ in range(count):
            self._value(key, kind)

    def _tensor(self) -> tuple[str, int]:
        """A tensor's name, and its end behind the header."""
        name = _name(self._text(_MAX_NAME_BYTES))
        if (dimensions := self._number("<I", 4)) > _MAX_DIMENSIONS:
            raise self._refusal(f"has the tensor {name} of {dimensions} dimensions", tensor=name)
        elements = math.prod(self._number("<Q", 8) for _ in range(dimensions))
        kind, offset = self._number("<I", 4), self._number("<Q", 8)
        if kind not in self._quant_sizes:
            raise self._refusal(f"has the tensor {name} of the unknown type {kind}", tensor=name)
        if not 0 < elements <= _MAX_ELEMENTS:
            raise self._refusal(f"has the tensor {name} of {elements} elements", tensor=name)
        block, size = self._quant_sizes[kind]
        return name, offset + elements // block * size

    def _bounded(self, kind: str, limit: int) -> int:
        if (count := self._number("<Q", 8)) > limit:
            raise self._refusal(f"states {count} {kind}; at most {limit} are read", limit=limit)
        return count

    def _text(self, limit: int) -> bytes:
        if (length := self._number("<Q", 8)) > limit:
            raise self._refusal(f"has a text of {length} bytes; at most {limit} are read", limit=limit)
        self._skip(length)
        return self._data[self._at - length : self._at]

    def _number(self, form: str, size: int) -> int:
        self._skip(size)
        return int(struct.unpack_from(form, self._data, self._at - size)[0])

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise struct.error

    def _refusal(self, reason: str, **facts: Any) -> ModelError:
        return ModelError(f"{self._path} {reason}", file=str(self._path), **facts)


def _name(text: bytes) -> str:
    return text.decode(errors="replace")[:80]
