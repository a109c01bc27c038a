"""`transform/3`: what it keeps, what it refuses, and that its bytes mean the same everywhere."""

from __future__ import annotations

import hashlib
import itertools
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.calibration.layout import layout_of
from isthmus.calibration.learn import STEPS, learn
from isthmus.calibration.models import learn_models
from isthmus.calibration.sensitivity import measure
from isthmus.codecs import NotPackable, Packed, Packing, entropy, pack
from isthmus.codecs.bytewise import PAIRS, SINGLE, Bytewise
from isthmus.codecs.levels import LEVELS, TOP, Models
from isthmus.codecs.payload import restore, shrink
from isthmus.codecs.planes import Layout, edges_for, plane_transform
from isthmus.codecs.steps import THIRD, in_eighths, size_of, step_of
from isthmus.codecs.table import GAINS, Table, levels_of
from isthmus.codecs.transform import TRANSFORM, analysed, rounded
from isthmus.errors import CalibrationError

Array = np.ndarray[Any, np.dtype[Any]]

SHAPES = {
    "maps": (1, 12, 14, 14),
    "maps, channels last": (1, 9, 10, 16),
    "large maps": (1, 4, 24, 24),
    "tokens": (1, 24, 16),
    "batches": (3, 6, 5, 5),
    "vectors": (2, 20),
    "one axis": (20,),
}
LAYOUTS = {"maps": Layout(4, 1), "maps, channels last": Layout(4, 3), "large maps": Layout(4, 1)}


