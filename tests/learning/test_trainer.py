"""The training loop: what it learns, what a kill and a resume leave, and batches over several processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from isthmus.errors import LearningError
from isthmus_tools.learning.training.config import FitTable, NetworkTable
from isthmus_tools.learning.training.samples import PreparedData, Samples, Statistics
from support.training import FAST, digits

torch = pytest.importorskip("torch")

from isthmus_tools.learning.training.checkpoints import Checkpoints, State  # noqa: E402
from isthmus_tools.learning.training.networks import Normalised, make_network  # noqa: E402
from isthmus_tools.learning.training.trainer import Trainer  # noqa: E402


@pytest.fixture(scope="module")
def data() -> PreparedData:
    torch.set_num_threads(1)
    return digits()


def network(data: PreparedData) -> Normalised:
    torch.manual_seed(0)
    made = make_network(NetworkTable(width=32), "dense", data.input_shape, len(data.classes))
    return Normalised(made, data.statistics, len(data.input_shape))


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in trainer.network.state_dict().items()}


def assert_equal(a: Trainer, b: Trainer) -> None:
    ours, theirs = weights(a), weights(b)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


class _Killed(Exception):
    pass


class _DyingCheckpoints(Checkpoints):
    """Ends the run after a number of checkpoints."""

    left = 2

    def write(self, step: int, state: State) -> None:
        super().write(step, state)
        self.left -= 1
        if not self.left:
            raise _Killed


def test_a_network_learns_digits_and_keeps_its_best_epoch(data: PreparedData) -> None:
    trainer = Trainer(network(data), data, msgspec.structs.replace(FAST, epochs=12, patience=3), 0)
    result = trainer.run()
    accuracy = (trainer.scores_of(data.test).argmax(1) == data.test.labels).mean()
    assert accuracy > 0.8
    assert result.best_epoch == int(np.argmin([each.validation_loss for each in result.history]))
    assert result.history[-1].loss < result.history[0].loss / 2


def test_a_run_that_was_killed_after_its_last_epoch_trains_no_further(data: PreparedData, tmp_path: Path) -> None:
    # At such a rate the validation loss rises from the first epochs on.
    options = msgspec.structs.replace(FAST, epochs=9, patience=1, rate=0.5, schedule="constant", warmup=0.0)
    first = Trainer(network(data), data, options, 0, checkpoints=Checkpoints(tmp_path, 2, "x"))
    ended = first.run()
    assert ended.stopped_early
    again = Trainer(network(data), data, options, 0, checkpoints=Checkpoints(tmp_path, 2, "x"))
    result = again.run(resume=True)
    assert (result.steps, result.best_epoch, result.stopped_early) == (ended.steps, ended.best_epoch, True)
    assert_equal(first, again)


@pytest.mark.parametrize("every", [0, 3], ids=["each epoch", "each third step"])
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    every: int, data: PreparedData, tmp_path: Path
) -> None:
    options = msgspec.structs.replace(FAST, checkpoint_every=every)
    whole = Trainer(network(data), data, options, 0)
    whole.run()
    with pytest.raises(_Killed):
        Trainer(network(data), data, options, 0, checkpoints=_DyingCheckpoints(tmp_path, 2, "x")).run()
    # Another start: what is not in the checkpoint would differ.
    torch.manual_seed(9)
    resumed = Trainer(network(data), data, options, 0, checkpoints=Checkpoints(tmp_path, 2, "x"))
    result = resumed.run(resume=True)
    assert result.resumed_at == (6 if every else 32)
    assert result.steps == 4 * 16
    assert_equal(whole, resumed)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path) -> None:
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path, 2, "x", warnings.append)
    for step in (1, 2, 3):
        checkpoints.write(step, {"at": torch.full((100,), float(step))})
    newest = max(tmp_path.iterdir())
    # A bit of a weight, of which torch's archive says nothing.
    damaged = bytearray(newest.read_bytes())
    damaged[damaged.index(np.full(100, 3, np.float32).tobytes()) + 2] ^= 1
    newest.write_bytes(damaged)
    state = checkpoints.latest()
    assert state is not None
    assert state["at"].unique().tolist() == [2.0]
    assert len(warnings) == 1
    assert f"{newest} is damaged" in warnings[0]
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert checkpoints.latest() is None


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 2, "x").write(1, {})
    with pytest.raises(LearningError, match="of other data") as refused:
        Checkpoints(tmp_path, 2, "y").latest()
    assert "--fresh" in refused.value.hint


def test_the_samples_of_a_step_are_the_same_for_any_number_of_processes(data: PreparedData) -> None:
    class Process:
        size = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def add(self, tensors: object) -> None:
            pass

    alone = Trainer(network(data), data, FAST, 5)
    rows = alone.order(0)[:32]
    parts = [Trainer(network(data), data, FAST, 5, processes=Process(rank)) for rank in range(3)]
    for one in (alone, *parts):
        one.optimiser.zero_grad()
        one.computation.backward(one.batch(rows))
    for expected, *each in zip(*(one.parameters for one in (alone, *parts)), strict=True):
        torch.testing.assert_close(sum(p.grad for p in each), expected.grad, atol=1e-6, rtol=1e-5)
    assert not np.array_equal(alone.order(0), alone.order(1))


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(data: PreparedData) -> None:
    options = FitTable(optimiser="sgd", rate=1e30, clip=0, epochs=3)
    with pytest.raises(LearningError, match="the loss is") as failed:
        Trainer(network(data), data, options, 0).run()
    assert "training.rate" in failed.value.hint


def test_training_without_a_validation_part_keeps_the_last_weights(data: PreparedData) -> None:
    none = Samples(data.test.inputs[:0], data.test.labels[:0], ())
    bare = PreparedData({**data.parts, "validation": none}, data.classes, data.statistics)
    result = Trainer(network(bare), bare, msgspec.structs.replace(FAST, epochs=2, patience=1), 0).run()
    assert (result.best_epoch, result.stopped_early) == (1, False)
    assert math.isnan(result.history[-1].validation_loss)


def test_an_epoch_by_itself_has_shifts_of_its_own() -> None:
    # Rows of pixels as series of a single channel.
    data = digits(64, 0, 0)
    series = {name: Samples(part.inputs[:, None], part.labels, part.groups) for name, part in data.parts.items()}
    data = replace(data, parts=series, statistics=Statistics(np.zeros(1, np.float32), np.ones(1, np.float32)))
    made = Normalised(make_network(NetworkTable(width=8), "convolutions", data.input_shape, 10), data.statistics, 2)
    trainer = Trainer(made, data, msgspec.structs.replace(FAST, shift=8), seed=0)
    drawn = []
    for epoch in (0, 1, 0):
        trainer.pass_over(epoch)
        drawn.append(trainer.batch(np.arange(64)).inputs.numpy())
    assert not np.array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])
