"""Distillation of a pruned head on the head's own activations: all of its layers' weights are trained by torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.calibration.boundary import BoundarySamples
from isthmus_tools.graph.channel_edits import EditableGraph
from isthmus_tools.graph.torch_graph import TorchGraph, torch_module
from isthmus_tools.learning.compression.subject import HeadSubject
from isthmus_tools.progress import Progress, silent

# Small: refit weights are near a minimum of their own layers.
_RATE = 3e-5
MAX_STEPS, _BATCH = 240, 8
# Every so many steps the samples that do not train are looked at; after as many looks without gain training ends.
_LOOK_STEPS, _PATIENCE = 20, 4
# One in so many samples, those of the last files, only looks.
_LOOKING = 5
# Of the boundary, relative: torch and onnxruntime sum in other orders.
_MAX_DIFFERENCE = 1e-3


def distil(
    subject: HeadSubject, graph: Path, out: Path, progress: Progress = silent, steps: int = MAX_STEPS
) -> tuple[Path, int]:
    """Train a graph in the head's place to give the head's boundary tensors; the file, and the steps of its weights.

    The loss is the mean squared difference over the mean square of each boundary tensor. A fifth of the samples do not
    train: the weights are those that are best on these, the graph's own if none are better. `graph` is made of the
    samples of `training_part` alone: those that it was fitted to would say too much for it.

    Raises:
        ModelError: torch is missing, does not know an operator, or computes another function than onnxruntime.
    """
    torch = torch_module()
    torch.manual_seed(0)
    edited = EditableGraph(graph)
    student, teacher = TorchGraph(edited.model), subject.runner(subject.graph)
    samples = [(arrays, teacher.run(arrays)) for arrays in subject.head_samples()]
    _check(student, subject.runner(graph).run(samples[0][0]), samples[0][0])
    training, looking = samples[: -max(1, len(samples) // _LOOKING)], samples[-max(1, len(samples) // _LOOKING) :]
    with _threads(torch, subject.threads):
        optimiser = torch.optim.Adam(student.parameters.values(), lr=_RATE)
        best, best_step, weights = _look(torch, student, looking), 0, _weights(student)
        rng = np.random.default_rng(0)
        for step in range(1, steps + 1):
            progress("distilling", step, steps)
            optimiser.zero_grad()
            # One after the other: a graph may hold the batch's size in its constants.
            for index in rng.choice(len(training), min(_BATCH, len(training)), replace=False):
                arrays, target = training[index]
                (_loss(torch, student(arrays), target) / _BATCH).backward()
            optimiser.step()
            if step % _LOOK_STEPS == 0:
                if (loss := _look(torch, student, looking)) < best:
                    best, best_step, weights = loss, step, _weights(student)
                elif step - best_step >= _PATIENCE * _LOOK_STEPS:
                    break
    for (node, index), array in weights.items():
        edited.set_constant(node, index, array)
    return edited.save(out), best_step


def training_part(subject: HeadSubject) -> HeadSubject:
    """The subject with the samples that train."""
    paths = subject.samples.paths
    return replace(subject, samples=BoundarySamples(paths[: -max(1, len(paths) // _LOOKING)]))


@contextmanager
def _threads(torch: Any, count: int) -> Iterator[None]:
    """Train on so many threads: of small operators more cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(student: TorchGraph, expected: Mapping[str, Array], arrays: Mapping[str, Array]) -> None:
    for name, tensor in student(arrays).items():
        difference = np.abs(tensor.detach().numpy() - expected[name]).max(initial=0)
        if not difference <= _MAX_DIFFERENCE * max(1e-6, float(np.abs(expected[name]).max(initial=0))):
            raise ModelError(f"torch computes {name} otherwise than onnxruntime: this graph cannot be distilled")


def _loss(torch: Any, outputs: Mapping[str, Any], target: Mapping[str, Array]) -> Any:
    losses = []
    for name, tensor in outputs.items():
        wanted = torch.from_numpy(target[name])
        losses.append(((tensor - wanted) ** 2).mean() / (wanted**2).mean().clamp(min=1e-12))
    return sum(losses)


def _look(torch: Any, student: TorchGraph, samples: list[Any]) -> float:
    with torch.no_grad():
        return float(np.mean([float(_loss(torch, student(arrays), target)) for arrays, target in samples]))


def _weights(student: TorchGraph) -> dict[tuple[str, int], Array]:
    return {place: parameter.detach().numpy().copy() for place, parameter in student.parameters.items()}