def activations(shape: tuple[int, ...], count: int = 24, seed: int = 0) -> list[Array]:
    """Tensors of some structure: smooth planes, correlated channels, heavy tails, means that are not zero."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(shape[-1], shape[-1]))
    found = []
    for _ in range(count):
        noise = rng.standard_t(6, size=shape) @ mixed
        smooth = noise if len(shape) < 3 else np.cumsum(noise, axis=1) / 3
        found.append((smooth + rng.normal() + 2).astype(np.float32))
    return found


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[Table, Array]]:
    return learned()


def learned() -> dict[str, tuple[Table, Array]]:
    """For each kind of tensor a table, and one that it was not learned from."""
    made = {}
    for kind, shape in SHAPES.items():
        samples = activations(shape)
        made[kind] = (learn(samples[1:], layout=LAYOUTS.get(kind)), samples[0])
    return made


# Steps


def test_a_step_thirteen_lower_is_a_third() -> None:
    assert size_of(0) == 1
    for step in range(-127 + THIRD, 128):
        assert size_of(step - THIRD) == pytest.approx(size_of(step) / 3, rel=1e-12)
        assert size_of(step - 1) < size_of(step)


def test_steps_in_eighths_of_an_octave_are_the_nearest_whole_ones() -> None:
    for step in range(-127, 128):
        assert type(in_eighths(step)) is int
        assert in_eighths(step) == pytest.approx(8 * np.log2(size_of(step)), abs=0.55)
        assert 0 <= in_eighths(step) - in_eighths(step - 1) <= 1
    assert (in_eighths(0), in_eighths(40), in_eighths(-40)) == (0, 39, -39)


def test_qualities_a_fifth_apart_are_exactly_a_third_of_the_step_apart() -> None:
    """In tables as they are learned, wherever balancing moved their steps to."""
    width = STEPS[0] - STEPS[1]
    for coarsest in range(-127 + width, 128):
        steps = (coarsest, coarsest - width)
        found = [step_of(q / 1000, steps) for q in range(1001)]
        assert (found[0], found[-1]) == steps
        assert {a - b for a, b in zip(found, found[200:], strict=False)} == {THIRD}
        assert {a - b for a, b in itertools.pairwise(found)} == {0, 1}
        # As sums are: 0.1 + 0.2 is no 0.3.
        assert [step_of(min(q / 1000 + 0.2, 1), steps) for q in range(801)] == found[200:]


def test_a_table_of_few_steps_takes_every_quality() -> None:
    assert {step_of(q / 100, (3, 3)) for q in range(101)} == {3}
    assert [step_of(q, (1, -1)) for q in (0, 0.2, 0.5, 0.8, 1)] == [1, 1, 0, -1, -1]


def round_trip(array: Array, table: Table, quality: float) -> tuple[bytes, Array]:
    payload = TRANSFORM.encode(array, Packing("transform/3", quality, table))
    return payload, TRANSFORM.decode(memoryview(payload), array.dtype, array.shape, table)


def components(array: Array, table: Table) -> list[Array]:
    """An array's components in units, band by band, by the table's own definition in float64."""
    planes = table.layout.forward(array).astype(np.float64) - table.mean
    _, _, height, width = table.layout.sizes(array.shape)
    transform = plane_transform(height, width, table.edges)
    coefficients = transform.forward(planes.astype(np.float32)).astype(np.float64)
    return [
        coefficients[:, a:b] @ rotation.astype(np.float64).T
        for rotation, a, b in zip(table.analysis_at_work, transform.starts, transform.starts[1:], strict=False)
    ]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("quality", [0.0, 0.35, 0.7, 1.0])
def test_every_component_comes_back_within_half_a_step(
    kind: str, quality: float, tables: dict[str, tuple[Table, Array]]
) -> None:
    table, array = tables[kind]
    _, found = round_trip(array, table, quality)
    assert found.shape == array.shape
    assert found.dtype == array.dtype
    half = 0.5 * size_of(step_of(quality, table.steps))
    for before, after in zip(components(array, table), components(found, table), strict=True):
        assert np.abs(before - after).max(initial=0) <= half * 1.001 + 1e-4


@pytest.mark.parametrize("kind", SHAPES)
def test_a_higher_quality_takes_more_bytes_and_loses_less(kind: str, tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables[kind]
    tries = [round_trip(array, table, quality) for quality in (0.0, 0.25, 0.5, 0.75, 1.0)]
    sizes = [len(payload) for payload, _ in tries]
    errors = [float(np.mean((found - array) ** 2)) for _, found in tries]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.002 * float(array.var())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_each_float_dtype_comes_back_as_it_was(dtype: Any, tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    _, found = round_trip(array.astype(dtype), table, 1.0)
    assert found.dtype == dtype
    assert np.abs(found.astype(np.float32) - array).max() < 0.1 * array.std()


def test_strided_and_read_only_arrays_give_the_same_bytes(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    expected, _ = round_trip(array, table, 0.5)
    strided = np.repeat(array, 2, axis=3)[..., ::2]
    strided.flags.writeable = False
    assert round_trip(strided, table, 0.5)[0] == expected


def test_encoding_leaves_the_array_alone(tables: dict[str, tuple[Table, Array]]) -> None:
    for table, array in tables.values():
        before = array.copy()
        round_trip(array, table, 0.5)
        assert np.array_equal(before, array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_nan_infinity_and_huge_values_are_not_packable(value: float, tables: dict[str, tuple[Table, Array]]) -> None:
    for table, array in tables.values():
        bad = array.copy()
        bad.flat[bad.size // 2] = value
        with pytest.raises(NotPackable):
            TRANSFORM.encode(bad, Packing("transform/3", 0.5, table))
        travels = pack(bad, Packing("transform/3", 0.5, table))
        assert travels is bad


def test_a_value_far_outside_of_what_was_learned_is_kept_within_the_step(
    tables: dict[str, tuple[Table, Array]],
) -> None:
    table, array = tables["maps"]
    odd = array.copy()
    odd[0, 3, 2, 2] += 15 * array.std()
    _, found = round_trip(odd, table, 1.0)
    assert np.abs(found - odd).max() < 0.15 * array.std()


def test_a_tensor_of_another_scale_is_not_packable(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    with pytest.raises(NotPackable, match="times the magnitude"):
        TRANSFORM.encode(array * 40, Packing("transform/3", 0.5, table))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_, np.uint8])
def test_other_dtypes_are_not_packable(dtype: Any, tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    with pytest.raises(NotPackable):
        TRANSFORM.encode(array.astype(dtype), Packing("transform/3", 0.5, table))


@pytest.mark.parametrize("shape", [(1, 11, 14, 14), (12, 14, 14), (1, 12, 14, 14, 1), (1, 12, 1025, 1)])
def test_tensors_of_another_kind_are_not_packable(
    shape: tuple[int, ...], tables: dict[str, tuple[Table, Array]]
) -> None:
    table, _ = tables["maps"]
    with pytest.raises(NotPackable):
        TRANSFORM.encode(np.ones(shape, np.float32), Packing("transform/3", 0.5, table))
    with pytest.raises(ValueError, match=r"table was learned|channels|plane axis"):
        TRANSFORM.decode(memoryview(bytes(8)), np.dtype(np.float32), shape, table)


def test_without_a_table_nothing_is_packed_and_nothing_unpacked() -> None:
    with pytest.raises(NotPackable, match="no table"):
        TRANSFORM.encode(np.ones((1, 4), np.float32), Packing("transform/3"))
    with pytest.raises(ValueError, match="no table"):
        TRANSFORM.decode(memoryview(bytes(8)), np.dtype(np.float32), (1, 4), None)


@pytest.mark.parametrize("quality", [-0.1, 1.1, float("nan")])
def test_a_quality_outside_of_0_to_1_is_refused(quality: float, tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["vectors"]
    with pytest.raises(ValueError, match="quality"):
        TRANSFORM.encode(array, Packing("transform/3", quality, table))


def test_constant_tensors_take_next_to_nothing(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    constant = np.broadcast_to(table.mean[:, None, None], array.shape).astype(np.float32)
    payload, found = round_trip(constant, table, 1.0)
    assert len(payload) < 60
    assert np.abs(found - constant).max() < 1e-3
    _, zeros = round_trip(np.zeros_like(array), table, 1.0)
    assert np.abs(zeros).max() < 0.1 * array.std()


def test_a_table_learned_from_constants_packs_constants() -> None:
    samples = [np.full((1, 4, 3, 3), 2.5, np.float32)] * 4
    _, found = round_trip(samples[0], learn(samples), 0.5)
    assert np.allclose(found, 2.5, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 12, 14, 14), (1, 12, 0, 14)])
def test_an_empty_tensor_has_an_empty_payload(shape: tuple[int, ...], tables: dict[str, tuple[Table, Array]]) -> None:
    table, _ = tables["maps"]
    payload, found = round_trip(np.zeros(shape, np.float32), table, 0.5)
    assert payload == b""
    assert found.shape == shape
    with pytest.raises(ValueError, match="empty"):
        TRANSFORM.decode(memoryview(b"abcdef"), np.dtype(np.float32), shape, table)


def test_one_table_serves_maps_of_any_size(tables: dict[str, tuple[Table, Array]]) -> None:
    table, _ = tables["maps"]
    for height, width in ((7, 9), (14, 14), (31, 40), (1, 1)):
        array = activations((2, 12, height, width), count=1, seed=5)[0]
        _, found = round_trip(array, table, 1.0)
        assert np.abs(found - array).max() < 0.25 * array.std()


@pytest.mark.parametrize("kind", ["maps", "vectors"])
def test_every_truncation_is_refused(kind: str, tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables[kind]
    payload, _ = round_trip(array, table, 0.4)
    # A step and a gain alone are a tensor of components that are all zero, unless some leave bits plain.
    for length in set(range(len(payload))) - ({2} if kind == "vectors" else set()):
        with pytest.raises(ValueError, match=r"short|end|padding|too large"):
            TRANSFORM.decode(memoryview(payload[:length]), array.dtype, array.shape, table)


def test_trailing_bytes_are_refused(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    payload, _ = round_trip(array, table, 0.4)
    for more in (b"\0", b"\1", b"\0\0\0\1", bytes(range(1, 9))):
        with pytest.raises(ValueError, match=r"end|padding|too large"):
            TRANSFORM.decode(memoryview(payload + more), array.dtype, array.shape, table)


def test_every_changed_byte_is_refused_or_gives_finite_numbers(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    payload, _ = round_trip(array, table, 0.3)
    accepted = 0
    for i in range(len(payload)):
        changed = bytearray(payload)
        changed[i] ^= 1 << (i % 8)
        try:
            found = TRANSFORM.decode(memoryview(changed), array.dtype, array.shape, table)
        except ValueError:
            continue
        accepted += 1
        assert np.isfinite(found).all()
    assert accepted < 0.05 * len(payload)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.integers(STEPS[1] - 1, STEPS[0] + 1), st.integers(GAINS[0] - 1, GAINS[1] + 1))
def test_any_bytes_are_refused_or_give_an_array(data: bytes, step: int, gain: int) -> None:
    array = TRANSFORM_SAMPLE[1]
    payload = bytes((step & 255, gain & 255)) + data
    try:
        found = TRANSFORM.decode(memoryview(payload), array.dtype, array.shape, TRANSFORM_SAMPLE[0])
    except ValueError:
        return
    assert found.shape == array.shape


def test_the_same_tensor_gives_the_same_bytes_in_every_thread(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    fresh = Table.from_arrays(table.to_arrays())
    expected = round_trip(array, table, 0.5)[0]
    found: list[bytes] = []

    def work() -> None:
        found.extend(round_trip(array, fresh, 0.5)[0] for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 80


def golden_models() -> Models:
    """Models made of integers alone."""
    zero = [max(65536 * (LEVELS - level) // (LEVELS + 1), 600) for level in range(LEVELS)]
    magnitudes = []
    for level in range(LEVELS):
        row = [max(4096 * (level + 1) ** k // (level + 2) ** (k + 1), 1) for k in range(TOP)]
        row[0] += 4096 - sum(row)
        magnitudes.append(row)
    return Models(np.array(zero, np.uint16), np.array(magnitudes, np.uint16))


def laplace_models() -> Models:
    """Each level's own: Laplace's distribution, rounded to whole numbers."""
    decay = np.exp(-np.sqrt(2) / 2.0 ** ((np.arange(LEVELS) - 12) / 2))
    magnitudes = np.maximum(4096 * (1 - decay[:, None]) * decay[:, None] ** np.arange(TOP), 1).astype(np.uint16)
    magnitudes[:, TOP - 1] = np.maximum(4096 * decay ** (TOP - 1), 1)
    magnitudes[:, 0] += (4096 - magnitudes.sum(axis=1)).astype(np.uint16)
    zero = np.clip(65536 * (1 - np.sqrt(decay)), 1, 65535).astype(np.uint16)
    return Models(zero, magnitudes)


def test_golden_bytes_of_the_entropy_coder() -> None:
    values = np.array([((i * i) % 97) * ((i % 7) - 3) // 40 for i in range(4096)], np.float32)
    values[::512] *= 1000
    runs = [(at, at * 128, (at + 1) * 128 if at < 20 else 4096) for at in range(21)]
    plan = entropy.Plan.of(runs, golden_models())
    data = entropy.encode(values, plan)
    assert np.array_equal(entropy.decode(memoryview(data), plan), values)
    assert (len(data), hashlib.sha256(data).hexdigest()) == GOLDEN_LONG
    short = entropy.Plan.of([(6, 0, 4), (12, 4, 10)], golden_models())
    data = entropy.encode(np.array([0, 0, 1, 0, -2, 5, 30, 0, -1, 1], np.float32), short)
    assert data.hex() == GOLDEN_SHORT


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whole_numbers_come_back_exactly(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 5, 384, 2048, 3001, 8000, 40_001]))
    unit = entropy.unit(count)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = sorted(data.draw(st.sets(st.integers(0, entropy.MAX_LEVEL), min_size=1, max_size=6)))
    cuts = sorted({int(c) // unit * unit for c in rng.integers(0, count, len(levels) - 1)} - {0})
    ends = [*cuts, count]
    runs = list(zip(levels, [0, *ends[:-1]], ends, strict=False))
    values = np.rint(rng.standard_t(1.5, size=count) * 10.0 ** rng.uniform(-1, 2)).clip(-(2**23) + 1, 2**23 - 1)
    plan = entropy.Plan.of(runs, golden_models())
    found = entropy.decode(memoryview(entropy.encode(values.astype(np.float32), plan)), plan)
    assert np.array_equal(found, values)


def large_values() -> tuple[Array, entropy.Plan]:
    """A long run of several bits a value, between two shorter ones, with some far outside of a byte."""
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(size=8192) * np.repeat([0.7, 3, 9], [1024, 6144, 1024])).astype(np.float32)
    values[1024::997] *= 10_000
    return values, entropy.Plan.of([(11, 0, 1024), (16, 1024, 7168), (19, 7168, 8192)], golden_models())


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


def small_values() -> tuple[Array, entropy.Plan]:
    """Two neighbouring levels of small values between shorter runs, with some far outside of what a pair holds."""
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(size=20_480) * np.repeat([0.5, 1, 1.4, 4], [4096, 6144, 6144, 4096]))
    values[::997] *= 10_000
    runs = [(11, 0, 4096), (13, 4096, 10_240), (14, 10_240, 16_384), (17, 16_384, 20_480)]
    return values.astype(np.float32), entropy.Plan.of(runs, laplace_models())


def test_small_values_are_pairs_in_one_section_with_large_ones_and_neighbouring_levels_have_one_code() -> None:
    values, plan = small_values()
    assert plan.bytewise == [Bytewise(0, 16_384, PAIRS, [2048, 6144]), Bytewise(16_384, 20_480, SINGLE, [4096])]
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
        assert not entropy.Plan.of(runs, models).bytewise
    apart = entropy.Plan.of([(15, 0, 3072), (16, 3072, 9000)], models)
    assert apart.bytewise == [Bytewise(0, 9024, SINGLE, [3072, 5952])]
    apart = entropy.Plan.of([(15, 0, 20_000), (16, 20_000, 40_000)], models)
    assert apart.bytewise == [Bytewise(0, 40_000, SINGLE, [20_000, 20_000])]


def test_few_values_are_grouped_like_those_that_follow() -> None:
    models = laplace_models()
    plan = entropy.Plan.of([(6, 0, 5024), (8, 5024, 6016), (11, 6016, 7008), (16, 7008, 8000)], models)
    assert [(s.start, s.stop) for s in plan.stretches] == [(0, 5024), (5024, 8000)]
    assert plan.stretches[1].grouping == models.grouping(16, False)
    between = entropy.Plan.of([(6, 0, 992), (16, 992, 8000), (18, 8000, 9024)], models)
    assert [(s.start, s.stop) for s in between.stretches] == [(0, 992), (8000, 9024)]


def test_nothing_but_zeros_takes_no_bytes_where_no_bits_are_plain() -> None:
    for level, least in ((0, 0), (16, 0), (17, 2)):
        plan = entropy.Plan.of([(level, 0, 200)], laplace_models())
        data = entropy.encode(np.zeros(200, np.float32), plan)
        assert (len(data) > 0) == (least > 0)
        assert not entropy.decode(memoryview(data), plan).any()
    with pytest.raises(ValueError, match="end"):
        entropy.decode(memoryview(b""), plan)


@pytest.mark.parametrize("of", [large_values, small_values])
def test_a_changed_or_shortened_section_is_refused(of: Callable[[], tuple[Array, entropy.Plan]]) -> None:
    values, plan = of()
    data = entropy.encode(values, plan)
    (length,) = struct.unpack("<I", data[:4])
    for i in range(0, 4 + length, 17):
        changed = bytearray(data)
        changed[i] ^= 1 << (i % 8)
        with pytest.raises(ValueError, match=r"section|zstd|end|padding|too large"):
            entropy.decode(memoryview(changed), plan)
    for stop in range(1, 4 + length, 97):
        with pytest.raises(ValueError, match="end"):
            entropy.decode(memoryview(data[:stop]), plan)


def test_a_plain_bit_more_leaves_the_model_of_half_the_deviation() -> None:
    rng = np.random.default_rng(0)
    for level in (17, 18, 21):
        values = np.rint(rng.laplace(size=2048) * 2.0 ** ((level - 12) / 2) / np.sqrt(2)).astype(np.float32)
        sizes = [len(entropy.encode(values, entropy.Plan.of([(at, 0, 2048)], laplace_models()))) for at in range(41)]
        assert min(sizes) > 0.997 * sizes[level]


def test_coded_values_take_what_their_model_says(tables: dict[str, tuple[Table, Array]]) -> None:
    models = tables["maps"][0].models
    rng = np.random.default_rng(0)
    for level in (2, 6, 10, 14):
        zero = models.zero[level] / 65536
        share = np.append(zero, (1 - zero) * models.magnitudes[level] / 4096)
        for count, most in ((16_000, 1.004), (40_000, 1.02)):  # the longer ones of some levels are sections
            drawn = rng.choice(TOP + 1, count, p=share / share.sum())
            drawn[drawn == TOP] = TOP - 1
            values = drawn * rng.choice([-1, 1], drawn.size)
            plan = entropy.Plan.of([(level, 0, values.size)], models)
            bits = -np.log2(share)[drawn].sum() + (drawn > 0).sum()
            assert len(entropy.encode(values.astype(np.float32), plan)) * 8 < bits * most + 64


@pytest.mark.parametrize("step", [STEPS[0], 0, STEPS[1]])
def test_models_fit_their_levels_at_every_step(step: int) -> None:
    """Learned at one step alone, so that what the others teach hides nothing."""
    rng = np.random.default_rng(0)
    stored = rng.integers(128 + in_eighths(step) - 40, 128 + in_eighths(step) + 20, 200_000)
    deviation = np.exp2((stored - 128) / 8)
    values = (rng.laplace(size=stored.size) * deviation / np.sqrt(2)).astype(np.float32)
    models = learn_models(values, stored, np.zeros(stored.size, np.int64), (step, step))
    steps = deviation / size_of(step)
    level = levels_of(stored, step, 0)
    assert float(np.abs(level - (12 + 2 * np.log2(steps))).max()) < 0.65
    for each in range(3, 17):
        share = float(np.mean(1 - np.exp(-np.sqrt(2) / 2 / steps[level == each])))
        assert models.zero[each] / 65536 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("quality", [0.0, 0.5, 1.0])
def test_coded_coefficients_take_little_more_than_their_entropy(quality: float) -> None:
    """The empirical entropy of each level's values, over all tensors; some bytes of each are its head and its end."""
    samples = activations((1, 12, 28, 28), 30)
    table = learn(samples[10:], layout=Layout(4, 1))
    step = step_of(quality, table.steps)
    coded, by_level = 0, dict[int, list[Array]]()
    for array in samples[:10]:
        payload = TRANSFORM.encode(array, Packing("transform/3", quality, table))
        coded += len(payload)
        values, grid = analysed(array, table)
        assert grid is not None
        gain = int(np.frombuffer(payload[1:2], np.int8)[0])
        whole = rounded(values, step, entropy.room(values.size))[: values.size]
        for level, start, stop in grid.runs(step, gain):
            by_level.setdefault(level, []).append(whole[start:stop])
    entropies = 0.0
    for runs in by_level.values():
        _, counts = np.unique(np.concatenate(runs), return_counts=True)
        entropies -= float(counts @ np.log2(counts / counts.sum()))
    assert coded < 1.03 * entropies / 8 + 10 * 16


