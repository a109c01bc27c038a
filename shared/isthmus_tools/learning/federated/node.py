"""A node of federated averaging: trains on its own data from the server's weights, and sends back their change."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import torch

from isthmus.arrays import Array
from isthmus.artifacts.choice import RAW, Choice
from isthmus.context import Context
from isthmus.errors import LearningError
from isthmus.pipeline.hop import Hop
from isthmus_tools.learning.federated.averaging import STATISTICS
from isthmus_tools.learning.federated.server import (
    ACCEPTED,
    EXAMPLES,
    JOIN,
    LATE,
    OVER,
    REJOIN,
    TASK,
    UPDATE,
    WAIT,
    numbered,
)
from isthmus_tools.learning.training.config import FitTable
from isthmus_tools.learning.training.networks import Normalised
from isthmus_tools.learning.training.samples import PreparedData
from isthmus_tools.learning.training.trainer import Trainer

# In float64: variances are differences of large numbers.
MEAN, SQUARE, FILL = (f"{STATISTICS}{name}" for name in ("mean", "square", "fill"))
# A smaller variance relative to the mean square is rounding: of float32, the inputs' dtype.
_CONSTANT = 1e-12


class LocalTraining:
    """A node's training: `epochs` passes a round over its own data, from the server's weights.

    The optimiser is new in each round: momentum of other weights would be of no use. The first round averages the
    statistics of the inputs (mean and mean square of each channel), so that all nodes normalise alike, and trains
    nothing. `prefix` selects the averaged weights of the network; the rest, a tail of the node's own, stays.
    """

    def __init__(
        self, network: Normalised, data: PreparedData, options: FitTable, seed: int, *, epochs: int, prefix: str = ""
    ) -> None:
        self.network = network
        self._data, self._seed, self._epochs = data, seed, epochs
        # Constant: a schedule over the whole run would need to know how often this node is left out.
        self._options = msgspec.structs.replace(options, schedule="constant", warmup=0.0)
        self._prefix = prefix
        self.examples = len(data.train)
        self._own = _statistics(data)

    def first_weights(self) -> dict[str, Array]:
        """The weights with which all begin: of the seed, and no statistics."""
        neutral = {MEAN: np.zeros_like(self._own[MEAN]), SQUARE: np.ones_like(self._own[SQUARE])}
        return self._shared_arrays() | neutral | {n: np.zeros_like(a) for n, a in self._own.items() if n == FILL}

    def load(self, weights: Mapping[str, Array]) -> None:
        """Take the server's weights.

        Raises:
            LearningError: they are of another network.
        """
        own = self._shared()
        if {n: tuple(v.shape) for n, v in own.items()} | {n: a.shape for n, a in self._own.items()} != {
            n: w.shape for n, w in weights.items()
        }:
            raise LearningError("the server's weights are of another network, or of inputs of another shape")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(torch.from_numpy(weights[name].copy()))
            mean, square = weights[MEAN], weights[SQUARE]
            variance = np.maximum(square - mean * mean, 0)
            # As in one process: a channel that is constant everywhere counts for nothing.
            is_constant = variance <= _CONSTANT * np.maximum(square, _CONSTANT)
            scale = np.where(is_constant, 0, 1 / np.sqrt(np.where(is_constant, 1, variance)))
            self.network.mean.copy_(torch.from_numpy(mean.astype(np.float32)).reshape(self.network.mean.shape))
            self.network.scale.copy_(torch.from_numpy(scale.astype(np.float32)).reshape(self.network.scale.shape))
            if self.network.has_fill:
                self.network.fill.copy_(
                    torch.from_numpy(weights[FILL].astype(np.float32)).reshape(self.network.fill.shape)
                )

    def change(self, number: int, weights: Mapping[str, Array]) -> dict[str, Array]:
        """The change of the weights by this node in round `number`, counted from 0.

        Raises:
            LearningError: the training diverged, or the weights are of another network.
        """
        self.load(weights)
        if number == 0:
            new = dict(weights) | self._own
        else:
            self._train(number)
            new = dict(weights) | self._shared_arrays()
        return {name: np.asarray(new[name] - weights[name], weights[name].dtype) for name in weights}

    def _train(self, number: int) -> None:
        trainer = Trainer(self.network, self._data, self._options, self._seed)
        for epoch in range(number * self._epochs, (number + 1) * self._epochs):
            trainer.pass_over(epoch)

    def _shared(self) -> dict[str, torch.Tensor]:
        state = self.network.network.state_dict()
        return {name: value for name, value in state.items() if name.startswith(self._prefix)}

    def _shared_arrays(self) -> dict[str, Array]:
        return {name: value.detach().cpu().numpy().copy() for name, value in self._shared().items()}


def _statistics(data: PreparedData) -> dict[str, Array]:
    """Mean and mean square of each channel of the training part, and the values that replace missing ones."""
    inputs = data.train.inputs.astype(np.float64)
    fill = data.statistics.fill
    if fill is not None:
        inputs = np.where(np.isnan(inputs), fill, inputs)
    axes = (0, *range(2, inputs.ndim))
    arrays = {MEAN: inputs.mean(axes), SQUARE: (inputs**2).mean(axes)}
    return arrays if fill is None else arrays | {FILL: fill.astype(np.float64)}


class FederatedNode:
    """Calls the server for tasks until the rounds are over: nodes behind NAT are never called."""

    def __init__(
        self,
        name: str,
        hop: Hop,
        run: str,
        training: LocalTraining,
        *,
        choice: Choice = RAW,
        call_s: float = 60.0,
        poll_s: float = 0.5,
        on_round: Callable[[int, bool], None] = lambda number, is_late: None,
    ) -> None:
        self._caller = f"{name}:{secrets.token_hex(8)}"
        self._hop, self._run, self._training, self._choice = hop, run, training, choice
        self._call_s, self._poll_s, self._on_round = call_s, poll_s, on_round
        self._stop = threading.Event()

    def stop(self) -> None:
        """End after the round in work; from another thread."""
        self._stop.set()

    def run(self) -> int:
        """Take part until the rounds are over; the number of rounds with this node. The network has the last weights.

        Raises:
            LearningError: another configuration, too few nodes are left, or the training diverged.
            HopError: the server cannot be reached for `call_s` seconds.
        """
        count, joined = 0, False
        while not self._stop.is_set():
            if not joined:
                self._call(JOIN, 0, self._training.first_weights())
                joined = True
            operation, number, weights = self._call(TASK, 0, {})
            if operation == OVER:
                self._training.load(weights)
                break
            # Polled: a server behind gateways cannot hold a request open for the minutes of a round.
            if operation == REJOIN:
                joined = False
                continue
            if operation == WAIT:
                self._stop.wait(self._poll_s)
                continue
            change = self._training.change(number, weights)
            answer, _, _ = self._call(UPDATE, number, change)
            if answer == REJOIN:
                joined = False
                continue
            if answer not in (ACCEPTED, LATE):
                raise LearningError(f"the server answered {answer[:80]!r} to an update")
            count += answer == ACCEPTED
            self._on_round(number + 1, answer == LATE)
        return count

    def _call(self, operation: str, number: int, tensors: Mapping[str, Array]) -> tuple[str, int, Mapping[str, Array]]:
        # Tasks name no number: the server learns of a node's data by updates alone.
        examples = {EXAMPLES: np.asarray(self._training.examples, np.int64)} if operation == UPDATE else {}
        frame = numbered(operation, self._run, number, tensors, self._caller, self._choice, examples)
        reply = self._hop.call(frame, Context.from_headers({}, longest_s=self._call_s)).frame
        if reply.step is None:
            raise LearningError(f"the server answered {reply.segment[:80]!r} without a round")
        return reply.segment, reply.step.position, reply.tensors
