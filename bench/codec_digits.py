"""A small residual network, trained here on scikit-learn's handwritten digits, so that accuracy has true labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from codec_models import Fold, Subject
from sklearn.datasets import load_digits

from isthmus.arrays import Array
from isthmus.artifacts.agreement import Measure
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.graph import torch_export

TRAINED, CALIBRATING = 1200, 200
"""Images that train; of these, so many calibrate. The other 597 are scored, or 200 of them in a short run."""
WIDTH = 32
CUTS = ("post_relu_1", "post_relu_2")


def digits(folder: Path, quick: bool) -> Subject:
    """Train, export and describe the network; takes some ten seconds."""
    data = load_digits()
    images = (data.images.astype(np.float32) / 8 - 1)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], data.target[order]
    path = folder / "digits.onnx"
    _train(images[:TRAINED], labels[:TRAINED], path, epochs=12 if quick else 40)

    scored = 200 if quick else len(images) - TRAINED

    def judge(example: CalibrationInput, expected: Mapping[str, Array], got: Mapping[str, Array]) -> tuple[bool, float]:
        answer = int(got["logits"].argmax())
        return answer == int(expected["logits"].argmax()), float(answer != labels[int(example.group)])

    def examples(start: int, stop: int) -> Iterator[CalibrationInput]:
        return (CalibrationInput(str(i), {"image": images[i][None]}) for i in range(start, stop))

    return Subject(
        "digits residual network",
        path,
        tuple(f"{name}=relu{i + 1}" for i, name in enumerate(CUTS)),
        Measure("top1", "logits"),
        judge,
        [Fold(lambda: examples(0, CALIBRATING), lambda: examples(TRAINED, TRAINED + scored), (CALIBRATING, scored))],
        "1 - accuracy",
    )


def _train(images: np.ndarray, labels: np.ndarray, path: Path, epochs: int) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = _network(nn)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimiser.step()
        schedule.step()
    trained = network.eval()
    torch_export.export(lambda: trained, path, shapes=[(1, 1, 8, 8)], input_names=["image"], output_names=["logits"])
    _name_relus(path)


def _network(nn: Any) -> Any:
    """Stem, two residual blocks with a ReLU at their end, pooled, linear; 32 maps of 8 × 8, then 64 of 4 × 4."""

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, taken: int, given: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(taken, given, 3, stride, 1, bias=False),
                nn.BatchNorm2d(given),
                nn.ReLU(),
                nn.Conv2d(given, given, 3, 1, 1, bias=False),
                nn.BatchNorm2d(given),
            )
            self.skip = nn.Conv2d(taken, given, 1, stride)

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.body(x) + self.skip(x))

    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, 1, 1),
        nn.ReLU(),
        Block(WIDTH, WIDTH, 1),
        Block(WIDTH, 2 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * WIDTH, 10),
    )


def _name_relus(path: Path) -> None:
    """Call the blocks' ends relu1 and relu2, so that cuts can name them."""
    import onnx

    model = onnx.load(path)
    nodes = model.graph.node
    ends = [n for before, n in itertools.pairwise(nodes) if (before.op_type, n.op_type) == ("Add", "Relu")]
    for number, node in enumerate(ends, 1):
        old, new = node.output[0], f"relu{number}"
        for each in nodes:
            each.input[:] = [new if name == old else name for name in each.input]
            each.output[:] = [new if name == old else name for name in each.output]
    onnx.save(model, path)