def test_a_table_comes_back_from_its_arrays(tables: dict[str, tuple[Table, Array]]) -> None:
    for table, array in tables.values():
        again = Table.from_arrays(table.to_arrays())
        assert again.nbytes == table.nbytes
        assert round_trip(array, again, 0.5)[0] == round_trip(array, table, 0.5)[0]


def broken_tables(arrays: Mapping[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
    def changed(name: str, value: Array) -> dict[str, Array]:
        return {**arrays, name: value}

    yield "unknown", {**arrays, "more": np.zeros(1)}
    for name in arrays:
        yield f"no {name}", {k: v for k, v in arrays.items() if k != name}
        yield f"dtype of {name}", changed(name, arrays[name].astype(np.complex64))
        yield f"shape of {name}", changed(name, arrays[name][..., None])
    yield "rank", changed("layout", np.array([5, 1], np.int32))
    yield "axis", changed("layout", np.array([4, -1], np.int32))
    for steps in (STEPS[::-1], (128, 63), (-63, -128)):
        yield f"steps {steps}", changed("thirteenths", np.array(steps, np.int32))
    yield "edges", changed("edges", arrays["edges"][::-1].copy())
    yield "NaN edges", changed("edges", np.full_like(arrays["edges"], np.nan))
    yield "scale", changed("scale", np.array([np.inf], np.float32))
    yield "mean", changed("mean", np.full_like(arrays["mean"], np.nan))
    yield "synthesis", changed("synthesis", np.full_like(arrays["synthesis"], np.inf))
    yield "zero", changed("zero", np.zeros_like(arrays["zero"]))
    yield "magnitudes", changed("magnitudes", np.ones_like(arrays["magnitudes"]))
    yield "channels", changed("mean", arrays["mean"][:-1])


def test_a_table_out_of_bounds_is_refused(tables: dict[str, tuple[Table, Array]]) -> None:
    for what, arrays in broken_tables(tables["maps"][0].to_arrays()):
        try:
            Table.from_arrays(arrays)
        except ValueError:
            continue
        pytest.fail(what)


def test_a_rotation_without_inverse_is_refused_when_it_is_needed(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["vectors"]
    flat = replace(table, synthesis=np.zeros_like(table.synthesis))
    with pytest.raises(NotPackable, match="inverse"):
        TRANSFORM.encode(array, Packing("transform/3", 0.5, flat))


def test_sequences_of_many_lengths_keep_bounded_memory() -> None:
    table = learn(activations((1, 24, 2)), layout=Layout(3, 2))
    for length in range(960, 1024):
        table.grid((1, length, 2))
    matrices = [g.transform.whole.nbytes for g in table._grids.values() if g.transform.whole is not None]
    assert 1 < len(matrices) < 64
    assert sum(matrices) <= 42 * 2**20


def test_calibrated_bytes_are_far_fewer_than_those_of_a_byte_each(tables: dict[str, tuple[Table, Array]]) -> None:
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(16, 4))

    def sample() -> Array:
        smooth = np.cumsum(np.cumsum(rng.normal(size=(12, 12, 4)), axis=0), axis=1)
        return np.ascontiguousarray((smooth @ mixed.T).transpose(2, 0, 1)[None], np.float32)

    samples = [sample() for _ in range(40)]
    payload, found = round_trip(samples[0], learn(samples[1:]), 0.4)
    assert len(payload) * 8 < 0.5 * samples[0].size
    assert np.mean((found - samples[0]) ** 2) < 0.01 * samples[0].var()


def test_pack_gives_a_packed_tensor(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    packed = pack(array, Packing("transform/3", 0.5, table))
    assert isinstance(packed, Packed)
    assert packed.nbytes < array.nbytes / 8


def test_noise_goes_where_the_tail_does_not_look() -> None:
    rng = np.random.default_rng(1)
    samples = [rng.normal(size=(1, 6, 8, 8)).astype(np.float32) for _ in range(30)]
    weights = np.array([8.0, 8.0, 1.0, 1.0, 0.1, 0.1])

    def tail(crossing: Mapping[str, Array]) -> dict[str, Array]:
        return {"out": crossing["x"].sum(axis=(2, 3)) * weights, "other": np.zeros(1)}

    how = measure(tail, ({"x": x} for x in samples), "x", output="out", loss="values", layout=Layout(4, 1))
    assert how.inputs == 30
    assert np.all(np.diff(np.diag(how.channels)[::2]) < 0)
    assert how.rings[0] > 100 * how.rings[2]
    table = learn(samples, sensitivity=how)
    _, found = round_trip(samples[0], table, 0.1)
    blind = learn(samples, layout=Layout(4, 1))
    size = len(round_trip(samples[0], table, 0.1)[0])
    quality = next(q for q in np.arange(0, 1, 0.02) if len(round_trip(samples[0], blind, q)[0]) >= size)
    _, other = round_trip(samples[0], blind, quality)

    def damage(array: Array) -> float:
        return float(np.mean((tail({"x": array})["out"] - tail({"x": samples[0]})["out"]) ** 2))

    assert damage(found) < damage(other) / 4


def test_sensitivity_of_classes_is_the_divergence_of_the_answers() -> None:
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(5, 7)) / 3

    def tail(crossing: Mapping[str, Array]) -> dict[str, Array]:
        return {"logits": crossing["x"].astype(np.float64) @ weights}

    inputs = [{"x": rng.normal(size=(1, 5)).astype(np.float32)} for _ in range(20)]
    how = measure(tail, inputs, "x", output="logits")
    expected = np.zeros((5, 5))
    for given_ in inputs:
        p = np.exp(tail(given_)["logits"][0])
        p /= p.sum()
        expected += weights @ (np.diag(p) - np.outer(p, p)) @ weights.T / len(inputs)
    assert np.allclose(how.channels, expected, rtol=1e-4, atol=1e-6)


def test_the_tail_is_run_no_more_than_asked() -> None:
    runs = 0

    def tail(crossing: Mapping[str, Array]) -> dict[str, Array]:
        nonlocal runs
        runs += 1
        return {"out": crossing["x"]}

    inputs = ({"x": np.random.default_rng(i).normal(size=(1, 4)).astype(np.float32)} for i in range(1000))
    how = measure(tail, inputs, "x", loss="values", max_runs=50)
    assert runs == how.runs == 50
    assert how.inputs == 10


def test_learning_refuses_what_it_cannot_learn_from() -> None:
    good = np.random.default_rng(0).normal(size=(1, 4, 3, 3)).astype(np.float32)
    for samples in (
        [],
        [good.astype(np.int32)],
        [good, np.concatenate([good, good], axis=1)],
        [good * np.nan],
        [good[:, :, :0]],
        [good.astype(np.float64) * 1e30],
        [good[None]],
        [np.float32(3)],
    ):
        with pytest.raises(CalibrationError):
            learn([np.asarray(s) for s in samples])
    with pytest.raises(CalibrationError, match="only once"):
        learn(x for x in [good])
    with pytest.raises(CalibrationError, match="no input"):
        measure(lambda crossing: crossing, [], "x")
    with pytest.raises(CalibrationError, match="errors could move"):
        measure(lambda crossing: crossing, [{"x": np.zeros((1, 4), np.int64)}], "x")
    with pytest.raises(CalibrationError, match="not finite"):
        measure(lambda crossing: {"y": crossing["x"] * np.nan}, [{"x": good}], "x")


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 40, 14, 14), 1), ((1, 14, 14, 40), 3), ((1, 50, 32), 2), ((1, 32, 50), 1), ((4, 9), 1)]
)
def test_the_channels_are_where_neighbours_are_least_alike(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=shape)
    for other in range(1, len(shape)):
        if other != axis:
            noise = np.cumsum(noise, axis=other)
    assert layout_of(noise) == Layout(len(shape), axis)


def test_the_plane_transform_is_orthonormal_and_its_bands_hold_all_of_it() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 7), (14, 14), (20, 33), (50, 1)):
        transform = plane_transform(height, width, edges_for(height, width, 8))
        planes = rng.normal(size=(2, height * width, 3)).astype(np.float32)
        coefficients = transform.forward(planes)
        assert np.allclose(transform.backward(coefficients), planes, atol=1e-4)
        assert np.isclose(np.sum(coefficients**2), np.sum(planes**2), rtol=1e-4)
        assert transform.starts[0] == 0
        assert transform.starts[-1] == height * width
        assert np.array_equal(np.sort(transform.order), np.arange(height * width))


_SAMPLES = activations(SHAPES["maps"])
TRANSFORM_SAMPLE = (learn(_SAMPLES[1:], layout=Layout(4, 1)), _SAMPLES[0])
GOLDEN_LONG = (2527, "d8215504135d665e9a90a637523e992f1e650e5e4d3325b891242306cfa5e572")
GOLDEN_SHORT = "d36c55f39b9a8a1a9ef617"
