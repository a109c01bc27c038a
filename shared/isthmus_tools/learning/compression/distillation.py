"""Distillation of a pruned head on the head's own activations: all of its layers' weights are trained by torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus.pipeline.agreement import agrees
from isthmus.runtime.ort_runner import OrtRunner
from isthmus_tools.calibration.boundary import BoundarySamples
from isthmus_tools.graph.channel_edits import EditableGraph
from isthmus_tools.graph.torch_graph import TorchGraph, torch_module
from isthmus_tools.learning.compression.measurement import Outcomes
from isthmus_tools.learning.compression.subject import Arrays, HeadSubject
from isthmus_tools.progress import Progress, silent

# Of each layer's RMS weight, after the warm-up: refit weights are near a minimum of their own layers.
_RATE, _WARM_UP = 3e-3, 0.05
MAX_STEPS, _BATCH = 1200, 16
MAX_CPU_S = 240.0
"""Seconds of CPU time of a training: the cosine of its rate ends there, where steps are slow."""
# Every so many steps the inputs that do not train are looked at; after as many looks without gain training ends.
_LOOK_STEPS, _PATIENCE = 40, 6
# Of the loss, where float32 rounds: channels that only repeat others went.
_NOTHING = 1e-9
# One in so many inputs only looks.
_LOOKING = 5
# Of the boundary, relative: torch and onnxruntime sum in other orders.
_MAX_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class HeadFigures:
    """What a graph in the head's place does to inputs: the error at the cut, and how many of them keep predictions."""

    error: float
    same: int
    inputs: int

    def __str__(self) -> str:
        return f"error {self.error:.4g}, agreement {self.same / max(1, self.inputs):.1%}"


@dataclass(frozen=True)
class Distillation:
    """A trained graph, the steps of its weights, and figures before and after on inputs that did not train."""

    path: Path
    steps: int
    before: HeadFigures
    after: HeadFigures

    @property
    def gains(self) -> bool:
        """Whether training changed the graph, and neither figure is worse than before."""
        return self.steps > 0 and self.after.error <= self.before.error and self.after.same >= self.before.same

    def __str__(self) -> str:
        return f"on {self.before.inputs} inputs that did not train {self.before} before, {self.after} after"


def distil(
    subject: HeadSubject,
    graph: Path,
    out: Path,
    progress: Progress = silent,
    steps: int = MAX_STEPS,
    cpu_s: float = MAX_CPU_S,
) -> Distillation:
    """Train a graph in the head's place to give the head's boundary tensors.

    The loss is the mean squared difference over the mean square of each boundary tensor. A fifth of the inputs do not
    train: the weights are those that are best on these, the graph's own if none are better. `graph` is made of the
    inputs of `training_part` alone: those that it was fitted to would say too much for it.

    Raises:
        ModelError: torch is missing, does not know an operator, or computes another function than onnxruntime.
    """
    torch = torch_module()
    torch.manual_seed(0)
    edited = EditableGraph(graph)
    student, teacher = TorchGraph(edited.model), subject.runner(subject.graph)
    training, looking = _parts(subject)
    examples = _Examples(subject, teacher)
    first = examples.read(training[0])[0]
    _check(student, subject.runner(graph).run(first), first)
    begin = time.process_time()
    with _threads(torch, subject.threads):
        optimiser = torch.optim.Adam(_rates(torch, student))
        full = [group["lr"] for group in optimiser.param_groups]
        best, best_step, weights = _look(torch, student, examples, looking), 0, _weights(student)
        rng = np.random.default_rng(0)
        done, step = 0.0, 0
        while done < 1 and best > _NOTHING:
            progress("distilling", step := step + 1, steps)
            factor = min(1.0, step / max(1.0, _WARM_UP * steps)) * (1 + math.cos(math.pi * done)) / 2
            for group, rate in zip(optimiser.param_groups, full, strict=True):
                group["lr"] = rate * factor
            optimiser.zero_grad()
            # One after the other: a graph may hold the batch's size in its constants.
            for index in rng.choice(len(training), min(_BATCH, len(training)), replace=False):
                arrays, target = examples.read(training[index])
                (_loss(torch, student(arrays), target) / _BATCH).backward()
            optimiser.step()
            # Time counts only where it is scarcer than steps, so that a second run gives the same weights.
            done = max(step / steps, (time.process_time() - begin) / cpu_s)
            if step % _LOOK_STEPS == 0 or done >= 1:
                if (loss := _look(torch, student, examples, looking)) < best:
                    best, best_step, weights = loss, step, _weights(student)
                elif step - best_step >= _PATIENCE * _LOOK_STEPS:
                    break
    for (node, index), array in weights.items():
        edited.set_constant(node, index, array)
    path = edited.save(out)
    before, after = (_figures(subject, teacher, each, looking) for each in (graph, path))
    return Distillation(path, best_step, before, after)


