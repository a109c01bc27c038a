"""Training on several machines: serving the layers behind a cut, serving rounds, and taking part in these."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.errors import LearningError
from isthmus.serving.training import TrainingServer
from isthmus.settings import RegistrySettings
from isthmus_tools.learning.training.config import TrainConfig
from isthmus_tools.learning.training.samples import PreparedData
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.train import TrainRequest, train

# Between looks at the clock of a round.
_TICK_S = 0.1
# After the last round, for nodes that have not asked for the weights yet.
_LINGER_S = 15.0


def _ignore(text: str) -> None:
    """No-op default callback."""


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """A training to serve at `host` and `port` until `stop` is set; `on_url` gets the address.

    `fresh` removes the checkpoints of an earlier run.
    """

    config: TrainConfig
    settings: RegistrySettings
    host: str = "127.0.0.1"
    port: int = 0
    fresh: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    on_url: Callable[[str], None] = _ignore


@dataclass(frozen=True)
class ServedRounds:
    """The number of rounds that ended, and in how many of these each node was, or was left out."""

    rounds: int
    nodes: dict[str, int]
    left_out: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """A node of federated averaging: its name, the server's URL, and its own data by the configuration."""

    config: TrainConfig
    registry: RegistrySettings
    url: str
    name: str


@dataclass(frozen=True)
class JoinResult:
    """The rounds with this node's update, its examples, and the accuracy of the last weights on its held-out part."""

    rounds: int
    examples: int
    accuracy: float | None
    graph: str


def serve_tail(request: ServeRequest, progress: Progress = silent) -> int:
    """Train the layers behind the cut with an edge's activations until `stop` is set; the steps that were applied.

    Raises:
        LearningError: the configuration.
        SettingsError, LocalError: the address cannot be listened on, or not without keys.
    """
    # Imported late: torch takes seconds.
    from isthmus_tools.learning.remote import training_settings
    from isthmus_tools.learning.split.run import cloud_side

    side = cloud_side(request.config, fresh=request.fresh, on_step=lambda step: progress(f"training, step {step}"))
    settings = training_settings(request.settings)
    with TrainingServer(settings, side.exchange, host=request.host, port=request.port) as server:
        request.on_url(server.url)
        request.stop.wait()
    return side.step


def serve_rounds(request: ServeRequest, progress: Progress = silent) -> ServedRounds:
    """Serve rounds of federated averaging to their end, or until `stop` is set.

    Raises:
        LearningError: the configuration, or a round with fewer nodes than `min_nodes`.
        SettingsError, LocalError: as `serve_tail`.
    """
    from isthmus_tools.learning.federated.run import rounds_server
    from isthmus_tools.learning.remote import training_settings

    nodes: dict[str, int] = {}
    left_out: dict[str, int] = {}
    total = request.config.federated.rounds + 1

    def ended(number: int, counted: list[str], missing: list[str]) -> None:
        for counts, names in ((nodes, counted), (left_out, missing)):
            for name in names:
                counts[name] = counts.get(name, 0) + 1
        without = f", without {', '.join(missing)}" if missing else ""
        progress(f"round {number} of {total}: {len(counted)} nodes{without}", number, total)

    server = rounds_server(
        request.config,
        fresh=request.fresh,
        on_round=lambda record: ended(record.number, list(record.examples), list(record.left_out)),
    )
    settings = training_settings(request.settings)
    with TrainingServer(settings, server.exchange, host=request.host, port=request.port) as listening:
        request.on_url(listening.url)
        over = 0.0
        while not request.stop.wait(_TICK_S):
            if (rounds := server.rounds) is None:
                continue
            try:
                rounds.tick()
            except LearningError:
                # Nodes that call now get the reason as well.
                request.stop.wait(_TICK_S * 20)
                raise
            over += _TICK_S if rounds.is_over else 0.0
            if rounds.all_told or over >= _LINGER_S:
                break
    return ServedRounds(0 if server.rounds is None else server.rounds.number, nodes, left_out)


def join_rounds(request: JoinRequest, progress: Progress = silent) -> JoinResult:
    """Prepare this node's data, and train until the server's rounds are over; the graph has the last weights.

    Raises:
        LearningError: data or configuration do not fit, the training diverged, or too few nodes are left.
        HopError: the server cannot be reached.
    """
    config = request.config
    data = _prepared(request, progress)
    from isthmus_tools.learning.federated.run import take_part
    from isthmus_tools.learning.remote import connect, training_settings
    from isthmus_tools.learning.training.run import export_graph

    hop = connect(request.url, training_settings(request.registry))
    total = config.federated.rounds + 1

    def ended(number: int, is_late: bool) -> None:
        progress(f"round {number} of {total}" + (" came too late" if is_late else ""), number, total)

    progress(f"waiting for a round of {request.url}")
    try:
        result = take_part(config, data, request.name, hop, on_round=ended)
    finally:
        hop.close()
    graph = config.run_folder / "model.onnx"
    progress("exporting the graph")
    export_graph(result.network, data, graph)
    return JoinResult(result.rounds, len(data.train), _accuracy(graph, data), str(graph))


def _prepared(request: JoinRequest, progress: Progress) -> PreparedData:
    """The data by the stages of `isthmus train`; nothing is compared with a model in service."""
    for stage in ("collect", "clean"):
        prepared = train(
            TrainRequest(
                config=request.config, registry=request.registry, stage=stage, fresh=stage == "clean", promote="never"
            ),
            progress,
        ).prepared
    if prepared is None:
        raise LearningError("the stage clean left no data")
    return prepared


def _accuracy(graph: Path, data: PreparedData) -> float | None:
    from isthmus_tools.learning.training.run import graph_scores

    if not len(data.test):
        return None
    scores = graph_scores(graph, data.input_name, data.test)
    return float((scores.argmax(1) == data.test.labels).mean())
