"""The rANS coder: the same bytes from numbers and from arrays, hardly a cost for lanes, and no harm from any bytes."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.codecs.transform import ans
from isthmus.codecs.transform.ans import CERTAIN, SCALE, Codebook, Decoder, Encoder, SymbolModel, bits_of, of_bits
from support.activations import Array
from support.patience import peak_of

COIN, SKEWED, WIDE = (
    SymbolModel.of([1, 1]),
    SymbolModel.of([0, 1, 10**30, 0, 10**29]),
    SymbolModel.of(list(range(1, 257))),
)


class Message(NamedTuple):
    """Sequences of symbols with bounds and models, and plain bits."""

    sequences: list[tuple[Array, list[int], Codebook]]
    plain: Array

    def encoded(self) -> bytes:
        coder = Encoder()
        for sequence in self.sequences:
            coder.add(*sequence)
        return coder.finish(self.plain)

    def decoded(self, data: bytes) -> tuple[list[Array], Array]:
        coder = Decoder(memoryview(data))
        symbols = [coder.take(bounds, codebook) for _, bounds, codebook in self.sequences]
        plain = coder.finish(self.plain.size)
        parts = [
            plain.take(count) for count in np.diff([0, self.plain.size // 3, self.plain.size // 2, self.plain.size])
        ]
        return symbols, np.concatenate(parts)

    def bits(self) -> float:
        """What the models say that symbols take, and the plain bits."""
        return self.plain.size + sum(
            math.log2(SCALE / model.frequencies[symbol])
            for symbols, bounds, codebook in self.sequences
            for (start, stop), model in zip(itertools.pairwise(bounds), codebook.models, strict=True)
            for symbol in symbols[start:stop].tolist()
        )


def message(rng: np.random.Generator, counts: list[int], plain: int, models: list[SymbolModel]) -> Message:
    """Sequences of so many symbols, each drawn by its model; runs of several models in each."""
    sequences = []
    for count in counts:
        cuts = np.sort(rng.integers(0, count + 1, len(models) - 1)).tolist()
        bounds = [0, *cuts, count]
        parts = [
            rng.choice(model.frequencies.size, stop - start, p=model.frequencies / SCALE)
            for (start, stop), model in zip(itertools.pairwise(bounds), models, strict=True)
        ]
        sequences.append((np.concatenate(parts).astype(np.uint8), bounds, Codebook(models)))
    return Message(sequences, rng.integers(0, 2, plain, np.uint8))


def check_round_trip(sent: Message) -> None:
    symbols, plain = sent.decoded(sent.encoded())
    assert all(np.array_equal(got, given) for got, (given, _, _) in zip(symbols, sent.sequences, strict=True))
    assert np.array_equal(plain, sent.plain)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3000), max_size=4), st.integers(0, 8000))
def test_symbols_and_plain_bits_come_back(seed: int, counts: list[int], plain: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.integers(0, 10 ** int(rng.integers(1, 18)), int(rng.integers(1, 257))) for _ in range(3)]
    models = [COIN, SKEWED, CERTAIN, WIDE, *(SymbolModel.of([1, *w.tolist()][:256]) for w in weights)]
    check_round_trip(message(rng, counts, plain, models))


def test_one_lane_of_integers_and_of_arrays_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = message(np.random.default_rng(0), [500, 3, 700], 100, [COIN, WIDE, SKEWED])
    data = sent.encoded()
    monkeypatch.setattr(ans, "_push_one", ans._push)
    monkeypatch.setattr(ans, "_pull_one", ans._pull)
    assert sent.encoded() == data
    check_round_trip(sent)


def test_lanes_cost_next_to_nothing_where_plain_bits_fill_their_states() -> None:
    rng = np.random.default_rng(1)
    for plain, lanes in ((1500, 1), (5000, 128), (30_000, 1024)):
        sent = message(rng, [20_000], plain, [WIDE, COIN])
        data = sent.encoded()
        assert 1 << (struct.unpack("<H", data[:2])[0] >> 12) == lanes
        assert len(data) < 1.002 * sent.bits() / 8 + 8


def test_golden_bytes_of_one_lane_and_of_many() -> None:
    few = Message(
        [
            (
                np.array([0, 2, 1, 3, 3, 0], np.uint8),
                [0, 4, 6],
                Codebook([SymbolModel.of([5, 2, 1, 1]), SymbolModel.of([1, 0, 0, 9])]),
            ),
            (np.array([7], np.uint8), [0, 1], Codebook([WIDE])),
        ],
        np.array([1, 0, 1, 1, 0, 0, 1], np.uint8),
    )
    assert few.encoded().hex() == GOLDEN_FEW
    at = np.arange(3000)
    symbols = (at * at % 251 % 40).astype(np.uint8)
    many = Message(
        [(symbols, [0, 1000, 3000], Codebook([WIDE, SymbolModel.of([40] * 40)]))], (at * 7 % 11 % 2).astype(np.uint8)
    )
    data = many.encoded()
    assert (len(data), hashlib.sha256(data).hexdigest()) == GOLDEN_MANY
    check_round_trip(few)
    check_round_trip(many)


def test_frequencies_sum_to_the_scale_and_only_what_never_occurs_has_none() -> None:
    for weights in ([1], [1, 0, 10**40], list(range(256)), [0, 0, 3], [10**9] * 256):
        frequencies = SymbolModel.of(weights).frequencies
        assert int(frequencies.sum()) == SCALE
        assert [f > 0 for f in frequencies.tolist()] == [w > 0 for w in weights]
    assert SymbolModel.of([1, 10**30]).frequencies.tolist() == [1, SCALE - 1]


def test_bits_are_the_numbers_that_gave_them() -> None:
    for width in range(1, 13):
        values = np.random.default_rng(width).integers(0, 1 << width, 50)
        bits = bits_of(values, width)
        assert bits.size == 50 * width
        assert np.array_equal(of_bits(bits, width), values)
    assert bits_of(np.array([5, 2]), 3).tolist() == [1, 0, 1, 0, 1, 0]


def sealed(lanes_log: int, data: bytes) -> bytes:
    """Any bytes with a head that is right for them."""
    return struct.pack("<H", lanes_log << 12 | zlib.crc32(data, lanes_log) & 0xFFF) + data


def test_bytes_that_no_encoder_wrote_are_refused_or_give_symbols_of_the_models() -> None:
    rng = np.random.default_rng(2)
    sent = message(rng, [2000, 300], 3000, [COIN, SKEWED, WIDE])
    good, accepted = sent.encoded(), 0
    for turn in range(1500):
        size = int(rng.integers(0, 1500))
        data = bytearray(good[2:] if turn % 2 else rng.bytes(size))
        lanes_log = struct.unpack("<H", good[:2])[0] >> 12 if turn % 2 else int(rng.choice([0, 6, 7, 12]))
        for at in rng.integers(0, len(data), 2 if turn % 2 else 0).tolist():
            data[at] ^= int(rng.integers(1, 256))
        try:
            symbols, plain = sent.decoded(sealed(lanes_log, bytes(data)))
        except ValueError:
            continue
        accepted += 1
        assert plain.size == 3000
        for got, (_, bounds, codebook) in zip(symbols, sent.sequences, strict=True):
            for (start, stop), model in zip(itertools.pairwise(bounds), codebook.models, strict=True):
                assert model.frequencies[got[start:stop]].all()
    assert 0 < accepted < 750


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "head"),
        (b"\0", "head"),
        (sealed(3, bytes(40)), "no 2\\^3 lanes"),
        (sealed(13, bytes(40)), "no 2\\^13 lanes"),
        (sealed(0, b""), "states"),
        (sealed(12, bytes(500)), "states"),
        (sealed(0, bytes(3))[:-1] + b"\1", "checksum"),
        (sealed(0, bytes([0, 0, 1])), "not zero"),
        (sealed(0, bytes(3)), "before the last symbol"),
        (sealed(0, bytes(2000)), "do not end"),
    ],
)
def test_what_is_wrong_with_coded_values_is_said(data: bytes, why: str) -> None:
    sent = message(np.random.default_rng(3), [400], 0, [COIN])
    with pytest.raises(ValueError, match=why):
        sent.decoded(data)


def test_memory_of_a_decoder_is_bounded_by_its_symbols_and_data() -> None:
    sent = message(np.random.default_rng(4), [50_000], 200_000, [WIDE])
    data = sent.encoded()
    bound = 30 * (50_000 + len(data))
    assert peak_of(lambda: sent.decoded(data), bound) < bound

    def hostile() -> None:
        with pytest.raises(ValueError, match="coded values"):
            sent.decoded(sealed(12, bytes(12_000)))

    assert peak_of(hostile, 30 * 50_000) < 30 * 50_000


GOLDEN_FEW = "d80e3ef6e0a6c50000"
GOLDEN_MANY = (3080, "4098db7bd0078af6bf5b6f90650ac76d09feea4980ea008bb1f1abc8dba99923")
