"""`isthmus fuse` of a model with an exit: published weights, what requests get by them, and refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from typer.testing import CliRunner

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import Choice
from isthmus.artifacts.fusion import Fusion
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Context
from isthmus.errors import LearningError
from isthmus.pipeline import LocalHop, LoopbackHop, Result, Route, execute, local_route, plan_route
from isthmus.pipeline.fusion import fused_output
from isthmus.registry import FolderStore, Registry, open_cache
from isthmus.runtime.session_store import open_store
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools import array_files
from isthmus_tools.cli import app
from isthmus_tools.usecases.fuse import FuseRequest, FuseResult, fuse
from support.half_digits import TRAINING, digits, publish_half, publish_with_exit

JUDGING = slice(1300, 1797)


@dataclass(frozen=True)
class Gated:
    """A registry whose model has an exit, and labelled inputs that trained neither."""

    folder: Path
    registry: Registry
    data: Path

    @property
    def settings(self) -> RegistrySettings:
        return RegistrySettings(registry=str(self.folder / "registry"), cache_dir=str(self.folder / "cache"))

    def fuse(self, **changes: Any) -> FuseResult:
        return fuse(FuseRequest(**{"model": "whole", "data": self.data, "registry": self.settings, **changes}))

    def route(self, bundle: Bundle) -> Route:
        """A route of the bundle over real frames, with its exit."""
        settings = SegmentSettings(**vars(self.settings))
        hop = LoopbackHop(LocalHop(open_store(open_cache(settings, self.registry), settings)))
        digest = self.registry.resolve("whole:prod").digest
        return plan_route(digest, bundle, (hop, hop)).with_exit()


def write_rows(path: Path, rows: slice, **labels: Array) -> Path:
    array_files.write_npz(path, {"x": digits().pixels[rows], **labels})
    return path


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    folder = tmp_path_factory.mktemp("gated")
    registry = Registry(FolderStore(folder / "registry"))
    publish_with_exit(registry, folder)
    rows = slice(TRAINING, 1300)
    return Gated(folder, registry, write_rows(folder / "data.npz", rows, labels=digits().labels[rows]))


@pytest.fixture(scope="module")
def fused(gated: Gated) -> FuseResult:
    return gated.fuse()


@pytest.fixture(scope="module")
def route(gated: Gated, fused: FuseResult) -> Route:
    return gated.route(gated.registry.resolve("whole:prod").bundle)


def run(route: Route, rows: Array) -> Result:
    return execute(route, {"x": rows}, Context.from_headers({}, longest_s=60))


def test_the_published_fusion_states_what_it_is_of_and_its_gain(gated: Gated, fused: FuseResult) -> None:
    bundle = gated.registry.resolve("whole:prod").bundle
    fusion = bundle.fusion
    assert fusion is not None
    assert fusion == fused.fusion
    assert (fusion.cut, fusion.output, fusion.output_kind, fusion.target) == ("hidden", "y", "logits", "labels")
    assert fusion.codec == "raw"
    assert fusion.gain.is_beyond_chance
    # Of the inputs that go on alone: the others never meet the model.
    assert fusion.gain.inputs == fused.inputs - fused.exited
    assert 0.3 < fused.exited / fused.inputs < 0.7


def test_requests_that_go_on_get_the_weighted_sum_and_those_that_exit_the_exits_scores(route: Route) -> None:
    hits = {"fused": 0, "model": 0}
    labels = digits().labels[JUDGING]
    taken = 0
    for row, label in zip(digits().pixels[JUDGING, None], labels, strict=True):
        result = run(route, row)
        assert result.exit is not None
        if result.is_early:
            taken += 1
            assert result.unfused is None
            assert "fused" not in result.facts()
            np.testing.assert_array_equal(result.outputs["y"], result.exit.scores)
            continue
        assert result.facts()["fused"] is True
        assert result.unfused is not None
        fusion = route.bundle.fusion
        assert fusion is not None
        expected = fused_output(fusion, result.exit.scores, result.unfused["y"])
        np.testing.assert_array_equal(result.outputs["y"], expected)
        hits["fused"] += int(result.outputs["y"].argmax() == label)
        hits["model"] += int(result.unfused["y"].argmax() == label)
    assert 0 < taken < len(labels)
    assert hits["fused"] > hits["model"] + 20


def test_a_request_for_the_full_model_gets_the_models_own_scores(route: Route) -> None:
    row = digits().pixels[JUDGING][:1]
    whole = run(local_route(route.digest, route.bundle, (route.bundle.segment(WHOLE),), route.hops[0]), row)
    full = run(route.full(), row)
    assert full.unfused is None
    np.testing.assert_allclose(full.outputs["y"], whole.outputs["y"], atol=1e-5)


def test_rows_of_a_batch_that_the_exit_is_sure_of_stay_the_models_own(route: Route) -> None:
    rows = digits().pixels[JUDGING][:40]
    result = run(route, rows)
    assert result.unfused is not None
    alone = [run(route, row) for row in rows[:, None]]
    for index, each in enumerate(alone):
        expected = result.unfused["y"][index] if each.is_early else each.outputs["y"][0]
        np.testing.assert_allclose(result.outputs["y"][index], expected, atol=1e-4)


def test_comparisons_take_the_models_own_scores_unless_agreement_was_learned(route: Route, fused: FuseResult) -> None:
    rows = digits().pixels[JUDGING][:40]
    result = run(route, rows)
    assert result.comparable is result.unfused
    bundle = structs.replace(route.bundle, fusion=structs.replace(fused.fusion, target="agreement"))
    result = run(replace(route, bundle=bundle), rows)
    assert result.comparable is result.outputs


@pytest.mark.parametrize("output_kind", ["logits", "probabilities"])
@pytest.mark.parametrize("kind", ["log_odds", "probabilities"])
def test_a_fused_output_keeps_shape_dtype_and_meaning(fused: FuseResult, kind: Any, output_kind: Any) -> None:
    fusion: Fusion = structs.replace(fused.fusion, kind=kind, output_kind=output_kind)
    scores = np.random.default_rng(0).dirichlet(np.ones(10), 3).astype(np.float16)[:, :, None, None]
    output = fused_output(fusion, scores[::-1], scores)
    assert (output.shape, output.dtype) == (scores.shape, scores.dtype)
    if output_kind == "probabilities":
        np.testing.assert_allclose(output.astype(np.float64).sum(axis=1), 1, atol=0.01)


def test_a_row_that_is_not_finite_stays_the_models_own(fused: FuseResult) -> None:
    own = np.random.default_rng(0).standard_normal((2, 10)).astype(np.float32)
    exit_scores = own[::-1].copy()
    exit_scores[0, 3] = np.nan
    output = fused_output(fused.fusion, exit_scores, own)
    np.testing.assert_array_equal(output[0], own[0])
    assert not np.array_equal(output[1], own[1])


def test_agreement_without_a_codec_cannot_be_gained_and_says_the_interval(gated: Gated, tmp_path: Path) -> None:
    with pytest.raises(LearningError, match="gains nothing beyond chance over the model alone") as refused:
        gated.fuse(data=write_rows(tmp_path / "bare.npz", slice(TRAINING, 1300)))
    assert refused.value.facts["alone"] == 1
    assert refused.value.facts["low"] <= 0
    assert "--codec" in refused.value.hint


def test_labels_gain_under_the_codec_that_is_named(gated: Gated) -> None:
    result = gated.fuse(codec=Choice("int4/1"), alias="")
    assert result.fusion.codec == "int4/1"
    assert result.fusion.gain.is_beyond_chance


def test_a_model_without_an_exit_is_refused_with_the_command_that_learns_one(gated: Gated, tmp_path: Path) -> None:
    registry = Registry(FolderStore(tmp_path / "registry"))
    publish_half(registry, tmp_path, "top")
    with pytest.raises(LearningError, match="top has no exit") as refused:
        replace(gated, folder=tmp_path, registry=registry).fuse(model="top")
    assert refused.value.hint == "learn one first: isthmus exits top --data FOLDER"


def test_inputs_that_all_exit_are_refused(gated: Gated, tmp_path: Path) -> None:
    registry = Registry(FolderStore(tmp_path / "registry"))
    publish_with_exit(registry, tmp_path, share=1.0)
    sure = write_rows(tmp_path / "sure.npz", slice(0, TRAINING), labels=digits().labels[:TRAINING])
    with pytest.raises(LearningError, match="all 400 inputs take the exit"):
        replace(gated, folder=tmp_path, registry=registry).fuse(data=sure)


def test_the_command_prints_one_document_or_the_gain_and_the_weights(gated: Gated, fused: FuseResult) -> None:
    command = ["fuse", "whole", "--data", str(gated.data), "--registry", str(gated.folder / "registry")]
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert document["fusion"]["cut"] == "hidden"
    assert document["gain"]["low"] > 0
    assert document["exited"] == fused.exited
    text = CliRunner().invoke(app, command).stdout
    assert "fuses the exit at hidden with the model" in text
    assert "at 95%" in text
    shown = CliRunner().invoke(app, ["show", "whole", "--registry", str(gated.folder / "registry")]).stdout
    assert "fuses exit and model where a request does not exit at hidden" in shown
    refused = CliRunner().invoke(app, [*command, "--shared", "--json"])
    assert json.loads(refused.stderr)["facts"]["options"] == ["--shared"]