def training_part(subject: HeadSubject) -> HeadSubject:
    """The subject with the inputs that train."""
    return replace(subject, samples=BoundarySamples(_parts(subject)[0]))


def _parts(subject: HeadSubject) -> tuple[list[Path], list[Path]]:
    """Inputs that train, and those that look: the last ones, which in a stream are least like the others."""
    paths = list(subject.samples.paths)
    if len(paths) < _LOOKING:
        raise ModelError(f"distillation needs {_LOOKING} inputs or more, and has {len(paths)}")
    count = len(paths) // _LOOKING
    return paths[:-count], paths[-count:]


class _Examples:
    """Inputs and the head's boundary tensors, read and computed when asked for: memory holds a single one."""

    def __init__(self, subject: HeadSubject, teacher: OrtRunner) -> None:
        self._subject, self._teacher = subject, teacher

    def read(self, path: Path) -> tuple[dict[str, Array], dict[str, Array]]:
        arrays = self._subject.head_inputs(next(iter(BoundarySamples([path]))))
        return arrays, self._teacher.run(arrays)


@contextmanager
def _threads(torch: Any, count: int) -> Iterator[None]:
    """Train on so many threads: of small operators more cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rates(torch: Any, student: TorchGraph) -> list[dict[str, Any]]:
    """A group of parameters for each tensor; a bias moves by the size of its layer's weights."""
    groups = []
    for (node, index), tensor in student.parameters.items():
        weight = student.parameters.get((node, 1), tensor)
        size = float(weight.detach().square().mean().sqrt())
        groups.append({"params": [tensor], "lr": _RATE * size, "name": f"{node}/{index}"})
    return groups


def _check(student: TorchGraph, expected: Arrays, arrays: Arrays) -> None:
    for name, tensor in student(arrays).items():
        difference = np.abs(tensor.detach().numpy() - expected[name]).max(initial=0)
        if not difference <= _MAX_DIFFERENCE * max(1e-6, float(np.abs(expected[name]).max(initial=0))):
            raise ModelError(f"torch computes {name} otherwise than onnxruntime: this graph cannot be distilled")


def _loss(torch: Any, outputs: dict[str, Any], target: Arrays) -> Any:
    losses = []
    for name, tensor in outputs.items():
        wanted = torch.from_numpy(target[name])
        losses.append(((tensor - wanted) ** 2).mean() / (wanted**2).mean().clamp(min=1e-12))
    return sum(losses)


def _look(torch: Any, student: TorchGraph, examples: _Examples, paths: Sequence[Path]) -> float:
    with torch.no_grad():
        pairs = map(examples.read, paths)
        return float(np.mean([float(_loss(torch, student(arrays), target)) for arrays, target in pairs]))


def _weights(student: TorchGraph) -> dict[tuple[str, int], Array]:
    return {place: parameter.detach().numpy().copy() for place, parameter in student.parameters.items()}


def _figures(subject: HeadSubject, teacher: OrtRunner, graph: Path, paths: Sequence[Path]) -> HeadFigures:
    """Both figures as onnxruntime computes them, as the function will."""
    runner, outcomes = subject.runner(graph), Outcomes()
    for arrays in BoundarySamples(paths):
        inputs = subject.head_inputs(arrays)
        boundary = runner.run(inputs)
        same = agrees(subject.measure, subject.executor.predict(arrays), subject.predict(arrays, boundary))
        outcomes.add("", same, teacher.run(inputs), boundary)
    return HeadFigures(outcomes.error, sum(outcomes.same[""]), len(paths))
