"""Models of other frameworks: imported by the command, and compared with what their own framework computes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import ModelError
from isthmus_tools.graph import exporting, formats, tensorflow_export
from isthmus_tools.graph.exporting import ModelInputs
from support.cli import document, isthmus

torch = pytest.importorskip("torch")


def imported(folder: Path, model: object, *options: object) -> dict[str, Any]:
    return document(isthmus("import", model, *options, "--name", "m", "--registry", folder / "registry", "--json"))


def outputs(folder: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs of the imported model, run in the segments of its default cut."""
    tensors = []
    for name, array in inputs.items():
        np.save(folder / f"{name}.npy", array)
        tensors += ["--tensor", f"{name}={folder / name}.npy"]
    out, where = folder / "out.npz", ("--registry", folder / "registry")
    result = isthmus("infer", "--model", "m", *tensors, "--local", "--output", out, *where)
    assert result.exit_code == 0, result.output
    with np.load(out) as loaded:
        return [loaded[name] for name in loaded.files]


def refused(folder: Path, model: object, *options: object) -> dict[str, Any]:
    result = isthmus("import", model, *options, "--name", "m", "--registry", folder / "registry", "--json")
    assert result.exit_code == 1, result.output
    return json.loads(result.stderr)


class Branches(torch.nn.Module):
    """Which of its branches runs depends on its values: tracing would lose one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return torch.relu(self.layer(x)) + y
        return self.layer(x) - y


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_program_computes_what_torch_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)]
    model = torch.nn.Sequential(*layers).eval()
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 8, 8)), tmp_path / "m.pt")
    made = imported(tmp_path, tmp_path / "m.pt", "--shape", "input=batch,3,8,8")
    assert [(s["name"], s["shape"]) for s in made["inputs"]] == [("input", ["batch", 3, 8, 8])]
    assert len(made["segments"]) > 1
    x = np.random.default_rng(0).random((3, 3, 8, 8), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(outputs(tmp_path, input=x)[0], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("sign", [1, -1])
def test_a_scripted_program_keeps_its_branches(sign: int, tmp_path: Path) -> None:
    model = Branches().eval()
    torch.jit.save(torch.jit.script(model), tmp_path / "m.pt")
    imported(tmp_path, tmp_path / "m.pt", "--shape", "y=1x4", "--shape", "x=1x4")
    x, y = np.full((1, 4), sign, np.float32), np.full((1, 4), 2, np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    np.testing.assert_allclose(outputs(tmp_path, x=x, y=y)[0], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_no_program_or_lacks_inputs_is_told(tmp_path: Path) -> None:
    torch.save(Branches().state_dict(), tmp_path / "weights.pt")
    error = refused(tmp_path, tmp_path / "weights.pt", "--shape", "x=1x4")
    assert "is no TorchScript program" in error["error"]
    assert "state_dict" in error["hint"]
    torch.jit.save(torch.jit.script(Branches()), tmp_path / "m.pt")
    assert "needs an example of y" in refused(tmp_path, tmp_path / "m.pt", "--shape", "x=1x4")["error"]
    assert "its forward takes x, y" in refused(tmp_path, tmp_path / "m.pt", "--shape", "z=1x4")["error"]


DIGITS = np.random.default_rng(0).random((60, 8))
LETTERS = np.array(["a", "b", "c"])[np.arange(60) % 3]


def network() -> Any:
    """A fitted pipeline: a scaler and a network with two hidden layers."""
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = MLPClassifier((16, 8), solver="lbfgs", max_iter=500, random_state=0)
    return make_pipeline(StandardScaler(), classifier).fit(DIGITS, LETTERS)


@pytest.mark.parametrize("way", ["file", "factory"])
@pytest.mark.filterwarnings("ignore")
def test_a_classifiers_probabilities_are_scikit_learns(way: str, tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx")
    skops = pytest.importorskip("skops.io")
    pipeline = network()
    skops.dump(pipeline, tmp_path / "digits.skops")
    made = imported(tmp_path, tmp_path / "digits.skops" if way == "file" else f"{__name__}:network")
    assert [(s["name"], s["shape"]) for s in made["inputs"]] == [("input", ["batch", 8])]
    assert len(made["segments"]) > 1
    x = np.random.default_rng(1).random((5, 8), np.float32)
    np.testing.assert_allclose(outputs(tmp_path, input=x)[0], pipeline.predict_proba(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_regressors_numbers_are_scikit_learns(tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx")
    skops = pytest.importorskip("skops.io")
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), Ridge()).fit(DIGITS, DIGITS.sum(axis=1))
    skops.dump(model, tmp_path / "sum.skops")
    imported(tmp_path, tmp_path / "sum.skops")
    x = np.random.default_rng(1).random((5, 8), np.float32)
    np.testing.assert_allclose(outputs(tmp_path, input=x)[0].ravel(), model.predict(x), atol=1e-4)


class Unknown:
    """A type that skops does not know."""


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_unknown_types_is_not_built(tmp_path: Path) -> None:
    skops = pytest.importorskip("skops.io")
    skops.dump({"a": Unknown()}, tmp_path / "m.skops")
    error = refused(tmp_path, tmp_path / "m.skops")
    assert "Unknown" in error["error"]
    assert "not known to be safe" in error["error"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("m.pkl", "skops.io.dump"),
        ("m.joblib", "skops.io.dump"),
        ("m.h5", "model.save('model.keras')"),
        ("m.safetensors", "the folder with config.json"),
    ],
)
def test_a_format_that_is_not_taken_says_what_is(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    error = refused(tmp_path, tmp_path / name)
    assert "not imported" in error["error"]
    assert hint in error["hint"]
    assert "holds neither" in refused(tmp_path, tmp_path)["error"]


@pytest.mark.parametrize(
    ("suffix", "package", "extra"),
    [
        (".keras", "keras", "tensorflow"),
        (".skops", "skops.io", "sklearn"),
        (".pt", "torch", "torch"),
        ("saved_model.pb", "tensorflow", "tensorflow"),
        ("config.json", "transformers", "transformers"),
    ],
)
def test_without_its_framework_a_model_says_what_to_install(
    suffix: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(tensorflow_export.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    path = tmp_path / f"m{suffix}"
    if not suffix.startswith("."):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / suffix).write_bytes(b"")
        path = tmp_path / "folder"
    chosen = formats.export_of(str(path))
    assert chosen is not None
    with pytest.raises(ModelError) as raised:
        chosen[1](str(path), tmp_path / "out.onnx", ModelInputs())
    assert raised.value.hint == exporting.install(extra)


needs_tensorflow = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("tensorflow", "tf2onnx", "keras")),
    reason='pip install "isthmus_tools[tensorflow]"',
)
KERAS = """
import sys, keras, numpy
keras.utils.set_random_seed(0)
layers = [keras.layers.Input((8, 8, 3), name="photo"), keras.layers.Conv2D(4, 3, activation="relu"),
          keras.layers.Flatten(), keras.layers.Dense(5)]
