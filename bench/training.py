"""Training on several processes, over a link and on several nodes: exactness, bytes, accuracy, steps a second, kills.

The data are scikit-learn's digits; the last 397 of 1,797 are held out, written by people of whom training has nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import psutil
import torch
from harness import STATE, Report, Row, arguments, at_most

from isthmus.artifacts.choice import Choice
from isthmus.serving.training import TrainingServer
from isthmus.settings import RegistrySettings
from isthmus.wire import frame
from isthmus_tools.learning.federated.averaging import Weights
from isthmus_tools.learning.federated.node import FederatedNode, LocalTraining
from isthmus_tools.learning.federated.rounds import Rounds, RoundTerms
from isthmus_tools.learning.federated.server import UPDATE, RoundsServer, numbered
from isthmus_tools.learning.remote import connect, training_settings
from isthmus_tools.learning.split.edge import Traffic
from isthmus_tools.learning.split.run import cloud_side, fit_split
from isthmus_tools.learning.training.checkpoints import Checkpoints
from isthmus_tools.learning.training.config import (
    DataTable,
    FileSource,
    FitTable,
    NetworkTable,
    SplitLearningTable,
    TrainConfig,
)
from isthmus_tools.learning.training.distributed import ProcessGroup, fit_on_processes
from isthmus_tools.learning.training.networks import Normalised
from isthmus_tools.learning.training.run import TrainedNetwork, fit, initial_network
from isthmus_tools.learning.training.samples import PreparedData
from support.training import digits, skewed_nodes

FOLDER = STATE / "training"
SETTINGS = training_settings(RegistrySettings(secrets_dir="/nowhere"))
CODECS = ("raw", "lossless/3", "half/1", "int8/1", "int4/1")
RUN = "sha256:" + "0" * 64


def config(name: str, *, epochs: int, clip: float = 0.0, width: int = 64, **tables: msgspec.Struct) -> TrainConfig:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return TrainConfig(
        name="digits",
        folder=str(folder),
        data=DataTable(kind="table", sources=(FileSource(path="unused"),), classes=tuple("0123456789")),
        network=NetworkTable(width=width),
        training=FitTable(epochs=epochs, batch=32, rate=3e-3, patience=0, clip=clip, checkpoint_every=10),
        **tables,
    )


def accuracy(network: Normalised, data: PreparedData) -> float:
    with torch.no_grad():
        scores = network.eval()(torch.from_numpy(data.test.inputs)).numpy()
    return float((scores.argmax(1) == data.test.labels).mean())


def distance(a: Normalised, b: Normalised) -> float:
    other = b.state_dict()
    return max(float((value - other[name]).abs().max()) for name, value in a.state_dict().items())


def loss_gap(a: TrainedNetwork, b: TrainedNetwork) -> float:
    return max(abs(x.loss - y.loss) / y.loss for x, y in zip(a.result.history, b.result.history, strict=True))


def alone(of: TrainConfig, data: PreparedData) -> TrainedNetwork:
    return fit(of, data, Checkpoints(Path(of.folder) / "checkpoints", 2, "x"), resume=False)


def on_processes(
    of: TrainConfig, data: PreparedData, group: ProcessGroup, on_start: Callable[[int], None] = lambda agent: None
) -> TrainedNetwork:
    data.write(Path(of.folder) / "data")
    return fit_on_processes(of, data, Path(of.folder) / "data", "x", group, resume=False, on_start=on_start)


def split(of: TrainConfig, data: PreparedData) -> tuple[TrainedNetwork, Traffic, float]:
    """Both sides over HTTP on this machine; milliseconds of a step too."""
    totals: list[Traffic] = []
    side = cloud_side(of, fresh=True)
    with TrainingServer(SETTINGS, side.exchange) as server:
        hop = connect(server.url, SETTINGS)
        trained = fit_split(of, data, hop, resume=False, on_end=totals.append)
        hop.close()
    return trained, totals[0], 1000 * trained.seconds / trained.result.steps


def exactness(report: Report, data: PreparedData) -> None:
    epochs = 4 if report.quick else 12
    reference = alone(config("one", epochs=epochs), data)
    rows: list[Row] = []
    for name, way in (
        ("data parallel, 2 processes", lambda c: on_processes(c, data, ProcessGroup(2))),
        ("pipeline over the cut", lambda c: on_processes(c, data, ProcessGroup(2, pipeline=True))),
        ("split, labels cross", lambda c: split(c, data)[0]),
        ("split, labels stay", lambda c: split(c, data)[0]),
    ):
        report.say(name)
        table = SplitLearningTable(labels="stay" if name.endswith("stay") else "cross")
        trained = way(config(name.split(",")[0].replace(" ", "-"), epochs=epochs, split_learning=table))
        gap, apart = loss_gap(trained, reference), distance(trained.network, reference.network)
        rows.append({"way": name, "steps": trained.result.steps, "loss_gap": gap, "weights_apart": apart})
        report.goals.append(at_most(f"{name}: relative gap of an epoch's loss to one process", gap, 1e-3))
        if name.startswith("split"):
            report.goals.append(at_most(f"{name}: weights apart from one process", apart, 1e-6))
    report.add("Against one process, the same global batches", rows)


def codecs(report: Report, data: PreparedData) -> None:
    epochs, rows = (5 if report.quick else 15), []
    whole = accuracy(alone(config("codec-one", epochs=epochs), data).network, data)
    for labels in ("cross", "stay"):
        for codec in CODECS:
            report.say(f"split, labels {labels}, {codec}")
            table = SplitLearningTable(labels=labels, activations=codec, gradients=codec)
            trained, traffic, ms = split(config("codec", epochs=epochs, split_learning=table), data)
            rows.append(
                {
                    "labels": labels,
                    "codec": codec,
                    "bytes_up_per_step": round(traffic.sent_bytes / trained.result.steps),
                    "bytes_down_per_step": round(traffic.received_bytes / trained.result.steps),
                    "ms_per_step": ms,
                    "accuracy": accuracy(trained.network, data),
                    "one_process": whole,
                }
            )
    report.add("Split learning by codec, batches of 32, validation and checkpoints included", rows)


class InTurn(LocalTraining):
    """Nodes of one process train one after the other."""

    _turn = threading.Lock()

    def change(self, number: int, weights: Weights) -> dict[str, np.ndarray]:
        with self._turn:
            return super().change(number, weights)


def federated(report: Report, data: PreparedData) -> None:
    rounds = 20 if report.quick else 40
    options = FitTable(optimiser="sgd", rate=0.1, batch=32, epochs=rounds, weight_decay=0.0, patience=0)

    def network() -> Normalised:
        return initial_network(config("federated", epochs=1), data)

    best = 0.0
    for rate in (0.01, 0.03, 0.1):
        central = msgspec.structs.replace(
            config("central", epochs=rounds), training=msgspec.structs.replace(options, rate=rate)
        )
        best = max(best, accuracy(alone(central, data).network, data))
    rows: list[Row] = []
    for share, momentum, codec, dies in (
        (0.8, 0.5, "raw", False),
        (0.9, 0.5, "raw", False),
        (0.8, 0.0, "raw", False),
        (0.8, 0.5, "int8/1", False),
        (0.8, 0.5, "raw", True),
    ):
        report.say(f"federated: share {share}, momentum {momentum}, {codec}" + (", a node dies" if dies else ""))
        result, sent, left_out = _federated(data, network, options, rounds, share, momentum, codec, dies)
        final = network()
        LocalTraining(final, data, options, 0, epochs=1).load(result)
        measured = accuracy(final, data)
        rows.append(
            {
                "own_digits_share": share,
                "momentum": momentum,
                "codec": codec,
                "node_dies": dies,
                "rounds": rounds,
                "accuracy": measured,
                "central": best,
                "bytes_per_update": sent,
                "left_out_of_rounds": left_out,
            }
        )
        if momentum and not dies:
            gap = 100 * (best - measured)
            report.goals.append(at_most(f"federated, {share:.0%} own digits, {codec}: points under central", gap, 2.0))
    report.add("Federated averaging over four nodes, against the best of three rates of central training", rows)


def _federated(
    data: PreparedData,
    network: Callable[[], Normalised],
    options: FitTable,
    rounds: int,
    share: float,
    momentum: float,
    codec: str,
    dies: bool,
) -> tuple[Weights, int, int]:
    terms = RoundTerms(rounds + 1, 3, 4, round_s=3.0, momentum=momentum)
    server = RoundsServer(lambda weights: Rounds(weights, terms), RUN)
    with TrainingServer(SETTINGS, server.exchange) as listening:
        hops = [connect(listening.url, SETTINGS) for _ in range(4)]
        nodes = [
            FederatedNode(
                f"node-{i}",
                hops[i],
                RUN,
                InTurn(network(), part, options, i, epochs=1),
                choice=Choice.parse(codec),
                poll_s=0.02,
            )
            for i, part in enumerate(skewed_nodes(data, share))
        ]
        threads = [threading.Thread(target=node.run) for node in nodes]
        for thread in threads:
            thread.start()
        if dies:
            while server.rounds is None or server.rounds.number < rounds // 2:
                time.sleep(0.01)
            nodes[3].stop()
        for thread in threads:
            thread.join()
        for hop in hops:
            hop.close()
    assert server.rounds is not None
    sizes = _update_bytes(server.rounds.weights, codec)
    return server.rounds.weights, sizes, sum(bool(record.left_out) for record in server.rounds.records)


def _update_bytes(weights: Weights, codec: str) -> int:
    draw = np.random.default_rng(0)
    change = {n: np.asarray(draw.normal(size=a.shape) * 1e-2, a.dtype) for n, a in weights.items()}
    return len(frame.encode(numbered(UPDATE, RUN, 1, change, "node-0:" + "0" * 16, Choice.parse(codec))))


def speed(report: Report, data: PreparedData) -> None:
    """Steps a second of a network with tens of milliseconds a step: two lengths, so that the start does not count."""
    short, long = (2, 8) if report.quick else (4, 24)
    rows: list[Row] = []
    for name, way in (
        ("one process", alone),
        ("data parallel, 2 processes", lambda c, d: on_processes(c, d, ProcessGroup(2))),
        ("pipeline over the cut", lambda c, d: on_processes(c, d, ProcessGroup(2, pipeline=True))),
    ):
        report.say(f"speed: {name}")
        runs = []
        for epochs in (short, long):
            wide = config("speed", epochs=epochs)
            fitting = msgspec.structs.replace(wide.training, batch=256, checkpoint_every=0)
            wide = msgspec.structs.replace(wide, network=NetworkTable(width=2048, bottleneck=512), training=fitting)
            runs.append(way(wide, data))
        steps = runs[1].result.steps - runs[0].result.steps
        seconds = runs[1].seconds - runs[0].seconds
        rows.append(
            {
                "way": name,
                "steps_per_s": steps / seconds,
                "start_s": runs[0].seconds - runs[0].result.steps * seconds / steps,
            }
        )
    report.add("Speed: 2.5 million weights, batches of 256, one thread a process", rows)


def kills(report: Report, data: PreparedData) -> None:
    """kill -9 of a worker in mid-training: the steps that are run again."""
    every, repeats = 10, 1 if report.quick else 3
    rows: list[Row] = []
    reference = alone(config("kill-one", epochs=12), data)
    lost: list[int] = []
    for i in range(repeats):
        report.say(f"kill -9 of a worker, {i + 1} of {repeats}")
        of = config("kill", epochs=12)
        checkpoints = Checkpoints(Path(of.folder) / "checkpoints", 3, "x")
        noted: list[int] = []
        trained = on_processes(of, data, ProcessGroup(2), partial(_killer, checkpoints=checkpoints, noted=noted))
        # The step at the kill is between the last checkpoint then and the one after it.
        lost.append(noted[0] + every - trained.result.resumed_at)
        rows.append(
            {
                "checkpoint_at_the_kill": noted[0],
                "resumed_at": trained.result.resumed_at,
                "weights_apart": distance(trained.network, reference.network),
            }
        )
    report.add("kill -9 of a worker of two, a checkpoint every 10 steps", rows)
    report.goals.append(at_most("kill -9: steps lost, at most one interval", max(lost), every))


def _killer(agent: int, checkpoints: Checkpoints, noted: list[int]) -> None:
    def kill() -> None:
        while not (steps := checkpoints.steps()):
            time.sleep(0.005)
        workers = [c for c in psutil.Process(agent).children() if c.environ().get("RANK") == "1"]
        noted.append(checkpoints.steps()[-1] if checkpoints.steps() else steps[-1])
        os.kill(workers[0].pid, signal.SIGKILL)

    threading.Thread(target=kill).start()


def main() -> None:
    report = arguments("training", __doc__, ["numpy", "torch", "scikit-learn"])
    torch.set_num_threads(1)
    data = digits(train=1200, validation=200, test=397)
    exactness(report, data)
    codecs(report, data)
    federated(report, data)
    speed(report, data)
    kills(report, data)
    report.emit()


if __name__ == "__main__":
    main()
