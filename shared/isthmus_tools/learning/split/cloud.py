"""The cloud's side of split learning: the layers behind the cut, their optimiser, and each step applied once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from isthmus.arrays import Array
from isthmus.context import Context
from isthmus.errors import DeadlineExceeded, LearningError, RequestMalformed, ShapeMismatch, StateMissing
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
    number_of,
    numbers_of,
    position_of,
    tensor_of,
)
from isthmus_tools.learning.training.checkpoints import Checkpoints, State
from isthmus_tools.learning.training.config import FitTable
from isthmus_tools.learning.training.trainer import optimiser_of, schedule_of, weighted_loss

MakeLayers = Callable[[Sequence[int], int], nn.Module]
"""The layers behind the cut, by the shape of an input and the number of classes; from the run's seed."""
# Bounds of the join: a network is built from these numbers before any data arrives.
_MAX_INPUT, _MAX_CLASSES = 2**26, 2**20


class CloudLayers:
    """The layers behind the cut in training, with optimiser, rate schedule and the best weights so far."""

    def __init__(self, module: nn.Module, options: FitTable, steps_per_epoch: int) -> None:
        self.module, self._clip = module, options.clip
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise LearningError("there is nothing to train behind the cut", key="network.name")
        self._optimiser = optimiser_of(self.parameters, options)
        self._schedule = schedule_of(self._optimiser, options, steps_per_epoch)
        self.best: dict[str, Tensor] = {}

    def apply(self) -> None:
        """Apply the gradients: an optimiser step.

        Raises:
            LearningError: a gradient is not finite; nothing is applied.
        """
        # Finite gradients of scores may overflow on their way back, and one such step would end all weights as NaN.
        if not all(p.grad is None or torch.isfinite(p.grad).all() for p in self.parameters):
            self._optimiser.zero_grad()
            raise LearningError(
                "the training diverged: gradients behind the cut are NaN or infinite",
                hint="a lower training.rate, or a finer codec of gradients",
            )
        if self._clip:
            # The norm of this side's gradients: the head's are not known yet.
            nn.utils.clip_grad_norm_(self.parameters, self._clip)
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()

    def mark_best(self) -> None:
        """Keep a copy of the present weights as the best."""
        self.best = {name: value.clone() for name, value in self.module.state_dict().items()}

    def state(self) -> State:
        """All that the further steps depend on."""
        return {
            "module": self.module.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "best": self.best,
            "random": torch.get_rng_state(),
        }

    def restore(self, state: State) -> None:
        """Go on from a state."""
        self.module.load_state_dict(state["module"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._optimiser.zero_grad()
        self.best = dict(state["best"])
        torch.set_rng_state(state["random"])


class CloudSide:
    """Trains the layers behind the cut with the activations of a single edge; thread-safe.

    The response to the last call is stored: an edge that lost the response sends the call again, and nothing is applied
    twice. The layers are made when the first edge joins, since the edge knows inputs and classes. `on_step` gets the
    number of steps.
    """

    def __init__(
        self,
        make: MakeLayers,
        terms: SplitTerms,
        options: FitTable,
        checkpoints: Checkpoints,
        *,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._make, self._terms, self._options, self._checkpoints = make, terms, options, checkpoints
        self._on_step = on_step
        self._device = torch.device(options.device)
        self._lock = threading.Lock()
        self._made: tuple[tuple[int, ...], CloudLayers] | None = None
        self._edge = ""
        self._last: tuple[str, int, Frame] | None = None
        # Of the U-shape, between the two calls of a step: inputs and outputs of the forward pass.
        self._pending: tuple[Tensor, Tensor] | None = None
        self.step = 0
        """Optimiser steps that were applied."""

    def exchange(self, frame: Frame, context: Context) -> Frame:
        """The response to a frame of the edge.

        Raises:
            LearningError: another configuration, another edge has joined since, or the training diverged.
            StateMissing: this side is at another step: the edge joins again.
            RequestMalformed, ShapeMismatch: not a frame of this training.
            DeadlineExceeded: earlier calls took until the deadline.
        """
        with self._alone(context):
            if frame.bundle != self._terms.run:
                raise LearningError(
                    "the two sides have different configurations",
                    hint="start both with the same file: network, seed, [training] and [split_learning] are part of it",
                )
            if frame.segment == JOIN:
                return self._join(frame)
            position = position_of(frame)
            if frame.request != self._edge and self._edge:
                raise LearningError("another edge has joined this training since", hint="one edge trains at a time")
            if self._last is not None and self._last[:2] == (frame.segment, position):
                return self._last[2]
            if self._made is None or not self._edge or position != self.step:
                raise self._missing(position)
            return self._run(frame, self._made[1])

    def _run(self, frame: Frame, layers: CloudLayers) -> Frame:
        operations = {
            STEP: self._whole_step,
            FORWARD: self._forward,
            BACKWARD: self._backward,
            SAVE: self._save,
            MARK: self._mark,
            PREDICT: self._predict,
            WEIGHTS: self._weights,
        }
        if (operation := operations.get(frame.segment)) is None:
            raise RequestMalformed(f"{frame.segment[:80]!r} is no operation; there are {', '.join(operations)}")
        position = position_of(frame)
        try:
            reply = operation(frame, layers)
        except (RuntimeError, ValueError, IndexError) as e:
            # torch raises these for shapes and dtypes that do not go together, and for most other faults.
            raise ShapeMismatch(f"the layers behind the cut do not run on these tensors: {e}"[:500]) from e
        if frame.segment in (STEP, FORWARD, BACKWARD):
            self._last = (frame.segment, position, reply)
        return reply

    def _join(self, frame: Frame) -> Frame:
        """Go back to the last checkpoint of both sides; the edge that joined last trains."""
        facts = (*numbers_of(frame, INPUT_SHAPE), number_of(frame, CLASSES), number_of(frame, EPOCH_STEPS))
        # An edge with other data begins anew: the schedule of rates depends on the number of steps.
        is_known = self._made is not None and self._made[0] == facts
        layers = self._made[1] if self._made is not None and is_known else self._layers(frame)
        if not self._checkpoints.exist():
            self._checkpoints.write(0, layers.state())
        theirs, own = numbers_of(frame, CHECKPOINTS), self._checkpoints.steps()
        common = set(theirs) & set(own)
        if not common and 0 in theirs:
            # The edge begins anew. The state before the first step is of the seed, on both sides.
            self._checkpoints.remove()
            layers = self._layers(frame)
            self._checkpoints.write(0, layers.state())
            common = {0}
        if not common:
            raise LearningError(
                "the two sides have no checkpoint of the same step",
                hint="start the edge with --fresh to begin anew",
                edge=sorted(theirs),
                cloud=own,
            )
        step = max(common)
        try:
            layers.restore(self._checkpoints.read(step))
        except (RuntimeError, ValueError, KeyError) as e:
            # Layers that are restored in part are made again by the next join.
            self._made = None
            raise LearningError(
                "the checkpoints of the cloud's side are of other inputs or classes",
                hint="start the cloud's side with --fresh to begin anew",
                edge=list(facts),
            ) from e
        self.step, self._made = step, (facts, layers)
        self._edge, self._last, self._pending = frame.request, None, None
        return self._reply(frame, {})

    def _layers(self, frame: Frame) -> CloudLayers:
        shape, classes = numbers_of(frame, INPUT_SHAPE), number_of(frame, CLASSES)
        size = 1
        for n in shape:
            size *= max(1, n)
        if not (0 < len(shape) <= 4 and min(shape) > 0 and size <= _MAX_INPUT and 2 <= classes <= _MAX_CLASSES):
            raise RequestMalformed(f"no network is made for inputs {shape[:8]} and {classes} classes")
        steps = max(1, number_of(frame, EPOCH_STEPS))
        return CloudLayers(self._make(shape, classes).to(self._device), self._options, steps)

    def _whole_step(self, frame: Frame, layers: CloudLayers) -> Frame:
        if self._terms.labels_stay:
            raise RequestMalformed("the labels stay at the edge in this training")
        inputs = tensor_of(frame, ACTIVATIONS).to(self._device).requires_grad_()
        targets, weights = (tensor_of(frame, name).to(self._device) for name in (TARGETS, ROW_WEIGHTS))
        layers.module.train()
        try:
            loss = weighted_loss(layers.module(inputs), targets, weights, self._options.label_smoothing)
        except IndexError as e:
            raise RequestMalformed(f"a target is no class: {e}", tensor=TARGETS) from e
        if torch.isfinite(loss):  # else nothing is applied, and the edge stops at the loss
            loss.backward()  # type: ignore[no-untyped-call]
        return self._applied(frame, layers, inputs, {LOSS: array_of(loss.reshape(1))})

    def _forward(self, frame: Frame, layers: CloudLayers) -> Frame:
        inputs = tensor_of(frame, ACTIVATIONS).to(self._device).requires_grad_()
        layers.module.train()
        outputs = layers.module(inputs)
        self._pending = (inputs, outputs)
        return self._reply(frame, {ACTIVATIONS: array_of(outputs)})

    def _backward(self, frame: Frame, layers: CloudLayers) -> Frame:
        if self._pending is None:  # this side was started again between the two calls
            raise self._missing(self.step)
        inputs, outputs = self._pending
        gradients = tensor_of(frame, GRADIENTS).to(self._device)
        outputs.backward(gradients)  # type: ignore[no-untyped-call]
        return self._applied(frame, layers, inputs, {})

    def _applied(self, frame: Frame, layers: CloudLayers, inputs: Tensor, tensors: dict[str, Array]) -> Frame:
        # None where the loss is not finite, or where no path leads from the activations to the outputs.
        gradients = inputs.grad
        if gradients is None:
            gradients = torch.zeros_like(inputs)
        else:
            layers.apply()
        self.step, self._pending = self.step + 1, None
        self._on_step(self.step)
        return self._reply(frame, {GRADIENTS: array_of(gradients), **tensors})

    def _save(self, frame: Frame, layers: CloudLayers) -> Frame:
        # The edge writes its own after this reply: the cloud's side has every step that the edge has.
        self._checkpoints.write(self.step, layers.state())
        return self._reply(frame, {})

    def _mark(self, frame: Frame, layers: CloudLayers) -> Frame:
        layers.mark_best()
        return self._reply(frame, {})

    @torch.no_grad()
    def _predict(self, frame: Frame, layers: CloudLayers) -> Frame:
        layers.module.eval()
        return self._reply(
            frame, {ACTIVATIONS: array_of(layers.module(tensor_of(frame, ACTIVATIONS).to(self._device)))}
        )

    def _weights(self, frame: Frame, layers: CloudLayers) -> Frame:
        weights = layers.best or layers.module.state_dict()
        return self._reply(frame, {name: array_of(value) for name, value in weights.items()})

    def _reply(self, frame: Frame, tensors: dict[str, Array]) -> Frame:
        return message(frame.segment, self._terms, self.step, tensors, frame.request)

    def _missing(self, position: int) -> StateMissing:
        return StateMissing(
            f"the cloud's side is at step {self.step}, not {position}",
            segment="split",
            session=self._terms.run,
            position=self.step,
        )

    @contextmanager
    def _alone(self, context: Context) -> Iterator[None]:
        if not self._lock.acquire(timeout=context.deadline.remaining()):
            raise DeadlineExceeded("the deadline passed before the training was free")
        try:
            yield
        finally:
            self._lock.release()
