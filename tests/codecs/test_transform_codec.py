"""`transform/4`: what it keeps, what it refuses, and that its bytes mean the same everywhere."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.codecs import EncodedTensor, Encoding, NotEncodable, encode_tensor
from isthmus.codecs.transform.codec import GAINS, TRANSFORM
from isthmus.codecs.transform.levels import step_of_quality, step_size
from isthmus.codecs.transform.planes import Layout, plane_transform
from isthmus.codecs.transform.table import PlaneTable
from isthmus_tools.calibration.transforms import STEPS, learn_planes
from support.activations import SHAPES, Array, activations, round_trip
from support.activations import tables as tables


def components(array: Array, table: PlaneTable) -> list[Array]:
    """An array's components in units, band by band, by the table's own definition in float64."""
    planes = table.layout.forward(array).astype(np.float64) - table.mean
    _, _, height, width = table.layout.sizes(array.shape)
    transform = plane_transform(height, width, table.edges)
    coefficients = transform.forward(planes.astype(np.float32)).astype(np.float64)
    return [
        coefficients[:, a:b] @ rotation.astype(np.float64).T
        for rotation, a, b in zip(table.analysis_matrix, transform.starts, transform.starts[1:], strict=False)
    ]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("quality", [0.0, 0.35, 0.7, 1.0])
def test_every_component_comes_back_within_half_a_step(
    kind: str, quality: float, tables: dict[str, tuple[PlaneTable, Array]]
) -> None:
    table, array = tables[kind]
    _, found = round_trip(array, table, quality)
    assert found.shape == array.shape
    assert found.dtype == array.dtype
    half = 0.5 * step_size(step_of_quality(quality, table.steps))
    for before, after in zip(components(array, table), components(found, table), strict=True):
        assert np.abs(before - after).max(initial=0) <= half * 1.001 + 1e-4


@pytest.mark.parametrize("kind", SHAPES)
def test_a_higher_quality_takes_more_bytes_and_loses_less(
    kind: str, tables: dict[str, tuple[PlaneTable, Array]]
) -> None:
    table, array = tables[kind]
    tries = [round_trip(array, table, quality) for quality in (0.0, 0.25, 0.5, 0.75, 1.0)]
    sizes = [len(payload) for payload, _ in tries]
    errors = [float(np.mean((found - array) ** 2)) for _, found in tries]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.002 * float(array.var())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_each_float_dtype_comes_back_as_it_was(dtype: Any, tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["maps"]
    _, found = round_trip(array.astype(dtype), table, 1.0)
    assert found.dtype == dtype
    assert np.abs(found.astype(np.float32) - array).max() < 0.1 * array.std()


def test_strided_and_read_only_arrays_give_the_same_bytes(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["maps"]
    expected, _ = round_trip(array, table, 0.5)
    strided = np.repeat(array, 2, axis=3)[..., ::2]
    strided.flags.writeable = False
    assert round_trip(strided, table, 0.5)[0] == expected


def test_encoding_leaves_the_array_alone(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    for table, array in tables.values():
        before = array.copy()
        round_trip(array, table, 0.5)
        assert np.array_equal(before, array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_nan_infinity_and_huge_values_are_not_encodable(
    value: float, tables: dict[str, tuple[PlaneTable, Array]]
) -> None:
    for table, array in tables.values():
        bad = array.copy()
        bad.flat[bad.size // 2] = value
        with pytest.raises(NotEncodable):
            TRANSFORM.encode(bad, Encoding("transform/4", 0.5, table))
        travels = encode_tensor(bad, Encoding("transform/4", 0.5, table))
        assert travels is bad


def test_a_value_far_outside_of_what_was_learned_is_kept_within_the_step(
    tables: dict[str, tuple[PlaneTable, Array]],
) -> None:
    table, array = tables["maps"]
    odd = array.copy()
    odd[0, 3, 2, 2] += 15 * array.std()
    _, found = round_trip(odd, table, 1.0)
    assert np.abs(found - odd).max() < 0.15 * array.std()


def test_a_tensor_of_another_scale_is_not_encodable(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["maps"]
    with pytest.raises(NotEncodable, match="times the magnitude"):
        TRANSFORM.encode(array * 40, Encoding("transform/4", 0.5, table))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_, np.uint8])
def test_other_dtypes_are_not_encodable(dtype: Any, tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["maps"]
    with pytest.raises(NotEncodable):
        TRANSFORM.encode(array.astype(dtype), Encoding("transform/4", 0.5, table))


@pytest.mark.parametrize("shape", [(1, 11, 14, 14), (12, 14, 14), (1, 12, 14, 14, 1), (1, 12, 1025, 1)])
def test_tensors_of_another_kind_are_not_encodable(
    shape: tuple[int, ...], tables: dict[str, tuple[PlaneTable, Array]]
) -> None:
    table, _ = tables["maps"]
    with pytest.raises(NotEncodable):
        TRANSFORM.encode(np.ones(shape, np.float32), Encoding("transform/4", 0.5, table))
    with pytest.raises(ValueError, match=r"table was learned|channels|plane axis"):
        TRANSFORM.decode(memoryview(bytes(8)), np.dtype(np.float32), shape, table)


def test_without_a_table_nothing_is_encoded_or_decoded() -> None:
    with pytest.raises(NotEncodable, match="no table"):
        TRANSFORM.encode(np.ones((1, 4), np.float32), Encoding("transform/4"))
    with pytest.raises(ValueError, match="no table"):
        TRANSFORM.decode(memoryview(bytes(8)), np.dtype(np.float32), (1, 4), None)


@pytest.mark.parametrize("quality", [-0.1, 1.1, float("nan")])
def test_a_quality_outside_of_0_to_1_is_refused(quality: float, tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["vectors"]
    with pytest.raises(ValueError, match="quality"):
        TRANSFORM.encode(array, Encoding("transform/4", quality, table))


def test_constant_tensors_take_next_to_nothing(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["maps"]
    constant = np.broadcast_to(table.mean[:, None, None], array.shape).astype(np.float32)
    payload, found = round_trip(constant, table, 1.0)
    assert len(payload) < 60
    assert np.abs(found - constant).max() < 1e-3
    _, zeros = round_trip(np.zeros_like(array), table, 1.0)
    assert np.abs(zeros).max() < 0.1 * array.std()


def test_a_table_learned_from_constants_encodes_constants() -> None:
    samples = [np.full((1, 4, 3, 3), 2.5, np.float32)] * 4
    _, found = round_trip(samples[0], learn_planes(samples), 0.5)
    assert np.allclose(found, 2.5, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 12, 14, 14), (1, 12, 0, 14)])
def test_an_empty_tensor_has_an_empty_payload(
    shape: tuple[int, ...], tables: dict[str, tuple[PlaneTable, Array]]
) -> None:
    table, _ = tables["maps"]
    payload, found = round_trip(np.zeros(shape, np.float32), table, 0.5)
    assert payload == b""
    assert found.shape == shape
    with pytest.raises(ValueError, match="empty"):
        TRANSFORM.decode(memoryview(b"abcdef"), np.dtype(np.float32), shape, table)


def test_one_table_serves_maps_of_any_size(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, _ = tables["maps"]
    for height, width in ((7, 9), (14, 14), (31, 40), (1, 1)):
        array = activations((2, 12, height, width), count=1, seed=5)[0]
        _, found = round_trip(array, table, 1.0)
        assert np.abs(found - array).max() < 0.25 * array.std()


@pytest.mark.parametrize("kind", ["maps", "vectors"])
def test_every_truncation_is_refused(kind: str, tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables[kind]
    payload, _ = round_trip(array, table, 0.4)
    # A step and a gain alone are a tensor of components that are all zero, unless some leave bits plain.
    for length in set(range(len(payload))) - ({2} if kind == "vectors" else set()):
        with pytest.raises(ValueError, match=r"short|end|padding|too large|checksum|lanes"):
            TRANSFORM.decode(memoryview(payload[:length]), array.dtype, array.shape, table)


def test_trailing_bytes_are_refused(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["maps"]
    payload, _ = round_trip(array, table, 0.4)
    for more in (b"\0", b"\1", b"\0\0\0\1", bytes(range(1, 9))):
        with pytest.raises(ValueError, match=r"end|padding|too large|checksum|lanes"):
            TRANSFORM.decode(memoryview(payload + more), array.dtype, array.shape, table)


def test_every_changed_byte_is_refused_or_gives_finite_numbers(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
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


def test_the_same_tensor_gives_the_same_bytes_in_every_thread(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["maps"]
    fresh = PlaneTable.from_arrays(table.to_arrays())
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


def test_calibrated_bytes_are_far_fewer_than_those_of_a_byte_each(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(16, 4))

    def sample() -> Array:
        smooth = np.cumsum(np.cumsum(rng.normal(size=(12, 12, 4)), axis=0), axis=1)
        return np.ascontiguousarray((smooth @ mixed.T).transpose(2, 0, 1)[None], np.float32)

    samples = [sample() for _ in range(40)]
    payload, found = round_trip(samples[0], learn_planes(samples[1:]), 0.4)
    assert len(payload) * 8 < 0.5 * samples[0].size
    assert np.mean((found - samples[0]) ** 2) < 0.01 * samples[0].var()


def test_encode_tensor_returns_an_encoded_tensor(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["maps"]
    encoded = encode_tensor(array, Encoding("transform/4", 0.5, table))
    assert isinstance(encoded, EncodedTensor)
    assert encoded.nbytes < array.nbytes / 8


_SAMPLES = activations(SHAPES["maps"])
TRANSFORM_SAMPLE = (learn_planes(_SAMPLES[1:], layout=Layout(4, 1)), _SAMPLES[0])
