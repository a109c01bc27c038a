"""Torch models: exported by name and by position, imported by the command, and compared with torch."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from isthmus.errors import ModelError
from isthmus_tools.graph import build, open_model, torch_export
from isthmus_tools.graph.exporting import ModelInputs
from isthmus_tools.graph.inputs import bind_shapes
from isthmus_tools.zoo import models as zoo
from support.cli import document, isthmus
from support.models import REAL, photos
from support.segments import run_partition, run_whole

torch = pytest.importorskip("torch")

IDS = np.arange(8, dtype=np.int64)[None] % 10


class Tokens(torch.nn.Module):
    """Scores of three classes for each of ten tokens; `mask` weighs them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 3)
        self.between: Any = torch.nn.Identity()

    def forward(self, ids: Any, mask: Any, extra: Any = None) -> Any:
        scores = self.head(self.between(self.embed(ids) * mask[..., None]))
        return scores if extra is None else scores + extra


class Mixed(Tokens):
    """With a layer that torch exports for one sequence alone, where its example is one."""

    def __init__(self) -> None:
        super().__init__()
        self.between = torch.nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)


class Apart(torch.nn.Module):
    """Two float inputs of one shape, which must not be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, a: Any, b: Any) -> Any:
        return self.layer(a) * 100 - b


class Fixed(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.relu(x.reshape(2, 8)) * 2


def imported(folder: Path, *options: object) -> dict[str, Any]:
    return document(isthmus("import", *options, "--registry", folder / "registry", "--json"))


def outputs(folder: Path, model: str, **inputs: np.ndarray) -> np.ndarray:
    tensors = []
    for name, array in inputs.items():
        np.save(folder / f"{name}.npy", array)
        tensors += ["--tensor", f"{name}={folder / name}.npy"]
    out = folder / "out.npz"
    result = isthmus("infer", "--model", model, *tensors, "--local", "--output", out, "--registry", folder / "registry")
    assert result.exit_code == 0, result.output
    with np.load(out) as loaded:
        return loaded[loaded.files[0]]


def refused(*options: object) -> dict[str, Any]:
    result = isthmus("import", *options, "--json")
    assert result.exit_code == 1, result.output
    return json.loads(result.stderr)


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npz"
    np.savez(path, ids=IDS, mask=np.ones((1, 8), np.float32))
    return path


def test_shapes_bind_to_forwards_parameters_in_any_order(tmp_path: Path) -> None:
    imported(tmp_path, f"{__name__}:Apart", "--shape", "b=1x8", "--shape", "a=1x8")
    a, b = np.ones((1, 8), np.float32), np.full((1, 8), 3, np.float32)
    of_b = outputs(tmp_path, "apart", a=a, b=b) - outputs(tmp_path, "apart", a=a, b=b * 0)
    assert np.allclose(of_b, -3, atol=1e-4)


class Nameless(torch.nn.Module):
    def forward(self, *values: Any) -> Any:
        return values[0] + values[1]


def failing() -> Any:
    raise RuntimeError("no weights here")


def test_a_factory_that_fails_and_inputs_without_names_are_told(tmp_path: Path) -> None:
    given = ("--shape", "a=1x8", "--registry", tmp_path)
    assert refused(f"{__name__}:failing", *given)["error"] == f"{__name__}:failing raised RuntimeError: no weights here"
    error = refused(f"{__name__}:Nameless", *given)
    assert "has no input a; its forward takes none by name" in error["error"]
    assert "a parameter with a name" in error["hint"]


@pytest.mark.parametrize("code", ["sys.exit()", "def make(): sys.exit(0)", "def make(): return Ends()"])
def test_a_models_code_that_exits_does_not_end_the_command(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = "class Ends(torch.nn.Module):\n    def forward(self, x): sys.exit(0)\n"
    (tmp_path / "quits.py").write_text(f"import sys, torch\n{ends}{code}\n")
    monkeypatch.chdir(tmp_path)
    error = refused("quits:make", "--shape", "x=1x8", "--registry", tmp_path / "registry")
    # Not by monkeypatch, which would put it back: the next code, or another test's module of the name, is read anew.
    sys.modules.pop("quits", None)
    assert error["error"].startswith("quits:make called sys.exit(")


def test_a_module_that_fails_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails.py").write_text("raise RuntimeError('no weights here')\n")
    monkeypatch.chdir(tmp_path)
    error = refused("fails:make", "--registry", tmp_path / "registry")
    assert (error["error"], error["hint"]) == ("fails raised RuntimeError: no weights here", "")


def test_names_that_forward_does_not_have_are_refused_with_those_it_has(tmp_path: Path) -> None:
    error = refused(f"{__name__}:Apart", "--shape", "x=1x8", "--registry", tmp_path)
    assert "has no input x; its forward takes a, b" in error["error"]
    error = refused(f"{__name__}:Apart", "--shape", "a=1x8", "--registry", tmp_path)
    assert "needs an example of b" in error["error"]
    assert "--shape b=1x3x224x224" in error["hint"]


def test_a_token_model_is_imported_with_its_examples_and_named_dimensions(tmp_path: Path, examples: Path) -> None:
    free = ("--shape", "ids=batch,seq", "--shape", "mask=batch,seq")
    made = imported(tmp_path, f"{__name__}:Mixed", "--example", examples, *free)
    assert [(s["name"], s["dtype"], s["shape"]) for s in made["inputs"]] == [
        ("ids", "int64", ["batch", "seq"]),
        ("mask", "float32", ["batch", "seq"]),
    ]
    ids, mask = np.tile(IDS, (3, 2)), np.linspace(0, 1, 48, dtype=np.float32).reshape(3, 16)
    with torch.no_grad():
        expected = Mixed().eval()(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    assert np.allclose(outputs(tmp_path, "mixed", ids=ids, mask=mask), expected, atol=1e-5)


def test_what_is_fixed_is_said(tmp_path: Path, examples: Path) -> None:
    given = ("--shape", "extra=1x8x3", "--example", examples, "--registry", tmp_path / "registry")
    result = isthmus("import", f"{__name__}:Tokens", *given)
    assert result.exit_code == 0, result.output
    takes = "takes ids int64[1, 8], mask float32[1, 8], extra float32[1, 8, 3]; all sizes are fixed"
    assert takes in result.stdout.replace("\n", " ")
    assert "--shape ids=batch,8" in result.stdout


def test_the_cause_of_a_failed_export_comes_first_and_without_escape_sequences(tmp_path: Path) -> None:
    error = refused(
        f"{__name__}:Tokens", "--shape", "ids=1x8", "--shape", "mask=1x8", "--registry", tmp_path / "registry"
    )
    assert "RuntimeError: Expected tensor for argument #1 'indices'" in error["error"]
    assert "\x1b" not in error["error"]
    assert "--example ids=FILE.npy" in error["hint"]


def test_a_dimension_that_the_model_fixes_is_not_taken_for_free(tmp_path: Path) -> None:
    error = refused(f"{__name__}:Fixed", "--shape", "x=batch:2,8", "--registry", tmp_path / "registry")
    assert "batch" in error["error"]


def test_a_programs_own_inputs_are_checked_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seq = torch.export.Dim("seq", min=2)
    program = torch.export.export(
        Tokens().eval(), (torch.from_numpy(IDS), torch.ones(1, 8)), dynamic_shapes=({1: seq}, {1: seq})
    )
    torch.export.save(program, tmp_path / "m.pt2")
    where = (tmp_path / "m.pt2", "--registry", tmp_path / "registry")
    given = {"mask": np.ones((1, 8), np.float32), "ids": IDS}
    np.savez(tmp_path / "wrong.npz", **{**given, "ids": IDS.astype(np.int32)})
    exported = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("the export was begun"))
    assert "nothing binds its free dimensions" in refused(*where)["error"]
    assert "no input 'x'; it has ids, mask" in refused(*where, "--shape", "x=1x8")["error"]
    assert "takes int64, and its example holds int32" in refused(*where, "--example", tmp_path / "wrong.npz")["error"]
    monkeypatch.setattr(torch.onnx, "export", exported)
    made = imported(tmp_path, tmp_path / "m.pt2", "--shape", "mask=1x8", "--shape", "ids=1x8")
    assert [(s["name"], s["dtype"]) for s in made["inputs"]] == [("ids", "int64"), ("mask", "float32")]


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cnn_in_this_folder.py").write_text("def make():\n    return 'no module, and so no export'\n")
    monkeypatch.chdir(tmp_path)
    before = [p for p in sys.path if p not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", before)
    error = refused("cnn_in_this_folder:make", "--shape", "input=batch,4", "--registry", tmp_path / "registry")
    assert "returned a str, not an nn.Module" in error["error"]
    assert sys.path == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x=contextx8"], "an x may belong to a name"),
        (["=1x8"], "--shape is '=1x8'"),
        (["1x3x224x224"], "it is NAME=1x3x320x640"),
        (["x=batch,seq"], "dimension seq of x has no size"),
        (["x=n:4,8", "y=n:5"], "n is 4 and 5"),
        (["x=-1x3"], "--shape is 'x=-1x3'"),
    ],
)
def test_a_shape_that_cannot_be_meant_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    shapes = [part for option in options for part in ("--shape", option)]
    assert message in refused(f"{__name__}:Fixed", *shapes, "--registry", tmp_path)["error"]


def test_a_dimension_named_free_that_a_file_fixes_is_refused(tmp_path: Path) -> None:
    from support.bundles import photos_model

    path = photos_model(tmp_path / "m.onnx")
    where = ("--registry", tmp_path / "registry")
    assert "batch of x is not free: axis 0 is 1" in refused(path, "--shape", "x=batch,3,8,8", *where)["error"]


def test_an_example_of_another_shape_than_the_given_one_is_refused() -> None:
    inputs = {"x": ("float32", ("n", 4))}
    assert bind_shapes(inputs, {}, {"x": np.ones((3, 4), np.float32)}) == {"x": (3, 4)}
    with pytest.raises(ModelError, match="takes float32, and its example holds float64"):
        bind_shapes(inputs, {}, {"x": np.ones((3, 4))})
    with pytest.raises(ModelError, match="has the shape 3x4, and 2x4 was given"):
        bind_shapes(inputs, {"x": (2, 4)}, {"x": np.ones((3, 4), np.float32)})


def test_an_exported_models_weights_leave_the_memory_and_bfloat16_is_taken(tmp_path: Path) -> None:
    weights = []

    def make() -> Any:
        model = torch.nn.Linear(4, 4).to(torch.bfloat16)
        weights.append(weakref.ref(model.weight))
        return model

    x = np.ones((1, 4), ml_dtypes.bfloat16)
    path = torch_export.export_named(make, tmp_path / "m.onnx", ModelInputs(examples={"input": x}))
    gc.collect()
    assert weights[0]() is None
    assert open_model(path).specs["input"].dtype == "bfloat16"


def test_what_the_registry_refuses_is_told_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("the export was begun"))
    given = (f"{__name__}:Apart", "--shape", "a=1x8", "--shape", "b=1x8")
    assert "'7' cannot be an alias" in refused(*given, "--alias", "7", "--registry", tmp_path)["error"]
    assert "cannot name a model" in refused(*given, "--name", "Not One", "--registry", tmp_path)["error"]
    (tmp_path / "models" / "apart" / "versions").mkdir(parents=True)
    (tmp_path / "models" / "apart" / "versions" / "1").write_text("no digest")
    assert refused(*given, "--registry", tmp_path)["type"] == "Corrupt"


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
        ("test_torch_export:no_such", "no model factory"),
        ("test_torch_export:not_a_module", "not an nn.Module"),
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
