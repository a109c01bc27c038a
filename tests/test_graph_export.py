"""Torch models become ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from isthmus.errors import ModelError
from isthmus_tools.graph import build, open_model, torch_export
from isthmus_tools.zoo import models as zoo
from support.models import REAL, photos
from support.segments import run_partition, run_whole

torch = pytest.importorskip("torch")


def factory() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def not_a_module() -> int:
    return 1


def test_a_factory_is_exported_in_eval_mode(tmp_path: Path) -> None:
    path = torch_export.export(f"{__name__}:factory", tmp_path / "m.onnx", shapes=[(1, 8)], input_names=["x"])
    assert "Dropout" not in {n.op_type for n in onnx.load(path).graph.node}
    x = np.linspace(0, 1, 8, dtype=np.float32)[None]
    with torch.no_grad():
        expected = factory().eval()(torch.from_numpy(x)).numpy()
    (got,) = run_whole(path, [{"x": x}])[0].values()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_saved_program_is_exported(tmp_path: Path) -> None:
    program = torch.export.export(factory().eval(), (torch.zeros(1, 8),))
    torch.export.save(program, tmp_path / "m.pt2")
    path = torch_export.export(str(tmp_path / "m.pt2"), tmp_path / "m.onnx")
    assert len(open_model(path).nodes) > 1


def test_free_dimensions_stay_free(tmp_path: Path) -> None:
    path = torch_export.export(
        factory, tmp_path / "m.onnx", shapes=[(2, 8)], input_names=["x"], dynamic={"x": {0: "batch"}}
    )
    bundle, files = build(path, "m", tmp_path / "out")
    assert bundle.inputs[0].shape == ("batch", 8)
    x = np.ones((5, 8), np.float32)
    (got,) = run_partition(bundle, files, bundle.default_cuts, [{"x": x}])[0].values()
    assert got.shape == (5, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:factory", "no model factory"),
        ("test_graph_export:no_such", "no model factory"),
        ("test_graph_export:not_a_module", "not an nn.Module"),
    ],
)
def test_a_spec_that_gives_no_model_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        torch_export.export(spec, tmp_path / "m.onnx", shapes=[(1, 8)])


@pytest.mark.parametrize("content", [None, b"no program"])
def test_a_file_that_is_no_program_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "m.pt2").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.pt2 cannot be read"):
        torch_export.export(str(tmp_path / "m.pt2"), tmp_path / "m.onnx")


def test_a_module_without_an_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs an example"):
        torch_export.export(factory, tmp_path / "m.onnx")


def test_an_example_that_does_not_fit_the_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="torch cannot export"):
        torch_export.export(factory, tmp_path / "m.onnx", shapes=[(1, 9)])


@pytest.mark.parametrize(
    ("spec", "expected"), [("a.b:c", True), ("m.pt2", True), ("m.onnx", False), ("dir/m.onnx", False)]
)
def test_a_torch_spec_is_told_from_a_file(spec: str, expected: bool) -> None:
    assert torch_export.is_torch_spec(spec) is expected


def test_the_ready_classifier_knows_a_cat_from_a_coffee(tmp_path: Path) -> None:
    entry = zoo.zoo_model("efficientnet-lite0")
    real = REAL[entry.name]
    bundle, files = build(real.path(), entry.name, tmp_path / "out", **entry.arguments())
    labels = entry.labels() if entry.labels else []
    top = [r["logits"].argmax() for r in run_partition(bundle, files, bundle.default_cuts, real.inputs())]
    assert len(photos()) == len(top)
    assert [labels[i] for i in top[1:3]] == ["espresso", "missile"]
    assert "cat" in labels[top[0]]
    assert bundle.labels is not None


def test_an_unknown_ready_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no ready model"):
        zoo.zoo_model("resnet-1")
