"""Payloads: golden bytes, each rule of docs/reference/codecs.md broken by the smallest bad input, bombs, mutations."""

from __future__ import annotations

import contextlib
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codecs import BOUND, CODED_FLOATS, PLAIN, Array, feature_map, frame_of, relu

from isthmus.codecs import EncodedTensor, Encoding, NotEncodable, find_codec
from isthmus.codecs.affine import MAX_OFFSET
from isthmus.codecs.payload import MAX_WINDOW_LOG, restore, shrink
from isthmus.errors import FrameError, FrameMalformed
from isthmus.wire import frame as frames
from isthmus.wire.frame import DTYPES, Frame
from support.bundles import photo
from support.patience import peak_of

FUZZ_ROUNDS = 20_000


def decode(codec: str, payload: bytes, dtype: str = "float32", shape: tuple[int, ...] = (4,)) -> Array:
    return find_codec(codec).decode(memoryview(payload), DTYPES[dtype], shape, None)


NUMBERS = np.array([0.0, 1.5, -2.0, 0.25], "float32")
GOLDEN: dict[str, tuple[str, bytes, Array]] = {
    "half": ("half/1", bytes.fromhex("0000003e00c00034"), NUMBERS),
    "bfloat16": ("bfloat16/1", bytes.fromhex("0000c03f00c0803e"), NUMBERS),
    # Lengths of two of three sections; the low words; the turned top words' low bytes, then their high ones: exponents.
    "lossless": ("lossless/3", struct.pack("<2I", 8, 4) + bytes(8) + bytes.fromhex("00800100007f807d"), NUMBERS),
    "lossless float32, one value": ("lossless/3", struct.pack("<f", -0.0), np.full((2, 2), -0.0, "f4")),
    # No length; the two values; a bit for each.
    "lossless float32, two values": (
        "lossless/3",
        struct.pack("<Iff", 0, 0, -np.inf) + b"\x50",
        np.array([0, -np.inf, 0, -np.inf], "f4"),
    ),
    "lossless float32, the other way around": (
        "lossless/3",
        struct.pack("<Iff", 0, -2, 1) + b"\xa0",
        np.array([1, -2, 1, -2], "f4"),
    ),
    "lossless float16, two values": ("lossless/3", struct.pack("<Iee", 0, 0, 1) + b"\x40", np.array([0, 1, 0], "f2")),
    "lossless bool": ("lossless/3", b"\xa0", np.array([True, False, True])),
    "lossless bool, all alike": ("lossless/3", b"\x01", np.ones((3, 3), np.bool_)),
    # How many bytes the least value takes and what each is more; it; their lengths; all lowest bytes, ….
    "lossless int16": (
        "lossless/3",
        struct.pack("<BbI", 0x12, -2, 3) + b"\x03\x00\x2e\x00\x00\x01",
        np.array([1, -2, 300], "int16"),
    ),
    "lossless int64, one byte": (
        "lossless/3",
        struct.pack("<Bq", 0x81, -(2**63)) + b"\xff\x00",
        np.array([-(2**63) + 255, -(2**63)]),
    ),
    "lossless int64, one bit": ("lossless/3", struct.pack("<Bb", 0x1F, -1) + b"\x60", np.array([-1, 0, 0, -1])),
    "lossless int64, all the same": ("lossless/3", b"\x10\x07", np.full((2, 2), 7)),
    "lossless int64, one": ("lossless/3", struct.pack("<BH", 0x20, 16000), np.array(16000)),
    "lossless int64, none but zeros": ("lossless/3", b"\0", np.zeros((2, 2), np.int64)),
    "lossless uint8, one": ("lossless/3", b"\x10\xff", np.array([255], np.uint8)),
    "lossless int8, one": ("lossless/3", b"\x10\xff", np.array([-1], np.int8)),
    "lossless int16, one that needs its sign": ("lossless/3", b"\x20\x80\x00", np.array([128], np.int16)),
    # The step, the offset, the codes.
    "int8": ("int8/1", struct.pack("<fi", 0.5, -4) + b"\x04\x07\x00\x05", np.array([0, 1.5, -2, 0.5], "float32")),
    # One channel: the length of the scales, four bytes of step and four of offset, two codes to a byte.
    "int4": ("int4/1", struct.pack("<Ifi", 8, 0.5, -4) + b"\x74\x50", np.array([0, 1.5, -2, 0.5], "float32")),
    # A step for each of two rows; six channels each, in order; their values; a code for each value.
    "int8-token": (
        "int8-token/1",
        struct.pack("<2f", 0.5, 2)
        + struct.pack("<12H", 0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 7)
        + struct.pack("<12f", *range(10, 22))
        + b"\0\0\0\0\0\0\x03\xfc\x01\0\0\0\0\0\x7f\0",
        np.array([[10, 11, 12, 13, 14, 15, 1.5, -2], [2, 16, 17, 18, 19, 20, 254, 21]], "float32"),
    ),
    # Form 0, no step, three values, one byte of bits; the values as lossless/3 has them.
    "sparse": (
        "sparse/2",
        struct.pack("<BfII", 0, 0, 3, 1) + b"\x70" + struct.pack("<2I", 6, 3) + bytes(6) + b"\x80\x01\x00\x7f\x80\x7d",
        np.array([0, 1.5, -2.0, 0.25], "float32"),
    ),
    "sparse, a mask": (
        "sparse/2",
        struct.pack("<BfII", 0, 0, 2, 1) + b"\x50" + struct.pack("<f", 1),
        np.array([0, 1, 0, 1], "f4"),
    ),
    "sparse, codes": (
        "sparse/2",
        struct.pack("<BfII", 1, 0.5, 2, 1) + b"\x50\x03\x01",
        np.array([0, 1.5, 0, 0.5], "f4"),
    ),
    "sparse, signed": ("sparse/2", struct.pack("<BfII", 2, 0.5, 1, 1) + b"\x20\xfd", np.array([0, 0, -1.5, 0], "f4")),
    # A zstd frame of 20 bytes in one block: a repeated zero.
    "lossless, zstd": (
        "lossless/3",
        struct.pack("<BB", 0x11, 9) + bytes.fromhex("28b52ffd2014a3000000"),
        np.full(20, 9, "uint8"),
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_payloads_read_as_they_always_did(case: str) -> None:
    codec, payload, expected = GOLDEN[case]
    got = find_codec(codec).decode(memoryview(payload), expected.dtype, expected.shape, None)
    assert got.tolist() == expected.tolist()
    assert got.dtype == expected.dtype


_LOSSLESS = [case for case in GOLDEN if case.startswith("lossless") and "zstd" not in case and "around" not in case]


@pytest.mark.parametrize("case", ["half", "bfloat16", "sparse", *_LOSSLESS])
def test_what_is_stored_is_written_as_the_golden_payload(case: str) -> None:
    codec, payload, array = GOLDEN[case]
    assert bytes(find_codec(codec).encode(array, Encoding(codec))) == payload


def streamed(data: bytes) -> bytes:
    """A zstd frame that does not say how long its content is."""
    maker = zstd.ZstdCompressor()
    return maker.compress(data) + maker.flush()


def by_hand(descriptor: str, block: str) -> bytes:
    """A zstd frame of a magic number, what describes it, and one block of a repeated zero."""
    return bytes.fromhex("28b52ffd" + descriptor + block + "00")


Z100 = bytes(100)
BAD_SECTIONS: dict[str, bytes] = {
    "longer than its content": bytes(101),
    "nothing": b"",
    "no zstd": b"\x01" * 20,
    "another size": zstd.compress(bytes(99)),
    "a size not stated": streamed(Z100),
    "cut off": zstd.compress(Z100)[:-1],
    "a frame and more": zstd.compress(Z100) + b"\0",
    "two frames": zstd.compress(bytes(50)) + zstd.compress(bytes(50)),
    "a skippable frame": b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "a skippable frame of its size": b"\x50\x2a\x4d\x18\x64\0\0\0" + bytes(80),
    "a dictionary": by_hand("210764", "230300"),
    "a window of 128 MiB": by_hand("808864000000", "230300"),
    "a block of no known kind": by_hand("2064", "270300"),
    "a block too short": by_hand("2064", "1b0300"),
    "a block too long": by_hand("2064", "2b0300"),
    "zlib": zlib.compress(Z100),
}


@pytest.mark.parametrize("case", BAD_SECTIONS)
def test_a_section_that_is_not_one_zstd_frame_of_its_size_is_refused(case: str) -> None:
    assert bytes(restore(memoryview(by_hand("2064", "230300")), 100)) == Z100
    with pytest.raises(ValueError, match=r"section|zstd"):
        restore(memoryview(BAD_SECTIONS[case]), 100)


def test_a_frame_whose_window_is_its_content_is_held_to_the_same_bound() -> None:
    maker = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    for size in (2**MAX_WINDOW_LOG, 2**MAX_WINDOW_LOG + 1):
        maker.set_pledged_input_size(size)
        frame = memoryview(maker.compress(bytes(size), maker.FLUSH_FRAME))
        assert frame[4] & 0x20
        if size == 2**MAX_WINDOW_LOG:
            assert restore(frame, size) == bytes(size)
        else:
            with pytest.raises(ValueError, match="window"):
                restore(frame, size)


def test_a_thread_that_was_interrupted_in_a_frame_writes_whole_ones_after_it() -> None:
    with pytest.raises(TypeError):
        shrink(bytes(9000), "checked", [3000, "no length", 3000])  # type: ignore[list-item]
    assert bytes(restore(memoryview(shrink(bytes(6000), "checked")), 6000)) == bytes(6000)


@pytest.mark.parametrize("kind", ["numbers", "checked", "structure"])
@given(data=st.binary(max_size=3000), repeated=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_sections_come_back(kind: Any, data: bytes, repeated: int) -> None:
    whole = data * repeated
    section = shrink(whole, kind)
    assert len(section) <= len(whole)
    assert bytes(restore(memoryview(section), len(whole))) == whole


def token_payload(step: float = 1, channels: Sequence[int] = range(6), count: int = 8) -> bytes:
    """A row of `count` values, with outliers of zero."""
    return struct.pack("<f6H24x", step, *channels) + bytes(count)


HEADER = struct.Struct("<BfII")
BAD: dict[str, tuple[str, bytes, str, tuple[int, ...]]] = {
    "half of odd length": ("half/1", bytes(7), "float32", (4,)),
    "half too long": ("half/1", bytes(10), "float32", (4,)),
    "half of a half": ("half/1", bytes(8), "float16", (4,)),
    "bfloat16 of int": ("bfloat16/1", bytes(8), "int32", (4,)),
    "lossless without lengths": ("lossless/3", bytes(11), "float32", (4,)),
    "lossless cut": ("lossless/3", struct.pack("<2I", 8, 4) + bytes(15), "float32", (4,)),
    "lossless with more": ("lossless/3", struct.pack("<2I", 8, 4) + bytes(17), "float32", (4,)),
    "lossless of a vast length": ("lossless/3", struct.pack("<2I", 2**32 - 1, 4) + bytes(16), "float32", (4,)),
    "lossless of one length": ("lossless/3", struct.pack("<I", 8) + bytes(16), "float32", (4,)),
    "lossless two values without one": ("lossless/3", struct.pack("<IfB", 0, 1, 0), "float32", (4,)),
    "lossless two values without bits": ("lossless/3", struct.pack("<Iff", 0, 0, 1), "float32", (4,)),
    "lossless two values, bits after the end": ("lossless/3", struct.pack("<IffB", 0, 0, 1, 0x18), "float32", (4,)),
    "lossless two values and more": ("lossless/3", struct.pack("<IffH", 0, 0, 1, 0x10), "float32", (4,)),
    "lossless half of a value": ("lossless/3", bytes(2), "float32", (4,)),
    "lossless booleans alike, but neither": ("lossless/3", b"\2", "bool", (9,)),
    "lossless booleans without anything": ("lossless/3", b"", "bool", (9,)),
    "lossless integers without anything": ("lossless/3", b"", "int32", (4,)),
    "lossless integers without the least": ("lossless/3", b"\x10", "int32", (4,)),
    "lossless integers with half of the least": ("lossless/3", b"\x20\x01", "int32", (4,)),
    "lossless integers with too long a least": ("lossless/3", b"\x30\x01\x01\x01", "int16", (4,)),
    "lossless integers too wide": ("lossless/3", struct.pack("<B2I", 3, 4, 4) + bytes(12), "int16", (4,)),
    "lossless integers of no bits, but bytes": ("lossless/3", b"\0\0", "int16", (4,)),
    "lossless one bit after the end": ("lossless/3", b"\x0f\xf1", "int16", (4,)),
    "lossless bits after the end": ("lossless/3", b"\xf1", "bool", (4,)),
    "lossless nothing, but bytes": ("lossless/3", b"\0", "float32", (0,)),
    "int8 without a step": ("int8/1", bytes(7), "float32", (4,)),
    "int8 step of zero": ("int8/1", struct.pack("<fi", 0, 0) + bytes(4), "float32", (4,)),
    "int8 step below zero": ("int8/1", struct.pack("<fi", -1, 0) + bytes(4), "float32", (4,)),
    "int8 step NaN": ("int8/1", struct.pack("<fi", np.nan, 0) + bytes(4), "float32", (4,)),
    "int8 step infinite": ("int8/1", struct.pack("<fi", np.inf, 0) + bytes(4), "float32", (4,)),
    "int8 offset": ("int8/1", struct.pack("<fi", 1, MAX_OFFSET + 1) + bytes(4), "float32", (4,)),
    "int8 offset below": ("int8/1", struct.pack("<fi", 1, -(2**31)) + bytes(4), "float32", (4,)),
    "int8 codes missing": ("int8/1", struct.pack("<fi", 1, 0) + bytes(3), "float32", (4,)),
    "int8 of float64": ("int8/1", struct.pack("<fi", 1, 0) + bytes(4), "float64", (4,)),
    "int8 nothing, but bytes": ("int8/1", struct.pack("<fi", 1, 0), "float32", (0, 4)),
    "int4 without scales": ("int4/1", bytes(3), "float32", (4,)),
    "int4 scales too short": ("int4/1", struct.pack("<I", 7) + bytes(7) + bytes(2), "float32", (4,)),
    "int4 scales of another count": ("int4/1", struct.pack("<Ifi", 8, 1, 0) + bytes(8), "float32", (1, 2, 2, 4)),
    "int4 step of zero": ("int4/1", struct.pack("<Ifi", 8, 0, 0) + bytes(2), "float32", (4,)),
    "int4 step NaN": ("int4/1", struct.pack("<Ifi", 8, np.nan, 0) + bytes(2), "float32", (4,)),
    "int4 offset": ("int4/1", struct.pack("<Ifi", 8, 1, -(2**31)) + bytes(2), "float32", (4,)),
    "int4 half a byte after the end": ("int4/1", struct.pack("<Ifi", 8, 1, 0) + b"\0\x10", "float32", (3,)),
    "int4 pairs missing": ("int4/1", struct.pack("<Ifi", 8, 1, 0) + b"\0", "float32", (3,)),
    "int4 nothing, but bytes": ("int4/1", b"\0", "float32", (1, 4, 0, 2)),
    "int8-token without steps": ("int8-token/1", bytes(7), "float32", (2, 1)),
    "int8-token step of zero": ("int8-token/1", token_payload(step=0), "float32", (8,)),
    "int8-token step below zero": ("int8-token/1", token_payload(step=-1), "float32", (8,)),
    "int8-token step NaN": ("int8-token/1", token_payload(step=np.nan), "float32", (8,)),
    "int8-token step infinite": ("int8-token/1", token_payload(step=np.inf), "float32", (8,)),
    "int8-token channel beyond the row": ("int8-token/1", token_payload(channels=(0, 1, 2, 3, 4, 8)), "float32", (8,)),
    "int8-token channel twice": ("int8-token/1", token_payload(channels=(0, 1, 1, 3, 4, 5)), "float32", (8,)),
    "int8-token channels out of order": ("int8-token/1", token_payload(channels=(1, 0, 2, 3, 4, 5)), "float32", (8,)),
    "int8-token codes missing": ("int8-token/1", token_payload()[:-1], "float32", (8,)),
    "int8-token of float64": ("int8-token/1", token_payload(), "float64", (8,)),
    "int8-token nothing, but bytes": ("int8-token/1", token_payload(), "float32", (0, 8)),
    "sparse without a header": ("sparse/2", bytes(12), "float32", (4,)),
    "sparse of an unknown form": ("sparse/2", HEADER.pack(3, 1, 1, 1) + b"\x80\x01", "float32", (4,)),
    "sparse with too many values": ("sparse/2", HEADER.pack(1, 1, 2, 1) + b"\x80\x01\x01", "float32", (4,)),
    "sparse with vastly many": ("sparse/2", HEADER.pack(1, 1, 2**32 - 1, 1) + b"\x80\x01", "float32", (4,)),
    "sparse with too few": ("sparse/2", HEADER.pack(1, 1, 1, 1) + b"\xc0\x01", "float32", (4,)),
    "sparse bits after the end": ("sparse/2", HEADER.pack(1, 1, 2, 1) + b"\x88\x01\x01", "float32", (4,)),
    "sparse step of zero": ("sparse/2", HEADER.pack(1, 0, 1, 1) + b"\x80\x01", "float32", (4,)),
    "sparse step NaN": ("sparse/2", HEADER.pack(1, np.nan, 1, 1) + b"\x80\x01", "float32", (4,)),
    "sparse exact with a step": ("sparse/2", HEADER.pack(0, 1, 0, 1) + b"\x00", "float32", (4,)),
    "sparse codes missing": ("sparse/2", HEADER.pack(1, 1, 1, 1) + b"\x80", "float32", (4,)),
    "sparse codes of float64": ("sparse/2", HEADER.pack(1, 1, 1, 1) + b"\x80\x01", "float64", (4,)),
    "sparse bits too long": ("sparse/2", HEADER.pack(1, 1, 1, 2) + b"\x80\0\x01", "float32", (4,)),
    "sparse nothing, but bytes": ("sparse/2", HEADER.pack(0, 0, 0, 0), "float32", (0,)),
    "transform without a table": ("transform/4", bytes(8), "float32", (4,)),
    "photo without a recipe": ("photo/1", photo(), "float32", (1, 3, 8, 8)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_payload_is_a_value_error(case: str) -> None:
    codec, payload, dtype, shape = BAD[case]
    with pytest.raises(ValueError):  # noqa: PT011 - each is its own sentence; the frame names the tensor and the rule
        decode(codec, payload, dtype, shape)


@pytest.mark.parametrize("codec", PLAIN)
def test_an_encoded_tensor_that_breaks_a_rule_is_the_frames_fault(codec: str) -> None:
    data = frame_of(relu(1, 4, 6, 6), Encoding(codec)).replace(b"[1,4,6,6]", b"[1,4,6,7]")
    with pytest.raises(FrameMalformed, match="'x' cannot be decoded") as e:
        frames.decode(data, max_bytes=BOUND)
    assert e.value.facts["rule"] == "payload"


def test_a_payload_of_the_transform_before_is_refused_by_its_name() -> None:
    data = frames.encode(Frame({}, encoded={"x": EncodedTensor("transform/4", "float32", (4,), bytes(8))}))
    with pytest.raises(FrameMalformed) as e:
        frames.decode(data.replace(b"transform/4", b"transform/1"), max_bytes=BOUND)
    assert e.value.facts["rule"] == "codec"


def bomb(size: int) -> bytes:
    """`size` zeros in a few bytes, as a section may hold them."""
    return bytes(shrink(bytes(size), "numbers"))


BOMBS: dict[str, tuple[str, Callable[[int], bytes], str]] = {
    "lossless": ("lossless/3", lambda n: b"\1" + bomb(n), "uint8"),
    "int8": ("int8/1", lambda n: struct.pack("<fi", 1, 0) + bomb(n), "float32"),
    "int4": ("int4/1", lambda n: struct.pack("<Ifi", 8, 1, 0) + bomb(n), "float32"),
    "int8-token": ("int8-token/1", lambda n: token_payload(count=0) + bomb(n), "float32"),
    "sparse": ("sparse/2", lambda n: HEADER.pack(1, 1, 0, len(bomb(n))) + bomb(n), "float32"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_payload_that_would_decode_to_more_than_its_tensor_allocates_nothing(case: str) -> None:
    codec, make, dtype = BOMBS[case]
    payload = make(64 * 2**20)
    assert len(payload) < 20_000

    def refuse() -> None:
        with pytest.raises(ValueError, match=r"section|zstd"):
            decode(codec, payload, dtype, (50_000,))

    assert peak_of(refuse, 2**20) < 2**20


def test_a_frame_of_many_small_payloads_unpacks_to_no_more_than_its_bound() -> None:
    packed = {
        f"t{i}": EncodedTensor("int8/1", "float32", (2**16,), struct.pack("<fi", 1, 0) + bomb(2**16)) for i in range(99)
    }
    data = frames.encode(Frame({}, encoded=packed))
    assert len(data) < 2**16

    def refuse() -> None:
        with pytest.raises(FrameError) as e:
            frames.decode(data, max_bytes=BOUND)
        assert e.value.facts["rule"] == "unpacked"

    assert peak_of(refuse, 2 * BOUND) < 2 * BOUND


def test_20_000_mutated_frames_of_encoded_tensors_raise_nothing_but_frame_errors() -> None:
    rng = random.Random(11)
    arrays = [relu(1, 4, 6, 6), feature_map(1, 4, 6, 6), np.arange(90, dtype="int64"), np.tri(20, dtype=bool)]
    arrays += [relu(1, 4, 6, 6).astype(d) for d in CODED_FLOATS[1:]] + [np.zeros((1, 6, 7, 7), "float32")]
    seeds = []
    for array, codec, quality in product(arrays, PLAIN, (1.0, 0.5)):
        with contextlib.suppress(NotEncodable):
            seeds.append(frame_of(array, Encoding(codec, quality)))
    assert len(seeds) > 50
    refused = 0
    for _ in range(FUZZ_ROUNDS):
        data = bytearray(rng.choice(seeds))
        start = int.from_bytes(data[8:16], "little") + 16
        for _ in range(rng.randint(1, 4)):
            at = (
                rng.randrange(start, len(data))
                if len(data) > start and rng.random() < 0.8
                else rng.randrange(len(data))
            )
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.randrange(256)
                case 2:
                    data[at : at + 4] = rng.choice(
                        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", rng.randbytes(4)]
                    )
                case 3:
                    other = rng.choice(seeds)
                    data[at:] = other[-max(1, len(data) - at) :]
        try:
            tensors = frames.decode(bytes(data), max_bytes=BOUND).tensors
        except FrameError:
            refused += 1
        else:
            assert all(array.nbytes <= BOUND for array in tensors.values())
    assert FUZZ_ROUNDS // 4 < refused < FUZZ_ROUNDS
