"""The server of federated averaging as an exchange of frames, and the checkpoint of its rounds.

A frame names the operation in `segment`, the run in `bundle`, `NODE:PROCESS` in `request`, and the round in `step`.
Source: docs/reference/training.md, "Federated averaging".
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from isthmus.artifacts.choice import RAW, Choice
from isthmus.codecs import Encoding
from isthmus.context import Context
from isthmus.errors import LearningError, RequestMalformed
from isthmus.pipeline import encode_tensors
from isthmus.wire.frame import Frame, Step
from isthmus_tools.learning.federated.averaging import NodeUpdate, Weights, check_update
from isthmus_tools.learning.federated.rounds import RoundRecord, Rounds
from isthmus_tools.learning.training.checkpoints import Checkpoints, State

JOIN, TASK, UPDATE = "federated/join", "federated/task", "federated/update"
ROUND, WAIT, OVER, ACCEPTED, LATE, REJOIN = (
    f"federated/{name}" for name in ("round", "wait", "over", "accepted", "late", "rejoin")
)
EXAMPLES = "examples"
# The process tells a node that was started again from two nodes with a single name.
_CALLER = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{16})")


class RoundsServer:
    """Answers the nodes' frames of one run; thread-safe.

    The first node that joins brings the weights with which all begin: the configuration's seed makes the same on every
    node, and this process needs neither data nor network. `make` starts the rounds from these.
    """

    def __init__(self, make: Callable[[Weights], Rounds], run: str) -> None:
        self._make, self._run = make, run
        self._lock = threading.Lock()
        self.rounds: Rounds | None = None
        # Each node's process, and the processes that a later process of the same name replaced.
        self._processes: dict[str, str] = {}
        self._replaced: set[str] = set()

    def exchange(self, frame: Frame, context: Context) -> Frame:
        """The response to a node's frame.

        Raises:
            LearningError: another configuration, a name that two processes have, or too few nodes are left.
            RequestMalformed, ShapeMismatch: not a frame of this training.
        """
        if frame.bundle != self._run:
            raise LearningError(
                "the node has another configuration than the server",
                hint="start all with the same file: network, seed, classes and rounds are part of it",
            )
        node = self._node_of(frame.request)
        # Copies: arrays of a frame are views of the request's body, and would keep the body in memory.
        tensors = {name: array.copy() for name, array in frame.tensors.items() if name != EXAMPLES}
        if frame.segment == JOIN:
            return self._join(tensors, frame.request)
        if (rounds := self.rounds) is None:  # this process was started again, and has not heard of a network
            return numbered(REJOIN, self._run, 0, {}, frame.request)
        if frame.segment == TASK:
            task = rounds.task(node)
            if task.weights is None:
                return numbered(WAIT, self._run, task.number, {}, frame.request)
            return numbered(OVER if task.is_over else ROUND, self._run, task.number, task.weights, frame.request)
        if frame.segment != UPDATE or frame.step is None:
            raise RequestMalformed(f"{frame.segment[:80]!r} is no operation; there are {JOIN}, {TASK} and {UPDATE}")
        examples = frame.tensors.get(EXAMPLES)
        if examples is None or examples.dtype != np.int64 or examples.shape != ():
            raise RequestMalformed("an update has its number of examples as an int64")
        is_taken = rounds.deliver(frame.step.position, NodeUpdate(node, int(examples), tensors))
        return numbered(ACCEPTED if is_taken else LATE, self._run, frame.step.position, {}, frame.request)

    def _join(self, weights: Weights, caller: str) -> Frame:
        with self._lock:
            if self.rounds is None:
                # Before any node may get them: NaN of the first node would be the weights of all.
                check_update(NodeUpdate(caller.partition(":")[0], 1, weights), weights)
                self.rounds = self._make(weights)
            # Names, dtypes and shapes: a node with other inputs would fail in its first round.
            check_update(NodeUpdate(caller.partition(":")[0], 1, weights), self.rounds.weights)
        return numbered(ACCEPTED, self._run, self.rounds.number, {}, caller)

    def _node_of(self, caller: str) -> str:
        if (match := _CALLER.fullmatch(caller)) is None:
            raise RequestMalformed(
                "the frame's request is NODE:PROCESS, a name of 1 to 64 letters, digits, '.', '_', '-'"
            )
        node, process = match.groups()
        with self._lock:
            if process in self._replaced:
                raise LearningError(
                    f"another process trains as the node {node} now", node=node, hint="give each node its own --name"
                )
            if (before := self._processes.get(node)) not in (None, process):
                self._replaced.add(str(before))
            self._processes[node] = process
        return node


def numbered(
    operation: str,
    run: str,
    number: int,
    tensors: Weights,
    caller: str,
    choice: Choice = RAW,
    raw: Weights | None = None,
) -> Frame:
    """A frame of a round, its `tensors` encoded by `choice` and those of `raw` never."""
    # Counters and other integers have no redundancy that a lossy codec may use.
    floats = [name for name, array in tensors.items() if array.dtype.kind == "f"]
    encoded = encode_tensors(tensors, dict.fromkeys(floats, Encoding(choice.codec, choice.quality)))
    plain = {**(raw or {}), **{name: array for name, array in tensors.items() if name not in encoded}}
    return Frame(plain, run, operation, caller, encoded, step=Step(run, number))


def rounds_state(rounds: Rounds) -> State:
    """All that further rounds depend on, for a checkpoint."""
    return {
        "number": rounds.number,
        "weights": {name: torch.from_numpy(array.copy()) for name, array in rounds.weights.items()},
        "velocity": {name: torch.from_numpy(array.copy()) for name, array in rounds.velocity.items()},
    }


def restored(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Arguments of `Rounds` to go on from the newest checkpoint; None without one.

    Raises:
        LearningError: the checkpoint is of another configuration.
    """
    if (state := checkpoints.latest()) is None:
        return None
    arrays = {part: {name: tensor.numpy() for name, tensor in state[part].items()} for part in ("weights", "velocity")}
    return {"number": state["number"], **arrays}


def saving(checkpoints: Checkpoints) -> Any:
    """A callback for `Rounds` that writes a checkpoint after each round."""

    def save(record: RoundRecord, rounds: Rounds) -> None:
        checkpoints.write(record.number, rounds_state(rounds))

    return save
