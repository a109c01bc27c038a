"""The servers of split learning and federated averaging against forged, repeated and poisoned calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from isthmus.context import Context
from isthmus.errors import IsthmusError, LearningError, RequestMalformed, ShapeMismatch
from isthmus.pipeline.hop import HopReply
from isthmus.wire.frame import Frame
from isthmus_tools.learning.federated.averaging import NodeUpdate
from isthmus_tools.learning.federated.rounds import Rounds, RoundTerms
from isthmus_tools.learning.training.samples import Statistics
from support.training import FAST

torch = pytest.importorskip("torch")

from isthmus_tools.learning.federated.server import RoundsServer  # noqa: E402
from isthmus_tools.learning.split import messages  # noqa: E402
from isthmus_tools.learning.split.cloud import CloudSide  # noqa: E402
from isthmus_tools.learning.split.edge import EdgeLayers, SplitComputation  # noqa: E402
from isthmus_tools.learning.split.messages import SplitTerms  # noqa: E402
from isthmus_tools.learning.training.checkpoints import Checkpoints  # noqa: E402
from isthmus_tools.learning.training.networks import Normalised  # noqa: E402
from isthmus_tools.learning.training.trainer import TrainingBatch  # noqa: E402

RUN = "sha256:" + "7" * 64
ROWS = {"activations": np.ones((4, 6), "f4"), "targets": np.arange(4), "weights": np.ones(4, "f4")}
JOIN = {"checkpoints": [0], "input_shape": [8], "classes": [5], "epoch_steps": [4]}
NODE = "north:" + "0" * 16


def context() -> Context:
    return Context.from_headers({}, longest_s=10)


class Cloud:
    """The cloud's side with two dense layers, and an edge that says anything."""

    def __init__(self, folder: Path, *, labels_stay: bool = False) -> None:
        self.terms = SplitTerms(RUN, labels_stay)
        self.checkpoints = Checkpoints(folder / "cloud", 2, RUN)

        def layers(shape: object, classes: int) -> torch.nn.Module:
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, classes))

        self.side = CloudSide(layers, self.terms, FAST, self.checkpoints)

    def call(self, operation: str, position: int = 0, **tensors: object) -> Frame:
        arrays = {name: np.asarray(value) for name, value in tensors.items()}
        frame = messages.message(operation, self.terms, position, arrays, "e" * 16)
        return self.side.exchange(frame, context())

    def join(self, **changes: list[int]) -> Frame:
        return self.call(messages.JOIN, **(JOIN | changes))

    def weights(self) -> np.ndarray:
        values = self.call(messages.WEIGHTS, self.side.step).tensors.values()
        return np.concatenate([np.ravel(value) for value in values])


@pytest.mark.parametrize("changes", [{"classes": []}, {"classes": [5, 6]}, {"epoch_steps": []}], ids=str)
def test_a_join_with_no_number_or_several_is_refused(changes: dict[str, list[int]], tmp_path: Path) -> None:
    with pytest.raises(RequestMalformed, match="numbers, not 1"):
        Cloud(tmp_path).join(**{name: np.array(value, np.int64) for name, value in changes.items()})


