"""Train a small CNN on scikit-learn's digits, and publish it in the registry `registry/` as the model `digits`."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from isthmus import RegistrySettings
from isthmus_tools import ImportRequest, import_model

SIDE, HELD_OUT = 16, 200
# A photo of 0 to 255 becomes -1 to 1; grey becomes RGB.
PREPROCESS = {
    "kind": "image",
    "input": "image",
    "dtype": "float32",
    "steps": [
        {"op": "resize", "size": [SIDE, SIDE], "interpolation": "nearest"},
        {"op": "normalize", "mean": [127.5] * 3, "std": [127.5] * 3},
        {"op": "layout", "to": "NCHW"},
    ],
}
POSTPROCESS = {"kind": "classify", "output": "scores", "softmax": True, "top_k": 3}


class Digits(torch.nn.Module):
    """Three convolutions; few channels in the middle, where a cut sends little."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 24, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(24, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(8, 48, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(48 * 4 * 4, 10),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores (batch, 10) of images (batch, 3, 16, 16)."""
        return self.layers(image)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Grey pixels (count, 16, 16) from 0 to 255, and the digits."""
    digits = load_digits()
    pixels = np.round(digits.images / 16 * 255).astype(np.uint8)
    return pixels.repeat(SIDE // 8, 1).repeat(SIDE // 8, 2), digits.target


def as_input(pixels: np.ndarray) -> torch.Tensor:
    """As PREPROCESS does: (count, 3, 16, 16)."""
    return torch.from_numpy(((pixels.astype(np.float32) - 127.5) / 127.5)[:, None].repeat(3, 1))


def train(pixels: np.ndarray, digits: np.ndarray) -> Digits:
    """The network after some passes over the data."""
    torch.manual_seed(0)
    # Kernels of this size take longer on several threads than on one.
    torch.set_num_threads(1)
    model, inputs, targets = Digits(), as_input(pixels), torch.from_numpy(digits)
    optimiser = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(12):
        for rows in torch.randperm(len(inputs)).split(32):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimiser.step()
    return model.eval()


def main() -> None:
    """Train, measure on held-out digits, export, publish."""
    pixels, digits = data()
    model = train(pixels[HELD_OUT:], digits[HELD_OUT:])
    with torch.no_grad():
        right = model(as_input(pixels[:HELD_OUT])).argmax(1).numpy() == digits[:HELD_OUT]
    print(f"{right.mean():.1%} of {HELD_OUT} held-out digits are right")
    Path("digits").mkdir(exist_ok=True)
    for i, (image, digit) in enumerate(zip(pixels[:HELD_OUT], digits[:HELD_OUT], strict=True)):
        Image.fromarray(image).resize((64, 64), Image.Resampling.NEAREST).save(f"digits/{i:03}-{digit}.png")
    batch = torch.export.Dim("batch")
    example = torch.zeros(2, 3, SIDE, SIDE)
    torch.onnx.export(
        model, (example,), "digits.onnx", dynamic_shapes=({0: batch},), output_names=["scores"], verbose=False
    )
    published = import_model(
        ImportRequest(
            model="digits.onnx",
            registry=RegistrySettings(registry=os.environ.get("ISTHMUS_REGISTRY", "registry"), cache_dir="cache"),
            preprocess=PREPROCESS,
            postprocess=POSTPROCESS,
            labels=[str(digit) for digit in range(10)],
        )
    )
    print(f"published {published.version.name}:{published.version.version}")


if __name__ == "__main__":
    sys.exit(main())
