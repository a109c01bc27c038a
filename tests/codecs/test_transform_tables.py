"""Tables of `transform/4`: quantiser steps, entropy models, bounds of their arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from isthmus.codecs import Encoding, NotEncodable
from isthmus.codecs.transform import entropy
from isthmus.codecs.transform.codec import GAINS, TRANSFORM, analyse, quantise
from isthmus.codecs.transform.levels import (
    ESCAPE,
    STEPS_PER_FACTOR,
    step_in_eighths,
    step_of_quality,
    step_size,
)
from isthmus.codecs.transform.plan import CodingPlan
from isthmus.codecs.transform.planes import Layout, edges_for, plane_transform
from isthmus.codecs.transform.table import PlaneTable, grid_cache
from isthmus_tools.calibration.transforms import STEPS, learn_planes
from support.activations import Array, activations, round_trip
from support.activations import tables as tables

# Steps


def test_a_step_thirteen_lower_is_a_third() -> None:
    assert step_size(0) == 1
    for step in range(-127 + STEPS_PER_FACTOR, 128):
        assert step_size(step - STEPS_PER_FACTOR) == pytest.approx(step_size(step) / 3, rel=1e-12)
        assert step_size(step - 1) < step_size(step)


def test_steps_in_eighths_of_an_octave_are_the_nearest_whole_ones() -> None:
    for step in range(-127, 128):
        assert type(step_in_eighths(step)) is int
        assert step_in_eighths(step) == pytest.approx(8 * np.log2(step_size(step)), abs=0.55)
        assert 0 <= step_in_eighths(step) - step_in_eighths(step - 1) <= 1
    assert (step_in_eighths(0), step_in_eighths(40), step_in_eighths(-40)) == (0, 39, -39)


def test_qualities_a_fifth_apart_are_exactly_a_third_of_the_step_apart() -> None:
    """In tables as they are learned, wherever balancing moved their steps to."""
    width = STEPS[0] - STEPS[1]
    for coarsest in range(-127 + width, 128):
        steps = (coarsest, coarsest - width)
        found = [step_of_quality(q / 1000, steps) for q in range(1001)]
        assert (found[0], found[-1]) == steps
        assert {a - b for a, b in zip(found, found[200:], strict=False)} == {STEPS_PER_FACTOR}
        assert {a - b for a, b in itertools.pairwise(found)} == {0, 1}
        # As sums are: 0.1 + 0.2 is no 0.3.
        assert [step_of_quality(min(q / 1000 + 0.2, 1), steps) for q in range(801)] == found[200:]


def test_a_table_of_few_steps_takes_every_quality() -> None:
    assert {step_of_quality(q / 100, (3, 3)) for q in range(101)} == {3}
    assert [step_of_quality(q, (1, -1)) for q in (0, 0.2, 0.5, 0.8, 1)] == [1, 1, 0, -1, -1]


# Models


def test_coded_values_take_what_their_model_says(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    models = tables["maps"][0].models
    rng = np.random.default_rng(0)
    for level in (2, 6, 10, 14):
        zero = models.zero[level] / 65536
        share = np.append(zero, (1 - zero) * models.magnitudes[level] / 4096)
        for count, most in ((16_000, 1.004), (40_000, 1.02)):  # the longer ones of some levels are sections
            drawn = rng.choice(ESCAPE + 1, count, p=share / share.sum())
            drawn[drawn == ESCAPE] = ESCAPE - 1
            values = drawn * rng.choice([-1, 1], drawn.size)
            plan = CodingPlan.of([(level, 0, values.size)], models)
            bits = -np.log2(share)[drawn].sum() + (drawn > 0).sum()
            assert len(entropy.encode(values.astype(np.float32), plan)) * 8 < bits * most + 64


@pytest.mark.parametrize("quality", [0.0, 0.5, 1.0])
def test_coded_coefficients_take_little_more_than_their_entropy(quality: float) -> None:
    """The empirical entropy of each level's values, over all tensors; some bytes of each are its head and its end."""
    samples = activations((1, 12, 28, 28), 30)
    table = learn_planes(samples[10:], layout=Layout(4, 1))
    step = step_of_quality(quality, table.steps)
    coded, by_level = 0, dict[int, list[Array]]()
    for array in samples[:10]:
        payload = TRANSFORM.encode(array, Encoding("transform/4", quality, table))
        coded += len(payload)
        values, grid, _ = analyse(array, table)
        assert grid is not None
        gain = int(np.frombuffer(payload[1:2], np.int8)[0])
        whole = quantise(values, step, entropy.padded_buffer(values.size))[: values.size]
        for level, start, stop in grid.runs(step, gain):
            by_level.setdefault(level, []).append(whole[start:stop])
    entropies = 0.0
    for runs in by_level.values():
        _, counts = np.unique(np.concatenate(runs), return_counts=True)
        entropies -= float(counts @ np.log2(counts / counts.sum()))
    assert coded < 1.03 * entropies / 8 + 10 * 16


