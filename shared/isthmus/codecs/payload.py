"""Sections of payloads: bytes of a size that the reader knows beforehand, stored or as a zstd frame each.

The only module that imports zstd: its backport before Python 3.14. Source: docs/reference/codecs.md, "Sections".
"""

from __future__ import annotations

import math
import struct
import sys
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# The largest window of a zstd frame is 8 MiB, the size that RFC 8878 asks of every decoder.
MAX_WINDOW_LOG = 23
MAX_SECTION = 2**32 - 1

Kind = Literal["numbers", "checked", "structure"]
"""The content of a section: numbers (hardly any repetition), numbers with a checksum, or structure (repetition):
indices, masks, parameters."""

# RFC 8878, 3.1.1.1: the frame header's descriptor follows the magic number, then the window, absent where it equals the
# content. zstd checks windows only on allocation.
_SINGLE_SEGMENT, _MAX_WINDOW_BYTE = 0x20, (MAX_WINDOW_LOG - 10) << 3
# ZSTD_c_literalCompressionMode: with a sparse search for repeats, zstd would omit Huffman codes as well.
_LITERAL_COMPRESSION = 1002

# glibc returns the end of its heap to the system beyond twice the largest block that was ever mapped and freed. Freeing
# 2 MiB raises the limit to 4 MiB: a transform of 300 kB takes 1.0 ms to encode instead of 1.7, measured alone.
np.empty(2**21, np.uint8)


class _Compressors(threading.local):
    """The compressors of a thread: creation takes longer than use, and threads cannot share a compressor."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Create all compressors, after an error may have ended compression within a frame."""

        # Numbers hardly ever repeat, but for zeros: a search at every 65th byte suffices. Measured on
        # EfficientNet-Lite0's exponents: 32% of their size at 620 MB/s; a search at every byte gives 33% at 310 MB/s.
        def numbers(checked: bool) -> zstd.ZstdCompressor:
            parameter = zstd.CompressionParameter
            options: dict[int, int] = {
                parameter.strategy: zstd.Strategy.fast,
                parameter.window_log: 17,
                parameter.hash_log: 6,
                parameter.min_match: 7,
                parameter.target_length: 64,
                parameter.checksum_flag: checked,
                _LITERAL_COMPRESSION: 1,
            }
            return zstd.ZstdCompressor(options=options)

        self.by_kind = {
            "numbers": numbers(False),
            "checked": numbers(True),
            "structure": zstd.ZstdCompressor(level=3),
        }


_compressors = _Compressors()


def shrink(data: bytes | memoryview, kind: Kind, parts: Sequence[int] = ()) -> bytes | memoryview:
    """`data` as a section: a zstd frame, or unchanged where that is not smaller.

    Parts of the lengths `parts` have different statistics, and get a Huffman code each.
    """
    if not len(data):
        return data
    compressor, start = _compressors.by_kind[kind], 0
    blocks: list[bytes] = []
    try:
        if len(parts) > 1:
            compressor.set_pledged_input_size(len(data))
            for part in parts[:-1]:
                blocks.append(compressor.compress(data[start : start + part], compressor.FLUSH_BLOCK))
                start += part
        frame = b"".join([*blocks, compressor.compress(data[start:], compressor.FLUSH_FRAME)])
    except BaseException:
        _compressors.renew()  # the next call would continue this frame
        raise
    return frame if len(frame) < len(data) else data


def restore(section: memoryview, size: int) -> bytes | memoryview:
    """The inverse of `shrink`; allocates at most some three times `size` bytes.

    Raises:
        ValueError: the section does not decode to `size` bytes.
    """
    if len(section) == size:
        return section
    if len(section) > size:
        raise ValueError(f"a section of {len(section)} bytes for {size}")
    try:
        info = zstd.get_frame_info(section)
        wide = size > 2**MAX_WINDOW_LOG if section[4] & _SINGLE_SEGMENT else section[5] > _MAX_WINDOW_BYTE
        if info.decompressed_size != size or info.dictionary_id or wide:
            raise ValueError(
                f"a zstd frame of {info.decompressed_size} bytes, dictionary {info.dictionary_id}; it is to give"
                f" {size} bytes without a dictionary, and a window of at most {2**MAX_WINDOW_LOG}"
            )
        decompressor = zstd.ZstdDecompressor()
        data = decompressor.decompress(section, size)
    except zstd.ZstdError as e:
        raise ValueError(f"no zstd frame of {size} bytes: {e}") from e
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"a section is not one zstd frame of {size} bytes")
    return data


class PayloadReader:
    """Reads a payload from its start; `end` checks that no bytes remain."""

    def __init__(self, payload: memoryview) -> None:
        self._rest = payload

    def take(self, length: int) -> memoryview:
        """The next `length` bytes.

        Raises:
            ValueError: the payload is shorter.
        """
        if length > len(self._rest):
            raise ValueError(f"the payload ends {length - len(self._rest)} bytes too early")
        part, self._rest = self._rest[:length], self._rest[length:]
        return part

    def rest(self) -> memoryview:
        """All remaining bytes."""
        return self.take(len(self._rest))

    def fields(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next fields of a little-endian struct.

        Raises:
            ValueError: the payload is shorter.
        """
        return layout.unpack(self.take(layout.size))

    def end(self) -> None:
        """Check that no bytes remain.

        Raises:
            ValueError: bytes remain.
        """
        if len(self._rest):
            raise ValueError(f"{len(self._rest)} bytes are left over")


def bytes_of(array: np.ndarray[Any, np.dtype[Any]]) -> memoryview:
    """A contiguous array's own memory as bytes."""
    return array.reshape(-1).view(np.uint8).data


def count_of(shape: tuple[int, ...]) -> int:
    """The number of values of a shape."""
    return math.prod(shape)
