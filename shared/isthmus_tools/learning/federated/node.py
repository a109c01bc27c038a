"""A node of federated averaging: trains on its own data from the server's weights, and sends back their change."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import torch
from torch import nn

from isthmus.arrays import Array
from isthmus.artifacts.choice import RAW, Choice
from isthmus.context import Context
from isthmus.errors import LearningError
from isthmus.pipeline.hop import Hop
from isthmus_tools.learning.federated.server import (
    ACCEPTED,
    EXAMPLES,
    LATE,
    OVER,
    TASK,
    UPDATE,
    WAIT,
    numbered,
)
from isthmus_tools.learning.training.config import FitTable
from isthmus_tools.learning.training.samples import PreparedData
from isthmus_tools.learning.training.trainer import Trainer


class LocalTraining:
    """A node's training: `epochs` passes a round over its own data, from the server's weights.

    The optimiser is new in each round: momentum of other weights would be of no use. `prefix` selects the averaged
    weights; the rest, for example a tail of the node's own, stays.
    """

    def __init__(
        self, network: nn.Module, data: PreparedData, options: FitTable, seed: int, *, epochs: int, prefix: str = ""
    ) -> None:
        self._network, self._data, self._seed, self._epochs = network, data, seed, epochs
        # Constant: a schedule over the whole run would need to know how often this node is left out.
        self._options = msgspec.structs.replace(options, schedule="constant", warmup=0.0)
        self._prefix = prefix
        self.examples = len(data.train)

    def weights(self) -> dict[str, Array]:
        """The averaged weights at present."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self._shared().items()}

    def load(self, weights: Mapping[str, Array]) -> None:
        """Take the server's weights.

        Raises:
            LearningError: weights of another network.
        """
        # Shapes too: `copy_` would broadcast a smaller tensor without an error.
        own = self._shared()
        if {n: v.shape for n, v in own.items()} != {n: w.shape for n, w in weights.items()}:
            raise LearningError("the server's weights are of another network")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(torch.from_numpy(weights[name].copy()))

    def change(self, number: int, weights: Mapping[str, Array]) -> dict[str, Array]:
        """The change of the weights by the training of round `number`.

        Raises:
            LearningError: the training diverged, or the weights are of another network.
        """
        self.load(weights)
        trainer, size = Trainer(self._network, self._data, self._options, self._seed), self._options.batch
        for epoch in range(number * self._epochs, (number + 1) * self._epochs):
            order = trainer.order(epoch)
            for start in range(0, len(order), size):
                trainer.step(order[start : start + size])
        return {name: np.asarray(after - weights[name]) for name, after in self.weights().items()}

    def _shared(self) -> dict[str, torch.Tensor]:
        state = self._network.state_dict()
        return {name: value for name, value in state.items() if name.startswith(self._prefix)}


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
        count = 0
        while not self._stop.is_set():
            operation, number, weights = self._call(TASK, 0, {})
            if operation == OVER:
                self._training.load(weights)
                break
            # Polled: a server behind gateways cannot hold a request open for the minutes of a round.
            if operation == WAIT:
                self._stop.wait(self._poll_s)
                continue
            change = self._training.change(number, weights)
            answer, _, _ = self._call(UPDATE, number, change)
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
