"""Recorded exports of ready models: an ONNX graph without weights, and the places of the weights in a torch checkpoint.

An import thus needs no torch; its smallest build is as large as all other packages together. A checkpoint is a pickle
and is never unpickled: after a check of its digest, each tensor is read as raw float32 from the recorded place. torch's
exporter folds a batch normalisation into the convolution before it; `write` folds likewise, with equal bits.

`make demo-data` records anew; a test compares the bundle with the bundle of an export by torch.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx

from isthmus.arrays import Array
from isthmus.artifacts.bundle import digest_of
from isthmus.errors import ModelError

FOLDER = Path(__file__).parent / "exports"
GRAPH, PLACES = "graph.onnx", "places.json"
# As torch names the parameters and buffers of a batch normalisation.
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


class Place(msgspec.Struct, frozen=True):
    """A float32 tensor of a checkpoint: little endian, offset and strides in bytes."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint's digest, its tensors by name, and the batch normalisation folded into each convolution."""

    digest: str
    epsilon: float
    batch_norms: dict[str, str]
    tensors: dict[str, Place]


def write(name: str, checkpoint: Path, out: Path, folder: Path = FOLDER) -> Path:
    """Write the recorded export `name` to `out`, with the weights of the file `checkpoint`.

    Raises:
        ModelError: the checkpoint cannot be read, or its digest is not the recorded digest.
    """
    recorded = msgspec.json.decode((folder / name / PLACES).read_bytes(), type=Checkpoint)
    try:
        data = checkpoint.read_bytes()
    except OSError as e:
        raise ModelError(f"{checkpoint} cannot be read: {e.strerror}", file=str(checkpoint)) from e
    if digest_of(data) != recorded.digest:
        raise ModelError(
            f"{checkpoint.name} differs from the checkpoint of the export {name}",
            file=str(checkpoint),
            hint="install its package anew, in the version of constraints.txt",
        )
    weights = read_weights(recorded, data)
    model = onnx.load(folder / name / GRAPH)
    for tensor in model.graph.initializer:
        # The graph holds small constants, such as bounds and axes, itself.
        if tensor.name in weights:
            tensor.raw_data = weights[tensor.name].tobytes()
    onnx.save(model, out)
    return out


def read_weights(recorded: Checkpoint, data: bytes) -> dict[str, Array]:
    """The export's weights by name: convolutions with their batch normalisation, other tensors as they are."""
    tensors = {name: np.ndarray(p.shape, "<f4", data, p.offset, p.strides) for name, p in recorded.tensors.items()}
    weights: dict[str, Array] = dict(tensors)
    for convolution, norm in recorded.batch_norms.items():
        gamma, beta, mean, variance = (tensors[f"{norm}.{part}"] for part in NORM_PARTS)
        # In float32 and in this order, as the exporter computes: other orders round differently.
        scale = gamma / np.sqrt(variance + recorded.epsilon)
        # (outputs, inputs, height, width)
        weights[f"{convolution}.weight"] = tensors[f"{convolution}.weight"] * scale[:, None, None, None]
        weights[f"{convolution}.weight_bias"] = beta - mean * scale
    return weights
