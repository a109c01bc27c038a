"""The training loop: global batches in an order that seed and epoch fix, checkpoints, early stopping.

The samples of a step, their order and their random shifts depend on the seed, the epoch and the sample alone: neither
the number of processes nor an interruption changes them. A process computes the gradients of its rows of a batch, and
`Processes` adds them up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.arrays import Array
from isthmus.errors import LearningError
from isthmus_tools.learning.training.augmentation import augmented
from isthmus_tools.learning.training.checkpoints import Checkpoints, State
from isthmus_tools.learning.training.config import FitTable
from isthmus_tools.learning.training.samples import PreparedData, Samples
from isthmus_tools.progress import Progress, silent

# Rows of a batch without gradients: bounds the memory of an evaluation.
_SCORED_ROWS = 1024


class Processes(Protocol):
    """The processes of a data-parallel run; this process is number `rank` of `size`."""

    rank: int
    size: int

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        ...


class OneProcess:
    """A run of this process alone."""

    rank, size = 0, 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """No-op: a single process has the sum."""


@dataclass(frozen=True)
class TrainingBatch:
    """This process's rows of a global batch: inputs, targets, and each row's weight in the batch's mean loss."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor


class Computation(Protocol):
    """How a batch's gradients and an input's scores come about: in a whole network, or in the stages of a pipeline."""

    def backward(self, batch: TrainingBatch) -> Tensor:
        """Add the gradients of the weighted sum of losses to the parameters'; the sum, on this process's rows."""
        ...

    def scores(self, inputs: Tensor) -> Tensor:
        """Scores (rows, classes) without gradients, the same on every process."""
        ...


