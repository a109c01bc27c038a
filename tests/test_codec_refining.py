"""Refinements and `layers/2`: what was sent coarsely and refined is what would have been sent finely, and no payload
does harm."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activations import SHAPES, activations, golden_models, laplace_models
from activations import tables as tables
from isthmus import frame as frames
from isthmus.calibration.learn import learn
from isthmus.calibration.rows import Form, Rows, learn_rows
from isthmus.codecs import NotPackable, Packed, Packing, pack, thirds
from isthmus.codecs.layers import (
    KEY_BYTES,
    LAYERS,
    Basis,
    First,
    Trail,
    follow,
    layered,
    trail_of,
    trails_of,
)
from isthmus.codecs.planes import Layout
from isthmus.codecs.refining import Known, known_at, known_of, read, refine, tensor_of
from isthmus.codecs.steps import FACTOR, THIRD, size_of, step_of
from isthmus.codecs.table import Table
from isthmus.codecs.transform import TRANSFORM, analysed
from isthmus.errors import FrameMalformed, NotKept
from isthmus.frame import Frame
from isthmus.kept import Kept
from patience import peak_of

Array = np.ndarray[Any, np.dtype[Any]]
BUNDLE = "sha256:" + "0" * 64
FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Qualities that are a third of the step apart, in tables as they are learned."""


def packed_first(array: Array, table: Table, quality: float) -> Packed:
    made = pack(array, layered(Packing("transform/4", quality, table)))
    assert isinstance(made, Packed)
    return made


class Chain(NamedTuple):
    """A first payload and refinements, one after the other."""

    sent: list[Packed]
    trail: Trail


def chain(array: Array, table: Table, qualities: tuple[float, ...] = FIFTHS, tensor: str = "x") -> Chain:
    sent = [packed_first(array, table, qualities[0])]
    trail = trail_of(sent[0], BUNDLE, tensor)
    for fine in qualities[1:]:
        more, trail = follow(trail, Packing("transform/4", fine, table))
        sent.append(more)
    return Chain(sent, trail)


def unpacked(packed: Packed, basis: Basis) -> Array:
    return LAYERS.decode(memoryview(packed.payload), np.dtype(packed.dtype), packed.shape, basis)


def once(array: Array, table: Table, quality: float) -> Known:
    payload = TRANSFORM.encode(array, Packing("transform/4", quality, table))
    return known_of(memoryview(payload), array.shape, table)


# What comes of it


@pytest.mark.parametrize("kind", SHAPES)
def test_refined_to_the_finest_step_each_time_it_is_what_packing_at_that_step_gives(
    kind: str, tables: dict[str, tuple[Table, Array]]
) -> None:
    table, array = tables[kind]
    values, _ = analysed(array, table)
    basis = Basis(table, Kept(), BUNDLE, "x")
    for quality, packed in zip(FIFTHS, chain(array, table).sent, strict=True):
        found, expected = unpacked(packed, basis), once(array, table, quality)
        direct = tensor_of(expected, array.dtype, array.shape, table)
        (held,) = [h for _, h in list(basis.keeper._held.values())[-1:]]  # type: ignore[attr-defined]
        differing = held.known.numbers != expected.numbers
        assert held.known.step == step_of(quality, table.steps)
        if not differing.any():
            assert found.tobytes() == direct.tobytes()
            continue
        # Ties, which the coarser step has rounded already.
        exact = values[differing] / size_of(held.known.step)
        assert np.allclose(np.abs(exact - np.floor(exact)), 0.5, atol=1e-3)
        assert differing.mean() < 0.01
    assert step_of(1.0, table.steps) - THIRD < table.steps[1]


@pytest.mark.parametrize("kind", SHAPES)
def test_every_component_of_a_refined_tensor_is_within_half_of_the_finer_step(
    kind: str, tables: dict[str, tuple[Table, Array]]
) -> None:
    table, array = tables[kind]
    sent = chain(array, table, (0.25, 0.45, 0.65))
    found = tensor_of(sent.trail.known, array.dtype, array.shape, table)
    before, after = analysed(array, table)[0], analysed(found, table)[0]
    assert np.abs(before - after).max() <= 0.5 * size_of(step_of(0.65, table.steps)) * 1.001 + 1e-4


