"""From prepared data to a trained network and its graph: the work of a process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from isthmus.arrays import Array
from isthmus.errors import LearningError
from isthmus.settings import RegistrySettings
from isthmus_tools.learning.training.checkpoints import Checkpoints
from isthmus_tools.learning.training.config import ONE_PROCESS, TrainConfig, TrainingPlace
from isthmus_tools.learning.training.networks import Normalised, make_network
from isthmus_tools.learning.training.samples import PreparedData, Samples
from isthmus_tools.learning.training.trainer import Trainer, TrainingResult
from isthmus_tools.progress import Progress, silent

SCORES = "scores"
"""Name of the graph's output: a score for each class, before softmax."""
# Rows of a run of the graph: bounds the memory of an evaluation.
_ROWS = 256


@dataclass(frozen=True)
class TrainedNetwork:
    """The network with its best weights, its history, and the seconds of this process."""

    network: Normalised
    result: TrainingResult
    seconds: float

    def document(self) -> dict[str, Any]:
        """The training, JSON-ready."""
        result = self.result
        parameters = sum(p.numel() for p in self.network.parameters())
        return {
            "best_epoch": result.best_epoch + 1,
            "epochs": len(result.history),
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "resumed_at_step": result.resumed_at,
            "seconds": round(self.seconds, 2),
            "parameters": parameters,
            "history": [_finite(asdict(each)) for each in result.history],
        }


def open_checkpoints(config: TrainConfig, data: PreparedData, warn: Callable[[str], None]) -> Checkpoints:
    """The checkpoints of a run with this configuration and this data."""
    folder = config.run_folder / "checkpoints"
    return Checkpoints(folder, config.training.keep, fingerprint(config, data), warn)


def fingerprint(config: TrainConfig, data: PreparedData) -> str:
    """A digest of all that the weights depend on."""
    # How often and how long checkpoints are kept changes no weight.
    loop = msgspec.structs.replace(config.training, keep=1, checkpoint_every=0, threads=1)
    digest = hashlib.sha256(msgspec.json.encode([config.seed, config.network, loop]))
    digest.update(data.digest().encode())
    digest.update(config.network_code())
    return digest.hexdigest()


def initial_network(config: TrainConfig, data: PreparedData, *, check: bool = True) -> Normalised:
    """The network before training, the same in every process; `check` as in `make_network`.

    Raises:
        LearningError: the network is absent, or does not fit the data.
    """
    # Of the initial weights; the order of samples has generators of its own.
    torch.manual_seed(config.seed)
    # Kernels of small networks take longer on several threads.
    torch.set_num_threads(config.training.threads)
    network = make_network(config.network, config.network_name, data.input_shape, len(data.classes), check=check)
    return Normalised(network, data.statistics, len(data.input_shape))


def fit(
    config: TrainConfig,
    data: PreparedData,
    checkpoints: Checkpoints,
    *,
    resume: bool,
    progress: Progress = silent,
    place: TrainingPlace = ONE_PROCESS,
    settings: RegistrySettings | None = None,
) -> TrainedNetwork:
    """Train the configuration's network where `place` says; the data is in the run's folder too.

    `settings` have the secrets for calls to other machines.

    Raises:
        LearningError: as `Trainer.run`, the device is missing, or a worker died too often.
        HopError: the other side of split learning cannot be reached.
    """
    _check_device(config.training.device)
    if place.processes > 1 or place.pipeline or place.split_with:
        return _fit_elsewhere(config, data, place, settings or RegistrySettings(), resume, progress)
    began = time.monotonic()
    network = initial_network(config, data)
    trainer = Trainer(network, data, config.training, config.seed, checkpoints=checkpoints, progress=progress)
    result = trainer.run(resume=resume)
    return TrainedNetwork(network.cpu(), result, time.monotonic() - began)


def _fit_elsewhere(
    config: TrainConfig,
    data: PreparedData,
    place: TrainingPlace,
    settings: RegistrySettings,
    resume: bool,
    progress: Progress,
) -> TrainedNetwork:
    # Imported late: both build on this module, and most runs need neither.
    from isthmus_tools.learning.remote import connect, training_settings
    from isthmus_tools.learning.split.run import fit_split
    from isthmus_tools.learning.training.distributed import ProcessGroup, fit_on_processes

    if not place.split_with:
        group = ProcessGroup(place.processes, place.pipeline)
        mark = fingerprint(config, data)
        return fit_on_processes(config, data, config.data_folder, mark, group, resume=resume, progress=progress)
    if place.processes > 1 or place.pipeline:
        raise LearningError("--split-with trains the head in one process: without --processes and --pipeline")
    hop = connect(place.split_with, training_settings(settings))
    try:
        return fit_split(config, data, hop, resume=resume, progress=progress)
    finally:
        hop.close()


def export_graph(network: Normalised, data: PreparedData, path: Path) -> None:
    """Write the network as ONNX: raw inputs to scores, with a free batch.

    Raises:
        ModelError: the network cannot be exported.
    """
    # Imported late: workers of a run neither export nor run a graph.
    from isthmus_tools.graph import torch_export

    torch_export.export(
        lambda: network,
        path,
        # The exporter might take a batch of 1 for a constant.
        shapes=[(2, *data.input_shape)],
        input_names=[data.input_name],
        output_names=[SCORES],
        dynamic={data.input_name: {0: "batch"}},
    )


def graph_scores(path: Path, input_name: str, samples: Samples) -> Array:
    """The scores (count, classes) of samples, by the exported graph.

    Raises:
        ModelError: the graph cannot be read or run.
        LearningError: a score is not finite.
    """
    from isthmus_tools.graph.load import read
    from isthmus_tools.graph.probe import values

    # As the functions do: by onnxruntime, and not by the torch network that was trained.
    model = read(path)
    parts = [
        values(model, [SCORES], {input_name: samples.inputs[start : start + _ROWS]})[SCORES]
        for start in range(0, len(samples), _ROWS)
    ]
    scores = np.concatenate(parts)
    if not np.isfinite(scores).all():
        raise LearningError("the trained model gives scores that are not finite", model=str(path))
    return scores


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise LearningError(
            f"training.device is {device}, and torch finds no such device here",
            key="training.device",
            hint='device = "cpu" trains on this machine',
        )


def _finite(document: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in document.items()}