def weighted_loss(scores: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    """The weighted sum of the rows' losses."""
    losses = nn.functional.cross_entropy(scores, targets, reduction="none", label_smoothing=label_smoothing)
    return (losses * weights).sum()


class WholeNetwork:
    """A network in this process."""

    def __init__(self, network: nn.Module, label_smoothing: float = 0.0) -> None:
        self._network, self._smoothing = network, label_smoothing

    def backward(self, batch: TrainingBatch) -> Tensor:
        """See `Computation.backward`."""
        # The last batch of an epoch may have fewer rows than there are processes.
        if not len(batch.targets):
            return torch.zeros((), device=batch.targets.device)
        loss = weighted_loss(self._network(batch.inputs), batch.targets, batch.weights, self._smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def scores(self, inputs: Tensor) -> Tensor:
        """See `Computation.scores`."""
        scores: Tensor = self._network(inputs)
        return scores


@dataclass(frozen=True)
class EpochResult:
    """An epoch's mean losses and the validation part's accuracy; NaN without a validation part."""

    epoch: int
    loss: float
    validation_loss: float = math.nan
    accuracy: float = math.nan
    rate: float = 0.0


@dataclass(frozen=True)
class TrainingResult:
    """The history, the epoch of the final weights, the steps in all, and why the training ended."""

    history: tuple[EpochResult, ...]
    best_epoch: int
    steps: int
    stopped_early: bool
    resumed_at: int = 0


@dataclass
class _Position:
    """The position of a run: `step` steps in all, `batches` of these in `epoch`."""

    epoch: int = 0
    batches: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[EpochResult] = field(default_factory=list)
    best_loss: float = math.inf
    best_epoch: int = -1


class Trainer:
    """Trains `network` (raw inputs to scores) on the training part of `data`.

    The network starts with its present weights; `seed` orders the samples. `computation` and `processes` distribute
    the work; each process needs the same data, options and weights. Only the process of rank 0 writes checkpoints.
    `on_best` is called where the present weights are the best so far.
    """

    def __init__(
        self,
        network: nn.Module,
        data: PreparedData,
        options: FitTable,
        seed: int,
        *,
        checkpoints: Checkpoints | None = None,
        processes: Processes | None = None,
        computation: Computation | None = None,
        on_best: Callable[[], None] = lambda: None,
        progress: Progress = silent,
    ) -> None:
        self._on_best = on_best
        self.network, self._data, self._options, self._seed = network, data, options, seed
        self._checkpoints, self._progress = checkpoints, progress
        self._processes: Processes = processes or OneProcess()
        self._device = torch.device(options.device)
        # Before the optimiser is built: an optimiser refers to parameters on their device.
        network.to(self._device)
        self.computation = computation or WholeNetwork(network, options.label_smoothing)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        if not self.parameters:
            raise LearningError("the network has no parameters to train", key="network.name")
        self.optimiser = optimiser_of(self.parameters, options)
        self.steps_per_epoch = max(1, math.ceil(len(data.train) / options.batch))
        self._schedule = schedule_of(self.optimiser, options, self.steps_per_epoch)
        self._class_weights = _class_weights(data.train.labels, len(data.classes), options)
        self._at = _Position()
        self._best: dict[str, Tensor] = {}

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train until the last epoch or until validation stops improving; the network keeps the best weights.

        With `resume` the run goes on from the newest whole checkpoint, if any.

        Raises:
            LearningError: the loss is not finite, or a checkpoint does not fit or cannot be written.
        """
        resumed_at = self._resume() if resume else 0
        # A run that was killed after its last epoch has nothing left to train.
        stopped_early = self._has_stalled()
        while self._at.epoch < self._options.epochs and not stopped_early:
            for rows in self._remaining_batches():
                self._note(self.step(rows))
                if self._at.batches < self.steps_per_epoch:
                    self._checkpoint_if_due()
            self._end_epoch()
            stopped_early = self._has_stalled()
            # After validation, so that a resumed run knows the best weights.
            self._checkpoint_if_due(ends_epoch=True)
        best_epoch = self._at.epoch - 1
        if self._best:
            # Of the epoch with the lowest validation loss.
            self.network.load_state_dict(self._best)
            best_epoch = self._at.best_epoch
        self.network.eval()
        return TrainingResult(tuple(self._at.history), best_epoch, self._at.step, stopped_early, resumed_at)

    def pass_over(self, epoch: int) -> None:
        """The steps of one epoch by itself, without validation and checkpoints.

        Raises:
            LearningError: the loss is not finite.
        """
        # Random shifts depend on the epoch, as the order does.
        self._at = _Position(epoch=epoch)
        for rows in self._remaining_batches():
            self.step(rows)

    def step(self, rows: Array) -> float:
        """A step of the optimiser on the rows of a global batch; the batch's mean loss over all processes.

        Raises:
            LearningError: the loss is not finite.
        """
        self.network.train()
        self.optimiser.zero_grad(set_to_none=False)
        for parameter in self.parameters:
            # Every process adds a tensor for each parameter, also a process without rows.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        loss = self.computation.backward(self.batch(rows)).reshape(1)
        self._processes.add([loss, *(p.grad for p in self.parameters if p.grad is not None)])
        mean_loss = float(loss)
        if not math.isfinite(mean_loss):
            raise LearningError(
                f"the loss is {mean_loss} at step {self._at.step + 1}",
                hint="a lower training.rate, or training.clip; data with values of very different size need cleaning",
                step=self._at.step + 1,
            )
        # After the sum: the bound is of the global batch.
        if self._options.clip:
            nn.utils.clip_grad_norm_(self.parameters, self._options.clip)
        self.optimiser.step()
        self._schedule.step()
        return mean_loss

    def batch(self, rows: Array) -> TrainingBatch:
        """This process's part of a global batch: each `size`-th row, weighted by the whole batch."""
        train = self._data.train
        weights = self._class_weights[train.labels[rows]]
        # Rows in turn: parts differ by a single row at most.
        own = slice(self._processes.rank, None, self._processes.size)
        inputs = augmented(train.inputs[rows[own]], rows[own], self._options, (self._seed, self._at.epoch))
        return TrainingBatch(
            torch.from_numpy(inputs).to(self._device),
            torch.from_numpy(train.labels[rows[own]]).to(self._device),
            torch.from_numpy(weights[own] / weights.sum()).to(self._device),
        )

    def order(self, epoch: int) -> Array:
        """The training part's rows in the order of an epoch."""
        # Of its own generator: draws from the global generator depend on earlier draws.
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._data.train))

    def scores_of(self, samples: Samples) -> Array:
        """Scores (count, classes) of samples, by the network's present weights."""
        self.network.eval()
        scores = []
        with torch.no_grad():
            for start in range(0, len(samples), _SCORED_ROWS):
                inputs = torch.from_numpy(samples.inputs[start : start + _SCORED_ROWS]).to(self._device)
                scores.append(self.computation.scores(inputs).cpu().numpy())
        return np.concatenate(scores) if scores else np.zeros((0, len(self._data.classes)), np.float32)

    def _remaining_batches(self) -> Iterator[Array]:
        order, size = self.order(self._at.epoch), self._options.batch
        for n in range(self._at.batches, self.steps_per_epoch):
            yield order[n * size : (n + 1) * size]

    def _note(self, loss: float) -> None:
        at = self._at
        at.batches, at.step = at.batches + 1, at.step + 1
        at.losses.append(loss)
        total = self._options.epochs * self.steps_per_epoch
        self._progress(f"training, epoch {at.epoch + 1} of {self._options.epochs}{self._so_far()}", at.step, total)

    def _so_far(self) -> str:
        if not self._at.history:
            return ""
        last = self._at.history[-1]
        accuracy = "" if math.isnan(last.accuracy) else f", {last.accuracy:.1%} of the validation part are right"
        return f": loss {last.loss:.3g}{accuracy}"

    def _end_epoch(self) -> None:
        at, validation = self._at, self._data.validation
        loss = accuracy = math.nan
        if len(validation):
            scores = torch.from_numpy(self.scores_of(validation))
            labels = torch.from_numpy(validation.labels)
            weights = torch.from_numpy(self._class_weights.astype(np.float32))
            loss = float(nn.functional.cross_entropy(scores, labels, weight=weights))
            accuracy = float((scores.argmax(1) == labels).float().mean())
        rate = float(self.optimiser.param_groups[0]["lr"])
        at.history.append(EpochResult(at.epoch + 1, float(np.mean(at.losses)), loss, accuracy, rate))
        # False for NaN: without a validation part the last weights stay.
        if loss < at.best_loss:
            at.best_loss, at.best_epoch = loss, at.epoch
            self._best = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
            self._on_best()
        at.epoch, at.batches, at.losses = at.epoch + 1, 0, []

    def _has_stalled(self) -> bool:
        patience = self._options.patience
        return bool(patience and self._best) and self._at.epoch - 1 - self._at.best_epoch >= patience

    def _checkpoint_if_due(self, *, ends_epoch: bool = False) -> None:
        every = self._options.checkpoint_every
        is_due = self._at.step % every == 0 if every else ends_epoch
        is_last = ends_epoch and (self._at.epoch == self._options.epochs or self._has_stalled())
        if self._checkpoints is not None and self._processes.rank == 0 and (is_due or is_last):
            self._checkpoints.write(self._at.step, self.state())

    def state(self) -> State:
        """All that a run needs to go on as without an interruption: tensors and plain values."""
        # A dictionary: torch reads no classes from archives without executing code.
        position = asdict(self._at)
        return {
            "position": position,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "best": self._best,
            "random": _random_state(),
        }

    def restore(self, state: State) -> None:
        """Go on from a state.

        Raises:
            LearningError: the state is of another network.
        """
        try:
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self._schedule.load_state_dict(state["schedule"])
        except (RuntimeError, ValueError, KeyError) as e:
            raise LearningError(f"the checkpoint is of another network: {e}", hint="--fresh starts anew") from e
        position = dict(state["position"])
        history = [EpochResult(**each) for each in position.pop("history")]
        self._at, self._best = _Position(**position, history=history), dict(state["best"])
        _restore_random_state(state["random"])

    def _resume(self) -> int:
        """Restore the newest whole checkpoint; its step, 0 without a checkpoint."""
        state = self._checkpoints.latest() if self._checkpoints is not None else None
        if state is None:
            return 0
        self.restore(state)
        return self._at.step


