"""Federated averaging: skewed nodes near central training, what crosses, nodes that die, hang or do not fit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from isthmus.context import Context
from isthmus.errors import LearningError, ShapeMismatch
from isthmus.pipeline.hop import HttpHop
from isthmus.serving.training import TrainingServer
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Frame
from isthmus_tools.learning.federated.averaging import NodeUpdate, Weights, average
from isthmus_tools.learning.federated.rounds import Rounds, RoundTerms
from isthmus_tools.learning.training.config import FitTable, NetworkTable
from isthmus_tools.learning.training.samples import PreparedData
from support.training import digits, skewed_nodes

torch = pytest.importorskip("torch")

from isthmus_tools.learning.federated.node import FederatedNode, LocalTraining  # noqa: E402
from isthmus_tools.learning.federated.server import RoundsServer, restored, saving  # noqa: E402
from isthmus_tools.learning.training.checkpoints import Checkpoints  # noqa: E402
from isthmus_tools.learning.training.networks import Normalised, make_network  # noqa: E402
from isthmus_tools.learning.training.trainer import Trainer  # noqa: E402

RUN = "sha256:" + "f" * 64
OPTIONS = FitTable(optimiser="sgd", rate=0.1, batch=32, epochs=20, weight_decay=0.0, patience=0)
WEIGHTS = {"w": np.zeros(2, "f4"), "count": np.zeros((), "i8")}


def network(data: PreparedData) -> Normalised:
    torch.manual_seed(0)
    return Normalised(make_network(NetworkTable(width=64), "dense", data.input_shape, 10), data.statistics, 1)


class InTurn(LocalTraining):
    """Nodes of one process train one after the other: threads that take turns of milliseconds are many times slower."""

    _turn = threading.Lock()

    def change(self, number: int, weights: Weights) -> dict[str, np.ndarray]:
        with self._turn:
            return super().change(number, weights)


def test_four_nodes_with_skewed_labels_come_within_two_points_of_central_training() -> None:
    torch.set_num_threads(1)
    data = digits(train=1200, validation=0, test=500)
    central = Trainer(network(data), data, OPTIONS, 0)
    central.run()
    expected = float((central.scores_of(data.test).argmax(1) == data.test.labels).mean())
    seen: list[Frame] = []
    server = RoundsServer(lambda weights: Rounds(weights, RoundTerms(21, 4, 4, momentum=0.5)), RUN)

    def exchange(frame: Frame, context: Context) -> Frame:
        reply = server.exchange(frame, context)
        seen.extend((frame, reply))
        return reply

    settings = SegmentSettings(registry="unused", secrets_dir="/nowhere", expose_details=True)
    with TrainingServer(settings, exchange) as listening:
        threads, hops = [], []
        for i, part in enumerate(skewed_nodes(data, share=0.8)):
            # Most of a node's examples are of its own two or three digits.
            counts = np.sort(np.bincount(part.train.labels, minlength=10))
            assert counts[-3:].sum() > 0.75 * counts.sum()
            hops.append(HttpHop(listening.url, attempts=2, connect_timeout_s=5, max_reply_bytes=2**24))
            training = InTurn(network(data), part, OPTIONS, i, epochs=1)
            node = FederatedNode(f"node-{i}", hops[-1], RUN, training, poll_s=0.01)
            threads.append(threading.Thread(target=node.run))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for hop in hops:
            hop.close()
    rounds = server.rounds
    assert rounds is not None
    assert rounds.is_over
    assert rounds.all_told
    final = network(data)
    LocalTraining(final, data, OPTIONS, 0, epochs=1).load(rounds.weights)
    accuracy = float((Trainer(final, data, OPTIONS, 0).scores_of(data.test).argmax(1) == data.test.labels).mean())
    assert accuracy >= expected - 0.02
    # Weights, the mean and mean square of each channel, and counts alone cross, in both directions.
    shapes = {name: array.shape for name, array in rounds.weights.items()}
    assert set(shapes) == {"input:mean", "input:square", *final.network.state_dict()}
    assert shapes["input:mean"] == shapes["input:square"] == (64,)
    for frame in seen:
        for name, array in frame.tensors.items():
            assert array.shape == (() if name == "examples" else shapes[name])
    assert all(record.left_out == () for record in rounds.records)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def update(node: str, value: float, examples: int = 1) -> NodeUpdate:
    return NodeUpdate(node, examples, {"w": np.full(2, value, "f4"), "count": np.asarray(examples)})


def test_updates_count_by_their_examples_in_any_order() -> None:
    updates = [update("a", 1.0, 1), update("b", 4.0, 3), update("c", 0.1, 7)]
    mean = average(updates)
    np.testing.assert_allclose(mean["w"], (1 * 1 + 3 * 4 + 7 * 0.1) / 11, rtol=1e-6)
    assert mean["count"] == 7
    np.testing.assert_array_equal(mean["w"], average(updates[::-1])["w"])


def test_a_node_that_hangs_is_left_out_and_takes_part_again_when_it_calls() -> None:
    clock = Clock()
    rounds = Rounds(WEIGHTS, RoundTerms(3, min_nodes=2, nodes=3, round_s=10), clock=clock)
    for node in "abc":
        rounds.task(node)
    assert all(rounds.task(node).weights is not None for node in "abc")
    assert rounds.deliver(0, update("a", 1.0))
    assert rounds.deliver(0, update("a", 9.0))  # again: changes nothing
    assert rounds.deliver(0, update("b", 3.0))
    assert rounds.task("a").weights is None  # waits for c
    clock.now = 10.0
    task = rounds.task("a")
    assert task.number == 1
    assert task.weights is not None
    np.testing.assert_array_equal(task.weights["w"], [2.0, 2.0])
    assert rounds.records[0].left_out == ("c",)
    assert rounds.records[0].examples == {"a": 1, "b": 1}
    assert not rounds.deliver(0, update("c", 5.0))  # late: of a round that has ended
    # The second round does not wait for a node that has not called since, the late call brought it back.
    assert rounds.task("c").number == 1
    for node in "abc":
        rounds.deliver(1, update(node, 0.0))
    assert rounds.records[1].left_out == ()


def test_too_few_nodes_end_the_training_with_their_names() -> None:
    clock = Clock()
    rounds = Rounds(WEIGHTS, RoundTerms(3, min_nodes=2, nodes=3, round_s=10), clock=clock)
    for node in "abc":
        rounds.task(node)
    rounds.deliver(0, update("a", 1.0))
    clock.now = 10.0
    with pytest.raises(LearningError, match="round 1 has the updates of 1 of 3 nodes") as failed:
        rounds.tick()
    assert failed.value.facts["left_out"] == ["b", "c"]
    with pytest.raises(LearningError, match="at least 2"):
        rounds.task("b")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"w": np.array([np.nan, 0], "f4")}, LearningError),
        ({"w": np.zeros(3, "f4")}, ShapeMismatch),
        ({"w": np.zeros(2, "f8")}, ShapeMismatch),
        ({"other": np.zeros(2, "f4")}, ShapeMismatch),
    ],
    ids=["nan", "shape", "dtype", "name"],
)
def test_an_update_that_would_spoil_the_average_is_refused(
    change: dict[str, np.ndarray], error: type[Exception]
) -> None:
    rounds = Rounds(WEIGHTS, RoundTerms(1, min_nodes=1, nodes=1))
    rounds.task("a")
    with pytest.raises(error):
        rounds.deliver(0, NodeUpdate("a", 1, {**update("a", 1).change, **change}))
    with pytest.raises(LearningError, match="examples"):
        rounds.deliver(0, update("a", 1.0, 0))
    assert rounds.number == 0


def test_the_server_goes_on_from_its_last_round_and_knows_its_nodes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, RUN)
    terms = RoundTerms(2, min_nodes=1, nodes=1, momentum=0.5)
    first = Rounds(WEIGHTS, terms, on_round=saving(checkpoints))
    first.task("a")
    first.deliver(0, update("a", 1.0))
    state = restored(checkpoints)
    assert state is not None
    server = RoundsServer(lambda weights: Rounds(**state, terms=terms), RUN)
    context = Context.from_headers({}, longest_s=5)
    caller = "a:" + "0" * 16
    assert server.exchange(Frame({}, RUN, "federated/task", caller), context).segment == "federated/rejoin"
    with pytest.raises(ShapeMismatch):  # a node with other inputs
        server.exchange(Frame({**WEIGHTS, "w": np.zeros(3, "f4")}, RUN, "federated/join", caller), context)
    server.exchange(Frame(WEIGHTS, RUN, "federated/join", caller), context)
    rounds = server.rounds
    assert rounds is not None
    assert rounds.number == 1
    task = server.exchange(Frame({}, RUN, "federated/task", caller), context)
    assert task.segment == "federated/round"
    change = update("a", 1.0).change | {"examples": np.asarray(1)}
    taken = server.exchange(task._replace(segment="federated/update", tensors=change), context)
    assert taken.segment == "federated/accepted"
    np.testing.assert_array_equal(rounds.weights["w"], [2.5, 2.5])  # 1, then 1 with half of the velocity of 1
    assert server.exchange(Frame({}, RUN, "federated/task", caller), context).segment == "federated/over"
    for frame, reason in (
        (Frame({}, "sha256:" + "0" * 64, "federated/task", caller), "another configuration"),
        (Frame({}, RUN, "federated/task", "no process"), "NODE:PROCESS"),
        (Frame({}, RUN, "federated/other", caller), "no operation"),
    ):
        with pytest.raises(Exception, match=reason):
            server.exchange(frame, context)
    server.exchange(Frame({}, RUN, "federated/task", "a:" + "1" * 16), context)
    with pytest.raises(LearningError, match="another process trains as the node a"):
        server.exchange(Frame({}, RUN, "federated/task", caller), context)
