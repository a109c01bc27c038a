"""What payloads are made of: sections whose size the reader knows beforehand, stored or as one zstd frame each.

The only module that imports zstd: the backport of what Python 3.14 has. Specification: docs/codecs.md, "Sections".
"""

from __future__ import annotations

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

MAX_WINDOW_LOG = 23
"""The largest window of a zstd frame that is read is 8 MiB; RFC 8878 asks every decoder to take this much."""
MAX_SECTION = 2**32 - 1

Kind = Literal["numbers", "checked", "structure"]
"""What a section holds: numbers that hardly ever repeat, the same with a checksum, or what does repeat: indices, masks,
parameters."""

# RFC 8878, 3.1.1.1: what describes a frame follows its magic number, then its window, or this is as large as the
# content; zstd itself looks at windows only where it makes one.
_SINGLE_SEGMENT, _WIDEST = 0x20, (MAX_WINDOW_LOG - 10) << 3
_LITERAL_COMPRESSION = 1002
"""ZSTD_c_literalCompressionMode; where few repeats are looked for, zstd would leave Huffman's codes out as well."""


# glibc gives the end of its heap back whenever that is twice the largest block that was ever mapped and freed, and
# mapping it anew takes longer than a transform's arithmetic: 2.2 ms instead of 0.9 for 300 kB. Freeing this once makes
# it keep up to 4 MiB.
np.empty(2**21, np.uint8)


class _Coders(threading.local):
    """A thread's own: two threads may not use one at once, and making one takes longer than using it."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Make them anew."""

        # Numbers hardly ever repeat, but for zeros: looking for repeats at every 65th byte finds those. Measured on
        # EfficientNet-Lite0's exponents: 32% of their size at 620 MB/s, where looking everywhere takes 33% at 310.
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

        self.compressors = {
            "numbers": numbers(False),
            "checked": numbers(True),
            "structure": zstd.ZstdCompressor(level=3),
        }


_coders = _Coders()


def shrink(data: bytes | memoryview, kind: Kind, parts: Sequence[int] = ()) -> bytes | memoryview:
    """`data` as a section: a zstd frame, or itself where that would not be smaller.

    `parts` are the lengths of parts that are not alike: each has a code of its own.
    """
    if not len(data):
        return data
    coder, start = _coders.compressors[kind], 0
    made: list[bytes] = []
    try:
        if len(parts) > 1:
            coder.set_pledged_input_size(len(data))
            for part in parts[:-1]:
                made.append(coder.compress(data[start : start + part], coder.FLUSH_BLOCK))
                start += part
        frame = b"".join([*made, coder.compress(data[start:], coder.FLUSH_FRAME)])
    except BaseException:
        _coders.renew()  # it may be within a frame, which the next one would continue
        raise
    return frame if len(frame) < len(data) else data


def restore(section: memoryview, size: int) -> bytes | memoryview:
    """The `size` bytes that a section stands for; never are more than some three times as many allocated.

    Raises:
        ValueError: it does not stand for that many.
    """
    if len(section) == size:
        return section
    if len(section) > size:
        raise ValueError(f"a section of {len(section)} bytes for {size}")
    try:
        found = zstd.get_frame_info(section)
        wide = size > 2**MAX_WINDOW_LOG if section[4] & _SINGLE_SEGMENT else section[5] > _WIDEST
        if found.decompressed_size != size or found.dictionary_id or wide:
            raise ValueError(
                f"a zstd frame of {found.decompressed_size} bytes, dictionary {found.dictionary_id}; it is to give"
                f" {size} bytes without a dictionary, and a window of at most {2**MAX_WINDOW_LOG}"
            )
        decompressor = zstd.ZstdDecompressor()
        data = decompressor.decompress(section, size)
    except zstd.ZstdError as e:
        raise ValueError(f"no zstd frame of {size} bytes: {e}") from e
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"a section is not one zstd frame of {size} bytes")
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
