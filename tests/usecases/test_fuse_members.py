"""One model of several sensors: it predicts better than each of them, is split at the scores, or is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.redaction import Redaction, Region
from isthmus.errors import IsthmusError, LearningError, ModelError
from isthmus.registry import Registry
from isthmus.settings import RegistrySettings
from isthmus_tools import array_files
from isthmus_tools.graph import build
from isthmus_tools.graph.merge import FUSED
from isthmus_tools.usecases.fuse_members import FuseMembersRequest, FuseMembersResult, fuse_members
from isthmus_tools.usecases.fusion_members import open_members
from isthmus_tools.usecases.local_model import LocalModel
from support.cli import isthmus
from support.half_digits import (
    CLASSES,
    TRAINING,
    digits,
    registry_of,
    weights_of,
    write_classifier,
    write_data,
)

JUDGING = slice(1300, 1797)
"""Inputs that neither trained the sensors nor weighed these."""


@dataclass(frozen=True)
class Sensors:
    """A registry with the two sensors, and the data that a fusion is learned from."""

    folder: Path
    registry: Registry
    data: Path
    labels: Path

    @property
    def settings(self) -> RegistrySettings:
        return RegistrySettings(registry=str(self.folder / "registry"), cache_dir=str(self.folder / "cache"))

    def fuse(self, *members: str, **changes: Any) -> FuseMembersResult:
        request = {"name": "both", "members": members or ("top", "bottom"), "data": self.data, "labels": self.labels}
        return fuse_members(FuseMembersRequest(**{**request, "registry": self.settings, **changes}))

    def publish(self, name: str, weights: Array, bias: Array, labels: list[str] | None = None) -> None:
        """A further classifier."""
        path = write_classifier(self.folder / f"{name}.onnx", weights, bias)
        postprocess = {"kind": "classify", "output": "y", "softmax": True, "top_k": 3}
        bundle, files = build(path, name, self.folder / f"{name}-b", postprocess=postprocess, labels=labels)
        self.registry.publish(bundle, files, alias="prod")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Sensors:
    folder = tmp_path_factory.mktemp("sensors")
    data, labels = write_data(folder / "data", slice(TRAINING, 1300))
    return Sensors(folder, registry_of(folder), data, labels)


@pytest.fixture(scope="module")
def fused(template: Sensors) -> FuseMembersResult:
    return template.fuse()


@pytest.fixture
def sensors(template: Sensors, tmp_path: Path) -> Sensors:
    """The sensors in a registry of the test's own."""
    shutil.copytree(template.folder / "registry", tmp_path / "registry")
    return Sensors(
        tmp_path, Registry(type(template.registry.store)(tmp_path / "registry")), template.data, template.labels
    )


def judging_inputs() -> dict[str, Array]:
    return {f"{half}.x": digits().half(half, JUDGING) for half in ("top", "bottom")}


def accuracy(scores: Array) -> float:
    return float((scores.argmax(axis=1) == digits().labels[JUDGING]).mean())


def test_the_fused_model_predicts_inputs_that_it_never_met_as_much_better_as_it_says(
    template: Sensors, fused: FuseMembersResult
) -> None:
    both = accuracy(LocalModel("both", template.settings).run(judging_inputs()).outputs[FUSED])
    alone = max(
        accuracy(LocalModel(half, template.settings).run({"x": digits().half(half, JUDGING)}).outputs["y"])
        for half in ("top", "bottom")
    )
    gain = fused.fitted.gain
    assert gain.is_beyond_chance
    assert gain.low <= both - alone <= gain.high


@pytest.mark.parametrize("cut", ["scores", "edge-top", "edge-bottom"])
def test_each_cut_of_the_fused_model_gives_the_whole_models_scores(
    template: Sensors, fused: FuseMembersResult, cut: str
) -> None:
    whole = LocalModel("both", template.settings, "..").run(judging_inputs()).outputs[FUSED]
    split = LocalModel("both", template.settings, cut).run(judging_inputs())
    np.testing.assert_allclose(split.outputs[FUSED], whole, atol=1e-4)
    assert [run.segment for run in split.runs] == [f"..{cut}", f"{cut}.."]


def test_only_scores_cross_in_front_of_the_sum_and_one_sensors_scores_beside_the_others_input(
    fused: FuseMembersResult,
) -> None:
    bundle: Bundle = fused.bundle
    assert {spec.name for spec in bundle.cuts["scores"].tensors} == {"top.y", "bottom.y"}
    assert {spec.name for spec in bundle.cuts["edge-top"].tensors} == {"top.y", "bottom.x"}
    assert {spec.name for spec in bundle.segment("..edge-top").inputs} == {"top.x"}
    assert bundle.default_cuts == ("scores",)


def test_the_bundle_names_its_members_their_weights_and_the_gain(template: Sensors, fused: FuseMembersResult) -> None:
    document = fused.bundle.source["fusion"]
    assert [member["name"] for member in document["members"]] == ["top", "bottom"]
    assert all(len(member["weights"]) in (1, CLASSES) for member in document["members"])
    assert document["gain"]["inputs"] == 1300 - TRAINING
    shown = isthmus("show", "both", "--registry", template.settings.registry).stdout
    assert f"the sum of top, bottom: {fused.fitted.gain.alone:.2%} right alone" in shown


