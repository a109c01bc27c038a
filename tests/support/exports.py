"""Records the ready model's export, which comes with the package: `make demo-data`. It needs torch.

The graph is torch's export without its weights; the places of the weights are those in the checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from isthmus.artifacts.bundle import digest_of
from isthmus_tools.graph import torch_export
from isthmus_tools.zoo import recorded_export
from isthmus_tools.zoo.models import efficientnet_lite0_checkpoint
from isthmus_tools.zoo.recorded_export import Checkpoint, Place

NAME = "efficientnet-lite0"


def efficientnet_lite0() -> Any:
    """EfficientNet-Lite0 with its ImageNet-1k weights, as an nn.Module."""
    import efficientnet_lite_pytorch

    # The package prints a line.
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        return efficientnet_lite_pytorch.EfficientNet.from_pretrained(
            NAME, weights_path=str(efficientnet_lite0_checkpoint())
        )


def export(out: Path) -> Path:
    """The export by torch."""
    return torch_export.export(
        f"{__name__}:efficientnet_lite0",
        out,
        shapes=[(1, 3, 224, 224)],
        input_names=["image"],
        output_names=["logits"],
    )


def record(folder: Path = recorded_export.FOLDER) -> None:
    """Write the graph and the places of its weights to `folder`."""
    place = folder / NAME
    place.mkdir(parents=True, exist_ok=True)
    checkpoint, module = efficientnet_lite0_checkpoint().read_bytes(), efficientnet_lite0()
    recorded = Checkpoint(digest_of(checkpoint), module._bn0.eps, batch_norms(module), places(checkpoint))
    weights = recorded_export.read_weights(recorded, checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        model = ir.load(export(Path(scratch) / "model.onnx"))
    # Those of nodes hold paths of this machine. Those of values stay: they are part of a bundle.
    ClearMetadataAndDocStringPass()(model)
    proto = ir.serde.serialize_model(model)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            assert tensor.raw_data == weights[tensor.name].tobytes(), tensor.name
            tensor.ClearField("raw_data")
    onnx.save(proto, place / recorded_export.GRAPH)
    # A line a tensor.
    (place / recorded_export.PLACES).write_bytes(msgspec.json.encode(recorded).replace(b"},", b"},\n") + b"\n")


def batch_norms(module: Any) -> dict[str, str]:
    """The name of the batch normalisation after each convolution: each module lists its parts in their order."""
    import torch

    pairs = {}
    for name, parent in module.named_modules():
        prefix = f"{name}." if name else ""
        parts = list(parent.named_children())
        convolutions = [n for n, part in parts if isinstance(part, torch.nn.Conv2d)]
        norms = [n for n, part in parts if isinstance(part, torch.nn.BatchNorm2d)]
        pairs |= {f"{prefix}{a}": f"{prefix}{b}" for a, b in zip(convolutions, norms, strict=True)}
    return pairs


def places(checkpoint: bytes) -> dict[str, Place]:
    """The place of each float32 tensor of the checkpoint, as torch reads it."""
    import torch

    found = {}
    for name, tensor in torch.load(efficientnet_lite0_checkpoint(), weights_only=True).items():
        if tensor.dtype == torch.float32:
            storage = tensor.untyped_storage()
            start = checkpoint.index(ctypes.string_at(storage.data_ptr(), storage.nbytes()))
            strides = tuple(4 * s for s in tensor.stride())
            found[name] = Place(start + 4 * tensor.storage_offset(), tuple(tensor.shape), strides)
    return found


if __name__ == "__main__":
    record()