model = keras.Sequential(layers)
model.save("m.keras")
model.export("saved", format="tf_saved_model", verbose=False)
numpy.save("x.npy", x := numpy.random.default_rng(0).random((3, 8, 8, 3), numpy.float32))
numpy.save("y.npy", model(x).numpy())
keras.Sequential([keras.layers.Input((4,)), keras.layers.Lambda(lambda x: x + 1)]).save("lambda.keras")
"""


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Keras file, a SavedModel, an input and TensorFlow's output, of a process of its own."""
    import subprocess

    folder = tmp_path_factory.mktemp("keras")
    done = subprocess.run([sys.executable, "-c", KERAS], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@needs_tensorflow
@pytest.mark.parametrize("file", ["m.keras", "saved"])
def test_a_model_of_tensorflow_computes_what_tensorflow_does(file: str, keras_files: Path, tmp_path: Path) -> None:
    made = imported(tmp_path, keras_files / file)
    assert [(s["name"], s["shape"][1:]) for s in made["inputs"]] == [("photo", [8, 8, 3])]
    assert len(made["segments"]) > 1
    found = outputs(tmp_path, photo=np.load(keras_files / "x.npy"))[0]
    np.testing.assert_allclose(found, np.load(keras_files / "y.npy"), atol=1e-5)


@needs_tensorflow
def test_a_keras_file_with_code_is_refused(keras_files: Path, tmp_path: Path) -> None:
    assert "Lambda" in refused(tmp_path, keras_files / "lambda.keras")["error"]


def encoder(kind: str, folder: Path) -> Any:
    """An encoder of random weights, saved in Hugging Face's layout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50))
    elif kind == "classifier":
        config = transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=50)
        model = transformers.DistilBertForSequenceClassification(config)
    elif kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4))
    else:
        config = transformers.MistralConfig(**sizes, num_key_value_heads=2, vocab_size=50)
        model = transformers.MistralForCausalLM(config)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bert", "classifier"])
def test_an_encoder_of_text_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    model = encoder(kind, tmp_path / "encoder")
    shapes = ("--shape", "input_ids=1x16", "--shape", "attention_mask=1x16")
    made = imported(tmp_path, tmp_path / "encoder", *shapes)
    assert [(s["name"], s["shape"]) for s in made["inputs"]] == [
        ("input_ids", ["batch", "tokens"]),
        ("attention_mask", ["batch", "tokens"]),
    ]
    ids = np.random.default_rng(0).integers(0, 50, (3, 9))
    mask = np.array([[1] * 9, [1] * 5 + [0] * 4, [1] * 7 + [0] * 2], np.int64)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), torch.from_numpy(mask), return_dict=False)
    for found, one in zip(outputs(tmp_path, input_ids=ids, attention_mask=mask), expected, strict=True):
        np.testing.assert_allclose(found, one.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_of_images_computes_what_transformers_does(tmp_path: Path) -> None:
    model = encoder("vit", tmp_path / "encoder")
    imported(tmp_path, tmp_path / "encoder")
    pixels = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels), return_dict=False)
    for found, one in zip(outputs(tmp_path, pixel_values=pixels), expected, strict=True):
        np.testing.assert_allclose(found, one.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_generator_and_code_in_the_folder_are_refused(tmp_path: Path) -> None:
    encoder("mistral", tmp_path / "generator")
    assert "generates in steps" in refused(tmp_path, tmp_path / "generator")["error"]
    config = json.loads((tmp_path / "generator" / "config.json").read_text())
    custom = {"architectures": ["Custom"], "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Custom"}}
    (tmp_path / "generator" / "config.json").write_text(json.dumps(config | custom))
    (tmp_path / "generator" / "code.py").write_text("open('executed', 'w')")
    assert "which transformers has not" in refused(tmp_path, tmp_path / "generator")["error"]
    assert not Path("executed").exists()