def test_members_that_take_the_same_input_share_it(sensors: Sensors) -> None:
    """As an int8 model beside its original does: here two networks that see different pixels of one picture."""
    for half, rows in (("top", slice(0, 32)), ("bottom", slice(32, 64))):
        weights, bias = weights_of(half)
        wide = np.zeros((64, CLASSES), np.float32)
        wide[rows] = weights
        sensors.publish(f"{half}-wide", wide, bias)
    array_files.write_npz(sensors.folder / "x.npz", {"x": digits().pixels[TRAINING:1300]})
    result = sensors.fuse("top-wide", "bottom-wide", shared=True, data=sensors.folder / "x.npz")
    assert [spec.name for spec in result.bundle.inputs] == ["x"]
    assert {spec.name for spec in result.bundle.cuts["edge-top-wide"].tensors} == {"x", "top-wide.y"}
    scores = LocalModel("both", sensors.settings, "edge-top-wide").run({"x": digits().pixels[JUDGING]}).outputs[FUSED]
    assert accuracy(scores) > 0.9


def refusal(call: Callable[[], object]) -> IsthmusError:
    with pytest.raises((LearningError, ModelError)) as refused:
        call()
    return refused.value


def test_a_member_that_guesses_is_refused_with_the_interval_and_publishes_nothing(sensors: Sensors) -> None:
    rng = np.random.default_rng(0)
    sensors.publish("noise", *(rng.standard_normal(s).astype(np.float32) for s in ((32, CLASSES), (CLASSES,))))
    arrays = {"bottom.x": digits().half("bottom")[TRAINING:1300], "noise.x": digits().half("top")[TRAINING:1300, ::-1]}
    array_files.write_npz(sensors.folder / "noise.npz", arrays)
    error = refusal(lambda: sensors.fuse("bottom", "noise", name="new", data=sensors.folder / "noise.npz"))
    assert "gains nothing beyond chance over bottom alone" in error.message
    assert error.facts["low"] <= 0 <= error.facts["high"]
    assert error.facts["inputs"] == 1300 - TRAINING
    assert "new" not in sensors.registry.models()


def test_members_that_do_not_go_together_are_refused_by_name(sensors: Sensors) -> None:
    weights, bias = weights_of("top")
    sensors.publish("nine", weights[:, :9], bias[:9])
    assert "different classes: bottom has 10, nine has 9" in refusal(lambda: sensors.fuse("bottom", "nine")).message
    sensors.publish("renamed", weights, bias, [*map(str, range(9)), "ten"])
    assert "class 9 is '9' of top, and 'ten'" in refusal(lambda: sensors.fuse("top", "renamed")).message
    sensors.publish("wide", np.zeros((64, CLASSES), np.float32), bias)
    assert "wide takes other inputs than top" in refusal(lambda: sensors.fuse("top", "wide", shared=True)).message
    assert "a member twice" in refusal(lambda: sensors.fuse("top", "top")).message
    assert "2 to 8 members, not 1" in refusal(lambda: sensors.fuse("top")).message
    assert "needs a name of its own" in refusal(lambda: sensors.fuse(name="top")).message


def test_a_member_that_is_no_classifier_is_refused(sensors: Sensors) -> None:
    weights, bias = weights_of("top")
    path = write_classifier(sensors.folder / "level.onnx", weights[:, :1], bias[:1])
    bundle, files = build(path, "level", sensors.folder / "level-b")
    sensors.registry.publish(bundle, files, alias="prod")
    assert "level" in refusal(lambda: sensors.fuse("top", "level")).message


def test_data_that_nothing_can_be_learned_from_are_refused(sensors: Sensors, tmp_path: Path) -> None:
    assert "has no labels" in refusal(lambda: sensors.fuse(labels=None)).message
    np.save(tmp_path / "one.npy", np.full(1300 - TRAINING, 3))
    assert "one class only" in refusal(lambda: sensors.fuse(labels=tmp_path / "one.npy")).message
    np.save(tmp_path / "few.npy", np.arange(7))
    assert "7 labels" in refusal(lambda: sensors.fuse(labels=tmp_path / "few.npy")).message
    arrays = {name: array[:80].copy() for name, array in judging_inputs().items()}
    arrays["top.x"][5, 2] = np.nan
    array_files.write_npz(tmp_path / "nan.npz", {**arrays, "labels": digits().labels[JUDGING][:80]})
    error = refusal(lambda: sensors.fuse(data=tmp_path / "nan.npz", labels=None))
    assert "NaN or infinity in top.x" in error.message
    assert error.facts["row"] == 5
    array_files.write_npz(tmp_path / "bare.npz", {"x": arrays["bottom.x"], "labels": digits().labels[JUDGING][:80]})
    assert "does not fit the model" in refusal(lambda: sensors.fuse(data=tmp_path / "bare.npz", labels=None)).message


def test_a_member_that_redacts_is_not_fused_with_another_that_does_not(template: Sensors) -> None:
    plain = template.registry.resolve("top")
    redaction = Redaction(regions=(Region(0, 0, 0.5, 0.5),))
    redacting = replace(plain, version="2", bundle=structs.replace(plain.bundle, redaction=redaction))
    for shared in (False, True):
        with pytest.raises(LearningError, match="top-2 redacts its inputs"):
            open_members(template.registry, [plain, redacting], shared=shared)
