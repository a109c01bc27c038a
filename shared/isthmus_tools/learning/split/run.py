"""Split learning from a configuration: the edge's whole training, and the cloud's side to serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from isthmus.artifacts.choice import Choice
from isthmus.errors import LearningError
from isthmus.pipeline.hop import Hop
from isthmus_tools.learning.remote import run_digest
from isthmus_tools.learning.split.cloud import CloudSide
from isthmus_tools.learning.split.edge import (
    SplitCheckpoints,
    SplitComputation,
    Traffic,
    edge_layers,
    layers_behind_cut,
    train_edge,
)
from isthmus_tools.learning.split.messages import SplitTerms
from isthmus_tools.learning.training.checkpoints import Checkpoints
from isthmus_tools.learning.training.config import TrainConfig
from isthmus_tools.learning.training.networks import Normalised, make_network
from isthmus_tools.learning.training.run import TrainedNetwork, fingerprint, initial_network
from isthmus_tools.learning.training.samples import PreparedData
from isthmus_tools.learning.training.trainer import Trainer
from isthmus_tools.progress import Progress, silent


def split_terms(config: TrainConfig) -> SplitTerms:
    """The terms of the configuration's table `split_learning`.

    Raises:
        LearningError: a codec that does not exist, or needs calibration.
    """
    table = config.split_learning
    choices = []
    for key in ("activations", "gradients"):
        try:
            choices.append(Choice.parse(getattr(table, key)))
        except ValueError as e:
            raise LearningError(f"split_learning.{key}: {e}", key=f"split_learning.{key}") from e
    return SplitTerms(run_digest(config, table), table.labels == "stay", choices[0], choices[1])


def fit_split(
    config: TrainConfig,
    data: PreparedData,
    hop: Hop,
    *,
    resume: bool,
    progress: Progress = silent,
    on_end: Callable[[Traffic], None] = lambda traffic: None,
) -> TrainedNetwork:
    """Train the head here and the layers behind the cut at `hop`; the network has the weights of both in the end.

    Raises:
        As `train_edge`.
    """
    began = time.monotonic()
    terms, options = split_terms(config), config.training
    network = initial_network(config, data)
    layers = edge_layers(network.network, labels_stay=terms.labels_stay)
    edge = Normalised(layers, data.statistics, len(data.input_shape))
    computation = SplitComputation(edge, layers, hop, terms, label_smoothing=options.label_smoothing)
    # The data's part of the fingerprint: the cloud's side has none.
    mark = f"{terms.run} {fingerprint(config, data)}"
    checkpoints = SplitCheckpoints(config.run_folder / "checkpoints" / "edge", options.keep, mark, computation)
    if not resume:
        checkpoints.remove()
    trainer = Trainer(
        edge,
        data,
        options,
        config.seed,
        checkpoints=checkpoints,
        computation=computation,
        on_best=computation.mark_best,
        progress=progress,
    )
    result = train_edge(trainer, computation, checkpoints, data.input_shape, len(data.classes))
    # Slices of a sequence share its layers: the whole network gets these weights.
    computation.load_cloud_weights(layers_behind_cut(network.network, labels_stay=terms.labels_stay)[0])
    network.eval()
    on_end(computation.traffic)
    return TrainedNetwork(network.cpu(), result, time.monotonic() - began)


def cloud_side(config: TrainConfig, *, fresh: bool, on_step: Callable[[int], None] = lambda step: None) -> CloudSide:
    """The cloud's side of the configuration's run, with checkpoints in the folder `tail` of the run's.

    Raises:
        LearningError: as `split_terms`.
    """
    terms = split_terms(config)

    def layers(shape: Sequence[int], classes: int) -> nn.Module:
        # The edge starts with the same seed: both sides have parts of one network.
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.training.threads)
        network = make_network(config.network, config.network_name, shape, classes)
        return layers_behind_cut(network, labels_stay=terms.labels_stay)[0]

    folder = config.run_folder / "tail"
    checkpoints = Checkpoints(folder, max(2, config.training.keep), terms.run)
    if fresh:
        checkpoints.remove()
    return CloudSide(layers, terms, config.training, checkpoints, on_step=on_step)
