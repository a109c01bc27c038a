"""The models of the benchmarks and inputs for them."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, STATE, Report
from PIL import Image

from isthmus.arrays import Array
from isthmus.artifacts.fidelity import measure_for, read_fidelity
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import Missing
from isthmus.registry import Registry, Resolved, open_cache, open_registry
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus.wire.frame import Frame, encode
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.calibration.calibrate import CalibrationSpec, calibrate
from isthmus_tools.calibration.inputs import open_source
from isthmus_tools.graph import build, cuts, open_model, torch_export
from isthmus_tools.usecases.local_model import LocalModel
from isthmus_tools.usecases.model_import import ImportRequest
from isthmus_tools.usecases.model_import import import_model as tools_import
from isthmus_tools.zoo import models as zoo
from isthmus_tools.zoo.photos import sample_photos, varied_photos
from support import models as tested

MODEL = "efficientnet-lite0"
REGISTRY = ROOT / ".isthmus" / "registry"


def import_model() -> None:
    """Import the model if the registry lacks it, in half a minute."""
    with contextlib.redirect_stdout(sys.stderr):
        tools_import(ImportRequest(model=MODEL, registry=RegistrySettings(registry=str(REGISTRY)), if_absent=True))


def resolved() -> Resolved:
    """The model's version in service."""
    return open_registry(RegistrySettings(registry=str(REGISTRY))).resolve(MODEL)


def whole() -> LocalModel:
    """The uncut model in this process, on a single thread."""
    return LocalModel(MODEL, RegistrySettings(registry=str(REGISTRY)), WHOLE, threads=1)


def photos() -> list[bytes]:
    """Files of real photos."""
    return [path.read_bytes() for path in sample_photos()]


def head_frame() -> bytes:
    """A frame for the head of the default partition, with a photo."""
    version = resolved()
    return encode(Frame(whole().preprocess(photos()[0]), version.digest, version.bundle.partition()[0].id, "bench"))


def inputs(count: int) -> list[dict[str, Array]]:
    """Different inputs of the model: the photos, then the photos with noise of a fixed seed."""
    model, rng = whole(), np.random.default_rng(0)
    clean = [model.preprocess(photo) for photo in photos()]
    arrays = list(clean)
    while len(arrays) < count:
        ((name, array),) = clean[len(arrays) % len(clean)].items()
        noise = np.asarray(rng.normal(0, 0.1, array.shape), array.dtype)
        arrays.append({name: array + noise})
    return arrays[:count]


PLAN_REGISTRY = STATE / "plan-registry"
# The alias of calibrated versions, the number of inputs, and the share of predictions that a codec must keep.
CALIBRATED, INPUTS, LIMIT = "calibrated", 200, 0.95
JPEG_QUALITY = 85
_IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


@dataclass(frozen=True)
class PlannedModel:
    """A model of the grid: its ONNX file, its shapes, its processing of photos, and a real input."""

    name: str
    path: Callable[[], Path]
    shapes: Mapping[str, tuple[int, ...]]
    input: Callable[[], dict[str, Array]] | None = None
    photo: Callable[[], bytes] | None = None
    preprocess: Mapping[str, Any] | None = None
    build: Mapping[str, Any] = field(default_factory=dict)
    calibrate: Sequence[str] = ()
    """Cuts at which the codec is calibrated on crops of real photos, for the grid with and without the codec."""


def published(planned: PlannedModel) -> Resolved:
    """The model in the benchmark's registry, published with all prefix cuts on first use."""
    PLAN_REGISTRY.mkdir(parents=True, exist_ok=True)
    registry = open_registry(RegistrySettings(registry=str(PLAN_REGISTRY)))
    if planned.name not in registry.models():
        _publish(planned, registry)
    return registry.resolve(planned.name)


def _publish(planned: PlannedModel, registry: Registry) -> None:
    model = open_model(planned.path(), bind=planned.shapes, freeze=bool(planned.shapes))
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        every = [[cut] for cut in cuts(model)]
        bundle, files = build(
            model, planned.name, folder, partitions=every, preprocess=planned.preprocess, **dict(planned.build)
        )
        registry.publish(bundle, files)


