"""Networks: ready ones of two parts with a narrow boundary, the user's own, and normalisation in front of either.

The ready networks have no batch statistics and no dropout, so that a batch gives the same gradients on any number of
processes. The last convolution of each residual branch starts at zero, so that no normalisation layers are needed.

Source: Zhang et al., "Fixup Initialization", ICLR 2019.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from isthmus.errors import LearningError
from isthmus_tools.learning.training.config import NetworkTable
from isthmus_tools.learning.training.samples import Statistics

# A kernel of the first layer sees this part of a second or of an edge; shorter series get shorter kernels.
_FIRST_KERNEL = 7
# Below this length or side, a stride would leave nothing to convolve.
_MIN_STRIDED = 16


class TwoPartNetwork(nn.Module):
    """A head with few output channels, the boundary tensor, and a tail that gives a score for each class."""

    def __init__(self, head: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.head, self.tail = head, tail

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores (batch, classes) of inputs (batch, …)."""
        scores: Tensor = self.tail(self.head(inputs))
        return scores


def two_parts(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Head and tail of a network that is to be trained in two places.

    Raises:
        LearningError: the network has no such parts.
    """
    children = dict(network.named_children())
    if set(children) != {"head", "tail"}:
        raise LearningError(
            "the network has no head and tail to train apart",
            key="network.name",
            hint="a network of your own has the modules head and tail alone, and forward gives tail(head(inputs))",
        )
    return children["head"], children["tail"]


class Normalised(nn.Module):
    """A network behind the normalisation by the training part's statistics: the graph takes raw inputs."""

    mean: Tensor
    scale: Tensor
    fill: Tensor

    def __init__(self, network: nn.Module, statistics: Statistics, dimensions: int) -> None:
        super().__init__()
        self.network = network
        # (channels, 1, …): broadcast over length, or height and width.
        shape = (-1, *(1,) * (dimensions - 1))
        self.register_buffer("mean", torch.from_numpy(statistics.mean.copy()).reshape(shape))
        self.register_buffer("scale", torch.from_numpy(statistics.scale.copy()).reshape(shape))
        self.has_fill = statistics.fill is not None
        if statistics.fill is not None:
            self.register_buffer("fill", torch.from_numpy(statistics.fill.copy()).reshape(shape))

    def normalised(self, inputs: Tensor) -> Tensor:
        """The inputs of the network behind the normalisation."""
        if self.has_fill:
            inputs = torch.where(torch.isnan(inputs), self.fill, inputs)
        return (inputs - self.mean) * self.scale

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores (batch, classes) of raw inputs (batch, channels, …)."""
        scores: Tensor = self.network(self.normalised(inputs))
        return scores


class _Residual(nn.Module):
    """Two convolutions beside the identity; the second starts at zero."""

    def __init__(self, convolution: type[nn.Conv1d] | type[nn.Conv2d], width: int) -> None:
        super().__init__()
        self.first = convolution(width, width, 3, padding=1)
        self.second = convolution(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        branch = self.second(torch.relu(self.first(inputs)))
        return torch.relu(inputs + branch)


class _Pooled(nn.Module):
    """Mean and largest value of each channel over length, or over height and width."""

    def forward(self, inputs: Tensor) -> Tensor:
        # (batch, channels, positions)
        flat = inputs.flatten(2)
        # The largest value tells short events; a mean over a long series hides these.
        return torch.cat([flat.mean(2), flat.amax(2)], 1)


def make_network(
    options: NetworkTable, name: str, input_shape: Sequence[int], classes: int, *, check: bool = True
) -> nn.Module:
    """The network `name`, from normalised inputs of `input_shape` to scores, with weights of torch's random state.

    Without `check` it is not run: for a process whose parent has run the same network.

    Raises:
        LearningError: no such function, or no module from inputs to (batch, classes).
    """
    width = options.width
    bottleneck = options.bottleneck or max(4, width // (2 if name == "dense" else 6))
    if ".py:" in name:
        network = _own_network(name, input_shape, classes)
    elif name == "dense":
        network = _dense(math.prod(input_shape), width, bottleneck, classes)
    elif name == "convolutions":
        network = _convolutional(nn.Conv1d, input_shape, width, bottleneck, classes)
    else:
        network = _convolutional(nn.Conv2d, input_shape, width, bottleneck, classes)
    if check:
        _check(network, name, input_shape, classes)
    return network


def _convolutional(
    convolution: type[nn.Conv1d] | type[nn.Conv2d],
    input_shape: Sequence[int],
    width: int,
    bottleneck: int,
    classes: int,
) -> TwoPartNetwork:
    # Height or width, or the length of a series.
    shortest = min(input_shape[1:])
    first, second = (2 if shortest >= length else 1 for length in (_MIN_STRIDED, 2 * _MIN_STRIDED))
    # Odd, so that the padding is even on both sides.
    kernel = min(_FIRST_KERNEL if convolution is nn.Conv1d else 3, 2 * ((shortest - 1) // 2) + 1)
    head = nn.Sequential(
        convolution(input_shape[0], width, kernel, stride=first, padding=kernel // 2),
        nn.ReLU(),
        _Residual(convolution, width),
        convolution(width, bottleneck, 3, stride=second, padding=1),
        nn.ReLU(),
    )
    # Twice as wide: the tail runs on the larger machine.
    tail = nn.Sequential(
        convolution(bottleneck, 2 * width, 3, padding=1),
        nn.ReLU(),
        _Residual(convolution, 2 * width),
        _Pooled(),
        nn.Linear(4 * width, classes),
    )
    return TwoPartNetwork(head, tail)


def _dense(features: int, width: int, bottleneck: int, classes: int) -> TwoPartNetwork:
    head = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, bottleneck), nn.ReLU())
    tail = nn.Sequential(nn.Linear(bottleneck, width), nn.ReLU(), nn.Linear(width, classes))
    return TwoPartNetwork(head, tail)


def _own_network(spec: str, input_shape: Sequence[int], classes: int) -> nn.Module:
    """The module of the user's function; executes the user's code."""
    file, _, function = spec.rpartition(":")
    if not Path(file).is_file():
        raise LearningError(f"network.name is {spec}, and there is no file {file}", key="network.name")
    # Imported late: workers of a run need none of the importers of models, which take a second.
    from isthmus_tools.graph.exporting import failures, quiet

    with quiet(), failures("Python", spec):
        module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        if module_spec is None or module_spec.loader is None:
            raise LearningError(f"{file} is no Python file", key="network.name")
        # Not entered in sys.modules: a file of any name hides no module of that name.
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise LearningError(f"{file} has no function {function}", key="network.name")
        network = make(tuple(input_shape), classes)
    if not isinstance(network, nn.Module):
        raise LearningError(f"{spec} returned a {type(network).__name__}, not an nn.Module", key="network.name")
    return network


def _check(network: nn.Module, name: str, input_shape: Sequence[int], classes: int) -> None:
    """Run the network once on zeros, before hours of training."""
    from isthmus_tools.graph.exporting import failures

    network.eval()
    with torch.no_grad(), failures("torch", name):
        scores = network(torch.zeros(2, *input_shape))
    network.train()
    # Scores of another shape would train, by broadcasting, to nonsense.
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (2, classes):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise LearningError(
            f"the network {name} maps a batch of 2 to {shape}; scores of {classes} classes are (2, {classes})",
            key="network.name",
            hint="the function takes the input's shape without the batch, and the number of classes",
        )
