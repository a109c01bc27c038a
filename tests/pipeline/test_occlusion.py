"""Explanations by occlusion: the decisive part is found at every cut, in one batch or one by one, and bounds hold."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.context import Context, Deadline
from isthmus.errors import DeadlineExceeded, IsthmusError, RequestMalformed, RequestTooLarge, RunFailed, ShapeMismatch
from isthmus.pipeline import execute, hidden_copies
from isthmus.pipeline.occlusion import OcclusionRequest, areas, class_scores, occlude
from isthmus.pipeline.places import Places, boundary_places, input_places, windows
from support.bundles import Published, pair_model, publish
from support.bundles import photos as photos
from support.explained import CELL, TOKEN, explained, local, picture, sentence


@pytest.fixture(scope="module", params=[1, "batch"])
def pictures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return picture(tmp_path_factory.mktemp("picture"), request.param)


@pytest.mark.parametrize(
    ("cuts", "at", "tensors"),
    [(("0",), "0", ["r"]), (("1",), "1", ["r", "p"]), (("7",), "", ["x"]), ((), "", ["x"])],
    ids=["one tensor", "two resolutions", "no rows and columns", "no cut"],
)
def test_only_the_decisive_cell_lowers_the_probability(
    pictures: Published, tmp_path: Path, cuts: tuple[str, ...], at: str, tensors: list[str]
) -> None:
    result = explained(local(pictures, tmp_path, *cuts), pictures.inputs, grid=4, window=1)
    assert (result.cut, [p.tensor for p in result.hidden], result.index) == (at, tensors, 1)
    assert result.drops[CELL] == pytest.approx(result.probability - 0.5, abs=1e-6)
    assert np.count_nonzero(np.abs(result.drops) > 1e-9) == 1
    assert result.windows == 16
    # A batch that is free travels as one.
    assert len(result.runs) == (16 if pictures.bundle.inputs[0].shape[0] == 1 else 1)


def test_overlapping_windows_share_their_drops(pictures: Published, tmp_path: Path) -> None:
    result = explained(local(pictures, tmp_path, "0"), pictures.inputs, grid=4)
    assert result.windows == 25
    # Four windows hold the decisive cell; of a neighbour's four windows two do, of a diagonal neighbour's one.
    assert np.unravel_index(result.drops.argmax(), (4, 4)) == CELL
    assert result.drops[CELL] == pytest.approx(result.probability - 0.5, abs=1e-6)
    np.testing.assert_allclose(
        result.drops[:3, 1:] / result.drops[CELL], [[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]]
    )
    assert result.drops[3, 0] == 0


def test_the_head_runs_once(pictures: Published, tmp_path: Path) -> None:
    result = explained(local(pictures, tmp_path, "0"), pictures.inputs, grid=4)
    assert [run.segment for run in result.base.runs] == ["..0", "0.."]
    assert {run.segment for each in result.runs for run in each.runs} == {"0.."}


def test_of_several_cuts_the_one_at_the_link_is_hidden(pictures: Published, tmp_path: Path) -> None:
    route = local(pictures, tmp_path, "0", "1")
    assert explained(route, pictures.inputs, grid=4).cut == "0"
    near, far = route.hops[0], copy(route.hops[0])
    far.name = "far"  # type: ignore[misc]
    result = explained(replace(route, hops=(near, near, far), near=near.name), pictures.inputs, grid=4)
    assert result.cut == "1"
    assert {run.hop for each in result.runs for run in each.runs} == {"far"}


def test_the_copies_are_not_kept(pictures: Published, tmp_path: Path) -> None:
    result = explained(local(pictures, tmp_path, "0"), pictures.inputs, grid=4)
    assert result.base.tensors
    assert not any(each.tensors or each.outputs for each in result.runs)


def test_another_class_has_the_opposite_drops(pictures: Published, tmp_path: Path) -> None:
    route = local(pictures, tmp_path, "0")
    likely, other = (explained(route, pictures.inputs, grid=4, index=index) for index in (1, 0))
    np.testing.assert_allclose(other.drops, -likely.drops, atol=1e-9)


def test_a_grid_finer_than_the_activations_is_theirs(pictures: Published, tmp_path: Path) -> None:
    assert explained(local(pictures, tmp_path, "0"), pictures.inputs, grid=15).drops.shape == (8, 8)


@pytest.mark.parametrize("mask", [False, True], ids=["ids alone", "attention mask"])
@pytest.mark.parametrize("cuts", [("0",), ()], ids=["at the cut", "at the input"])
def test_the_decisive_token_is_found(tmp_path: Path, cuts: tuple[str, ...], mask: bool) -> None:
    published = sentence(tmp_path / "model", mask=mask)
    result = explained(local(published, tmp_path, *cuts), published.inputs)
    assert result.drops.shape == (6,)
    ids = published.inputs["input_ids"][0].tolist()
    assert int(result.drops.argmax()) == ids.index(TOKEN)
    assert np.abs(np.delete(result.drops, ids.index(TOKEN))).max() < 1e-3
    hidden = "h" if cuts else "attention_mask" if mask else "input_ids"
    assert [p.tensor for p in result.hidden] == [hidden]


def test_tokens_are_hidden_by_the_id_that_is_asked_for(tmp_path: Path) -> None:
    published = sentence(tmp_path / "model")
    result = explained(local(published, tmp_path), published.inputs, hidden_id=TOKEN)
    # Every other token becomes the decisive one.
    assert result.drops.max() <= 0


def test_a_long_sequence_is_hidden_in_groups(tmp_path: Path) -> None:
    published = sentence(tmp_path / "model")
    assert explained(local(published, tmp_path), published.inputs, max_runs=4).drops.shape == (4,)


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"index": 2}, RequestMalformed, "class 2 is none of the model's 2 classes"),
        ({"index": -1}, RequestMalformed, "class -1"),
        ({"grid": -1}, RequestMalformed, "grid is -1; it is a whole number from 1 to 32"),
        ({"grid": 33}, RequestMalformed, "grid is 33"),
        ({"grid": 8, "max_runs": 80}, RequestTooLarge, "a grid of 8 takes 81 runs .* at most 80"),
        ({"max_runs": 0}, RequestTooLarge, "at most 0"),
        ({"output": "none"}, RequestMalformed, "no output 'none'"),
    ],
)
def test_a_request_out_of_range_is_refused(
    pictures: Published, tmp_path: Path, wanted: dict[str, Any], error: type[IsthmusError], message: str
) -> None:
    with pytest.raises(error, match=message):
        explained(local(pictures, tmp_path, "0"), pictures.inputs, **wanted)


def test_probabilities_that_are_not_finite_are_told(tmp_path: Path) -> None:
    published = picture(tmp_path / "model")
    with pytest.raises(RunFailed, match="is not finite"):
        explained(local(published, tmp_path, "0"), {"x": np.full((1, 3, 8, 8), np.inf, np.float32)})


def test_a_sequence_is_refused_where_no_run_is_allowed(tmp_path: Path) -> None:
    published = sentence(tmp_path / "model")
    with pytest.raises(RequestTooLarge, match="at most 0"):
        explained(local(published, tmp_path), published.inputs, max_runs=0)


def test_a_batch_of_inputs_is_refused(tmp_path: Path) -> None:
    published = picture(tmp_path / "model", "batch")
    inputs = {"x": np.repeat(published.inputs["x"], 2, axis=0)}
    with pytest.raises(ShapeMismatch, match="of one input"):
        explained(local(published, tmp_path), inputs)


def test_a_model_without_classes_is_refused(tmp_path: Path) -> None:
    published = publish(tmp_path / "model", pair_model(_folder(tmp_path / "model") / "pair.onnx"), {})
    with pytest.raises(RequestMalformed, match="several outputs"):
        class_scores(published.bundle)
    regression = replace_output(published, (1, 1))
    with pytest.raises(ShapeMismatch, match="is no table of classes"):
        class_scores(regression)


def test_inputs_without_places_are_refused(tmp_path: Path) -> None:
    published = publish(tmp_path / "model", pair_model(_folder(tmp_path / "model") / "pair.onnx"), {})
    inputs = {name: np.zeros((1, 32), np.float32) for name in ("x", "mask")}
    with pytest.raises(ShapeMismatch, match="neither a picture nor tokens"):
        explained(local(published, tmp_path), inputs, output="late")


def test_runs_that_would_be_late_are_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = picture(tmp_path / "model")
    context, calls, clock = Context.from_headers({}, longest_s=60), [], [0.0]
    # Each call takes a second by this clock, and 60 are left: 289 do not fit.
    monkeypatch.setattr(hidden_copies, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))

    def run(route: Any, arrays: Any) -> Any:
        calls.append(route)
        clock[0] += 1
        return execute(route, arrays, context)

    request = OcclusionRequest(class_scores(published.bundle), grid=16)
    with pytest.raises(DeadlineExceeded, match="more calls") as caught:
        occlude(local(published, tmp_path), published.inputs, request, run, Deadline.after(30))
    assert len(calls) == 2
    assert "smaller grid" in caught.value.hint


def test_a_graph_that_holds_a_batch_of_one_gets_its_copies_one_by_one(tmp_path: Path) -> None:
    published = picture(tmp_path / "model", "batch", baked=True)
    assert published.bundle.inputs[0].shape[0] == "batch"
    result = explained(local(published, tmp_path, "0"), published.inputs, grid=4, window=1)
    assert len(result.runs) == 16
    assert np.unravel_index(result.drops.argmax(), (4, 4)) == CELL


def test_a_batch_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = picture(tmp_path / "model", "batch")
    monkeypatch.setattr(hidden_copies, "MAX_BATCH_BYTES", 4 * published.inputs["x"].nbytes)
    result = explained(local(published, tmp_path), published.inputs, grid=4, window=1)
    assert len(result.runs) == 4
    assert np.unravel_index(result.drops.argmax(), (4, 4)) == CELL


@pytest.mark.parametrize(
    ("shape", "whole", "expected"),
    [
        ((1, 192, 7, 7), (224, 224), Places("t", 2, (7, 7), 2)),
        ((1, 40, 80, 3), (320, 640), Places("t", 1, (40, 80), 2)),
        ((1, 64, 41, 80), (325, 640), Places("t", 2, (41, 80), 2)),
        ((1, 197, 768), (224, 224), Places("t", 1, (14, 14), 1, 1)),
        ((1, 196, 768), (224, 224), Places("t", 1, (14, 14), 1, 0)),
        ((1, 200, 64), (320, 640), Places("t", 1, (10, 20), 1, 0)),
        ((1, 128, 384), (128,), Places("t", 1, (128,))),
        ((1, 16, 128), (128,), Places("t", 2, (128,))),
        ((1, 480, 1, 1), (224, 224), None),
        ((1, 1000), (224, 224), None),
        ((1, 64, 8, 30), (224, 224), None),
        ((1, 12, 128, 128), (128,), None),
    ],
)
def test_places_are_read_from_shapes(shape: tuple[int, ...], whole: tuple[int, ...], expected: Places | None) -> None:
    array = np.zeros(shape, np.float32)
    spec = type("Spec", (), {"name": "t"})()
    assert boundary_places([spec], {"t": array}, whole) == ([expected] if expected else [])
    if expected:
        # A view: hiding a place changes the array itself.
        expected.view(array)[...] = 1
        assert array.sum() == np.prod(shape) * (1 - expected.leading / shape[1])


def test_whole_numbers_that_cross_a_cut_have_no_places() -> None:
    spec = type("Spec", (), {"name": "t"})()
    assert boundary_places([spec], {"t": np.zeros((1, 6, 4), np.int64)}, (6,)) == []


def test_a_photo_with_channels_last_has_its_layout(photos: Published) -> None:
    steps = [{"op": "layout", "to": "NHWC"}]
    bundle = _replaced(photos, preprocess={**(photos.bundle.preprocess or {}), "steps": steps})
    assert input_places(bundle, {"x": np.zeros((1, 8, 8, 3), np.float32)}) == Places("x", 1, (8, 8), 2)


def test_windows_cover_every_place() -> None:
    covered = np.zeros((10, 7))
    for window in windows((7, 7), 2, (10, 7)):
        covered[window] += 1
    assert covered.min() == 4
    assert list(windows((2,), 1, (5,))) == [(slice(0, 3),), (slice(2, 5),)]


def test_areas_are_named_with_their_shares() -> None:
    drops = np.zeros((7, 7))
    drops[0, 0], drops[3, 3], drops[6, 3] = 3.0, 6.0, -5.0
    assert areas(drops) == [{"where": "centre", "share": 0.6667}, {"where": "upper left", "share": 0.3333}]
    assert areas(np.zeros((7, 7))) == []


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _replaced(published: Published, **changes: Any) -> Any:
    from msgspec.structs import replace as replaced

    return replaced(published.bundle, **changes)


def replace_output(published: Published, shape: tuple[int, ...]) -> Any:
    from isthmus.artifacts.tensors import TensorSpec

    return _replaced(published, outputs=(TensorSpec("y", "float32", shape),))
