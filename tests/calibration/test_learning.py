"""Learning the tables of `transform/4`: sensitivity, transforms, clusters of rows, and the choice between forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from isthmus.arrays import Array
from isthmus.codecs.transform.levels import (
    STEPS_PER_FACTOR,
    levels_of,
    step_in_eighths,
    step_size,
)
from isthmus.codecs.transform.planes import Layout
from isthmus.codecs.transform.rows import RowLayout, RowTable
from isthmus.codecs.transform.table import PlaneTable
from isthmus.errors import CalibrationError
from isthmus_tools.calibration.fisher import Sensitivity, equalise_steps, measure_sensitivity
from isthmus_tools.calibration.layouts import plane_layout, row_layout
from isthmus_tools.calibration.rate_distortion import learn_table
from isthmus_tools.calibration.rows import RowModel, Rows, learn_rows
from isthmus_tools.calibration.transforms import STEPS, learn_models, learn_planes
from support.activations import round_trip
from support.row_tables import FORMS, components, sentence, state

# Sensitivity


def test_noise_goes_where_the_tail_does_not_look() -> None:
    rng = np.random.default_rng(1)
    samples = [rng.normal(size=(1, 6, 8, 8)).astype(np.float32) for _ in range(30)]
    weights = np.array([8.0, 8.0, 1.0, 1.0, 0.1, 0.1])

    def tail(crossing: Mapping[str, Array]) -> dict[str, Array]:
        return {"out": crossing["x"].sum(axis=(2, 3)) * weights, "other": np.zeros(1)}

    how = measure_sensitivity(tail, ({"x": x} for x in samples), "x", output="out", loss="values", layout=Layout(4, 1))
    assert how.inputs == 30
    assert np.all(np.diff(np.diag(how.channels)[::2]) < 0)
    assert how.rings[0] > 100 * how.rings[2]
    table = learn_planes(samples, sensitivity=how)
    _, found = round_trip(samples[0], table, 0.1)
    blind = learn_planes(samples, layout=Layout(4, 1))
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
    how = measure_sensitivity(tail, inputs, "x", output="logits")
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
    how = measure_sensitivity(tail, inputs, "x", loss="values", max_runs=50)
    assert runs == how.runs == 50
    assert how.inputs == 10


# Tables of planes


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 40, 14, 14), 1), ((1, 14, 14, 40), 3), ((1, 50, 32), 2), ((1, 32, 50), 1), ((4, 9), 1)]
)
def test_the_channels_are_where_neighbours_are_least_alike(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=shape)
    for other in range(1, len(shape)):
        if other != axis:
            noise = np.cumsum(noise, axis=other)
    assert plane_layout(noise) == Layout(len(shape), axis)


@pytest.mark.parametrize("step", [STEPS[0], 0, STEPS[1]])
def test_models_fit_their_levels_at_every_step(step: int) -> None:
    """Learned at one step alone, so that what the others teach hides nothing."""
    rng = np.random.default_rng(0)
    stored = rng.integers(128 + step_in_eighths(step) - 40, 128 + step_in_eighths(step) + 20, 200_000)
    deviation = np.exp2((stored - 128) / 8)
    values = (rng.laplace(size=stored.size) * deviation / np.sqrt(2)).astype(np.float32)
    models = learn_models(values, stored, np.zeros(stored.size, np.int64), (step, step))
    steps = deviation / step_size(step)
    level = levels_of(stored, step, 0)
    assert float(np.abs(level - (12 + 2 * np.log2(steps))).max()) < 0.65
    for each in range(3, 17):
        share = float(np.mean(1 - np.exp(-np.sqrt(2) / 2 / steps[level == each])))
        assert models.zero[each] / 65536 == pytest.approx(share, abs=0.01)


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
            learn_planes([np.asarray(s) for s in samples])
    with pytest.raises(CalibrationError, match="only once"):
        learn_planes(x for x in [good])
    with pytest.raises(CalibrationError, match="no input"):
        measure_sensitivity(lambda crossing: crossing, [], "x")
    with pytest.raises(CalibrationError, match="errors could move"):
        measure_sensitivity(lambda crossing: crossing, [{"x": np.zeros((1, 4), np.int64)}], "x")
    with pytest.raises(CalibrationError, match="not finite"):
        measure_sensitivity(lambda crossing: {"y": crossing["x"] * np.nan}, [{"x": good}], "x")


# Tables of rows


def test_the_layers_of_a_state_are_one_row() -> None:
    rng = np.random.default_rng(0)
    assert row_layout(state(rng)) == RowLayout(3, (0, 2), (2, 12))
    assert row_layout(sentence(rng, 30)) == RowLayout(3, (2,), (24,))
    table = learn_rows(Rows.of([state(rng) for _ in range(60)]), FORMS["one class"], None, STEPS)
    array = state(rng)
    _, found = round_trip(array, table, 1.0)
    assert np.abs(found - array).max() < 1
    both = np.concatenate([array, state(rng)], axis=1)
    assert np.abs(round_trip(both, table, 1.0)[1] - both).max() < 1


def test_steps_are_finer_in_rows_that_matter_more() -> None:
    rng = np.random.default_rng(0)
    samples = [sentence(rng, 12) for _ in range(40)]

    def tail(crossing: Mapping[str, Array]) -> dict[str, Array]:
        x = crossing["x"][0].astype(np.float64)
        return {"out": x[1:] * 0.01 + 3 * x[:1]}

    how = measure_sensitivity(tail, [{"x": x} for x in samples], "x", loss="values")
    assert len(how.places) == how.inputs
    assert how.places[0][0] > 10 * how.places[0][1:].max()
    table = learn_rows(Rows.of(samples), RowModel(4, rotated=True), how, STEPS)
    first = table.clusters.likeliest(components(samples[0][0], table).astype(np.float32))[0]
    assert table.weights[first] == table.weights.max() > 0
    assert sorted(how.in_order(list(range(39, -1, -1))).places[-1]) == sorted(how.places[0])


def test_tokens_become_rows_and_smooth_sequences_keep_their_planes() -> None:
    rng = np.random.default_rng(0)

    def of(samples: list[Array]) -> PlaneTable | RowTable:
        return learn_table(
            samples, Sensitivity(plane_layout(samples[0]), np.eye(samples[0].shape[2]), np.ones(7), 1, 1)
        )

    assert isinstance(of([sentence(rng, 12) for _ in range(40)]), RowTable)
    smooth = [np.cumsum(rng.normal(size=(1, 60, 6)), axis=1).astype(np.float32) for _ in range(24)]
    assert isinstance(of(smooth), PlaneTable)


@pytest.mark.parametrize("harm", [1e-12, 1.0, 1e300])
def test_the_form_does_not_depend_on_how_much_a_tensor_matters(harm: float) -> None:
    rng = np.random.default_rng(3)
    smooth = [np.cumsum(rng.normal(size=(1, 60, 6)), axis=1).astype(np.float32) for _ in range(24)]
    how = Sensitivity(plane_layout(smooth[0]), harm * np.eye(6), np.ones(7), 1, 1)
    assert isinstance(learn_table(smooth, how), PlaneTable)


@pytest.mark.parametrize("channels", [6, 24])
def test_noise_has_no_classes(channels: int) -> None:
    rng = np.random.default_rng(7)
    noise = [rng.normal(size=(1, channels)).astype(np.float32) for _ in range(400)]
    found = learn_table(noise, Sensitivity(plane_layout(noise[0]), np.eye(channels), np.ones(7), 1, 1))
    assert isinstance(found, RowTable)
    assert len(found.means) == 1


def test_the_steps_of_tensors_that_cross_together_do_the_same_harm() -> None:
    rng = np.random.default_rng(0)
    samples = [{"a": sentence(rng, 8), "b": sentence(rng, 8) / 64} for _ in range(30)]

    def tail(crossing: Mapping[str, Array]) -> dict[str, Array]:
        return {"out": crossing["a"] + crossing["b"]}

    found = {name: measure_sensitivity(tail, samples, name, loss="values", max_runs=200) for name in ("a", "b")}
    made: dict[str, PlaneTable | RowTable] = {n: learn_table([s[n] for s in samples], how) for n, how in found.items()}
    equalise_steps(made, found)
    sizes = [table.scale * step_size(table.steps[0]) for table in made.values()]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.15)
    moved = [(table.steps[0] - STEPS[0]) * table.channels for table in made.values()]
    assert abs(sum(moved)) <= sum(table.channels for table in made.values()) / 2 < abs(moved[0])
    assert {coarsest - finest for coarsest, finest in (table.steps for table in made.values())} == {
        5 * STEPS_PER_FACTOR
    }
    for table, by in ((made["a"], 1e9), (made["b"], 1e-9)):
        # However far apart tensors are, steps stay where a byte says them.
        apart = {"a": replace(made["a"], steps=STEPS), "b": replace(table, steps=STEPS, scale=table.scale * by)}
        equalise_steps(apart, found)
        assert {abs(t.steps[0] - STEPS[0]) for t in apart.values()} == {40}


def test_rows_that_cannot_be_learned_from_are_refused() -> None:
    good = np.ones((1, 4, 3), np.float32)
    for samples in ([], [good.astype(np.int32)], [good, good[:, :, :2]], [good * np.nan], [good[:, :0]]):
        with pytest.raises(CalibrationError):
            learn_rows(Rows.of(samples), FORMS["one class"], None, STEPS)
    with pytest.raises(CalibrationError, match="too large"):
        learn_rows(Rows.of([good * np.float32(1e20), -good * np.float32(1e20)]), FORMS["one class"], None, STEPS)
    assert learn_planes([good] * 4).channels == 3


def test_rows_unlike_all_others_have_a_class_with_the_mean_and_the_variance_of_all() -> None:
    rng = np.random.default_rng(6)
    words = 5 * rng.normal(size=(8, 24))
    known = [(words[rng.integers(0, 8, 10)] + rng.normal(size=(10, 24)))[None].astype(np.float32) for _ in range(40)]
    unknown = [(5 * rng.normal(size=(10, 24)))[None].astype(np.float32) for _ in range(20)]
    table, alone = (learn_rows(Rows.of(known), RowModel(k, rotated=True), None, STEPS) for k in (16, 1))
    assert np.allclose(table.means[0], np.concatenate(known, axis=1)[0].mean(axis=0), atol=1e-4)
    shares = [
        np.mean([table.clusters.likeliest(components(a[0], table).astype(np.float32)) == 0 for a in arrays])
        for arrays in (known, unknown)
    ]
    assert shares[0] < 0.1
    assert shares[1] > 0.8
    for arrays, most in ((known, 0.7), (unknown, 1.0)):
        taken, without = (sum(len(round_trip(a, each, 0.5)[0]) for a in arrays) for each in (table, alone))
        assert taken < most * without
