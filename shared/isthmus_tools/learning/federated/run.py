"""Federated averaging from a configuration: the server of its rounds, and a node with data of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from isthmus.artifacts.choice import TRANSFORM_ID, Choice
from isthmus.errors import LearningError
from isthmus.pipeline.hop import Hop
from isthmus_tools.learning.federated.averaging import Weights
from isthmus_tools.learning.federated.node import FederatedNode, LocalTraining
from isthmus_tools.learning.federated.rounds import RoundRecord, Rounds, RoundTerms
from isthmus_tools.learning.federated.server import RoundsServer, restored, saving
from isthmus_tools.learning.remote import run_digest
from isthmus_tools.learning.training.checkpoints import Checkpoints
from isthmus_tools.learning.training.config import TrainConfig
from isthmus_tools.learning.training.networks import Normalised
from isthmus_tools.learning.training.run import initial_network
from isthmus_tools.learning.training.samples import PreparedData

# Of the checkpoints of the server, each of all weights.
_KEPT = 3


@dataclass(frozen=True)
class NodeResult:
    """A node's part: the network with the last weights, and the number of rounds with this node's update."""

    network: Normalised
    rounds: int


def rounds_server(config: TrainConfig, *, fresh: bool, on_round: Callable[[RoundRecord], None]) -> RoundsServer:
    """The server of the configuration's rounds; it goes on from its last round where there was one.

    Raises:
        LearningError: the configuration lists no classes, or has a codec that cannot be used.
    """
    table = config.federated
    checkpoints = Checkpoints(config.run_folder / "rounds", _KEPT, digest_of(config))
    if fresh:
        checkpoints.remove()
    terms = RoundTerms(
        # The first averages the statistics of the inputs.
        rounds=table.rounds + 1,
        min_nodes=table.min_nodes,
        nodes=table.nodes,
        round_s=table.round_time,
        momentum=table.momentum,
    )
    save = saving(checkpoints)

    def ended(record: RoundRecord, rounds: Rounds) -> None:
        save(record, rounds)
        on_round(record)

    def make(weights: Weights) -> Rounds:
        return Rounds(**{"weights": weights, **(restored(checkpoints) or {})}, terms=terms, on_round=ended)

    return RoundsServer(make, digest_of(config))


def take_part(
    config: TrainConfig,
    data: PreparedData,
    name: str,
    hop: Hop,
    *,
    on_round: Callable[[int, bool], None] = lambda number, is_late: None,
) -> NodeResult:
    """Train as a node until the rounds are over.

    Raises:
        As `FederatedNode.run`.
    """
    table = config.federated
    prefix = "head." if table.average == "head" else ""
    training = LocalTraining(
        initial_network(config, data), data, config.training, config.seed, epochs=table.epochs, prefix=prefix
    )
    node = FederatedNode(name, hop, digest_of(config), training, choice=codec_of(config), on_round=on_round)
    count = node.run()
    training.network.eval()
    return NodeResult(training.network, count)


def digest_of(config: TrainConfig) -> str:
    """The digest of the run.

    Raises:
        LearningError: the configuration lists no classes.
    """
    if not config.data.classes:
        raise LearningError(
            "data.classes is missing: a node may have no example of some class, and all need the same order",
            key="data.classes",
        )
    return run_digest(config, config.federated)


def codec_of(config: TrainConfig) -> Choice:
    """The codec of the nodes' changes.

    Raises:
        LearningError: no such codec, or one that needs calibration.
    """
    try:
        choice = Choice.parse(config.federated.codec)
    except ValueError as e:
        raise LearningError(f"federated.codec: {e}", key="federated.codec") from e
    if choice.codec == TRANSFORM_ID:
        raise LearningError(
            "federated.codec is calibrated for activations; weights have no table", key="federated.codec"
        )
    return choice
