"""`isthmus leak`: likeness, the attackers, what deeper cuts and codecs take away, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from typer.testing import CliRunner

from isthmus.artifacts.bundle import Blob, TextEmbedding
from isthmus.artifacts.leak import LEAK, read_leak
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import LearningError
from isthmus_tools.cli import app
from isthmus_tools.learning.leak.activations import FeatureFiles
from isthmus_tools.learning.leak.attack_data import refuse_texts
from isthmus_tools.learning.leak.likeness import correlation, psnr, ssim
from isthmus_tools.learning.leak.linear import reconstruct_linearly
from isthmus_tools.learning.leak.network import TrainingBudget, train_network
from isthmus_tools.learning.leak.targets import IMAGE, SERIES, VECTOR
from isthmus_tools.learning.leak.targets import TargetLayout as Layout
from support.bundles import Published
from support.trained_digits import digits, publish_digits

FAST = ("--steps", "40", "--inputs", "200")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    images, labels = digits()
    np.savez(folder / "digits.npz", x=images, labels=labels)
    return folder


def run(published: Published, data: Path, *arguments: str) -> Any:
    command = ["leak", published.name, "--data", str(data), "--registry", str(published.folder), "--json"]
    return CliRunner().invoke(app, [*command, *arguments])


def measured(published: Published, data: Path, *arguments: str) -> Any:
    result = run(published, data, *FAST, *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def document(model: Published, data: Path) -> Any:
    return measured(model, data, "--codec", "int4/1", "--cut", "1", "--cut", "3", "--cut", "7")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 24), (1, 11, 40), (2, 5, 5)], ids=str)
def test_ssim_and_psnr_are_those_of_scikit_image(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    first = rng.random((4, *shape))
    second = (first + rng.normal(0, 0.2, first.shape)).clip(0, 1)
    small = min(shape[1:]) < 11
    gaussian: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5}
    options = {"win_size": min(7, min(shape[1:]))} if small else gaussian
    expected = [
        structural_similarity(a, b, channel_axis=0, data_range=1.0, use_sample_covariance=False, **options)
        for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(ssim(torch.from_numpy(first), torch.from_numpy(second)).numpy(), expected, atol=1e-9)
    ratios = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(psnr(first, second), ratios)


def test_correlation_is_pearsons_and_0_of_a_constant() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(3, 2, 1, 50)), rng.normal(size=(3, 2, 1, 50))
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(correlation(torch.from_numpy(first), torch.from_numpy(second)).numpy(), expected)
    assert not correlation(torch.zeros(1, 5), torch.rand(1, 5)).any()


def test_deeper_cuts_reveal_less_and_all_more_than_the_mean_input(document: Any) -> None:
    raw = {e["cut"]: e["likeness"] for e in document["entries"] if e["codec"] == "raw"}
    similarities = [raw[cut]["similarity"] for cut in ("1", "3", "7")]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] > 0.95
    assert similarities[-1] > document["baseline"]["similarity"] + 0.05
    assert raw["1"]["psnr"] > raw["7"]["psnr"] + 10


def test_reconstructions_of_an_early_cut_get_the_class_of_their_label(document: Any) -> None:
    first = document["entries"][0]["likeness"]
    assert document["original"]["top1"] > 0.8
    assert first["top1"] > document["original"]["top1"] - 0.05
    assert document["baseline"]["top1"] < 0.3


def test_the_stronger_attacker_counts_and_a_codec_may_reveal_less(document: Any) -> None:
    for each in document["entries"]:
        assert each["likeness"]["similarity"] >= each["linear"]["similarity"]
        assert each["attacker"] != "linear" or each["likeness"] == each["linear"]
        assert each["likeness"]["similarity"] >= document["baseline"]["similarity"]
    psnrs = {(e["cut"], e["codec"]): e["likeness"]["psnr"] for e in document["entries"]}
    assert psnrs["1", "int4/1"] < psnrs["1", "raw"]


def test_the_version_names_the_document_and_show_lists_its_cuts(model: Published, document: Any) -> None:
    resolved = model.registry.resolve(f"digits:{document['version']}")
    leak = read_leak(resolved.bundle, model.registry.blob)
    assert leak is not None
    assert leak.cuts() == ["1", "3", "7"]
    assert (leak.inputs.trained, leak.inputs.held_out) == (100, 100)
    arguments = ["show", f"digits:{document['version']}", "--registry", str(model.folder)]
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(shown.stdout)["leak"] == ["1", "3", "7"]
    assert "what leaks: measured at 1, 3, 7" in CliRunner().invoke(app, arguments).stdout


def test_the_same_seed_gives_the_same_document_and_earlier_cuts_stay(
    model: Published, data: Path, document: Any, tmp_path: Path
) -> None:
    picture = tmp_path / "leak.svg"
    again = measured(model, data, "--cut", "7", "--codec", "int4/1", "--picture", str(picture))
    assert again["entries"] == [entry for entry in document["entries"] if entry["cut"] == "7"]
    assert "What the cuts of digits reveal" in picture.read_text()
    resolved = model.registry.resolve("digits:prod")
    leak = LEAK.decode(model.registry.blob(resolved.bundle.leak))
    assert leak.cuts() == ["1", "3", "7"]


@pytest.mark.parametrize(
    ("into", "tensors"),
    [
        (Layout("x", SERIES, (3, 40), (3, 1, 40), False), lambda x: {"a": x[:, :, ::2], "b": x.sum(axis=1)}),
        (Layout("x", SERIES, (40, 3), (3, 1, 40), True), lambda x: {"a": 2 * x}),
        (
            Layout("x", VECTOR, (12,), (12, 1, 1), False),
            lambda x: {"a": x @ np.eye(12, dtype=np.float32)[:, ::2]},
        ),
        (
            Layout("x", IMAGE, (1, 9, 9), (1, 9, 9), False),
            lambda x: {"a": x.mean(axis=3), "b": x[:, :, ::2, ::2]},
        ),
    ],
    ids=["series", "series-of-channels-last", "vector", "two-tensors-of-an-image"],
)
def test_attackers_take_series_vectors_and_several_tensors(into: Layout, tensors: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Smooth inputs, of which a part tells about the rest.
    inputs = rng.normal(size=(64, 1, *into.full)).astype(np.float32).cumsum(axis=-1)
    targets = np.stack([into.small(x[0]) for x in inputs])
    np.testing.assert_array_equal(into.full_size(targets[0]), inputs[0, 0])
    files = FeatureFiles(tmp_path, into, count=64, trained=48)
    for x in inputs:
        files.add(tensors(x))
    crossings = files.crossings(targets / targets.std())

    def score(reconstructions: Any) -> float:
        held_out = torch.from_numpy(crossings.targets[48:])
        return float(correlation(held_out, torch.from_numpy(reconstructions)).mean())

    assert score(reconstruct_linearly(crossings, score)) > 0.7
    network = train_network(crossings, into.measure, TrainingBudget(steps=40))
    assert (network.steps, network.reconstruct(crossings, crossings.held_out).shape) == (40, (16, *into.shape))
    assert score(network.reconstruct(crossings, crossings.held_out)) > 0.3


def test_training_ends_when_its_time_is_over(tmp_path: Path) -> None:
    into = Layout("x", VECTOR, (4,), (4, 1, 1), False)
    files = FeatureFiles(tmp_path, into, count=40, trained=30)
    rows = np.random.default_rng(0).normal(size=(40, 1, 4)).astype(np.float32)
    for row in rows:
        files.add({"a": row})
    seconds = iter(range(100))
    network = train_network(
        files.crossings(rows.reshape(40, 4, 1, 1)),
        into.measure,
        TrainingBudget(steps=50, seconds=10.5),
        clock=lambda: float(next(seconds)),
    )
    assert network.steps == 10


def nan(images: Any) -> Any:
    images[20, 0, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("images", "arguments", "sentence"),
    [
        (nan, (), "digits.npz holds NaN or infinity in x, input 20"),
        (lambda images: images[:20], (), "20 inputs; 32 are the least"),
        (lambda images: images * 1e38, (), "are not finite"),
        (lambda images: images, ("--cut", "4"), "has no cut '4'"),
        (lambda images: images, ("--codec", "int5/1"), "'int5/1' is no codec of tensors"),
        (lambda images: images, ("--labels", "none.csv"), "none.csv cannot be read as labels"),
    ],
    ids=["nan", "few", "overflow", "cut", "codec", "labels"],
)
def test_data_and_options_that_cannot_be_used_are_refused(
    model: Published, tmp_path: Path, images: Any, arguments: tuple[str, ...], sentence: str
) -> None:
    np.savez(tmp_path / "digits.npz", x=images(digits()[0][:64].copy()))
    before = len(model.registry.versions("digits"))
    refused = run(model, tmp_path, "--steps", "1", "--inputs", "64", *arguments)
    assert refused.exit_code == 1
    assert sentence in json.loads(refused.stderr)["error"]
    assert len(model.registry.versions("digits")) == before


def test_a_model_without_a_cut_is_refused(model: Published, data: Path) -> None:
    whole = (model.bundle.segment(WHOLE),)
    uncut = structs.replace(model.bundle, name="uncut", cut_list=(), segment_list=whole, default_cuts=())
    model.registry.publish(uncut, {})
    refused = run(replace(model, bundle=uncut), data)
    assert refused.exit_code == 1
    assert json.loads(refused.stderr)["error"] == "uncut has no cut, so nothing crosses"


def test_inputs_that_are_all_the_same_are_refused(model: Published, tmp_path: Path) -> None:
    np.savez(tmp_path / "digits.npz", x=np.ones((40, 1, 8, 8), np.float32))
    refused = run(model, tmp_path)
    assert refused.exit_code == 1
    assert "are the same in x" in json.loads(refused.stderr)["error"]


def test_models_of_texts_are_refused(model: Published) -> None:
    embedding = TextEmbedding(Blob("sha256:" + "0" * 64, 1), "ids", "mask", "vector", 16, "mean")
    with pytest.raises(LearningError, match="digits takes texts; photos, series and vectors are reconstructed"):
        refuse_texts(structs.replace(model.bundle, embedding=embedding))
