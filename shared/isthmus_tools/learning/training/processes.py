"""The processes of a run on several: gradients that are summed, and the stages of a pipeline over the cut.

A pipeline has the head in process 0 and the tail in process 1: each holds the weights, gradients, optimiser and
checkpoints of its own stage alone, and micro-batches of a step follow each other through both.

Source: Huang et al., "GPipe", NeurIPS 2019; torch.distributed.pipelining.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isthmus_tools.learning.training.trainer import TrainingBatch, weighted_loss

# More would shorten the wait of a stage by less, and make micro-batches of a few samples.
MICRO_BATCHES = 4
# Axes of activations between the stages.
_MAX_RANK = 8


class GroupProcesses:
    """The processes of the process group, each with all weights: data parallel."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """See `Processes.add`: one exchange for all tensors."""
        # A message for each tensor would cost a round of latencies for each.
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()


class StageProcesses:
    """A stage of a pipeline as the trainer sees it: a process with all rows of a batch and its own parameters."""

    rank, size = 0, 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum the loss, which the last stage has; gradients belong to a single stage each."""
        dist.all_reduce(tensors[0])


class PipelineComputation:
    """A `Computation` of two stages; this process runs `stage`, the head in process 0 and the tail in process 1."""

    def __init__(self, stage: nn.Module, device: torch.device, *, label_smoothing: float, clip: float) -> None:
        self._stage, self._device = stage, device
        self._smoothing, self._clip = label_smoothing, clip
        self._is_first = dist.get_rank() == 0
        self._parameters = [p for p in stage.parameters() if p.requires_grad]
        self._schedules: dict[int, Any] = {}

    def backward(self, batch: TrainingBatch) -> Tensor:
        """See `Computation.backward`."""
        schedule = self._schedule(len(batch.targets))
        loss = torch.zeros((), device=self._device)
        if self._is_first:
            schedule.step(batch.inputs)
        else:
            losses: list[Tensor] = []
            # In one tensor, since a schedule splits one: class numbers are exact in float64.
            target = torch.stack([batch.targets.double(), batch.weights.double()], 1)
            schedule.step(target=target, losses=losses)
            loss = torch.stack([each.detach() for each in losses]).sum()
        self._bound_norm()
        return loss

    def scores(self, inputs: Tensor) -> Tensor:
        """See `Computation.scores`."""
        activations = _broadcast(self._stage(inputs) if self._is_first else None, 0, self._device)
        return _broadcast(None if self._is_first else self._stage(activations), 1, self._device)

    def _schedule(self, count: int) -> Any:
        """The schedule of a batch of `count` rows; its stage's buffers have the shapes of that batch."""
        if count not in self._schedules:
            from torch.distributed.pipelining import PipelineStage, ScheduleGPipe  # a second

            # Equal micro-batches: the buffers of a stage have one shape.
            chunks = next(n for n in range(min(MICRO_BATCHES, count), 0, -1) if count % n == 0)
            stage = PipelineStage(self._stage, dist.get_rank(), 2, self._device)
            # The sum of losses, whose weights make the batch's mean already.
            self._schedules[count] = ScheduleGPipe(stage, chunks, loss_fn=self._loss, scale_grads=False)
        return self._schedules[count]

    def _loss(self, scores: Tensor, target: Tensor) -> Tensor:
        return weighted_loss(scores, target[:, 0].long(), target[:, 1].to(scores.dtype), self._smoothing)

    def _bound_norm(self) -> None:
        """Bound the norm of both stages' gradients together, as one process does."""
        if not self._clip:
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        dist.all_reduce(square)
        factor = torch.clamp(self._clip / (square.sqrt() + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)


def _broadcast(tensor: Tensor | None, source: int, device: torch.device) -> Tensor:
    """The tensor of process `source`, on every process; its shape goes first."""
    shape = torch.zeros(_MAX_RANK + 1, dtype=torch.int64, device=device)
    if tensor is not None:
        shape[0] = tensor.dim()
        shape[1 : tensor.dim() + 1] = torch.tensor(tensor.shape)
    dist.broadcast(shape, source)
    rank, *sizes = shape.tolist()
    received = torch.empty(sizes[:rank], device=device) if tensor is None else tensor.detach().contiguous()
    dist.broadcast(received, source)
    return received


def common_step(steps: Sequence[int]) -> int | None:
    """The last step of which every process has a checkpoint; None without one."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, list(steps))
    common = set(every[0]).intersection(*every[1:])
    return max(common) if common else None
