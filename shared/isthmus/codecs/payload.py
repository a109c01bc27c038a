"""What payloads are made of: sections whose size the reader knows beforehand, stored or as one zstd frame each.

The only module that imports zstandard. Specification: docs/codecs.md, "Sections".
"""

from __future__ import annotations

import struct
import threading
from typing import Any, Literal

import numpy as np
import zstandard

MAX_WINDOW_BYTES = 8 * 2**20
"""The largest window of a zstd frame that is read; RFC 8878 asks every decoder to take this much."""
LONGEST_SECTION = 2**32 - 1

Kind = Literal["numbers", "checked", "structure"]
"""What a section holds: numbers that hardly ever repeat, the same with a checksum, or what does repeat: indices, masks,
parameters."""


# glibc gives the end of its heap back whenever that is twice the largest block that was ever mapped and freed, and
# mapping it anew takes longer than a transform's arithmetic: 2.2 ms instead of 0.9 for 300 kB. Freeing this once makes
# it keep up to 4 MiB.
np.empty(2**21, np.uint8)


class _Coders(threading.local):
    """A thread's own: two threads may not use one at once, and making one takes longer than using it."""

    def __init__(self) -> None:
        # Seven bytes seldom repeat among numbers; looking for less costs twice the time and Huffman's place in the
        # result. Measured on EfficientNet-Lite0's exponents: 34% of their size at 420 MB/s, level 1 39% at 160.
        def numbers(checked: bool) -> zstandard.ZstdCompressor:
            parameters = zstandard.ZstdCompressionParameters(
                strategy=zstandard.STRATEGY_FAST,
                window_log=17,
                chain_log=6,
                hash_log=6,
                search_log=1,
                min_match=7,
                target_length=0,
                write_content_size=True,
                write_checksum=checked,
            )
            return zstandard.ZstdCompressor(compression_params=parameters)

        self.compressors = {
            "numbers": numbers(False),
            "checked": numbers(True),
            "structure": zstandard.ZstdCompressor(level=3),
        }
        self.decompressor = zstandard.ZstdDecompressor()


_coders = _Coders()


def shrink(data: bytes | memoryview, kind: Kind) -> bytes | memoryview:
    """`data` as a section: a zstd frame, or itself where that would not be smaller."""
    if not len(data):
        return data
    frame: bytes = _coders.compressors[kind].compress(data)
    return frame if len(frame) < len(data) else data


def restore(section: memoryview, size: int) -> bytes | memoryview:
    """The `size` bytes that a section stands for; nothing else is ever allocated.

    Raises:
        ValueError: it does not stand for that many.
    """
    if len(section) == size:
        return section
    if len(section) > size:
        raise ValueError(f"a section of {len(section)} bytes for {size}")
    try:
        frame = zstandard.get_frame_parameters(section)
        if frame.content_size != size or frame.dict_id or frame.window_size > max(size, MAX_WINDOW_BYTES):
            raise ValueError(
                f"a zstd frame of {frame.content_size} bytes, window {frame.window_size}, dictionary {frame.dict_id};"
                f" it is to give {size} bytes without a dictionary"
            )
        data: bytes = _coders.decompressor.decompress(section, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise ValueError(f"no zstd frame of {size} bytes: {e}") from e
    if len(data) != size:
        raise ValueError(f"a zstd frame gave {len(data)} bytes, not {size}")
    return data


class Reader:
    """Takes a payload apart from its start; `end` says that nothing is left over."""

    def __init__(self, payload: memoryview) -> None:
        self._rest = payload

    def take(self, length: int) -> memoryview:
        """The next `length` bytes.

        Raises:
            ValueError: there are fewer.
        """
        if length > len(self._rest):
            raise ValueError(f"the payload ends {length - len(self._rest)} bytes too early")
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def rest(self) -> memoryview:
        """All bytes that are left."""
        return self.take(len(self._rest))

    def fields(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next fields of a little-endian struct.

        Raises:
            ValueError: the payload ends before.
        """
        return layout.unpack(self.take(layout.size))

    def end(self) -> None:
        """Nothing may be left.

        Raises:
            ValueError: something is.
        """
        if len(self._rest):
            raise ValueError(f"{len(self._rest)} bytes are left over")


def bytes_of(array: np.ndarray[Any, np.dtype[Any]]) -> memoryview:
    """A contiguous array's bytes, as they lie."""
    return array.reshape(-1).view(np.uint8).data


def count_of(shape: tuple[int, ...]) -> int:
    """How many values a shape has."""
    count = 1
    for n in shape:
        count *= n
    return count
