"""Training on several processes: the weights of one, uneven batches, a pipeline over the cut, killed workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from msgspec import structs

from isthmus.errors import LearningError
from isthmus_tools.learning.training.config import DataTable, FileSource, FitTable, NetworkTable, TrainConfig
from isthmus_tools.learning.training.samples import PreparedData
from support.training import digits

torch = pytest.importorskip("torch")

from isthmus_tools.learning.training.checkpoints import Checkpoints  # noqa: E402
from isthmus_tools.learning.training.distributed import ProcessGroup, fit_on_processes  # noqa: E402
from isthmus_tools.learning.training.run import TrainedNetwork, fit  # noqa: E402

# The last of eleven batches has 13 rows: one process gets a row more than the other.
ROWS = 333
OPTIONS = FitTable(epochs=24, batch=32, rate=3e-3, patience=0, checkpoint_every=5, clip=0.5, label_smoothing=0.1)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    torch.set_num_threads(1)
    return digits(train=ROWS)


def config(folder: Path, options: FitTable = OPTIONS) -> TrainConfig:
    return TrainConfig(
        name="digits",
        folder=str(folder / "run"),
        data=DataTable(kind="table", sources=(FileSource(path="unused"),)),
        network=NetworkTable(width=32),
        training=options,
    )


@pytest.fixture(scope="module")
def alone(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> TrainedNetwork:
    folder = tmp_path_factory.mktemp("alone")
    return fit(config(folder), data, Checkpoints(folder, 1, "x"), resume=False)


def train(
    data: PreparedData,
    folder: Path,
    group: ProcessGroup,
    on_start: Callable[[int], None] = lambda process: None,
    *,
    options: FitTable = OPTIONS,
    resume: bool = False,
) -> tuple[TrainedNetwork, list[str]]:
    data.write(folder / "data")
    stages: list[str] = []
    trained = fit_on_processes(
        config(folder, options),
        data,
        folder / "data",
        "x",
        group,
        resume=resume,
        progress=lambda stage, done=0, total=0: stages.append(stage),
        on_start=on_start,
    )
    return trained, stages


def assert_same(trained: TrainedNetwork, alone: TrainedNetwork) -> None:
    for ours, expected in zip(trained.result.history, alone.result.history, strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=1e-3)
        assert ours.validation_loss == pytest.approx(expected.validation_loss, rel=1e-3)
    expected = alone.network.state_dict()
    for name, value in trained.network.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name].numpy(), atol=2e-3, err_msg=name)


def kill_worker(agent: int, rank: int, when: Callable[[], bool]) -> threading.Thread:
    """Kill -9 the worker of that rank, in a thread, once `when` is true."""

    def kill() -> None:
        # Looked up while the worker imports torch: afterwards the run is over in a second.
        while psutil.pid_exists(agent):
            workers = [child for child in _children(agent) if _rank_of(child) == rank]
            if workers and when():
                os.kill(workers[0].pid, signal.SIGKILL)
                return
            time.sleep(0.002 if workers else 0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def _children(agent: int) -> list[psutil.Process]:
    try:
        return psutil.Process(agent).children()
    except psutil.Error:  # it has ended
        return []


def _rank_of(process: psutil.Process) -> int:
    try:
        return int(process.environ().get("RANK", -1))
    except psutil.Error:  # between fork and exec, or already over
        return -1


def test_a_killed_worker_is_named_and_the_resumed_run_trains_as_one_process_does(
    data: PreparedData, alone: TrainedNetwork, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 3, "x")
    killers: list[threading.Thread] = []
    group = ProcessGroup(2, max_restarts=0)
    with pytest.raises(LearningError, match=r"worker 1 \(process \d+\) died by SIGKILL") as failed:
        train(data, tmp_path, group, lambda agent: killers.append(kill_worker(agent, 1, checkpoints.exist)))
    killers[0].join()
    assert "--resume" in failed.value.hint
    assert failed.value.facts["exit_code"] == -9
    last = checkpoints.steps()[-1]
    trained, _ = train(data, tmp_path, group, resume=True)
    # No more than the steps since the last checkpoint is lost.
    assert trained.result.resumed_at == last >= OPTIONS.checkpoint_every
    assert trained.result.steps == alone.result.steps
    assert_same(trained, alone)


def test_an_error_that_another_start_would_meet_as_well_ends_the_run_at_once(
    data: PreparedData, tmp_path: Path
) -> None:
    diverging = structs.replace(OPTIONS, optimiser="sgd", rate=1e30, clip=0.0, warmup=0.0)
    with pytest.raises(LearningError, match=r"the loss is nan at step \d") as failed:
        train(data, tmp_path, ProcessGroup(2), options=diverging)
    assert "training.rate" in failed.value.hint
    assert [path.name for path in tmp_path.glob("run/processes/logs/*/*")] == ["attempt_0"]


def test_a_pipeline_over_the_cut_whose_stage_is_killed_trains_as_one_process_does(
    data: PreparedData, alone: TrainedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Relative to the command, as the default .isthmus/training/NAME is; and `#` would end a URL.
    monkeypatch.chdir(tmp_path)
    folder = Path("runs #1")
    stages = [Checkpoints(folder / "run" / "checkpoints" / f"stage-{stage}", 2, "x") for stage in (0, 1)]
    killers: list[threading.Thread] = []

    def have_checkpoints() -> bool:
        return all(stage.exist() for stage in stages)

    group = ProcessGroup(2, pipeline=True)
    trained, progress = train(
        data, folder, group, lambda agent: killers.append(kill_worker(agent, 1, have_checkpoints))
    )
    killers[0].join()
    # Both started again, from a step that both have.
    assert any("restart 1" in stage for stage in progress)
    assert trained.result.resumed_at >= OPTIONS.checkpoint_every
    assert_same(trained, alone)
    # Each process wrote the checkpoints of its own stage.
    states = [stage.latest() for stage in stages]
    names = [set(state["network"]) for state in states if state is not None]
    assert len(names) == 2
    assert not names[0] & names[1]
    with pytest.raises(LearningError, match="not 3"):
        ProcessGroup(3, pipeline=True)
