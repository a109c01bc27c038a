"""`isthmus train`: a whole run on digits, kill and resume, stages, promotion, labels of the model in service."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.registry import Resolved, open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases.local_model import LocalModel
from support.cli import document, isthmus, refusal
from support.patience import until
from support.training import digits

pytest.importorskip("torch")

CONFIG = """
name = "digits"
folder = "FOLDER"
[data]
kind = "table"
[[data.sources]]
kind = "files"
path = "DATA"
[network]
width = 32
[training]
rate = 0.01
epochs = 6
checkpoint_every = 5
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an .npz file of labelled digits."""
    folder = tmp_path_factory.mktemp("digits")
    all_digits = digits(600, 0, 0)
    np.savez(folder / "digits.npz", pixels=all_digits.train.inputs, labels=all_digits.train.labels)
    return folder


def configured(folder: Path, data: Path, text: str = CONFIG, **replaced: str) -> Path:
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "train.toml"
    path.write_text(text.replace("DATA", str(data)).replace("FOLDER", str(folder / "run")))
    return path


def run(config: Path, *options: str) -> Any:
    return document(isthmus("train", config, *options, "--registry", config.parent / "registry", "--json"))


def refused(config: Path, *options: str) -> Any:
    return refusal(isthmus("train", config, *options, "--registry", config.parent / "registry", "--json"))


def in_registry(config: Path, reference: str) -> Resolved:
    return open_registry(RegistrySettings(registry=str(config.parent / "registry"))).resolve(reference)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Any]:
    config = configured(tmp_path_factory.mktemp("trained"), data)
    return config, run(config)


def test_a_run_publishes_what_it_evaluated(trained: tuple[Path, Any], data: Path) -> None:
    config, result = trained
    assert result["promoted"]
    assert result["evaluation"]["accuracy"]["value"] > 0.8
    folder = Path(result["folder"])
    bundle = in_registry(config, "digits:prod").bundle
    assert bundle.default_cuts == ("relu_1",)
    accuracy = bundle.source["training"]["evaluation"]["accuracy"][0]
    assert accuracy == pytest.approx(result["evaluation"]["accuracy"]["value"], abs=1e-4)
    # Raw inputs, over the cut, as a user gives them.
    held_out = np.load(folder / "data" / "test.npz")
    settings = RegistrySettings(registry=str(config.parent / "registry"), cache_dir=str(config.parent / "cache"))
    outputs = LocalModel("digits", settings).run({"features": held_out["features"][:, 0]}).outputs
    assert (outputs["scores"].argmax(1) == held_out["labels"]).mean() == pytest.approx(accuracy, abs=1e-4)
    assert held_out["features"].max() == 16
    assert (folder / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    confusion = json.loads((folder / "evaluation.json").read_text())["confusion"]
    assert np.sum(confusion) == len(held_out["labels"])


def test_equal_weights_are_published_without_promotion(trained: tuple[Path, Any]) -> None:
    config, first = trained
    result = run(config, "--stage", "publish")
    assert not result["promoted"]
    assert "not surely above" in result["unpromoted"]
    assert result["comparison"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert in_registry(config, "digits:prod").version == first["version"]
    forced = run(config, "--stage", "publish", "--promote", "always")
    assert forced["promoted"]
    assert forced["training"] is None


def test_a_better_version_is_promoted(tmp_path: Path, data: Path) -> None:
    # A network that has hardly begun, then one that learned.
    poor = run(configured(tmp_path, data, epochs="epochs = 1 #", **{"rate = 0.01": "rate = 1e-5"}))
    assert poor["promoted"]
    better = run(configured(tmp_path, data))
    assert better["promoted"], better["unpromoted"]
    assert better["comparison"]["difference"]["low"] > 0.2
    # The same groups are held out in both.
    assert poor["data"]["groups"] == better["data"]["groups"]
    source = in_registry(tmp_path / "train.toml", "digits:prod").bundle.source
    assert source["training"]["comparison"]["is_better"]


def test_a_killed_run_goes_on_to_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, data: Path, trained: tuple[Path, Any]
) -> None:
    config = configured(tmp_path, data)
    arguments = ["train", str(config), "--registry", str(tmp_path / "registry"), "--stage"]
    run(config, "--stage", "clean")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments, "train"], cwd=tmp_path, env=os.environ, stderr=subprocess.PIPE
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    assert until(lambda: len(list(checkpoints.glob("step-*"))) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error
    last = max(int(path.name[5:17]) for path in checkpoints.glob("step-*"))
    assert "--fresh starts anew" in refused(config)["hint"]
    resumed = run(config, "--resume", "--stage", "train")
    assert resumed["training"]["resumed_at_step"] == last
    whole = trained[1]
    assert resumed["training"]["history"] == whole["training"]["history"]
    assert resumed["training"]["steps"] == whole["training"]["steps"]
    model, other = (Path(each["folder"]) / "model.onnx" for each in (resumed, whole))
    assert weights(model) == weights(other)


# After each fifth step the file is there, and there is time to kill the process.
SLOW = """
import time
from isthmus_tools.learning.training import trainer
step = trainer.Trainer.step
trainer.Trainer.step = lambda self, rows: (time.sleep(0.05), step(self, rows))[1]
from isthmus_tools.cli import main
main()
"""


def weights(path: Path) -> dict[str, bytes]:
    onnx = pytest.importorskip("onnx")
    return {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in onnx.load(path).graph.initializer}


def test_resuming_a_finished_run_trains_nothing_again(trained: tuple[Path, Any]) -> None:
    config, first = trained
    stamp = (Path(first["folder"]) / "model.onnx").stat().st_mtime_ns
    assert run(config, "--resume", "--stage", "train")["training"] == first["training"]
    assert (Path(first["folder"]) / "model.onnx").stat().st_mtime_ns == stamp


def test_labels_that_do_not_match_the_model_in_service_are_refused_before_training(
    trained: tuple[Path, Any], tmp_path: Path, data: Path
) -> None:
    config, _ = trained
    other = tmp_path / "data"
    other.mkdir()
    with np.load(data / "digits.npz") as arrays:
        few = arrays["labels"] < 4
        np.savez(other / "d.npz", pixels=arrays["pixels"][few], labels=arrays["labels"][few])
    second = configured(tmp_path, other)
    options = ("--registry", config.parent / "registry", "--json")
    failure = refusal(isthmus("train", second, *options))
    assert failure["type"] == "LearningError"
    assert "the data has the labels 0, 1, 2, 3, and version" in failure["error"]
    assert "--promote always" in failure["hint"]
    assert not (tmp_path / "run" / "training.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume", "--fresh"), "give one"),
        (("--stage", "deploy"), "there is no stage 'deploy'; stages are collect, clean, train, evaluate, publish"),
        (("--stage", "train"), "holds no prepared data"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, data: Path
) -> None:
    assert message in refused(configured(tmp_path, data), *options)["error"]


def test_a_machine_without_torch_is_told_before_anything_is_collected(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    config = configured(tmp_path, data)
    assert refused(config)["hint"] == 'pip install "isthmus_tools[torch]"'
    assert not (tmp_path / "run").exists()
    assert run(config, "--stage", "clean")["data"]["collected"] == 600


def test_a_network_of_ones_own_is_trained_and_a_wrong_one_is_named(tmp_path: Path, data: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def linear(shape, classes):\n    return torch.nn.Linear(shape[0], classes)\n"
        "def wrong(shape, classes):\n    return torch.nn.Linear(shape[0], 3)\n"
        "def none(shape, classes):\n    return 1\n"
    )
    for name, message in (("wrong", "maps a batch of 2 to (2, 3)"), ("none", "returned a int"), ("no", "no function")):
        config = configured(tmp_path, data, **{"width = 32": f'name = "own.py:{name}"'})
        assert message in refused(config, "--fresh")["error"]
    linear = configured(tmp_path, data, **{"width = 32": 'name = "own.py:linear"'})
    run(linear, "--fresh", "--stage", "clean")
    result = run(linear, "--stage", "train")
    assert result["training"]["parameters"] == 650
    assert result["training"]["history"][-1]["accuracy"] > 0.7


def test_people_see_what_was_dropped_and_why_nothing_was_promoted(tmp_path: Path, data: Path) -> None:
    with np.load(data / "digits.npz") as arrays:
        pixels, labels = arrays["pixels"].copy(), arrays["labels"]
    pixels[0] = np.nan
    own = tmp_path / "data"
    own.mkdir()
    np.savez(own / "d.npz", pixels=pixels, labels=labels)
    config = configured(tmp_path, own, epochs="epochs = 1 #")
    shown = isthmus("train", config, "--registry", tmp_path / "registry", "--promote", "never").output
    assert "600 samples, of which" in shown
    assert "dropped: missing values: 1" in shown
    assert "ignored: a channel that is constant in training" in shown
    assert "it is not promoted: promotion is off" in shown
    assert "the most frequent class alone would give" in shown