def calibrated_version(planned: PlannedModel, version: Resolved, report: Report) -> str:
    """The reference of the calibrated version, calibrated on first use."""
    reference = f"{planned.name}:{CALIBRATED}"
    settings = SegmentSettings(registry=str(PLAN_REGISTRY), cache_dir=str(STATE / "plan-cache"), threads=1)
    registry = open_registry(settings)
    with contextlib.suppress(Missing):
        bundle = registry.resolve(reference).bundle
        if bundle.fidelity and set(read_fidelity(bundle, registry.blob).cuts()) == set(planned.calibrate):
            return reference
    report.say(f"{planned.name}: calibrating the codec at {', '.join(planned.calibrate)}, once: some minutes")
    source = open_source(version.bundle, varied_photos(), "photos", INPUTS)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        executor = SegmentExecutor(version.digest, version.bundle, open_cache(settings, registry), settings)
        spec = CalibrationSpec(planned.calibrate, INPUTS, LIMIT, measure_for(version.bundle))
        calibrated = calibrate(executor, source, spec, Path(folder))
        registry.publish(calibrated.bundle, calibrated.files, alias=CALIBRATED)
    return reference


def _photo(height: int, width: int, short_side: int | None = None) -> bytes:
    """A real photo as a camera near the model would send: a JPEG little larger than the model's input."""
    image = Image.fromarray(tested.photos()[0])
    if short_side is not None:
        scale = short_side / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
    return _jpeg(image.resize((width, height), Image.Resampling.BICUBIC))


def _page(height: int, width: int) -> bytes:
    page = Image.open(tested.package_dir("skimage") / "data" / "page.png").convert("RGB")
    return _jpeg(page.resize((width, height), Image.Resampling.BICUBIC))


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def _resnet50() -> Path:
    def write(path: Path) -> None:
        torch_export.export(
            "models:resnet50_module", path, shapes=[(1, 3, 224, 224)], input_names=["image"], output_names=["logits"]
        )

    return tested.exported("resnet-50", write)


def resnet50_module() -> Any:
    """ResNet-50 with random weights: real times and bytes, meaningless predictions."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    net = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, image: Any) -> Any:
            return self.net(image).logits

    return Logits().eval()


def _text() -> dict[str, Array]:
    """Tokens of a paragraph's length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (1, TOKENS), dtype=np.int64)
    return {"ids": ids, "mask": np.ones((1, TOKENS), np.int64)}


TOKENS = 122
_SQUARE = [{"op": "resize", "short_side": 256, "interpolation": "bicubic"}, {"op": "center_crop", "size": [224, 224]}]
_LAYOUT = {"op": "layout", "to": "NCHW"}
PLANNED: Mapping[str, PlannedModel] = {
    planned.name: planned
    for planned in (
        PlannedModel(
            "efficientnet-lite0",
            tested.efficientnet_lite0,
            {},
            photo=lambda: _photo(224, 224, 256),
            preprocess=zoo.zoo_model("efficientnet-lite0").preprocess,
            calibrate=("20", "31", "48", "65"),
        ),
        PlannedModel(
            "ocr-detector",
            tested.REAL["ocr-detector"].path,
            {"x": (1, 3, 320, 640)},
            photo=lambda: _page(320, 640),
            preprocess={
                "kind": "image",
                "input": "x",
                "dtype": "float32",
                "steps": [
                    {"op": "resize", "size": [320, 640], "interpolation": "bilinear"},
                    {"op": "normalize", "mean": [127.5] * 3, "std": [127.5] * 3},
                    _LAYOUT,
                ],
            },
        ),
        PlannedModel("minilm", tested.minilm, {"ids": (1, TOKENS), "mask": (1, TOKENS)}, input=_text),
        PlannedModel(
            "resnet-50",
            _resnet50,
            {},
            photo=lambda: _photo(224, 224, 256),
            preprocess={
                "kind": "image",
                "input": "image",
                "dtype": "float32",
                "steps": [*_SQUARE, {"op": "normalize", **_IMAGENET}, _LAYOUT],
            },
        ),
    )
}
