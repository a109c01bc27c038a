"""`isthmus exits` on scikit-learn's digits: what is published, what it promises, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.fusion import Fusion, FusionGain
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES
from isthmus.artifacts.segment_id import SegmentId
from isthmus.pipeline import LocalHop, execute, plan_route
from isthmus.registry import FolderStore, Registry
from isthmus.runtime.session_store import open_store
from isthmus_tools.learning.exits.threshold import upper_bound
from support.bundles import Published, cache_of, pair_model, publish, segment_settings
from support.cli import document, isthmus, refusal
from support.digits import TRAINED, digits, publish_digits, write_digits
from support.hop_servers import context

FUSION = Fusion(
    cut="1",
    output="scores",
    kind="log_odds",
    output_kind="logits",
    exit_weights=(0.5,),
    model_weights=(0.5,),
    scale=1.0,
    target="labels",
    codec="raw",
    penalty=0.1,
    gain=FusionGain(500, 0.97, 0.98, 5, 0, 0.001, 0.02),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 digits; the 297 behind these are for tests of what was published."""
    return write_digits(tmp_path_factory.mktemp("held-out"), stop=TRAINED + 1000)


@pytest.fixture(scope="module")
def fitted(
    original: Published, held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Published, dict[str, Any]]:
    """The model with exits at cuts of the command's choice, and the command's document."""
    folder = tmp_path_factory.mktemp("fitted") / "registry"
    shutil.copytree(original.folder, folder)
    told = document(run(folder, held_out, "--json"))
    registry = Registry(FolderStore(folder))
    version = registry.resolve("digits")
    return replace(original, registry=registry, folder=folder, bundle=version.bundle, digest=version.digest), told


@pytest.fixture
def registry(original: Published, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.folder, tmp_path / "registry"))


def run(registry: Path, data: Path, *options: object) -> Any:
    arguments = ("--data", data, "--registry", registry, "--limit", "2%", "--threads", 1, *options)
    return isthmus("exits", "digits", *arguments)


def latest(registry: Path) -> Bundle:
    return Registry(FolderStore(registry)).resolve("digits").bundle


def test_an_exit_is_published_with_its_gate(fitted: tuple[Published, dict[str, Any]]) -> None:
    published, told = fitted
    (only,) = published.bundle.exits
    assert only.gate is not None
    assert (only.cut, only.segment.id, only.segment.weights) == ("1", SegmentId("1", "1"), ())
    assert [spec.name for spec in only.segment.outputs] == [EXIT_SCORES, EXIT_CONFIDENCE]
    assert only.segment.outputs[0].shape == published.bundle.outputs[0].shape
    assert (only.gate.output, only.gate.risk, only.gate.limit, only.gate.inputs) == (
        "scores",
        "disagreement",
        0.02,
        500,
    )
    assert only.gate.bound == upper_bound(only.gate.failing, 500, only.gate.confidence) <= 0.02
    assert only.gate.share > 0.6
    assert (told["version"], told["alias_moved"], told["fitted"], told["held_out"]) == ("2", True, 500, 500)
    first, late = (next(c for c in told["candidates"] if c["cut"] == cut) for cut in ("1", "3"))
    assert first["gate"] == structs.asdict(only.gate)
    assert (first["published"], late["published"]) == (True, False)
    assert late["reason"] == "other cuts spare more work"
    # Labels lie beside the inputs.
    assert first["model"]["low"] < first["model"]["value"] < first["model"]["high"]
    assert first["gated"]["value"] > first["model"]["value"] - 0.02


def test_the_published_exit_keeps_its_promise_on_new_inputs(
    fitted: tuple[Published, dict[str, Any]], tmp_path: Path
) -> None:
    published, _ = fitted
    (only,) = published.bundle.exits
    store = open_store(cache_of(published, tmp_path), segment_settings(published, tmp_path))
    plain = plan_route(published.digest, published.bundle, (LocalHop(store),))
    pixels, classes = digits()
    pixels, classes = pixels[TRAINED + 1000 :], classes[TRAINED + 1000 :]
    model = execute(plain, {"x": pixels}, context()).outputs["scores"].argmax(1)
    results = [execute(plain.with_exit(), {"x": row[None]}, context()) for row in pixels]
    store.store.close()
    exits = np.array([result.exit is not None and result.exit.is_taken for result in results])
    gated = np.array([int(result.outputs["scores"].argmax()) for result in results])
    assert only.gate is not None
    assert exits.mean() == pytest.approx(only.gate.share, abs=0.08)
    # Requests that go on get the model's own prediction.
    assert (gated[~exits] == model[~exits]).all()
    # 297 inputs at a rate of 2%: above 12 in one of a thousand draws.
    assert (gated != model).sum() <= 12
    assert (gated == classes).mean() > 0.95


def test_named_cuts_are_added_and_exits_of_other_cuts_stay(
    fitted: tuple[Published, dict[str, Any]], held_out: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fitted[0].folder, tmp_path / "registry"))
    registry = Registry(FolderStore(folder))
    fused = structs.replace(registry.resolve("digits").bundle, fusion=FUSION)
    registry.publish(fused, {}, alias="prod")
    told = document(run(folder, held_out, "--cut", "2", "--json"))
    bundle = latest(folder)
    assert {each.cut for each in bundle.exits} == {"1", "2"}
    assert {"..2", "2.."} <= bundle.segments.keys()
    assert told["alias_moved"]
    assert [c["cut"] for c in told["candidates"]] == ["2"]
    assert bundle.fusion == fused.fusion
    # Weights of a fusion are for the scores of one exit.
    document(run(folder, held_out, "--cut", "1", "--limit", "3%", "--json"))
    assert latest(folder).fusion is None


