"""The edge's side of split learning: gradients of the head, and in the U-shape of the last layers, over a hop."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.arrays import Array
from isthmus.context import Context
from isthmus.errors import LearningError, StateMissing
from isthmus.pipeline.hop import Hop
from isthmus.wire.frame import Frame
from isthmus_tools.learning.split.messages import (
    ACTIVATIONS,
    BACKWARD,
    CHECKPOINTS,
    CLASSES,
    EPOCH_STEPS,
    FORWARD,
    GRADIENTS,
    INPUT_SHAPE,
    JOIN,
    LOSS,
    MARK,
    PREDICT,
    ROW_WEIGHTS,
    SAVE,
    STEP,
    TARGETS,
    WEIGHTS,
    SplitTerms,
    array_of,
    message,
    position_of,
    tensor_of,
)
from isthmus_tools.learning.training.checkpoints import Checkpoints, State
from isthmus_tools.learning.training.networks import Normalised, two_parts
from isthmus_tools.learning.training.trainer import Trainer, TrainingBatch, TrainingResult, weighted_loss

# A cloud that loses its state again and again before the next checkpoint is not going to get there.
_MAX_REJOINS = 5


class EdgeLayers(nn.Module):
    """The layers at the edge: the head, and in the U-shape the model's last layer."""

    def __init__(self, head: nn.Module, end: nn.Module | None = None) -> None:
        super().__init__()
        self.head, self.end = head, end


def edge_layers(network: nn.Module, *, labels_stay: bool) -> EdgeLayers:
    """The edge's layers of a network of two parts.

    Raises:
        LearningError: it has no two parts, or its tail is no sequence that could end at the edge.
    """
    return EdgeLayers(two_parts(network)[0], layers_behind_cut(network, labels_stay=labels_stay)[1])


def layers_behind_cut(network: nn.Module, *, labels_stay: bool) -> tuple[nn.Module, nn.Module | None]:
    """The cloud's layers, and the last layer where that stays at the edge.

    Raises:
        LearningError: as `edge_layers`.
    """
    _, tail = two_parts(network)
    if not labels_stay:
        return tail, None
    if not isinstance(tail, nn.Sequential) or len(tail) < 2:
        raise LearningError(
            "the tail is no torch.nn.Sequential of two layers or more: no last layer can stay at the edge",
            key="split_learning.labels",
        )
    return tail[:-1], tail[-1]


@dataclass
class Traffic:
    """Frames that crossed the link, in bytes, and calls."""

    sent_bytes: int = 0
    received_bytes: int = 0
    calls: int = 0


