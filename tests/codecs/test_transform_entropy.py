"""The coder of whole numbers: they come back exactly, from few bytes, and other bytes are refused."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.codecs.payload import restore, shrink
from isthmus.codecs.transform import entropy
from isthmus.codecs.transform.ans import SCALE
from isthmus.codecs.transform.levels import MAX_LEVEL, Grouping
from isthmus.codecs.transform.plan import PAIRS, SINGLE, ByteRun, CodingPlan, run_unit
from support.activations import Array, golden_models, laplace_models


def test_golden_bytes_of_the_entropy_coder() -> None:
    values = np.array([((i * i) % 97) * ((i % 7) - 3) // 40 for i in range(4096)], np.float32)
    values[::512] *= 1000
    runs = [(at, at * 128, (at + 1) * 128 if at < 20 else 4096) for at in range(21)]
    plan = CodingPlan.of(runs, golden_models())
    data = entropy.encode(values, plan)
    assert np.array_equal(entropy.decode(memoryview(data), plan), values)
    assert (len(data), hashlib.sha256(data).hexdigest()) == GOLDEN_LONG
    short = CodingPlan.of([(6, 0, 4), (12, 4, 10)], golden_models())
    data = entropy.encode(np.array([0, 0, 1, 0, -2, 5, 30, 0, -1, 1], np.float32), short)
    assert data.hex() == GOLDEN_SHORT


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whole_numbers_come_back_exactly(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 5, 384, 2048, 3001, 8000, 40_001]))
    unit = run_unit(count)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = sorted(data.draw(st.sets(st.integers(0, MAX_LEVEL), min_size=1, max_size=6)))
    cuts = sorted({int(c) // unit * unit for c in rng.integers(0, count, len(levels) - 1)} - {0})
    ends = [*cuts, count]
    runs = list(zip(levels, [0, *ends[:-1]], ends, strict=False))
    values = np.rint(rng.standard_t(1.5, size=count) * 10.0 ** rng.uniform(-1, 2)).clip(-(2**23) + 1, 2**23 - 1)
    plan = CodingPlan.of(runs, golden_models())
    found = entropy.decode(memoryview(entropy.encode(values.astype(np.float32), plan)), plan)
    assert np.array_equal(found, values)


def large_values() -> tuple[Array, CodingPlan]:
    """A long run of several bits a value, between two shorter ones, with some far outside of a byte."""
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(size=8192) * np.repeat([0.7, 3, 9], [1024, 6144, 1024])).astype(np.float32)
    values[1024::997] *= 10_000
    return values, CodingPlan.of([(11, 0, 1024), (16, 1024, 7168), (19, 7168, 8192)], golden_models())


def test_a_long_run_of_large_values_is_a_section() -> None:
    values, plan = large_values()
    data = entropy.encode(values, plan)
    (length,) = struct.unpack("<I", data[:4])
    assert 0.5 * 6144 < length < 0.7 * 6144
    assert np.array_equal(entropy.decode(memoryview(data), plan), values)
    whole = np.frombuffer(restore(memoryview(data)[4 : 4 + length], 6144), np.uint8).astype(np.int16) - 64
    assert np.array_equal(whole.astype(np.int8), np.clip(values[1024:7168], -127, 127))
    stored = struct.pack("<I", 6144) + bytes((whole + 64).astype(np.uint8)) + data[4 + length :]
    assert np.array_equal(entropy.decode(memoryview(stored), plan), values)


def small_values() -> tuple[Array, CodingPlan]:
    """Two neighbouring levels of small values between shorter runs, with some far outside of what a pair holds."""
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(size=20_480) * np.repeat([0.5, 1, 1.4, 4], [4096, 6144, 6144, 4096]))
    values[::997] *= 10_000
    runs = [(11, 0, 4096), (13, 4096, 10_240), (14, 10_240, 16_384), (17, 16_384, 20_480)]
    return values.astype(np.float32), CodingPlan.of(runs, laplace_models())


def test_small_values_are_pairs_in_one_section_with_large_ones_and_neighbouring_levels_have_one_code() -> None:
    values, plan = small_values()
    assert plan.byte_runs == [ByteRun(0, 16_384, PAIRS, [2048, 6144]), ByteRun(16_384, 20_480, SINGLE, [4096])]
    data = entropy.encode(values, plan)
    assert np.array_equal(entropy.decode(memoryview(data), plan), values)
    (length,) = struct.unpack("<I", data[:4])
    assert 0.33 * 20_480 < length < 0.38 * 20_480
    symbols = np.frombuffer(restore(memoryview(data)[4 : 4 + length], 8192 + 4096), np.uint8)
    clipped = np.clip(values[:16_384].reshape(-1, 2), -4, 4)
    assert np.array_equal(symbols[:8192], clipped @ [9, 1] + 40)
    stored = struct.pack("<I", 8192 + 4096) + symbols.tobytes() + data[4 + length :]
    assert np.array_equal(entropy.decode(memoryview(stored), plan), values)


def test_each_part_of_a_section_has_a_code_of_its_own() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = (np.rint(rng.laplace(size=8000) * s).clip(-127, 127).astype(np.int8).tobytes() for s in (2, 30))
    together, apart = (len(shrink(narrow + wide, "checked", parts)) for parts in ((), (8000, 8000)))
    assert apart < 0.93 * together
    assert bytes(restore(memoryview(shrink(narrow + wide, "checked", (8000, 8000))), 16_000)) == narrow + wide


def test_a_pair_that_there_is_not_is_refused() -> None:
    values, plan = small_values()
    data = entropy.encode(values, plan)
    (length,) = struct.unpack("<I", data[:4])
    for symbol in (81, 255):
        stored = struct.pack("<I", 8192 + 4096) + bytes(8191) + bytes([symbol]) + bytes(4096) + data[4 + length :]
        with pytest.raises(ValueError, match="symbols"):
            entropy.decode(memoryview(stored), plan)


def test_short_runs_and_small_tensors_have_no_pairs() -> None:
    models = laplace_models()
    for runs in (
        [(13, 0, 8160), (17, 8160, 9000)],
        [(13, 0, 16_352)],
        [(10, 0, 12_000), (12, 12_000, 16_064), (14, 16_064, 18_080), (17, 18_080, 19_072)],
        [(10, 0, 40_000)],
    ):
        assert not CodingPlan.of(runs, models).byte_runs
    apart = CodingPlan.of([(15, 0, 3072), (16, 3072, 9000)], models)
    assert apart.byte_runs == [ByteRun(0, 9024, SINGLE, [3072, 5952])]
    apart = CodingPlan.of([(15, 0, 20_000), (16, 20_000, 40_000)], models)
    assert apart.byte_runs == [ByteRun(0, 40_000, SINGLE, [20_000, 20_000])]


def test_runs_beside_one_another_that_are_grouped_alike_are_one_stretch() -> None:
    models = laplace_models()
    plan = CodingPlan.of([(6, 0, 5024), (8, 5024, 6016), (11, 6016, 7008), (16, 7008, 8000)], models)
    assert [(s.start, s.stop) for s in plan.stretches] == [(0, 6016), (6016, 7008), (7008, 8000)]
    assert [s.grouping for s in plan.stretches] == [Grouping(4, True), Grouping(4, False), Grouping(2, False)]
    between = CodingPlan.of([(6, 0, 992), (16, 992, 8000), (18, 8000, 9024)], models)
    assert [(s.start, s.stop) for s in between.stretches] == [(0, 992), (8000, 9024)]


@pytest.mark.parametrize("grouping", [Grouping(2, False), Grouping(4, False), Grouping(4, True)])
def test_a_byte_of_magnitudes_stands_for_them_in_order(grouping: Grouping) -> None:
    every = np.arange(256, dtype=np.uint8)
    magnitudes = grouping.values[every].view(np.int8)
    assert magnitudes.max() == grouping.limit == (15 if grouping.size == 2 else 3)
    assert np.array_equal(grouping.symbols(magnitudes.copy()), every)
    assert magnitudes[grouping.size : 2 * grouping.size].tolist() == [1] + [0] * (grouping.size - 1)


def test_frequencies_of_groups_are_products_of_those_of_values() -> None:
    models = golden_models()
    for level, grouping in ((2, Grouping(4, True)), (9, Grouping(4, False)), (16, Grouping(2, False))):
        found = models.level(level, grouping).groups.frequencies / SCALE
        zero, magnitudes = models.zero[level] / 65536, models.magnitudes[level] / 4096
        one = np.array([zero, *(1 - zero) * magnitudes[: grouping.limit - 1], 0])
        one[-1] = 1 - one.sum()
        expected = np.array([one[each] for each in grouping.values.view(np.int8).reshape(256, -1)]).prod(axis=1)
        if grouping.flagged:
            expected[0] = 0
        assert np.abs(found - expected / expected.sum()).max() < 256 / SCALE


@pytest.mark.parametrize("magnitude", [1, 126, 127, 128, 5000])
def test_values_that_are_all_bytes_come_back(magnitude: int) -> None:
    plan = CodingPlan.of([(15, 0, 8000), (16, 8000, 20_000)], laplace_models())
    assert not plan.narrow
    values = np.rint(np.random.default_rng(0).laplace(size=20_000) * 3).clip(-20, 20).astype(np.float32)
    values[[0, 9000, 19_999]] = magnitude, -magnitude, magnitude
    assert np.array_equal(entropy.decode(memoryview(entropy.encode(values, plan)), plan), values)


def test_a_byte_that_stands_for_no_value_is_refused() -> None:
    plan = CodingPlan.of([(16, 0, 8000)], laplace_models())
    values = np.ones(8000, np.float32)
    data = entropy.encode(values, plan)
    (length,) = struct.unpack("<I", data[:4])
    stored = struct.pack("<I", 8000) + bytes([65] * 7999 + [192]) + data[4 + length :]
    with pytest.raises(ValueError, match="another one"):
        entropy.decode(memoryview(stored), plan)


def test_nothing_but_zeros_takes_no_bytes_where_no_bits_are_plain() -> None:
    for level, least in ((0, 0), (16, 0), (17, 2)):
        plan = CodingPlan.of([(level, 0, 200)], laplace_models())
        data = entropy.encode(np.zeros(200, np.float32), plan)
        assert (len(data) > 0) == (least > 0)
        assert not entropy.decode(memoryview(data), plan).any()
    with pytest.raises(ValueError, match="end"):
        entropy.decode(memoryview(b""), plan)


@pytest.mark.parametrize("of", [large_values, small_values])
def test_a_changed_or_shortened_section_is_refused(of: Callable[[], tuple[Array, CodingPlan]]) -> None:
    values, plan = of()
    data = entropy.encode(values, plan)
    (length,) = struct.unpack("<I", data[:4])
    for i in range(0, 4 + length, 17):
        changed = bytearray(data)
        changed[i] ^= 1 << (i % 8)
        with pytest.raises(ValueError, match=r"section|zstd|end|padding|too large|checksum|lanes"):
            entropy.decode(memoryview(changed), plan)
    for stop in range(1, 4 + length, 97):
        with pytest.raises(ValueError, match="end"):
            entropy.decode(memoryview(data[:stop]), plan)


def test_a_plain_bit_more_leaves_the_model_of_half_the_deviation() -> None:
    rng = np.random.default_rng(0)
    for level in (17, 18, 21):
        values = np.rint(rng.laplace(size=2048) * 2.0 ** ((level - 12) / 2) / np.sqrt(2)).astype(np.float32)
        sizes = [len(entropy.encode(values, CodingPlan.of([(at, 0, 2048)], laplace_models()))) for at in range(41)]
        assert min(sizes) > 0.997 * sizes[level]


GOLDEN_LONG = (2506, "3546288a59568446a1d8656bf692d0716b7fd3301f87334528c9f7b597c07e45")
GOLDEN_SHORT = "bb023ac6d06da5296028"
