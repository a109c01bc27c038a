"""Sealed blobs: any range opens, and nothing that was altered, moved, cut off or spliced does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import Corrupt
from isthmus.security.sealed_blob import SealedHeader, new_header, new_keys, open_range, read_header, seal

CHUNK = 64
"""Small chunks, so that small blobs have several."""
PLAIN = bytes(range(256)) * 2


@dataclass(frozen=True)
class Sealing:
    """A blob, its sealed form and all of its keys."""

    plain: bytes
    header: SealedHeader
    keys: dict[int, bytes]
    sealed: bytes

    def opened(self, start: int, stop: int, sealed: bytes | None = None) -> bytes:
        data = self.sealed if sealed is None else sealed
        return open_range(self.header, self.keys, start, stop, lambda a, b: data[a:b])


def sealing(plain: bytes, boundaries: Sequence[int] = (), chunk_bytes: int = CHUNK) -> Sealing:
    digest = "sha256:" + hashlib.sha256(plain).hexdigest()
    header = replace(new_header(digest, len(plain), boundaries), chunk_bytes=chunk_bytes)
    keys = new_keys(header)
    return Sealing(plain, header, keys, b"".join(seal(header, keys, [plain])))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_range_opens_to_the_plain_bytes(data: st.DataObject) -> None:
    plain = data.draw(st.binary(max_size=600))
    boundaries = data.draw(st.lists(st.integers(0, len(plain)), max_size=6))
    start = data.draw(st.integers(0, len(plain)))
    stop = data.draw(st.integers(start, len(plain)))
    blob = sealing(plain, boundaries)
    assert blob.opened(start, stop) == plain[start:stop]


def test_empty_ranges_and_an_empty_blob_open_to_nothing() -> None:
    blob, empty = sealing(PLAIN, [100]), sealing(b"")
    assert [blob.opened(at, at) for at in range(len(PLAIN) + 1)] == [b""] * (len(PLAIN) + 1)
    assert empty.opened(0, 0) == b""


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5), st.integers(1, 90))
def test_the_sealed_form_is_the_same_for_plain_bytes_in_any_pieces(plain: bytes, bounds: list[int], piece: int) -> None:
    blob = sealing(plain, bounds)
    pieces = [plain[at : at + piece] for at in range(0, len(plain), piece)]
    assert b"".join(seal(blob.header, blob.keys, pieces)) == blob.sealed
    assert len(blob.sealed) == blob.header.sealed_size
    assert read_header(blob.sealed) == blob.header


BLOB = sealing(PLAIN, [100, 101, 300])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(BLOB.sealed) - 1), st.integers(1, 255))
def test_no_altered_byte_passes(at: int, change: int) -> None:
    altered = bytearray(BLOB.sealed)
    altered[at] ^= change
    if at < len(BLOB.header.encoded):
        # Readers take the header from their grant; one from the file is refused, or opens no chunk.
        try:
            header = read_header(bytes(altered))
        except Corrupt:
            return
        assert header != BLOB.header
        with pytest.raises((Corrupt, KeyError)):
            open_range(header, BLOB.keys, 0, min(header.size, 1), lambda a, b: BLOB.sealed[a:b])
    else:
        with pytest.raises(Corrupt, match="altered"):
            BLOB.opened(0, len(PLAIN), bytes(altered))


def chunk_places(blob: Sealing) -> list[tuple[int, int]]:
    header = blob.header
    return [
        (header.place(region, chunk), header.end(region, chunk))
        for region in range(len(header.stops))
        for chunk in range(header.chunks(region))
    ]


def test_no_chunk_passes_at_the_place_of_another() -> None:
    # Of one length, so that only the place tells them apart.
    blob = sealing(PLAIN)
    places = chunk_places(blob)
    for i, (a, b) in enumerate(places):
        for j, (c, d) in enumerate(places):
            moved = bytearray(blob.sealed)
            moved[c:d] = blob.sealed[a:b]
            plain = slice(j * CHUNK, (j + 1) * CHUNK)
            if i == j:
                assert blob.opened(plain.start, plain.stop, bytes(moved)) == PLAIN[plain]
            else:
                with pytest.raises(Corrupt):
                    blob.opened(plain.start, plain.stop, bytes(moved))


def test_no_chunk_passes_in_another_blob_or_another_sealing_even_under_the_same_key() -> None:
    other = bytes(255 - b for b in PLAIN)
    for plain in (PLAIN, other):
        header = replace(new_header("sha256:" + hashlib.sha256(plain).hexdigest(), len(plain)), chunk_bytes=CHUNK)
        spliced = b"".join(seal(header, sealing(PLAIN).keys, [plain]))
        blob = sealing(PLAIN)
        foreign = b"".join(seal(header, blob.keys, [plain]))
        for sealed in (spliced, foreign):
            with pytest.raises(Corrupt):
                blob.opened(0, CHUNK, sealed)


def test_no_region_passes_for_another_under_the_same_key() -> None:
    blob = sealing(PLAIN, [256])
    same = {0: blob.keys[0], 1: blob.keys[0]}
    sealed = b"".join(seal(blob.header, same, [PLAIN]))
    half = (len(sealed) - len(blob.header.encoded)) // 2
    swapped = sealed[: len(blob.header.encoded)] + sealed[-half:] + sealed[-2 * half : -half]
    for start in (0, 256):
        with pytest.raises(Corrupt):
            open_range(blob.header, same, start, start + 10, lambda a, b: swapped[a:b])


def test_a_blob_cut_short_at_the_end_of_a_chunk_is_refused() -> None:
    blob = sealing(PLAIN)
    shorter = SealedHeader(blob.header.digest_hex, (len(PLAIN) - CHUNK,), blob.header.salt, CHUNK)
    with pytest.raises(Corrupt):
        open_range(shorter, blob.keys, 0, 10, lambda a, b: blob.sealed[a:b])
    with pytest.raises(Corrupt):
        blob.opened(0, len(PLAIN), blob.sealed[: -CHUNK - 16])


def test_a_key_of_one_region_does_not_open_another() -> None:
    blob = sealing(PLAIN, [256])
    swapped = {0: blob.keys[1], 1: blob.keys[0]}
    for start in (0, 256):
        with pytest.raises(Corrupt):
            open_range(blob.header, swapped, start, start + 1, lambda a, b: blob.sealed[a:b])


def test_plain_bytes_of_another_digest_are_not_sealed() -> None:
    blob = sealing(PLAIN)
    for wrong in (PLAIN[:-1], PLAIN + b"x", PLAIN[:-1] + b"x"):
        with pytest.raises(Corrupt, match="hash"):
            list(seal(blob.header, blob.keys, [wrong]))


def test_the_layout_is_as_documented() -> None:
    plain = bytes(100_000)
    digest = hashlib.sha256(plain).hexdigest()
    header = SealedHeader(digest, (70_000, 100_000), bytes(32))
    parts = list(seal(header, {0: bytes(32), 1: b"\x01" * 32}, [plain]))
    fixed = f"{b'ISTHBLB'.hex()}01{digest}{100_000:016x}{65_536:08x}{2:08x}{'00' * 32}"
    assert parts[0].hex() == f"{fixed}{70_000:016x}{100_000:016x}"
    assert [len(part) for part in parts] == [104, 65_536 + 16, 4464 + 16, 30_000 + 16]
    # Computed by hand as the page says, with hmac for HKDF.
    assert [part[:8].hex() for part in parts[1:]] == ["7992281b695da847", "6e2586d634308b3a", "547e628f57f8d3cf"]


@pytest.mark.parametrize("data", [b"", b"ISTHBLB\x01", b"x" * 200, BLOB.sealed[:100]], ids=len)
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt, match="header"):
        read_header(data)
