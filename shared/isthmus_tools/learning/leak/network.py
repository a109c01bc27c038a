"""The inverse network: a small network from boundary tensors to the input, trained on public inputs.

Maps pass convolutions and are upsampled to the input's size; maps of height 1, of series, pass convolutions along
time; vectors pass two dense layers. The loss joins the document's measure and the squared error.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from isthmus.arrays import Array
from isthmus.artifacts.leak import SSIM
from isthmus_tools.learning.leak.activations import Crossings, Features
from isthmus_tools.learning.leak.likeness import MEASURES
from isthmus_tools.progress import Progress, silent

# Channels of the convolutions: a step takes some 50 ms of a CPU for photos compared at 64 pixels.
_WIDTH, _FLAT_WIDTH, _SEED_CHANNELS = 48, 256, 32
# The coarsest map that vectors are unfolded to.
_SEED_SIDE = 4
_BATCH = 16
_LEARNING_RATE = 2e-3
# Share of the similarity in the loss of images; the squared error keeps colours.
_SIMILARITY = 0.3
# Training ends with the best weights by inputs left out of training, at so many checks.
_CHECKS, _VALIDATION = 8, 8


@dataclass(frozen=True)
class TrainingBudget:
    """The bounds of a network's training: `steps`, and `seconds` for an early end; 0 for no limit."""

    steps: int
    seconds: float = 0.0
    seed: int = 0