def schedule_of(
    optimiser: torch.optim.Optimizer, options: FitTable, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate of each step relative to the highest: a linear rise, then constant or half a cosine."""
    total = options.epochs * steps_per_epoch
    rise = options.warmup * total

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        if options.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, total - rise))))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def optimiser_of(parameters: Sequence[nn.Parameter], options: FitTable) -> torch.optim.Optimizer:
    """The optimiser that the options name."""
    match options.optimiser:
        case "sgd":
            return torch.optim.SGD(
                parameters, options.rate, momentum=options.momentum, weight_decay=options.weight_decay
            )
        case "adam":
            return torch.optim.Adam(parameters, options.rate, weight_decay=options.weight_decay)
    return torch.optim.AdamW(parameters, options.rate, weight_decay=options.weight_decay)


def _class_weights(labels: Array, classes: int, options: FitTable) -> Array:
    """A weight for each class: 1, or inverse to its frequency in the training part with a mean of 1 over samples."""
    if options.class_weights == "none":
        return np.ones(classes, np.float32)
    # A class that is absent from the training part has no weight to be divided by zero.
    counts = np.maximum(np.bincount(labels, minlength=classes), 1)
    return (len(labels) / (np.count_nonzero(np.bincount(labels, minlength=classes)) * counts)).astype(np.float32)


def _random_state() -> dict[str, Any]:
    """Generators that a user's network may draw from: torch's, numpy's and Python's."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, pending = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        # torch's archives hold no unsigned 32-bit arrays.
        "numpy": (str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)),
        "python": (version, list(internal), pending),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
    version, internal, pending = state["python"]
    random.setstate((version, tuple(internal), pending))