def test_the_table_names_every_candidate(registry: Path, held_out: Path) -> None:
    told = run(registry, held_out, "--risk", "accuracy", "--confidence", "90%")
    assert told.exit_code == 0, told.output
    assert "risk: accuracy, at most 2.00% of requests" in told.stdout
    assert "3: no exit, other cuts spare more work" in told.stdout
    assert "digits:2 sha256:" in told.stdout
    assert "clear requests end at the default cut 1" in told.stdout
    (only,) = latest(registry).exits
    assert only.gate is not None
    assert (only.gate.risk, only.gate.confidence) == ("accuracy", 0.9)
    # An exit that is right where the model is wrong differs, and does not fail.
    assert only.gate.differing is not None
    assert only.gate.differing > only.gate.failing
    shown = isthmus("show", "digits", "--registry", registry).stdout
    assert f"exit at 1: {only.gate.share:.1%} of 500 held-out inputs; at most {only.gate.bound:.2%} of" in shown
    told = document(isthmus("show", "digits", "--registry", registry, "--json"))
    assert told["exits"][0]["gate"]["failing"] == only.gate.failing


def test_inputs_to_fit_may_be_others_and_labels_are_not_needed(registry: Path, tmp_path: Path) -> None:
    pixels, _ = digits()
    for name, rows in (("fit", slice(0, TRAINED)), ("data", slice(TRAINED, TRAINED + 300))):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "x.npz", x=pixels[rows])
    told = document(run(registry, tmp_path / "data", "--training", tmp_path / "fit", "--json"))
    assert (told["fitted"], told["held_out"], told["labelled"]) == (500, 300, False)
    assert told["candidates"][0]["gated"] is None


def test_too_few_inputs_say_how_many_are_missing(registry: Path, tmp_path: Path) -> None:
    data = write_digits(tmp_path / "few", stop=TRAINED + 200)
    told = refusal(run(registry, data, "--limit", "1%", "--json"))
    assert told["type"] == "LearningError"
    assert (told["facts"]["held_out"], told["facts"]["needed"], told["facts"]["missing"]) == (100, 299, 199)
    assert "give 398 more inputs" in told["hint"]
    assert "--limit 3%" in told["hint"]
    assert document(run(registry, data, "--limit", "5%", "--json"))["held_out"] == 100


def test_one_class_nan_and_other_labels_are_refused_before_anything_is_published(
    registry: Path, tmp_path: Path
) -> None:
    pixels, classes = digits()
    broken = pixels[:700].copy()
    broken[650, 0, 3, 3] = np.nan
    cases: dict[str, dict[str, Any]] = {
        "one class only": {"x": pixels[classes == 4], "labels": classes[classes == 4]},
        "predicts one class": {"x": np.repeat(pixels[:1], 400, 0)},
        "NaN or infinity in x, input 650": {"x": broken},
        "no class of the model: '10'": {"x": pixels[:700], "labels": classes[:700] + 1},
    }
    for index, (message, arrays) in enumerate(cases.items()):
        folder = tmp_path / str(index)
        folder.mkdir()
        np.savez(folder / "data.npz", **arrays)
        assert message in refusal(run(registry, folder, "--json"))["error"]
    assert "has no labels" in refusal(run(registry, tmp_path / "1", "--risk", "accuracy", "--json"))["error"]
    assert Registry(FolderStore(registry)).resolve("digits").version == "1"


def test_a_cut_without_a_useful_exit_is_refused_with_the_reason(registry: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("noise", 400), ("few", 12)):
        np.savez(tmp_path / f"{name}.npz", x=rng.uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32))
    options = ("--training", tmp_path / "few.npz", "--cut", "1", "--limit", "1%", "--json")
    told = refusal(run(registry, tmp_path / "noise.npz", *options))
    assert told["error"].startswith("no cut of digits has an exit worth publishing: at 1 ")
    assert set(told["facts"]["reasons"]) == {"1"}
    assert "partition of several cuts" in refusal(run(registry, tmp_path, "--cut", "1/3", "--json"))["error"]


def test_models_without_classes_are_refused(tmp_path: Path) -> None:
    pair = publish(tmp_path / "pair", pair_model(tmp_path / "pair.onnx"), {})
    np.savez(tmp_path / "x.npz", x=np.ones((2, 32), np.float32), mask=np.ones((2, 32), np.float32))
    arguments = ("exits", "pair", "--data", tmp_path / "x.npz", "--registry", pair.folder, "--json")
    assert "does not say which output holds classes" in refusal(isthmus(*arguments))["error"]
    assert "2 outputs" in refusal(isthmus(*arguments, "--classes", "late"))["error"]


@pytest.mark.parametrize(("option", "value"), [("--limit", "0"), ("--limit", "150%"), ("--confidence", "sure")])
def test_options_out_of_range_are_named(option: str, value: str, registry: Path, held_out: Path) -> None:
    assert refusal(run(registry, held_out, option, value, "--json"))["error"].startswith(f"{option}: ")
