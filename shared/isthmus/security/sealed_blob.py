"""Blobs sealed for storage: encrypted in chunks, so that a byte range is read and verified without the rest.

A blob is divided into regions, each under a data key of its own, so that a reader of one region cannot read another.
Chunks are sealed as in STREAM: the nonce holds the chunk's number and whether the chunk is its region's last. The key
of a region's chunks is derived from the data key and the whole header, which names the blob's digest, its length and
all regions: a chunk opens at its own place of its own blob alone, and a truncated blob does not open at its end.
Sources: Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance"
(2015); AES-GCM-HKDF-Streaming of Tink; NIST SP 800-38D. Layout: docs/reference/encryption.md.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from isthmus.errors import Corrupt

KEY_BYTES = 32
CHUNK_BYTES = 2**16
"""Plain bytes of a chunk: the tag adds 0.02 %, and a read of some bytes decrypts at most this much more at each end."""
MAX_REGIONS = 2**16
# Bounds the memory of a read: a range of 8 MiB whose edges lie within chunks has 129, read in three parts.
_CHUNKS_PER_READ = 43
_MAGIC = b"ISTHBLB\x01"
_TAG_BYTES, _SALT_BYTES, _PREFIX_BYTES = 16, 32, 7
# Magic, SHA-256 of the plain blob, its length, bytes of a chunk, number of regions, salt.
_HEAD = struct.Struct(f">8s32sQII{_SALT_BYTES}s")
_NONCE = struct.Struct(f">{_PREFIX_BYTES}sI?")
_LABEL = b"isthmus sealed blob 1"
# Regions in use at a time; deriving a key takes 10 microseconds.
_MAX_DERIVED = 1024


@dataclass(frozen=True)
class SealedHeader:
    """What a sealed blob begins with: the plain blob's digest in hex and length, and the end of each region."""

    digest_hex: str
    stops: tuple[int, ...]
    salt: bytes
    chunk_bytes: int = CHUNK_BYTES

    @cached_property
    def encoded(self) -> bytes:
        """The header's bytes."""
        head = _HEAD.pack(
            _MAGIC, bytes.fromhex(self.digest_hex), self.size, self.chunk_bytes, len(self.stops), self.salt
        )
        return head + struct.pack(f">{len(self.stops)}Q", *self.stops)

    @cached_property
    def identity(self) -> str:
        """The name of this sealing of the blob: the header's digest, abbreviated to 128 bits."""
        return hashlib.sha256(self.encoded).hexdigest()[:32]

    @property
    def size(self) -> int:
        """Length of the plain blob in bytes."""
        return self.stops[-1]

    @property
    def sealed_size(self) -> int:
        """Length of the sealed blob in bytes."""
        return self._sealed_starts[-1]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The begin of each region in the plain blob."""
        return (0, *self.stops[:-1])

    @cached_property
    def _sealed_starts(self) -> tuple[int, ...]:
        """The begin of each region in the sealed blob, then the sealed blob's end."""
        sizes = (stop - start + _TAG_BYTES * self.chunks(i) for i, (start, stop) in enumerate(self.bounds))
        return tuple(itertools.accumulate(sizes, initial=len(self.encoded)))

    @property
    def bounds(self) -> Iterable[tuple[int, int]]:
        """Begin and end of each region in the plain blob."""
        return zip(self.starts, self.stops, strict=True)

    def chunks(self, region: int) -> int:
        """The number of a region's chunks; an empty blob has one."""
        return max(1, -(-(self.stops[region] - self.starts[region]) // self.chunk_bytes))

    def regions(self, start: int, stop: int) -> range:
        """The regions that hold the plain bytes `start` to `stop`."""
        first = bisect_right(self.stops, start) if start < self.size else len(self.stops) - 1
        last = bisect_right(self.stops, stop - 1) if stop > start else first
        return range(first, last + 1)

    def place(self, region: int, chunk: int) -> int:
        """Where a chunk begins in the sealed blob."""
        return self._sealed_starts[region] + chunk * (self.chunk_bytes + _TAG_BYTES)

    def end(self, region: int, chunk: int) -> int:
        """Where a chunk ends in the sealed blob."""
        return min(self.place(region, chunk + 1), self._sealed_starts[region + 1])


def new_header(digest: str, size: int, boundaries: Iterable[int] = ()) -> SealedHeader:
    """The header for sealing a blob, with regions between `boundaries` (offsets in the blob, in any order)."""
    inner = sorted({offset for offset in boundaries if 0 < offset < size})
    return SealedHeader(digest.removeprefix("sha256:"), (*inner, size), os.urandom(_SALT_BYTES))


def read_header(data: bytes) -> SealedHeader:
    """The header at the begin of `data`.

    Raises:
        Corrupt: no header, or one whose lengths contradict each other.
    """
    try:
        magic, digest, size, chunk_bytes, count, salt = _HEAD.unpack_from(data)
        if magic != _MAGIC or not 1 <= count <= MAX_REGIONS or not 1 <= chunk_bytes <= 2**30:
            raise ValueError("it is none of this version")
        stops = struct.unpack_from(f">{count}Q", data, _HEAD.size)
        starts = (0, *stops[:-1])
        if stops[-1] != size or (count > 1 and any(a >= b for a, b in zip(starts, stops, strict=True))):
            raise ValueError("its regions are not in order")
    except (struct.error, ValueError) as e:
        raise Corrupt(f"the header of a sealed blob cannot be read: {e}", blob="") from e
    return SealedHeader(digest.hex(), stops, salt, chunk_bytes)


def new_keys(header: SealedHeader) -> dict[int, bytes]:
    """A random data key for each region."""
    return {region: os.urandom(KEY_BYTES) for region in range(len(header.stops))}


def seal(header: SealedHeader, keys: Mapping[int, bytes], pieces: Iterable[bytes | bytearray]) -> Iterator[bytes]:
    """The sealed blob of the plain `pieces`, in parts; memory is that of a piece.

    Raises:
        Corrupt: the pieces are not the blob of the header's digest.
    """
    yield header.encoded
    digest, source = hashlib.sha256(), _Pieces(pieces)
    for region, (start, stop) in enumerate(header.bounds):
        cipher, prefix = _derived(header, region, keys[region])
        count = header.chunks(region)
        for chunk in range(count):
            plain = source.take(min(header.chunk_bytes, stop - start - chunk * header.chunk_bytes))
            digest.update(plain)
            yield cipher.encrypt(_NONCE.pack(prefix, chunk, chunk == count - 1), plain, None)
    if source.take(1) or digest.hexdigest() != header.digest_hex:
        raise Corrupt(f"the bytes of sha256:{header.digest_hex} do not hash to it", blob=f"sha256:{header.digest_hex}")


def open_range(
    header: SealedHeader, keys: Mapping[int, bytes], start: int, stop: int, read: Callable[[int, int], bytes]
) -> bytes | bytearray:
    """The plain bytes `start` to `stop`; `read` gives a range of the sealed blob, of 2.7 MiB at most.

    Every region of the range must be among `keys`.

    Raises:
        Corrupt: a chunk was altered, or belongs to another place, blob or key.
    """
    # Decrypted in place: fresh memory for each chunk, and a copy of all, would take longer than the decryption.
    plain = bytearray(stop - start)
    places = _chunks(header, start, stop)
    while group := list(itertools.islice(places, _CHUNKS_PER_READ)):
        base = header.place(*group[0])
        data = memoryview(read(base, header.end(*group[-1])))
        for region, chunk in group:
            sealed = data[header.place(region, chunk) - base : header.end(region, chunk) - base]
            _open_chunk(header, keys[region], (region, chunk), sealed, memoryview(plain), start)
        # Not two at a time: the next read comes before the names are bound anew.
        del data, sealed
    return plain


def _chunks(header: SealedHeader, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Region and number of each chunk of the range, in order."""
    for region in header.regions(start, stop) if start < stop else ():
        begin, end = header.starts[region], header.stops[region]
        first = max(0, start - begin) // header.chunk_bytes
        last = (min(stop, end) - 1 - begin) // header.chunk_bytes
        yield from ((region, chunk) for chunk in range(first, last + 1))


def _open_chunk(
    header: SealedHeader, key: bytes, place: tuple[int, int], sealed: memoryview, plain: memoryview, start: int
) -> None:
    """Decrypt a chunk into `plain`, which begins at `start` of the blob; the edges of a range are parts of chunks."""
    region, chunk = place
    cipher, prefix = _derived(header, region, key)
    nonce = _NONCE.pack(prefix, chunk, chunk == header.chunks(region) - 1)
    at = header.starts[region] + chunk * header.chunk_bytes - start
    stop = at + len(sealed) - _TAG_BYTES
    try:
        if at >= 0 and stop <= len(plain):
            cipher.decrypt_into(nonce, sealed, None, plain[at:stop])
        else:
            whole = cipher.decrypt(nonce, sealed, None)
            plain[max(0, at) : stop] = whole[max(0, -at) : len(plain) - at]
    # ValueError: bytes too few for a tag.
    except (InvalidTag, ValueError):
        digest = f"sha256:{header.digest_hex}"
        raise Corrupt(
            f"the sealed bytes of {digest} were altered, or are another blob's", blob=digest, sealing=header.identity
        ) from None


@lru_cache(_MAX_DERIVED)
def _derived(header: SealedHeader, region: int, key: bytes) -> tuple[AESGCM, bytes]:
    """The cipher of a region's chunks, and the begin of their nonces."""
    info = b"".join((_LABEL, header.encoded, region.to_bytes(4, "big")))
    derived = HKDF(algorithm=SHA256(), length=KEY_BYTES + _PREFIX_BYTES, salt=header.salt, info=info).derive(key)
    return AESGCM(derived[:KEY_BYTES]), derived[KEY_BYTES:]


class _Pieces:
    """Bytes in pieces of any length, taken in other lengths."""

    def __init__(self, pieces: Iterable[bytes | bytearray]) -> None:
        self._pieces, self._rest = iter(pieces), memoryview(b"")

    def take(self, count: int) -> bytes | memoryview:
        """The next `count` bytes, fewer at the end."""
        # Mostly within a piece: nothing to copy.
        if len(self._rest) >= count:
            taken, self._rest = self._rest[:count], self._rest[count:]
            return taken
        return self._joined(count)

    def _joined(self, count: int) -> bytes:
        taken = list[bytes | memoryview]()
        while count:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
                if not self._rest:
                    break
            taken.append(self._rest[:count])
            self._rest = self._rest[count:]
            count -= len(taken[-1])
        return b"".join(taken)
