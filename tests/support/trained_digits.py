"""A convolutional classifier of scikit-learn's digits, trained in a second, as an ONNX file and as data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from support.bundles import Published, publish, save, value

POSTPROCESS = {"kind": "classify", "output": "logits", "softmax": True, "top_k": 3}
CUTS = ("1", "3", "5", "7")
"""After each convolution, and at the features of 8 values before the classes."""


def digits() -> tuple[Any, Any]:
    """All 1,797 digits and their classes. Shapes: (digits, 1, 8, 8) from 0 to 1, (digits,)."""
    loaded = load_digits()
    return (loaded.images / 16).astype(np.float32)[:, None], loaded.target.astype(np.int64)


@cache
def trained() -> dict[str, Any]:
    """The weights after 12 epochs of 1,200 digits, by name."""
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)]
        dense = [nn.Linear(64, 8), nn.Linear(8, 10)]
        layers = nn.ModuleList([*convolutions, *dense])
        optimiser = torch.optim.AdamW(layers.parameters(), 5e-3)
        for _ in range(12):
            for batch in torch.randperm(1200).split(64):
                x = torch.from_numpy(images[batch.numpy()])
                for layer in convolutions:
                    x = functional.relu(layer(x))
                scores = dense[1](functional.relu(dense[0](x.flatten(1))))
                optimiser.zero_grad()
                functional.cross_entropy(scores, torch.from_numpy(labels[batch.numpy()])).backward()
                optimiser.step()
    return {
        f"{'wb'[part]}{index}": tensor.detach().numpy().copy()
        for index, layer in enumerate(layers)
        for part, tensor in enumerate((layer.weight, layer.bias))
    }


def digits_model(path: Path) -> Path:
    """The classifier as an ONNX file of ten nodes."""
    nodes, source = [], "x"
    for index, stride in enumerate((1, 2, 2)):
        inputs = [source, f"w{index}", f"b{index}"]
        nodes.append(helper.make_node("Conv", inputs, [f"c{index}"], pads=[1] * 4, strides=[stride] * 2))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [source := f"r{index}"]))
    nodes += [
        helper.make_node("Flatten", [source], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["g3"], transB=1),
        helper.make_node("Relu", ["g3"], ["r3"]),
        helper.make_node("Gemm", ["r3", "w4", "b4"], ["logits"], transB=1),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in trained().items()]
    return save(path, nodes, [value("x", 1, 1, 8, 8)], [value("logits", 1, 10)], weights)


def publish_digits(folder: Path) -> Published:
    """The classifier, cut behind each layer."""
    images, _ = digits()
    return publish(
        folder,
        digits_model(folder / "digits.onnx"),
        {"x": images[:1]},
        partitions=[[cut] for cut in CUTS],
        postprocess=POSTPROCESS,
    )
