"""Train a network that tells what the wearer of a watch does, and publish it in the registry as the model `motion`.

The data are BasicMotions: 80 recordings of ten seconds, by accelerometer and gyroscope of a watch. The package aeon
brings them; its files are read, none of its code is imported.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import torch

from isthmus import RegistrySettings
from isthmus_tools import ImportRequest, import_model

CHANNELS, SAMPLES = 6, 100
LABELS = ["standing", "walking", "running", "badminton"]
REGISTRY = os.environ.get("ISTHMUS_REGISTRY", ".isthmus/registry")


def recordings(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Recordings (count, channels, samples) in the watch's units, and labels; `part` is TRAIN or TEST."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the recordings are in the package aeon: pip install --no-deps aeon")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "BasicMotions", f"BasicMotions_{part}.ts")
    # A line is a recording: channels between colons, then the label.
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#@"]
    fields = [line.split(":") for line in lines]
    readings = np.array([[channel.split(",") for channel in each[:-1]] for each in fields], np.float32)
    return readings, np.array([LABELS.index(each[-1].lower()) for each in fields])


class Motion(torch.nn.Module):
    """Normalisation and convolutions, few channels in the middle, where a cut sends little; then two dense layers."""

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__()
        # Part of the graph, and so of the head: raw readings stay at the edge.
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv1d(CHANNELS, 24, 7, stride=2),
            torch.nn.ReLU(),
            torch.nn.Conv1d(24, 4, 5, stride=3),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 15, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, len(LABELS)),
        )

    def forward(self, readings: torch.Tensor) -> torch.Tensor:
        """Probabilities (batch, labels) of readings (batch, channels, samples)."""
        return self.scores(readings).softmax(-1)

    def scores(self, readings: torch.Tensor) -> torch.Tensor:
        """The probabilities before softmax."""
        return self.layers((readings - self.mean) / self.deviation)


def train(readings: np.ndarray, labels: np.ndarray) -> Motion:
    """The network after some passes over the recordings, each time begun at another sample."""
    torch.manual_seed(0)
    # Kernels of this size take longer on several threads than on one.
    torch.set_num_threads(1)
    inputs, targets = torch.from_numpy(readings), torch.from_numpy(labels)
    model = Motion(inputs.mean((0, 2)).unsqueeze(1), inputs.std((0, 2)).unsqueeze(1))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-3)
    for _ in range(150):
        shifted = inputs.roll(int(torch.randint(SAMPLES, ())), 2)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model.scores(shifted), targets).backward()
        optimiser.step()
    return model.eval()


def main() -> None:
    """Train, measure on the recordings of the test, export, publish."""
    model = train(*recordings("TRAIN"))
    readings, labels = recordings("TEST")
    with torch.no_grad():
        right = model(torch.from_numpy(readings)).argmax(1).numpy() == labels
    print(f"{right.sum()} of {len(labels)} held-out recordings are right")
    example = torch.zeros(2, CHANNELS, SAMPLES)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, "motion.pt2")
    registry = RegistrySettings(registry=REGISTRY, cache_dir=".isthmus/commands")
    published = import_model(ImportRequest(model="motion.pt2", registry=registry, cuts=["relu_1"]))
    print(f"published {published.version.name}:{published.version.version}")


if __name__ == "__main__":
    main()
