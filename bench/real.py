"""The models that the planner's benchmark divides, published with every cut, and a real input for each."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from report import STATE, Report
from tested import models as tested

from isthmus.arrays import Array
from isthmus.artifacts.agreement import measure_for
from isthmus.artifacts.choice import TRANSFORM_ID
from isthmus.artifacts.fidelity_document import read
from isthmus.errors import Missing
from isthmus.processing.image import MAX_PIXELS
from isthmus.registry import Registry, Resolved, open_cache, open_registry
from isthmus.runtime.tables import Tables, tables_of
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.calibration.calibrate import CalibrationSpec, calibrate
from isthmus_tools.calibration.inputs import open_source
from isthmus_tools.graph import build, cuts, open_model, torch_export
from isthmus_tools.zoo import models as zoo
from isthmus_tools.zoo.photos import varied_photos

REGISTRY = STATE / "plan-registry"
CALIBRATED, INPUTS, LIMIT = "calibrated", 200, 0.95
"""The alias of what was calibrated, with how many inputs, and the share of answers that a codec must keep."""
JPEG_QUALITY = 85
_IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


@dataclass(frozen=True)
class Real:
    """A model to divide: its ONNX file, the shapes that bind it, how it takes photos, and a real input."""

    name: str
    path: Callable[[], Path]
    shapes: Mapping[str, tuple[int, ...]]
    input: Callable[[], dict[str, Array]] | None = None
    photo: Callable[[], bytes] | None = None
    preprocess: Mapping[str, Any] | None = None
    build: Mapping[str, Any] = field(default_factory=dict)
    calibrate: Sequence[str] = ()
    """Cuts at which the codec is calibrated, with parts of real photos, for the grid before and after it."""


def published(real: Real) -> Resolved:
    """The model in the benchmark's registry, published with all its prefix cuts if it is not there."""
    REGISTRY.mkdir(parents=True, exist_ok=True)
    registry = open_registry(RegistrySettings(registry=str(REGISTRY)))
    if real.name not in registry.models():
        _publish(real, registry)
    return registry.resolve(real.name)


def _publish(real: Real, registry: Registry) -> None:
    model = open_model(real.path(), bind=real.shapes, freeze=bool(real.shapes))
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        every = [[cut] for cut in cuts(model)]
        bundle, files = build(
            model, real.name, folder, partitions=every, preprocess=real.preprocess, **dict(real.build)
        )
        registry.publish(bundle, files)


def calibrated_version(real: Real, found: Resolved, report: Report) -> str:
    """The reference of `found` with its codec calibrated: made once, a version beside the one that is served."""
    reference = f"{real.name}:{CALIBRATED}"
    settings = SegmentSettings(registry=str(REGISTRY), cache_dir=str(STATE / "plan-cache"), threads=1)
    registry = open_registry(settings)
    with contextlib.suppress(Missing):
        made = registry.resolve(reference).bundle
        if made.fidelity and set(read(made, registry.blob).cuts()) == set(real.calibrate):
            return reference
    report.say(f"{real.name}: calibrating the codec at {', '.join(real.calibrate)}, once: some minutes")
    source = open_source(found.bundle, varied_photos(), "photos", INPUTS)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        executor = SegmentExecutor(found.digest, found.bundle, open_cache(settings, registry), settings)
        spec = CalibrationSpec(real.calibrate, INPUTS, LIMIT, measure_for(found.bundle))
        calibrated = calibrate(executor, source, spec, Path(folder))
        registry.publish(calibrated.bundle, calibrated.files, alias=CALIBRATED)
    return reference


def table_of(registry: Registry, reference: str) -> Callable[[str], object]:
    """A version's codec tables by tensor; None for those that have none."""
    found = registry.resolve(reference)
    tables = Tables(registry.bundle, registry.blob, MAX_PIXELS)
    return tables_of(found.bundle, found.digest, TRANSFORM_ID, tables)


def _photo(height: int, width: int, short_side: int | None = None) -> bytes:
    """A real photo as a camera near the model would send it: a JPEG not much larger than what the model looks at."""
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
            "real:resnet50_module", path, shapes=[(1, 3, 224, 224)], input_names=["image"], output_names=["logits"]
        )

    return tested.exported("resnet-50", write)


def resnet50_module() -> Any:
    """ResNet-50's shape with random weights: its times and its bytes are real, its answers mean nothing."""
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
    """A paragraph's tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (1, TOKENS), dtype=np.int64)
    return {"ids": ids, "mask": np.ones((1, TOKENS), np.int64)}


TOKENS = 122
_SQUARE = [{"op": "resize", "short_side": 256, "interpolation": "bicubic"}, {"op": "center_crop", "size": [224, 224]}]
_LAYOUT = {"op": "layout", "to": "NCHW"}
EVERY: Mapping[str, Real] = {
    real.name: real
    for real in (
        Real(
            "efficientnet-lite0",
            tested.efficientnet_lite0,
            {},
            photo=lambda: _photo(224, 224, 256),
            preprocess=zoo.zoo_model("efficientnet-lite0").preprocess,
            calibrate=("20", "31", "48", "65"),
        ),
        Real(
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
        Real("minilm", tested.minilm, {"ids": (1, TOKENS), "mask": (1, TOKENS)}, input=_text),
        Real(
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