def test_first_and_refinements_take_as_many_bytes_as_the_finer_payload() -> None:
    samples = activations((1, 24, 14, 14), 60)
    table = learn(samples[8:], layout=Layout(4, 1))
    for qualities in itertools.pairwise(FIFTHS):
        together = finer = 0
        for array in samples[:8]:
            sent = chain(array, table, qualities).sent
            together += sent[0].nbytes + sent[1].nbytes - KEY_BYTES - 1
            finer += len(TRANSFORM.encode(array, Packing("transform/4", qualities[1], table)))
        assert 0.95 < together / finer < 1.05, qualities


def test_a_refinement_has_a_gain_of_its_own(tables: dict[str, tuple[Table, Array]]) -> None:
    """A coarse step shows little of how large a tensor is for what was learned, a finer one more."""
    table, array = tables["maps"]
    quiet = table.mean[:, None, None] + 0.25 * (array - table.mean[:, None, None])
    values, grid = analysed(quiet, table)
    assert grid is not None
    known = known_at(values, step_of(0.2, table.steps))
    part, finer = refine(values, quiet.shape, known, table)
    gain = int(np.int8(np.uint8(part[0])))
    assert gain < -10
    more = (finer.numbers - 3 * known.numbers).astype(np.int8)
    own, loud = (len(thirds.encode(more, known.numbers, grid.runs(finer.step, g), grid.models)) for g in (gain, 0))
    assert own == len(part) - 1
    assert own < 0.9 * loud


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_each_float_dtype_is_refined(dtype: Any, tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    basis = Basis(table, Kept(), BUNDLE, "x")
    for packed in chain(array.astype(dtype), table, (0.6, 0.8, 1.0)).sent:
        found = LAYERS.decode(memoryview(packed.payload), np.dtype(dtype), packed.shape, basis)
    assert found.dtype == dtype
    assert np.abs(found.astype(np.float32) - array).max() < 0.1 * array.std()


def test_values_far_outside_of_what_was_learned_are_refined_too(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    odd = array.copy()
    odd[0, 3, 2, 2] += 30 * array.std()
    trail = chain(odd, table).trail
    assert trail.known.numbers.dtype == np.int16
    found = tensor_of(trail.known, odd.dtype, odd.shape, table)
    assert np.abs(found - odd).max() < 0.15 * array.std()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_thirds_come_back_exactly(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 2, 3, 4, 5, 384, 2048, 3001, 20_001]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = sorted(data.draw(st.sets(st.integers(0, 40), min_size=1, max_size=6)))
    cuts = sorted({int(c) for c in rng.integers(0, count, len(levels) - 1)} - {0})
    ends = [*cuts, count]
    runs = list(zip(levels, [0, *ends[:-1]], ends, strict=False))
    dtype, most = data.draw(st.sampled_from([(np.int8, 1), (np.int8, 127), (np.int16, 30_000), (np.int32, 2**21)]))
    coarse = np.rint(rng.laplace(size=count) * most / 9).clip(-most, most).astype(dtype)
    more = rng.integers(-1, 2, count).astype(np.int8)
    coded = thirds.encode(more, coarse, runs, golden_models())
    assert np.array_equal(thirds.decode(memoryview(coded), coarse, runs, golden_models()), more)


def test_thirds_beyond_the_last_number_are_refused() -> None:
    more, models = np.array([0, 1, 0, -1, 0, 0, 0, 1], np.int8), golden_models()
    coded = thirds.encode(more, np.zeros(8, np.int8), [(10, 0, 8)], models)
    with pytest.raises(ValueError, match="padding"):
        thirds.decode(memoryview(coded), np.zeros(5, np.int8), [(10, 0, 5)], models)


def test_golden_bytes_of_a_refinement() -> None:
    coarse = np.array([0, 0, 0, 0, 1, -1, 0, 2, -5, 0, 0, 40, -1, 1, 0, 0, 3], np.int8)
    more = np.array([0, 0, 1, -1, 1, 1, 0, 0, -1, 0, 0, 1, 0, -1, 0, 0, 1], np.int8)
    coded = thirds.encode(more, coarse, [(8, 0, 4), (12, 4, 12), (30, 12, 17)], golden_models())
    assert coded.hex() == GOLDEN


def test_a_third_costs_what_the_finer_numbers_models_say() -> None:
    """Levels of small and of large deviations; drawn from the model of the finer numbers, then coarsened."""
    models, rng = laplace_models(), np.random.default_rng(0)
    for level in (6, 10, 14):
        zero, row = models.zero[level] / 65536, models.magnitudes[level] / 4096
        share = np.append(zero, (1 - zero) * row)
        drawn = rng.choice(len(share), 40_000, p=share / share.sum()) * rng.choice([-1, 1], 40_000)
        coarse = np.rint(drawn / 3).astype(np.int8)
        more = (drawn - 3 * coarse).astype(np.int8)
        of_each = np.where(drawn == 0, share[0], share[np.abs(drawn)] / 2)
        nearby = np.minimum(np.abs(3 * coarse[:, None].astype(int) + [-1, 0, 1]), len(row))
        of_three = np.where(nearby == 0, share[0], share[nearby] / 2).sum(axis=1)
        bits = -np.log2(of_each / of_three).sum()
        coded = thirds.encode(more, coarse, [(level, 0, drawn.size)], models)
        assert len(coded) * 8 < 1.02 * bits + 64


# What cannot be refined


def test_there_is_no_refinement_beyond_the_finest_step(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    trail = chain(array, table).trail
    with pytest.raises(NotPackable, match="no finer step"):
        refine(trail.values, array.shape, trail.known, table)
    part, _ = refine(trail.values, array.shape, known_at(trail.values, table.steps[1] + THIRD), table)
    with pytest.raises(ValueError, match="the table ends at"):
        read(memoryview(part), trail.known, array.shape, table)


def test_qualities_whose_steps_are_no_third_of_one_another_are_not_followed(
    tables: dict[str, tuple[Table, Array]],
) -> None:
    table, array = tables["maps"]
    trail = trail_of(packed_first(array, table, 0.2), BUNDLE, "x")
    for fine in (0.2, 0.3, 0.6, 0.0):
        with pytest.raises(NotPackable, match="not a third"):
            follow(trail, Packing("transform/4", fine, table))


def test_an_empty_tensor_is_not_layered(tables: dict[str, tuple[Table, Array]]) -> None:
    table, _ = tables["maps"]
    empty = np.zeros((0, 12, 14, 14), np.float32)
    assert pack(empty, layered(Packing("transform/4", 0.2, table))) is empty
    with pytest.raises(ValueError, match="empty"):
        LAYERS.decode(memoryview(b""), empty.dtype, empty.shape, Basis(table, Kept(), BUNDLE, "x"))
    with pytest.raises(ValueError, match="empty"):
        refine(np.zeros(0, np.float32), empty.shape, Known(24, np.zeros(0, np.int8)), table)


def test_another_tensor_is_not_refined(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    values, _ = analysed(array, table)
    other = activations(SHAPES["maps"], 2, seed=9)
    known = known_at(analysed(other[0], table)[0], step_of(0.2, table.steps))
    with pytest.raises(NotPackable, match="not the tensor"):
        refine(values, array.shape, known, table)
    with pytest.raises(NotPackable, match="not the tensor"):
        refine(values[:-1], array.shape, known, table)
    with pytest.raises(NotPackable):
        refine(values * np.nan, array.shape, known, table)


def test_values_that_grow_beyond_the_coder_are_not_refined(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    values = np.zeros(array.size, np.float32)
    values[0] = 2.0**21 * size_of(0)
    known = known_at(values, 0)
    with pytest.raises(NotPackable, match="outside"):
        refine(values, array.shape, known, table)


def test_row_tables_are_packed_once(tables: dict[str, tuple[Table, Array]]) -> None:
    tokens = [np.random.default_rng(i).normal(size=(1, 6, 16)).astype(np.float32) for i in range(30)]
    table = learn_rows(Rows.of(tokens), Form(1, rotated=True), None, (24, -41))
    packing = Packing("transform/4", 0.4, table)
    assert layered(packing) is packing
    with pytest.raises(NotPackable, match="planes"):
        follow(chain(*reversed(tables["maps"]), (0.2,)).trail, packing)
    with pytest.raises(NotPackable, match="planes"):
        LAYERS.encode(tokens[0], Packing("layers/2", 0.4, table))
    with pytest.raises(ValueError, match="no table"):
        LAYERS.decode(memoryview(bytes(20)), tokens[0].dtype, tokens[0].shape, Basis(table, Kept(), BUNDLE, "x"))


def test_a_payload_that_was_not_packed_here_has_no_trail(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["maps"]
    sent = chain(array, table, (0.2, 0.4)).sent
    assert [isinstance(p.payload, First) for p in sent] == [True, False]
    assert trails_of({"x": sent[0], "y": sent[1]}, BUNDLE).keys() == {"x"}
    for packed in (sent[1], Packed("layers/2", "float32", array.shape, bytes(sent[0].payload))):
        with pytest.raises(ValueError, match="not packed here"):
            trail_of(packed, BUNDLE, "x")


# Hostile payloads


class Reader:
    """A function that reads frames with `layers/2`, and what it keeps."""

    def __init__(self, table: Table, **more: Table) -> None:
        self.tables = {"x": table, **more}
        self.kept = Kept()

    def read(self, packed: Packed, tensor: str = "x", bundle: str = BUNDLE) -> Array:
        beside = {"beside": np.zeros(1, np.float32)}  # without it the frame would be a short one
        data = frames.encode(Frame(beside, bundle, "1..", packed={tensor: packed}))
        found = frames.decode(data, max_bytes=2**24, tables=lambda b, t, _: Basis(self.tables[t], self.kept, b, t))
        return found.tensors[tensor]


@pytest.fixture
def reader(tables: dict[str, tuple[Table, Array]]) -> Reader:
    """One that has the first payload of `maps` and one refinement."""
    table, array = tables["maps"]
    made = Reader(table, other=table)
    for packed in chain(array, table, (0.2, 0.4)).sent:
        made.read(packed)
    return made


@pytest.fixture(scope="module")
def last(tables: dict[str, tuple[Table, Array]]) -> Packed:
    """The second refinement."""
    table, array = tables["maps"]
    return chain(array, table, (0.2, 0.4, 0.6)).sent[2]


def like(packed: Packed, payload: bytes, **changed: Any) -> Packed:
    about = {"codec": packed.codec, "dtype": packed.dtype, "shape": packed.shape} | changed
    return Packed(payload=payload, **about)


def test_every_truncation_of_a_refinement_is_refused(reader: Reader, last: Packed) -> None:
    payload = bytes(last.payload)
    for length in range(len(payload)):
        with pytest.raises(FrameMalformed):
            reader.read(like(last, payload[:length]))
    for more in (b"\0", b"\1", b"\0\0\0\1", bytes(range(1, 9))):
        with pytest.raises(FrameMalformed):
            reader.read(like(last, payload + more))


def test_every_changed_byte_of_a_refinement_is_refused_or_gives_finite_numbers(reader: Reader, last: Packed) -> None:
    payload, accepted, tried = bytes(last.payload), 0, 0
    for i in range(len(payload)):
        for bit in range(0, 8, 2):
            changed = bytearray(payload)
            changed[i] ^= 1 << bit
            tried += 1
            try:
                found = reader.read(like(last, bytes(changed)))
            except FrameMalformed:
                assert i == 0 or i > KEY_BYTES
                continue
            except NotKept:
                assert 1 <= i <= KEY_BYTES
                continue
            accepted += 1
            assert np.isfinite(found).all()
    assert tried > 1500
    assert accepted < 0.02 * tried


def payloads() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for _ in range(1500):
        yield rng.bytes(int(rng.integers(0, 400)))


def test_random_refinements_are_refused(reader: Reader, last: Packed) -> None:
    before = bytes(last.payload)[: 1 + KEY_BYTES]
    for data in payloads():
        try:
            found = reader.read(like(last, before + data))
        except FrameMalformed:
            continue
        assert np.isfinite(found).all()


def test_a_refinement_comes_after_what_it_refines(tables: dict[str, tuple[Table, Array]], last: Packed) -> None:
    empty = Reader(tables["maps"][0])
    with pytest.raises(NotKept) as e:
        empty.read(last)
    assert e.value.facts == {"tensor": "x"}
    assert "send it whole" in e.value.message
    assert "replicas" in e.value.hint
    assert empty.kept.nbytes == 0


def test_a_key_of_another_tensor_bundle_shape_or_dtype_stands_for_nothing(reader: Reader, last: Packed) -> None:
    payload = bytes(last.payload)
    for tensor, bundle, changed in (
        ("other", BUNDLE, {}),
        ("x", "sha256:" + "1" * 64, {}),
        ("x", BUNDLE, {"shape": (1, 12, 28, 7)}),
        ("x", BUNDLE, {"shape": (2, 12, 14, 7)}),
        ("x", BUNDLE, {"dtype": "float16"}),
    ):
        with pytest.raises(NotKept):
            reader.read(like(last, payload, **changed), tensor, bundle)
    with pytest.raises(FrameMalformed):
        reader.read(like(last, payload, dtype="int32"))
    assert np.isfinite(reader.read(last)).all()


def test_no_chain_of_refinements_is_endless(tables: dict[str, tuple[Table, Array]]) -> None:
    """Each has a finer step, and the table has a finest one, whoever makes them; a reader keeps as much after each."""
    table, array = tables["maps"]
    endless = Table.from_arrays(table.to_arrays() | {"thirteenths": np.array((table.steps[0], -127), np.int32)})
    reader = Reader(table)
    packed = packed_first(array, table, 0.0)
    trail, count = trail_of(packed, BUNDLE, "x"), 0
    sent, known = packed, trail.known
    while known.step >= table.steps[1]:
        reader.read(sent)
        key, count = next(reversed(reader.kept._held)), count + 1
        part, known = refine(trail.values, array.shape, known, endless)
        sent = like(packed, b"\x80" + key + part)
    assert count == 6
    with pytest.raises(FrameMalformed, match="the table ends at"):
        reader.read(sent)
    assert reader.kept.nbytes < 6 * (4 * array.size + 1024)


def test_changed_first_payloads_are_refused_or_kept_as_finite_numbers(tables: dict[str, tuple[Table, Array]]) -> None:
    table, array = tables["vectors"]
    reader, first = Reader(table), packed_first(array, table, 1.0)
    payload = bytes(first.payload)
    for i, bit in itertools.product(range(len(payload)), range(8)):
        changed = bytearray(payload)
        changed[i] ^= 1 << bit
        with contextlib.suppress(FrameMalformed, NotKept):
            assert np.isfinite(reader.read(like(first, bytes(changed)))).all()


def test_memory_is_bounded_by_what_dtype_and_shape_say(reader: Reader, last: Packed) -> None:
    whole = int(np.prod(last.shape)) * 4
    reader.read(last)

    def hostile() -> None:
        for data in itertools.islice(payloads(), 50):
            try:
                reader.read(like(last, bytes(last.payload)[: 1 + KEY_BYTES] + data))
            except FrameMalformed:
                continue

    assert peak_of(hostile) < 40 * whole
    assert peak_of(lambda: reader.read(last)) < 40 * whole


def test_a_refinement_may_come_twice(reader: Reader, last: Packed) -> None:
    first = reader.read(last)
    size = reader.kept.nbytes
    assert reader.read(last).tobytes() == first.tobytes()
    assert reader.kept.nbytes == size


def test_without_a_basis_nothing_is_unpacked(last: Packed) -> None:
    with pytest.raises(ValueError, match="no table"):
        LAYERS.decode(memoryview(last.payload), np.dtype(np.float32), last.shape, None)
    with pytest.raises(NotPackable):
        LAYERS.encode(np.ones((1, 4), np.float32), Packing("layers/2"))


def test_the_factor_of_thirteen_steps_is_three() -> None:
    assert FACTOR == 3
    for step in (-41, 0, 24):
        assert size_of(step) == pytest.approx(3 * size_of(step - THIRD), rel=1e-12)


GOLDEN = "86097654f3e0ef427eb0"
