"""`transform/4` of rows: tokens, vectors and states in clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.arrays import Array
from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.transform.codec import GAINS, TRANSFORM
from isthmus.codecs.transform.levels import (
    ESCAPE,
    LEVELS,
    MAX_DEAD_ZONE,
    EntropyModels,
    step_of_quality,
    step_size,
)
from isthmus.codecs.transform.rows import Clusters, RowLayout, RowTable, decode_clusters, encode_clusters, read_table
from isthmus_tools.calibration.tables import learn_token_table
from isthmus_tools.calibration.transforms import STEPS
from support.activations import round_trip
from support.row_tables import FORMS, components, sentence, table_of


@pytest.fixture(scope="module")
def tables() -> dict[str, RowTable]:
    return {name: table_of(form) for name, form in FORMS.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quality", [0.0, 0.5, 1.0])
def test_every_component_of_a_row_comes_back_within_half_a_step_or_as_the_zero_that_it_nearly_is(
    form: str, quality: float, tables: dict[str, RowTable]
) -> None:
    table, array = tables[form], sentence(np.random.default_rng(9))
    _, found = round_trip(array, table, quality)
    step = step_size(step_of_quality(quality, table.steps))
    rows = components(array[0], table).astype(np.float32)
    zero = table.centres[table.clusters.likeliest(rows)]
    came = components(found[0].astype(float), table)
    widest = np.where(np.abs(came - zero) < 0.01 * step, MAX_DEAD_ZONE, 0.5)
    assert (np.abs(came - rows) <= widest * step * 1.001 + 1e-4).all()


def test_rows_of_any_number_and_dtype_come_back(tables: dict[str, RowTable]) -> None:
    rng = np.random.default_rng(3)
    for table in tables.values():
        for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
            array = np.concatenate([sentence(rng, 7), sentence(rng, 7)]).astype(dtype)
            _, found = round_trip(array, table, 1.0)
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            assert np.abs(found.astype(np.float32) - array.astype(np.float32)).max() < 1
        assert round_trip(np.zeros((1, 0, 24), np.float32), table, 0.5)[0] == b""


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_few_rows_come_back_after_those_of_any_other_number(form: str) -> None:
    table = table_of(FORMS[form])
    tokens = [np.full((1, 1, 24), 7.5, np.float32), *(sentence(np.random.default_rng(i), 3)[:, 1:2] for i in range(6))]
    for token in tokens:
        for count in (1, 2, 3, 4, 8, 12, 16, 17, 4, 1):
            array = np.repeat(token, count, axis=1)
            payload, found = round_trip(array, table, 0.6)
            assert np.abs(components(found[0] - array[0], table)).max() <= step_size(step_of_quality(0.6, table.steps))
            assert round_trip(array, RowTable.from_arrays(table.to_arrays()), 0.6)[0] == payload


def test_a_token_that_is_always_the_same_costs_next_to_nothing(tables: dict[str, RowTable]) -> None:
    constant = np.full((1, 10, 24), 7.5, np.float32)
    assert len(round_trip(constant, tables["classes"], 0.5)[0]) < len(round_trip(constant, tables["one class"], 0.5)[0])
    assert len(round_trip(constant, tables["classes"], 0.5)[0]) < 20


def test_classes_take_fewer_bytes_for_no_more_error(tables: dict[str, RowTable]) -> None:
    rng = np.random.default_rng(5)
    sizes: dict[str, int] = dict.fromkeys(tables, 0)
    for array in [sentence(rng) for _ in range(20)]:
        for name, table in tables.items():
            sizes[name] += len(round_trip(array, table, 0.5)[0])
    assert sizes["classes"] < 0.9 * sizes["one class"]


def test_a_row_far_from_every_class_is_kept_within_the_step(tables: dict[str, RowTable]) -> None:
    table = tables["classes"]
    array = sentence(np.random.default_rng(2), 6)
    array[0, 3] = 300
    _, found = round_trip(array, table, 1.0)
    assert np.abs(components(found[0] - array[0], table)).max() <= 0.02


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_rows_that_are_not_finite_are_not_encodable(value: float, tables: dict[str, RowTable]) -> None:
    for table in tables.values():
        array = sentence(np.random.default_rng(2), 6)
        array[0, 3, 4] = value
        with pytest.raises(NotEncodable):
            TRANSFORM.encode(array, Encoding("transform/4", 0.5, table))


@pytest.mark.parametrize("shape", [(1, 6, 23), (6, 24), (1, 1, 6, 24), (24, 6, 1)])
def test_tensors_without_such_rows_are_refused(shape: tuple[int, ...], tables: dict[str, RowTable]) -> None:
    with pytest.raises(NotEncodable):
        TRANSFORM.encode(np.ones(shape, np.float32), Encoding("transform/4", 0.5, tables["classes"]))
    with pytest.raises(ValueError, match=r"table"):
        TRANSFORM.decode(memoryview(bytes(9)), np.dtype(np.float32), shape, tables["classes"])


def test_every_truncated_or_longer_payload_of_rows_is_refused(tables: dict[str, RowTable]) -> None:
    array = sentence(np.random.default_rng(4), 9)
    for table in tables.values():
        payload, _ = round_trip(array, table, 0.4)
        zeros = 2 + -(-9 * table.bits // 8)  # rows that are their class's mean
        wrong = [payload[:length] for length in range(len(payload)) if length != zeros]
        wrong += [payload + more for more in (b"\0", b"\1", bytes(range(1, 9)))]
        for data in wrong:
            with pytest.raises(ValueError, match=r"short|end|padding|too large|class|checksum|lanes"):
                TRANSFORM.decode(memoryview(data), array.dtype, array.shape, table)


_TABLE = table_of(FORMS["classes"])


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.integers(STEPS[1] - 1, STEPS[0] + 1), st.integers(GAINS[0] - 1, GAINS[1] + 1))
def test_any_bytes_are_refused_or_give_rows(data: bytes, step: int, gain: int) -> None:
    payload = bytes((step & 255, gain & 255)) + data
    try:
        found = TRANSFORM.decode(memoryview(payload), np.dtype(np.float32), (1, 11, 24), _TABLE)
    except ValueError:
        return
    assert found.shape == (1, 11, 24)


@given(st.integers(0, 12), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_classes_come_back_from_their_bits(bits: int, count: int, seed: int) -> None:
    classes = np.random.default_rng(seed).integers(0, 1 << bits, count)
    data = encode_clusters(classes, bits)
    assert len(data) == -(-count * bits // 8)
    assert np.array_equal(decode_clusters(memoryview(data), count, bits), classes)
    if count * bits % 8:
        with pytest.raises(ValueError, match="not zero"):
            decode_clusters(memoryview(data[:-1] + bytes([data[-1] | 1])), count, bits)


def many_classes(rng: np.random.Generator) -> tuple[Clusters, Array, Array]:
    """512 classes of 96 components, some of which part them; and rows of these, with the class that each is of."""
    centres = rng.normal(size=(512, 96)) * np.geomspace(4, 0.1, 96)
    deviations = rng.uniform(0.3, 1.5, size=(512, 96))
    of = rng.integers(0, 512, 3000)
    rows = centres[of] + deviations[of] * rng.normal(size=(3000, 96))
    return Clusters.of(centres, np.square(deviations)), rows.astype(np.float32), of


def test_the_class_that_is_found_is_the_likeliest_of_all() -> None:
    classes, rows, of = many_classes(np.random.default_rng(4))
    found = classes.likeliest(rows)
    costs = np.stack(
        [
            (np.square(rows - c) * w).sum(axis=1) + r
            for c, w, r in zip(classes.centres, classes.weight, classes.log_variance, strict=True)
        ]
    )
    assert (found == costs.argmin(axis=0)).mean() > 0.99
    assert (found == of).mean() > 0.98


def test_a_row_is_of_the_same_class_whatever_rows_lie_beside_it() -> None:
    classes, rows, _ = many_classes(np.random.default_rng(5))
    one_by_one = [classes.likeliest(row[None])[0] for row in rows[:200]]
    assert np.array_equal(classes.likeliest(rows)[:200], one_by_one)
    assert classes.likeliest(rows[:0]).shape == (0,)


def test_a_table_is_as_large_as_memory_allows_and_no_larger(tables: dict[str, RowTable]) -> None:
    table = tables["one class"]
    most = replace(
        table,
        means=np.zeros((4096, 24), np.float32),
        weights=np.zeros(4096, np.int8),
        deviations=np.full((4096, 24), 128, np.uint8),
    )
    assert most.bits == 12
    for classes, channels in ((8192, 24), (4096, 512), (3, 24)):
        wide = RowLayout(3, (2,), (channels,))
        with pytest.raises(ValueError, match=f"{classes} clusters of {channels} channels"):
            replace(table, layout=wide, means=np.zeros((classes, channels), np.float32))


def golden_table() -> RowTable:
    """Made of integers alone: four channels as they are, two classes, the second of steps half as large."""
    magnitudes = np.full((LEVELS, ESCAPE), 4096 // ESCAPE, np.uint16)
    magnitudes[:, 0] += 4096 - ESCAPE * (4096 // ESCAPE)
    models = EntropyModels(np.full(LEVELS, 30000, np.uint16), magnitudes)
    return RowTable(
        layout=RowLayout(2, (1,), (4,)),
        means=np.array([[0, 0, 0, 0], [8, 8, 8, 8]], np.float32),
        weights=np.array([0, 8], np.int8),
        scale=1.0,
        synthesis=np.array([1, 1, 2, 4], np.float16),
        deviations=np.array([[128, 136, 144, 120], [128, 128, 128, 128]], np.uint8),
        steps=(0, 0),
        models=models,
    )


def test_golden_bytes_of_rows() -> None:
    array = np.array([[1, -2, 4, 0], [8, 9, 8, 8], [0, 1, 0, 4]], np.float32)
    payload, found = round_trip(array, golden_table(), 0.5)
    assert np.array_equal(found, array)
    assert payload.hex() == GOLDEN


def test_a_table_of_rows_comes_back_from_its_arrays(tables: dict[str, RowTable]) -> None:
    array = sentence(np.random.default_rng(4))
    for table in tables.values():
        again = read_table(table.to_arrays())
        assert again.nbytes == table.nbytes
        assert round_trip(array, again, 0.5)[0] == round_trip(array, table, 0.5)[0]


def broken_tables(arrays: Mapping[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
    for name in arrays:
        yield f"dtype of {name}", {**arrays, name: arrays[name].astype(np.complex64)}
        yield f"shape of {name}", {**arrays, name: arrays[name][..., None]}
        if name != "rows":
            yield f"no {name}", {k: v for k, v in arrays.items() if k != name}
    for rows in ([3, 2], [5, 2, 24], [3, 3, 24], [3, 2, 0], [3, 2, 23], [3, 2, 5000], [3, 2, 4, 1, 6], [0, 0, 24]):
        yield f"rows {rows}", {**arrays, "rows": np.array(rows, np.int32)}
    yield "unknown", {**arrays, "more": np.zeros(1)}
    yield "classes", {**arrays, "means": arrays["means"][:3], "weights": arrays["weights"][:3]}
    for steps in (STEPS[::-1], (128, 63), (-63, -128)):
        yield f"steps {steps}", {**arrays, "thirteenths": np.array(steps, np.int32)}
    yield "scale", {**arrays, "scale": np.array([np.nan], np.float32)}
    yield "means", {**arrays, "means": np.full_like(arrays["means"], np.inf)}


def test_a_table_of_rows_out_of_bounds_is_refused(tables: dict[str, RowTable]) -> None:
    for what, arrays in broken_tables(tables["classes"].to_arrays()):
        try:
            read_table(arrays)
        except ValueError:
            continue
        pytest.fail(what)


def test_a_factor_of_zero_is_refused_when_it_is_needed(tables: dict[str, RowTable]) -> None:
    arrays = tables["classes as they are"].to_arrays()
    table = read_table({**arrays, "synthesis": np.zeros_like(arrays["synthesis"])})
    with pytest.raises(NotEncodable, match="inverse"):
        TRANSFORM.encode(sentence(np.random.default_rng(0)), Encoding("transform/4", 0.5, table))


GOLDEN = "00fe404b0e521b8b00480c0000"


@pytest.mark.parametrize("quality", [0.2, 0.6, 1.0])
def test_a_token_has_the_same_coefficients_in_every_step(quality: float) -> None:
    rng = np.random.default_rng(3)
    states = (rng.laplace(size=(1, 300, 96)) @ rng.standard_normal((96, 96))).astype(np.float32)
    states[:, :, 7] *= 40
    table = learn_token_table([states[:, :200]])
    encoding = Encoding("transform/4", quality, table)

    def back(part: Array) -> Array:
        payload = memoryview(TRANSFORM.encode(part, encoding))
        return TRANSFORM.decode(payload, part.dtype, part.shape, table)

    # Unlike the calibrated magnitudes too: the tensor's gain must not move the dead zone.
    for tensor in (states[:, 200:], np.concatenate([states[:, 200:250], 0.01 * states[:, 250:]], axis=1)):
        whole = back(tensor)
        for size in (1, 7):
            parts = [back(tensor[:, at : at + size]) for at in range(0, 100, size)]
            # The inverse transform is in float32, whose last bits differ with the number of rows.
            np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5 * float(np.abs(whole).max()))