class InverseNetwork(nn.Module):
    """From standardised features to the compared array. Shapes: maps or values as in `Features`."""

    def __init__(self, features: list[Features], shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self._shape = shape
        self._factor = 1 if height == 1 else 2, 1 if width == 1 else 2
        # The last convolution works at half the size; its channels become pixels, so that no layer runs at full size.
        self._grid = -(-height // self._factor[0]), -(-width // self._factor[1])
        self._is_map = [each.is_map for each in features]
        maps = [each.values.shape for each in features if each.is_map]
        start = [max((s[axis + 2] for s in maps), default=_SEED_SIDE) for axis in (0, 1)]
        self._start = min(start[0], self._grid[0]), min(start[1], self._grid[1])
        self.entries = nn.ModuleList([self._entry(each) for each in features])
        kernel, padding = ((1, 3), (0, 1)) if height == 1 else ((3, 3), (1, 1))
        joined = sum(_WIDTH if is_map else _SEED_CHANNELS for is_map in self._is_map)
        self.first = nn.Conv2d(joined, _WIDTH, kernel, padding=padding)
        self.layers = nn.ModuleList(
            [nn.Conv2d(_WIDTH, _WIDTH, kernel, padding=padding) for _ in range(self._doublings() + 2)]
        )
        self.last = nn.Conv2d(_WIDTH, channels * self._factor[0] * self._factor[1], kernel, padding=padding)
        self.dense = nn.Linear(joined * self._start[0] * self._start[1], int(np.prod(shape))) if width == 1 else None

    def _doublings(self) -> int:
        size, count = list(self._start), 0
        while tuple(size) != self._grid:
            size = [min(2 * a, b) for a, b in zip(size, self._grid, strict=True)]
            count += 1
        return count

    def _entry(self, features: Features) -> nn.Module:
        channels, height, width = features.values.shape[1:]
        if features.is_map:
            # Finer maps than the grid lose nothing: neighbours become channels.
            fold = -(-height // self._grid[0]), -(-width // self._grid[1])
            return nn.Sequential(_Folded(fold, self._start), nn.Conv2d(channels * fold[0] * fold[1], _WIDTH, 1))
        seeds = _SEED_CHANNELS * self._start[0] * self._start[1]
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, _FLAT_WIDTH),
            nn.GELU(),
            nn.Linear(_FLAT_WIDTH, seeds),
            nn.Unflatten(1, (_SEED_CHANNELS, *self._start)),
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """The reconstruction of each input. Shapes: (batch, channels, height, width)."""
        joined = torch.cat([entry(x) for entry, x in zip(self.entries, features, strict=True)], dim=1)
        if self.dense is not None:
            values: torch.Tensor = self.dense(functional.gelu(joined).flatten(1))
            return values.reshape(-1, *self._shape)
        hidden = functional.gelu(self.first(joined))
        size = list(self._start)
        for layer in self.layers:
            hidden = hidden + functional.gelu(layer(hidden))
            if tuple(size) != self._grid:
                size = [min(2 * a, b) for a, b in zip(size, self._grid, strict=True)]
                hidden = functional.interpolate(hidden, tuple(size), mode="nearest")
        return self._unfolded(self.last(hidden))

    def _unfolded(self, maps: torch.Tensor) -> torch.Tensor:
        """Channels to pixels, as a pixel shuffle with factors of its own for both axes."""
        channels, height, width = self._shape
        rows, columns = self._factor
        blocks = maps.reshape(len(maps), channels, rows, columns, *self._grid)
        # (batch, channels, grid height, rows, grid width, columns)
        pixels = blocks.permute(0, 1, 4, 2, 5, 3).reshape(len(maps), channels, rows * self._grid[0], -1)
        return pixels[:, :, :height, :width]


class _Folded(nn.Module):
    """Neighbouring places of maps as channels, then the size where the network starts."""

    def __init__(self, fold: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self._fold, self._size = fold, size

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        rows, columns = self._fold
        batch, channels, height, width = maps.shape
        maps = functional.pad(maps, (0, -width % columns, 0, -height % rows))
        blocks = maps.reshape(batch, channels, maps.shape[2] // rows, rows, maps.shape[3] // columns, columns)
        folded = blocks.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, blocks.shape[2], blocks.shape[4])
        if tuple(folded.shape[2:]) == self._size:
            return folded
        return functional.interpolate(folded, self._size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class TrainedInverse:
    """A trained inverse network, and the steps of training."""

    network: InverseNetwork
    steps: int

    def reconstruct(self, crossings: Crossings, indices: Array) -> Array:
        """Some inputs, in units. Shapes: (inputs, channels, height, width)."""
        self.network.eval()
        with torch.no_grad():
            return np.concatenate([self.network(x).numpy() for x, _ in crossings.batches(indices)])


def train_network(
    crossings: Crossings,
    measure: str,
    budget: TrainingBudget,
    *,
    start: TrainedInverse | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = silent,
    stage: str = "training",
) -> TrainedInverse:
    """Train a network on the training inputs, from `start` where given; the same budget gives the same weights.

    One training input in eight chooses among the weights on the way. Shapes: as `InverseNetwork`.
    """
    # The caller's random state stays, and this one depends on the seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)
        network = InverseNetwork(list(crossings.features), crossings.targets.shape[1:])
    if start is not None:
        network.load_state_dict(start.network.state_dict())
    rows = np.arange(crossings.trained)
    fitting, validating = rows[rows % _VALIDATION != 0], rows[rows % _VALIDATION == 0]
    # Decay, since a few hundred inputs are learned by heart otherwise.
    optimiser = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=budget.steps + 1)
    rng = np.random.default_rng(budget.seed)
    best, best_loss, step = network.state_dict(), float("inf"), 0
    began = clock()
    while step < budget.steps and (not budget.seconds or clock() - began < budget.seconds):
        progress(stage, step, budget.steps)
        network.train()
        x, y = crossings.batch(np.sort(rng.choice(fitting, min(_BATCH, len(fitting)), replace=False)))
        optimiser.zero_grad()
        loss = _loss(measure, network(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        step += 1
        looks = step % max(1, budget.steps // _CHECKS) == 0 or step == budget.steps
        if looks and (validation := _validation(network, measure, crossings, validating)) < best_loss:
            best, best_loss = copy.deepcopy(network.state_dict()), validation
    # The weights at hand, no copy, where time was over before the first look.
    network.load_state_dict(best)
    progress(stage, budget.steps, budget.steps)
    return TrainedInverse(network, step)


def _loss(measure: str, predicted: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    loss = functional.mse_loss(predicted, expected)
    if measure == SSIM:
        loss = (1 - _SIMILARITY) * loss + _SIMILARITY * (1 - MEASURES[measure](predicted, expected).mean())
    return loss


def _validation(network: InverseNetwork, measure: str, crossings: Crossings, indices: Array) -> float:
    network.eval()
    with torch.no_grad():
        losses = [(len(y), float(_loss(measure, network(x), y))) for x, y in crossings.batches(indices)]
    return sum(count * loss for count, loss in losses) / max(1, len(indices))