class SplitComputation:
    """A `Computation` with the layers behind the cut trained by a `CloudSide` over `hop`.

    `network` normalises inputs in front of `EdgeLayers`. `call_s` bounds a call with its retries, in seconds: a cloud
    that is started again within that time is waited for.
    """

    def __init__(
        self,
        network: Normalised,
        layers: EdgeLayers,
        hop: Hop,
        terms: SplitTerms,
        *,
        label_smoothing: float = 0.0,
        call_s: float = 60.0,
    ) -> None:
        self._network, self._layers, self._hop, self._terms = network, layers, hop, terms
        self._smoothing, self._call_s = label_smoothing, call_s
        # Of this process: the cloud refuses calls of an edge after another has joined.
        self._process = secrets.token_hex(8)
        self.traffic = Traffic()
        self._classes = 0
        self.step = 0
        """Optimiser steps that the cloud's side has applied."""

    def join(self, checkpoints: Sequence[int], input_shape: Sequence[int], classes: int, epoch_steps: int) -> int:
        """Agree on the last checkpoint of both sides, and have the cloud go back there; the step."""
        # Counts alone describe the data: the cloud needs these to make its layers and their schedule.
        numbers = {
            CHECKPOINTS: checkpoints,
            INPUT_SHAPE: input_shape,
            CLASSES: [classes],
            EPOCH_STEPS: [epoch_steps],
        }
        reply = self._call(JOIN, {name: np.asarray(values, np.int64) for name, values in numbers.items()})
        self.step, self._classes = position_of(reply), classes
        return self.step

    def backward(self, batch: TrainingBatch) -> Tensor:
        """See `Computation.backward`; the cloud's side applies its own gradients."""
        activations = self._layers.head(self._network.normalised(batch.inputs))
        crossing = {ACTIVATIONS: array_of(activations)}
        if self._layers.end is None:
            rows = {TARGETS: array_of(batch.targets), ROW_WEIGHTS: array_of(batch.weights)}
            reply = self._call(STEP, crossing | rows)
            # Not `tensor_of`: the trainer has the words for a loss that is not finite.
            told = reply.tensors.get(LOSS)
            loss = torch.tensor(float(told[0]) if told is not None and told.shape == (1,) else float("nan"))
        else:
            # A leaf: gradients end here, and cross as a frame.
            middle = tensor_of(self._call(FORWARD, crossing), ACTIVATIONS).to(activations.device).requires_grad_()
            with _fitting("activations"):
                loss = weighted_loss(self._layers.end(middle), batch.targets, batch.weights, self._smoothing)
                loss.backward()  # type: ignore[no-untyped-call]
            gradients = torch.zeros_like(middle) if middle.grad is None else middle.grad
            reply = self._call(BACKWARD, {GRADIENTS: array_of(gradients)})
        with _fitting("gradients"):
            activations.backward(tensor_of(reply, GRADIENTS).to(activations.device))
        self.step = position_of(reply)
        return loss.detach()

    def scores(self, inputs: Tensor) -> Tensor:
        """See `Computation.scores`."""
        activations = array_of(self._layers.head(self._network.normalised(inputs)))
        outputs = tensor_of(self._call(PREDICT, {ACTIVATIONS: activations}), ACTIVATIONS).to(inputs.device)
        with _fitting("scores"):
            scores: Tensor = outputs if self._layers.end is None else self._layers.end(outputs)
            if tuple(scores.shape) != (expected := (len(inputs), self._classes)):
                raise ValueError(f"they are {tuple(scores.shape)}, not {expected}")
        return scores

    def save(self) -> None:
        """Have the cloud's side write a checkpoint."""
        self._call(SAVE, {})

    def mark_best(self) -> None:
        """Have the cloud's side keep its present weights as the best."""
        self._call(MARK, {})

    def cloud_weights(self) -> dict[str, Tensor]:
        """The best weights of the cloud's layers, to put the whole network together."""
        reply = self._call(WEIGHTS, {})
        return {name: tensor_of(reply, name) for name in reply.tensors}

    def load_cloud_weights(self, layers: nn.Module) -> None:
        """Load them into layers of the same form.

        Raises:
            LearningError: they are of other layers.
        """
        weights = self.cloud_weights()
        with _fitting("weights"):
            layers.load_state_dict(weights)

    def _call(self, operation: str, tensors: dict[str, Array]) -> Frame:
        frame = message(operation, self._terms, self.step, tensors, self._process)
        reply = self._hop.call(frame, Context.from_headers({}, longest_s=self._call_s))
        self.traffic.sent_bytes += reply.sent_bytes
        self.traffic.received_bytes += reply.received_bytes
        self.traffic.calls += 1
        return reply.frame


@contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Name the other side where its tensors do not fit the edge's."""
    try:
        yield
    except (RuntimeError, ValueError) as e:  # of torch, for shapes and dtypes
        raise LearningError(
            f"the cloud's side answered with {what} that do not fit: {e}"[:500],
            hint="both sides need the same version of Isthmus and the same file",
        ) from e


class SplitCheckpoints(Checkpoints):
    """The edge's checkpoints, each written after the cloud's of the same step.

    A kill between the two leaves the edge a checkpoint behind, so both sides keep two or more.
    """

    def __init__(self, folder: Path, keep: int, fingerprint: str, computation: SplitComputation) -> None:
        super().__init__(folder, max(2, keep), fingerprint)
        self._computation = computation

    def begin(self, state: State) -> None:
        """Write the state before the first step where there is no checkpoint; the cloud writes its own by itself."""
        if not self.exist():
            super().write(0, state)

    def write(self, step: int, state: State) -> None:
        """See `Checkpoints.write`."""
        self._computation.save()
        super().write(step, state)


def train_edge(
    trainer: Trainer,
    computation: SplitComputation,
    checkpoints: SplitCheckpoints,
    input_shape: Sequence[int],
    classes: int,
) -> TrainingResult:
    """Train both sides to the end, from the last checkpoint that both have.

    Raises:
        LearningError: the sides do not fit, or the training diverged.
        StateMissing: the cloud's side loses its state again and again.
        HopError: the cloud cannot be reached for the time of a call; the checkpoints stay.
    """
    checkpoints.begin(trainer.state())
    furthest, rejoins = -1, 0
    while True:
        step = computation.join(checkpoints.steps(), input_shape, classes, trainer.steps_per_epoch)
        trainer.restore(checkpoints.read(step))
        try:
            return trainer.run()
        except StateMissing:
            # The cloud's process was started again, and stands at its last checkpoint.
            rejoins = rejoins + 1 if step <= furthest else 0
            furthest = max(furthest, step)
            if rejoins >= _MAX_REJOINS:
                raise