def test_an_edge_with_other_classes_is_refused_and_the_first_one_goes_on(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    cloud.join()
    cloud.call(messages.STEP, 0, **ROWS)
    cloud.call(messages.SAVE, 1)
    before = cloud.weights()
    with pytest.raises(LearningError, match="of other inputs or classes") as refused:
        cloud.join(classes=[3], checkpoints=[0, 1])
    assert "--fresh" in refused.value.hint
    assert messages.position_of(cloud.join(checkpoints=[0, 1])) == 1
    np.testing.assert_array_equal(cloud.weights(), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"activations": ROWS["activations"].astype(ml_dtypes.bfloat16)},
        {"activations": np.ones(6, "f4")},
        {"activations": np.full((4, 6), np.inf, "f4")},
        {"targets": np.arange(3)},
        {"targets": np.full(4, -1)},
        {"weights": np.ones(3, "f4")},
    ],
    ids=["bfloat16", "one axis", "infinite", "fewer targets", "negative target", "fewer weights"],
)
def test_a_forged_step_is_refused_and_changes_nothing(changes: dict[str, np.ndarray], tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    cloud.join()
    before = cloud.weights()
    with pytest.raises((RequestMalformed, ShapeMismatch)):
        cloud.call(messages.STEP, 0, **(ROWS | changes))
    assert cloud.side.step == 0
    np.testing.assert_array_equal(cloud.weights(), before)


def test_finite_gradients_that_overflow_behind_the_cut_change_nothing(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, labels_stay=True)
    cloud.join()
    before = cloud.weights()
    scores = cloud.call(messages.FORWARD, 0, activations=ROWS["activations"]).tensors["activations"]
    with pytest.raises(LearningError, match="NaN or infinite"):
        cloud.call(messages.BACKWARD, 0, gradients=np.full(scores.shape, 3e38, "f4"))
    np.testing.assert_array_equal(cloud.weights(), before)
    # Nothing of these gradients stays for the next step.
    cloud.join()
    cloud.call(messages.FORWARD, 0, activations=ROWS["activations"])
    cloud.call(messages.BACKWARD, 0, gradients=np.zeros(scores.shape, "f4"))
    assert np.isfinite(cloud.weights()).all()


def test_a_damaged_checkpoint_of_the_cloud_leaves_the_one_before(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    cloud.join()
    for step in (1, 2):
        cloud.call(messages.STEP, step - 1, **ROWS)
        cloud.call(messages.SAVE, step)
    newest = tmp_path / "cloud" / "step-000000000002.checkpoint"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = Cloud(tmp_path)
    assert again.checkpoints.steps() == [1]
    assert messages.position_of(again.join(checkpoints=[1, 2])) == 1


class ForgedHop:
    """The cloud in this process, with a change of each of its answers."""

    name, encodes = "forged", False

    def __init__(self, side: CloudSide, operation: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.side, self.operation, self.tensor, self.forge = side, operation, name, change

    def call(self, frame: Frame, context: Context) -> HopReply:
        reply = self.side.exchange(frame, context)
        if frame.segment == self.operation:
            forged = {n: self.forge(a) if n == self.tensor else a for n, a in reply.tensors.items()}
            reply = reply._replace(tensors=forged)
        return HopReply(reply, 0.0)

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize(
    ("labels_stay", "operation", "tensor", "change"),
    [
        (False, messages.STEP, "gradients", lambda a: a[:1]),
        (False, messages.STEP, "gradients", lambda a: a * np.float32(np.nan)),
        (True, messages.FORWARD, "activations", lambda a: a[:1]),
        (True, messages.FORWARD, "activations", lambda a: a[:, :2]),
        (True, messages.BACKWARD, "gradients", lambda a: a[:, :2]),
        (False, messages.PREDICT, "activations", lambda a: a[:1]),
        (False, messages.PREDICT, "activations", lambda a: a[:, :2]),
        (False, messages.WEIGHTS, "0.bias", lambda a: a[:2]),
    ],
)
def test_an_answer_that_does_not_fit_stops_the_edge_with_its_name(
    labels_stay: bool, operation: str, tensor: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path, labels_stay=labels_stay)
    end = torch.nn.Linear(5, 5) if labels_stay else None
    layers = EdgeLayers(torch.nn.Linear(8, 6), end)
    statistics = Statistics(np.zeros(8, np.float32), np.ones(8, np.float32))
    hop = ForgedHop(cloud.side, operation, tensor, change)
    computation = SplitComputation(Normalised(layers, statistics, 1), layers, hop, cloud.terms)
    computation.join([0], [8], 5, 4)
    batch = TrainingBatch(torch.ones(4, 8), torch.arange(4), torch.full((4,), 0.25))
    same_form = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5))
    with pytest.raises((LearningError, RequestMalformed), match=r"do not fit|NaN or infinity"):  # noqa: PT012
        computation.backward(batch)
        computation.scores(torch.ones(3, 8))
        computation.load_cloud_weights(same_form)


def rounds_server(momentum: float = 0.9) -> RoundsServer:
    return RoundsServer(lambda weights: Rounds(weights, RoundTerms(3, 1, 1, momentum=momentum)), RUN)


def joined(server: RoundsServer, weights: dict[str, np.ndarray], caller: str = NODE) -> Frame:
    return server.exchange(Frame(weights, RUN, "federated/join", caller), context())


@pytest.mark.parametrize(
    "weights", [{"w": np.array([np.nan, 0], "f4")}, {"w": np.array([np.inf, 0], "f4")}, {}], ids=["nan", "inf", "none"]
)
def test_weights_of_the_first_node_that_are_no_numbers_begin_no_training(weights: dict[str, np.ndarray]) -> None:
    server = rounds_server()
    with pytest.raises(IsthmusError):
        joined(server, weights)
    joined(server, {"w": np.zeros(2, "f4")}, "south:" + "1" * 16)
    assert server.rounds is not None
    np.testing.assert_array_equal(server.rounds.weights["w"], [0, 0])


def test_finite_changes_that_would_add_up_to_infinity_are_refused() -> None:
    rounds = Rounds({"w": np.zeros(2, "f4")}, RoundTerms(3, 1, 1, momentum=0.9))
    rounds.task("a")
    with pytest.raises(LearningError, match=r"w of the node a would become 3e\+38"):
        rounds.deliver(0, NodeUpdate("a", 1, {"w": np.full(2, -3e38, "f4")}))
    assert rounds.deliver(0, NodeUpdate("a", 1, {"w": np.full(2, 1e30, "f4")}))
    assert np.isfinite(rounds.weights["w"]).all()


def test_a_round_without_a_checkpoint_ends_the_training_and_counts_once() -> None:
    def full(*_: object) -> None:
        raise LearningError("no checkpoint can be written")

    now = [0.0]
    rounds = Rounds({"w": np.zeros(2, "f4")}, RoundTerms(3, 1, 1, round_s=10), on_round=full, clock=lambda: now[0])
    rounds.task("a")
    with pytest.raises(LearningError, match="no checkpoint"):
        rounds.deliver(0, NodeUpdate("a", 1, {"w": np.ones(2, "f4")}))
    now[0] = 20.0
    with pytest.raises(LearningError, match="no checkpoint"):
        rounds.tick()
    np.testing.assert_array_equal(rounds.weights["w"], [1, 1])