# As arrays


def test_a_table_comes_back_from_its_arrays(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    for table, array in tables.values():
        again = PlaneTable.from_arrays(table.to_arrays())
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


def test_a_table_out_of_bounds_is_refused(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    for what, arrays in broken_tables(tables["maps"][0].to_arrays()):
        try:
            PlaneTable.from_arrays(arrays)
        except ValueError:
            continue
        pytest.fail(what)


def test_a_rotation_without_inverse_is_refused_when_it_is_needed(tables: dict[str, tuple[PlaneTable, Array]]) -> None:
    table, array = tables["vectors"]
    flat = replace(table, synthesis=np.zeros_like(table.synthesis))
    with pytest.raises(NotEncodable, match="inverse"):
        TRANSFORM.encode(array, Encoding("transform/4", 0.5, flat))


def test_sizes_of_all_tables_keep_bounded_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = grid_cache(60 * 2**20)
    monkeypatch.setattr("isthmus.codecs.transform.table.GRIDS", cache)
    table = learn_planes(activations((1, 24, 2)), layout=Layout(3, 2))
    other = PlaneTable.from_arrays(table.to_arrays())
    for length in range(960, 992):  # a matrix of 4 MB each
        first = table.grid((1, length, 2))
        assert other.grid((1, length, 2)) is not first
        assert table.grid((1, length, 2)) is first
    assert 1 < len(cache) < 32
    matrices = [g.transform.whole.nbytes for g in cache.values() if g.transform.whole is not None]
    assert sum(matrices) < cache.currsize <= 60 * 2**20


def test_a_grid_counts_the_plans_that_it_may_keep() -> None:
    table = learn_planes(activations((1, 24, 2)), layout=Layout(3, 2))
    grid = table.grid((1, 24, 2))
    assert grid is not None
    before = grid.nbytes
    plans = [grid.plan(step, gain) for step in range(table.steps[1], table.steps[0]) for gain in (-96, 0, 24)]
    largest = max(
        plan.limits.nbytes
        + plan.lower_limits.nbytes
        + (plan.plain.shift.nbytes + plan.plain.half.nbytes if plan.plain else 0)
        for plan in plans
    )
    assert len(grid._plans) <= 64
    assert grid.nbytes == before > len(grid._plans) * largest + grid.order.nbytes + grid.place.nbytes


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


def test_plans_are_kept_for_a_bounded_number_of_values() -> None:
    table = learn_planes(activations((1, 8, 16, 16)), layout=Layout(4, 1))
    for size, most in ((16, 64), (512, 4)):
        grid = table.grid((1, 8, size, size))
        assert grid is not None
        for gain in range(GAINS[0], GAINS[1] + 1):
            grid.plan(0, gain)
        assert len(grid._plans) <= most


def test_a_sample_tells_the_gain_of_maps_whose_channels_differ() -> None:
    """In steps as long as there are channels, one of them would be all that is found."""
    rng = np.random.default_rng(0)
    table = learn_planes([rng.normal(size=(1, 48, 64, 64)).astype(np.float32) for _ in range(3)], layout=Layout(4, 1))
    array = rng.normal(size=(1, 48, 64, 64)).astype(np.float32) * np.exp(rng.normal(size=(48, 1, 1))).astype(np.float32)
    values, grid, _ = analyse(array, table)
    assert grid is not None
    some, per_unit = grid.gain_samples(0)
    assert per_unit.size < values.size / 8
    every = np.repeat(grid.per_unit, grid.counts)
    sampled, all_ = float(np.abs(values[some]) @ per_unit) / per_unit.size, float(np.abs(values) @ every) / every.size
    assert sampled == pytest.approx(all_, rel=0.06)
