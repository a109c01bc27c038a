"""Split learning: the weights of training in one process, over real frames; lost responses, kills and bad calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from isthmus.artifacts.choice import RAW, Choice
from isthmus.context import Context
from isthmus.errors import HopRejected, LearningError, SettingsError, ShapeMismatch, StateMissing
from isthmus.pipeline.hop import HopReply, HttpHop
from isthmus.security.protected_call import open_protection
from isthmus.serving.training import TrainingServer
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Frame
from isthmus_tools.learning.training.config import NetworkTable
from isthmus_tools.learning.training.samples import PreparedData
from support.training import FAST, digits

torch = pytest.importorskip("torch")

from isthmus_tools.learning.split import messages  # noqa: E402
from isthmus_tools.learning.split.cloud import CloudSide  # noqa: E402
from isthmus_tools.learning.split.edge import (  # noqa: E402
    EdgeLayers,
    SplitCheckpoints,
    SplitComputation,
    edge_layers,
    layers_behind_cut,
    train_edge,
)
from isthmus_tools.learning.split.messages import SplitTerms  # noqa: E402
from isthmus_tools.learning.training.checkpoints import Checkpoints  # noqa: E402
from isthmus_tools.learning.training.networks import Normalised, make_network  # noqa: E402
from isthmus_tools.learning.training.trainer import Trainer  # noqa: E402

RUN = "sha256:" + "5" * 64
# Without a bound on gradients: it holds for each side by itself.
OPTIONS = msgspec.structs.replace(FAST, epochs=3, checkpoint_every=5, clip=0.0, label_smoothing=0.1)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    torch.set_num_threads(1)
    return digits(train=333)


def two_parts(shape: tuple[int, ...] | list[int], classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return make_network(NetworkTable(width=32), "dense", shape, classes)


class TwiceHop:
    """Sends each call twice, as a caller does that lost the response."""

    name, encodes = "twice", True

    def __init__(self, inner: HttpHop) -> None:
        self.inner = inner

    def call(self, frame: Frame, context: Context) -> HopReply:
        first, second = self.inner.call(frame, context), self.inner.call(frame, context)
        for name, array in first.frame.tensors.items():
            np.testing.assert_array_equal(array, second.frame.tensors[name])
        return second

    def close(self) -> None:
        self.inner.close()


class Split:
    """Both sides of a training in `folder`; either can be made anew, as after a kill."""

    def __init__(self, data: PreparedData, folder: Path, *, labels_stay: bool = False, codec: Choice = RAW) -> None:
        self.data, self.folder = data, folder
        self.terms = SplitTerms(RUN, labels_stay, codec, codec)
        self.seen: list[Frame] = []
        self.fails_at = -1
        self.cloud = self.new_cloud()

    def new_cloud(self) -> CloudSide:
        def behind(shape: object, classes: int) -> torch.nn.Module:
            network = two_parts(list(shape), classes)  # type: ignore[call-overload]
            return layers_behind_cut(network, labels_stay=self.terms.labels_stay)[0]

        return CloudSide(behind, self.terms, OPTIONS, Checkpoints(self.folder / "cloud", 2, RUN))

    def exchange(self, frame: Frame, context: Context) -> Frame:
        self.seen.append(frame)
        if len(self.seen) == self.fails_at:  # the cloud's process dies and is started again
            self.cloud = self.new_cloud()
        return self.cloud.exchange(frame, context)

    @contextmanager
    def served(self, wrap: Callable[[HttpHop], TwiceHop | HttpHop] = lambda hop: hop) -> Iterator[TwiceHop | HttpHop]:
        with TrainingServer(settings(), self.exchange) as server:
            hop = HttpHop(server.url, attempts=2, connect_timeout_s=5, max_reply_bytes=2**24)
            try:
                yield wrap(hop)
            finally:
                hop.close()

    def edge(self, hop: TwiceHop | HttpHop, progress: Callable[..., None] = lambda *_: None) -> Edge:
        return Edge(self, hop, progress)


class Edge:
    """The edge's side, in a process's place."""

    def __init__(self, split: Split, hop: TwiceHop | HttpHop, progress: Callable[..., None]) -> None:
        data, terms = split.data, split.terms
        self.data = data
        self.layers: EdgeLayers = edge_layers(two_parts(data.input_shape, 10), labels_stay=terms.labels_stay)
        self.network = Normalised(self.layers, data.statistics, 1)
        self.computation = SplitComputation(self.network, self.layers, hop, terms, label_smoothing=0.1)
        self.checkpoints = SplitCheckpoints(split.folder / "edge", 2, RUN, self.computation)
        self.trainer = Trainer(
            self.network,
            data,
            OPTIONS,
            0,
            checkpoints=self.checkpoints,
            computation=self.computation,
            on_best=self.computation.mark_best,
            progress=progress,
        )

    def train(self) -> dict[str, np.ndarray]:
        """The weights of the whole network, by name."""
        train_edge(self.trainer, self.computation, self.checkpoints, self.data.input_shape, 10)
        whole = two_parts(self.data.input_shape, 10)
        whole.head.load_state_dict(self.layers.head.state_dict())  # type: ignore[union-attr]
        behind = self.computation.cloud_weights()
        if self.layers.end is not None:
            last = len(whole.tail) - 1  # type: ignore[arg-type]
            behind |= {f"{last}.{name}": value for name, value in self.layers.end.state_dict().items()}
        whole.tail.load_state_dict(behind)  # type: ignore[union-attr]
        return {name: value.numpy() for name, value in whole.state_dict().items()}


def settings(**values: object) -> SegmentSettings:
    return SegmentSettings(**{"registry": "unused", "secrets_dir": "/nowhere", "expose_details": True} | values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(data: PreparedData) -> dict[str, np.ndarray]:
    """The weights of training in one process."""
    network = Normalised(two_parts(data.input_shape, 10), data.statistics, 1)
    Trainer(network, data, OPTIONS, 0).run()
    return {name: value.numpy() for name, value in network.network.state_dict().items()}


def assert_same(weights: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(weights) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(weights[name], array, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("labels_stay", [False, True], ids=["labels go along", "labels stay"])
def test_raw_frames_give_the_weights_of_training_in_one_process(
    labels_stay: bool, data: PreparedData, alone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    split = Split(data, tmp_path, labels_stay=labels_stay)
    # Every call twice: nothing is applied a second time.
    with split.served(TwiceHop) as hop:
        assert_same(split.edge(hop).train(), alone)
    crossed = {name for frame in split.seen for name in frame.tensors}
    assert (messages.TARGETS in crossed) is not labels_stay
    if labels_stay:
        assert crossed == {"activations", "gradients", "checkpoints", "input_shape", "classes", "epoch_steps"}


def test_either_side_is_killed_and_both_resume_in_step(
    data: PreparedData, alone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(stage: str, done: int = 0, total: int = 0) -> None:
        if done == 23:
            raise Killed

    split = Split(data, tmp_path)
    split.fails_at = 15
    with split.served() as hop:
        with pytest.raises(Killed):
            split.edge(hop, die).train()
        joins = [frame for frame in split.seen if frame.segment == messages.JOIN]
        assert len(joins) == 2  # the second one after the cloud's death
        split.cloud = split.new_cloud()
        edge = split.edge(hop)
        assert_same(edge.train(), alone)
    assert split.seen[-1].step is not None
    last_join = max(i for i, frame in enumerate(split.seen) if frame.segment == messages.JOIN)
    assert split.seen[last_join + 1].step.position == 20  # type: ignore[union-attr]


def test_lossy_codecs_cost_bytes_less_and_still_learn(data: PreparedData, tmp_path: Path) -> None:
    sent, losses = {}, {}
    for codec in ("raw", "int8/1"):
        split = Split(data, tmp_path / codec[:3], codec=Choice.parse(codec))
        with split.served() as hop:
            edge = split.edge(hop)
            edge.train()
            sent[codec] = edge.computation.traffic.sent_bytes
            losses[codec] = float((edge.trainer.scores_of(data.test).argmax(1) == data.test.labels).mean())
    assert sent["int8/1"] < 0.6 * sent["raw"]
    assert losses["int8/1"] > losses["raw"] - 0.05
    with pytest.raises(LearningError, match="calibrated activations"):
        SplitTerms(RUN, activations=Choice.parse("transform/4@0.5"))


def test_calls_that_do_not_fit_are_refused_and_change_nothing(data: PreparedData, tmp_path: Path) -> None:
    split = Split(data, tmp_path)
    with split.served() as hop:
        edge = split.edge(hop)
        edge.checkpoints.begin(edge.trainer.state())
        computation = edge.computation
        batch = edge.trainer.batch(edge.trainer.order(0)[:32])
        with pytest.raises(StateMissing):  # nobody has joined
            computation.backward(batch)
        computation.join([0], data.input_shape, 10, 11)
        context = Context.from_headers({}, longest_s=10)
        step = {"activations": np.zeros((4, 16), "f4"), "targets": np.zeros(4, "i8"), "weights": np.ones(4, "f4")}
        for changes, error in (
            ({"activations": np.full((4, 16), np.nan, "f4")}, "NaN or infinity"),
            ({"activations": np.zeros((4, 7), "f4")}, "do not run on these tensors"),
            ({"targets": np.full(4, 10, "i8")}, "no class"),
        ):
            frame = messages.message(messages.STEP, split.terms, 0, step | changes, computation._process)
            with pytest.raises((HopRejected, ShapeMismatch), match=error):
                hop.call(frame, context)
        with pytest.raises(HopRejected, match="different configurations"):
            hop.call(frame._replace(bundle="sha256:" + "6" * 64), context)
        assert split.cloud.step == 0
        split.edge(hop).computation.join([0], data.input_shape, 10, 11)
        with pytest.raises(HopRejected, match="another edge has joined"):
            computation.backward(batch)
        with pytest.raises(HopRejected, match="no checkpoint of the same step"):
            computation.join([7], data.input_shape, 10, 11)


def test_a_training_beyond_this_machine_needs_keys_and_takes_protected_calls_alone(tmp_path: Path) -> None:
    def echo(frame: Frame, context: Context) -> Frame:
        return frame

    with pytest.raises(SettingsError, match="beyond this machine"):
        TrainingServer(settings(), echo, host="0.0.0.0")  # noqa: S104
    (tmp_path / "hop-keys").write_text("k1:" + "QUFB" * 11)
    protected = settings(secrets_dir=str(tmp_path))
    frame, context = Frame({"x": np.ones(3, "f4")}), Context.from_headers({}, longest_s=10)
    with TrainingServer(protected, echo) as server:
        options = {"attempts": 1, "connect_timeout_s": 5, "max_reply_bytes": 2**20}
        bare, keyed = (
            HttpHop(server.url, **options),
            HttpHop(server.url, protection=open_protection(protected), **options),
        )  # type: ignore[arg-type]
        with pytest.raises(HopRejected, match="sealed"):
            bare.call(frame, context)
        np.testing.assert_array_equal(keyed.call(frame, context).frame.tensors["x"], frame.tensors["x"])
        bare.close()
        keyed.close()
