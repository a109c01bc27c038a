"""Explanations of real models: hiding the input is captum's occlusion, and hiding at a cut comes near to that."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.arrays import Array
from isthmus.pipeline.occlusion import Occlusion
from isthmus.processing.image import model_input
from isthmus.registry import FolderStore, Registry
from isthmus_tools.graph import build
from isthmus_tools.zoo import models as zoo
from isthmus_tools.zoo.photos import sample_photos
from support import exports
from support.bundles import Published, publish
from support.explained import explained, local
from support.models import REAL, efficientnet_lite0

CUTS = ("31", "65")
# Few cells, since torch runs the model for each; pixels of a cell's side.
GRID = 4
SIDE = 224 // GRID


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """EfficientNet-Lite0, cut in the middle and near its end."""
    folder = tmp_path_factory.mktemp("model")
    onnx, arguments = efficientnet_lite0(), zoo.zoo_model("efficientnet-lite0").arguments()
    partitions = [[], *([cut] for cut in CUTS)]
    bundle, files = build(onnx, "efficientnet-lite0", folder / "built", partitions=partitions, **arguments)
    registry = Registry(FolderStore(folder / "registry"))
    version = registry.publish(bundle, files)
    return Published(registry, folder / "registry", bundle, version.version, version.digest, onnx, {})


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def inputs_of(model: Published, path: Path) -> dict[str, Array]:
    return model_input(model.bundle, path.read_bytes())


def captums(image: Array, index: int, window: int) -> Array:
    """captum's drops of the class's probability, a cell each, with windows of that many cells."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    net, border = torch_model(), (window - 1) * SIDE

    def probability(padded: Any) -> Any:
        inner = padded[:, :, border : 224 + border, border : 224 + border]
        return torch.softmax(net(inner).double(), dim=1)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other tests run
    with torch.no_grad():
        # Windows begin before the picture and end behind it, as ours do.
        padded = torch.nn.functional.pad(torch.from_numpy(image), (border,) * 4)
        drops = attr.Occlusion(probability).attribute(
            padded, (3, window * SIDE, window * SIDE), (3, SIDE, SIDE), baselines=0, target=index
        )
    torch.set_num_threads(threads)
    inner = drops[0, 0, border : 224 + border, border : 224 + border].numpy()
    return np.asarray(inner[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE])


@cache
def torch_model() -> Any:
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    return exports.efficientnet_lite0().eval()


@pytest.mark.parametrize("window", [1, 2])
def test_hiding_the_input_is_captums_occlusion(model: Published, cached: Path, window: int) -> None:
    inputs = inputs_of(model, sample_photos()[1])
    result = explained(local(model, cached), inputs, grid=GRID, window=window)
    assert result.windows == (GRID + window - 1) ** 2
    expected = captums(inputs["image"], result.index, window)
    # Probabilities of onnxruntime and of torch differ by some 1e-6.
    np.testing.assert_allclose(result.drops, expected, atol=2e-5)
    assert np.abs(expected).max() > 0.05


def test_a_png_is_told_by_its_first_and_last_bytes(cached: Path) -> None:
    real = REAL["magika"]
    published = publish(cached / "magika", real.path(), {}, partitions=[[]], **real.open_arguments())
    result = explained(local(published, cached), real.inputs()[2], grid=64, hidden_id=256)
    # Of 64 parts of 32 bytes; the batch is free, and so all of them are one call.
    assert set(np.argsort(-result.drops)[:2].tolist()) == {0, 63}
    assert len(result.runs) == 1


def rank_correlation(one: Array, other: Array) -> float:
    """Spearman's: the correlation of the ranks."""
    ranks = [np.argsort(np.argsort(each.ravel())) for each in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_hiding_at_a_cut_comes_near_to_hiding_the_input(model: Published, cached: Path) -> None:
    routes = {cut: local(model, cached, *([cut] if cut else [])) for cut in ("", *CUTS)}
    found: dict[str, list[float]] = {cut: [] for cut in CUTS}
    for path in sample_photos():
        inputs = inputs_of(model, path)
        maps: dict[str, Occlusion] = {cut: explained(route, inputs) for cut, route in routes.items()}
        for cut in CUTS:
            found[cut].append(rank_correlation(maps[cut].drops, maps[""].drops))
    # docs/how-to/why.md has the figures.
    assert all(np.mean(values) > 0.6 for values in found.values())
