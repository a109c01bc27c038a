"""A run on several processes of this machine: data parallel, or the two stages of a pipeline over the cut.

Where a worker dies, all are started again from the last checkpoint, at most `MAX_RESTARTS` times.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from isthmus.errors import LearningError
from isthmus.files import write_whole
from isthmus_tools import parent_death
from isthmus_tools.learning.training.config import FileSource, TrainConfig
from isthmus_tools.learning.training.networks import two_parts
from isthmus_tools.learning.training.run import TrainedNetwork, initial_network
from isthmus_tools.learning.training.samples import PreparedData
from isthmus_tools.learning.training.trainer import EpochResult, TrainingResult
from isthmus_tools.learning.training.worker import ERROR, WorkerJob
from isthmus_tools.progress import Progress, silent

MAX_RESTARTS = 3
# Of one machine; each holds all of the data.
MAX_PROCESSES = 64
# Of the end of a worker's log, in an error.
_SHOWN_BYTES = 600
_LOOK_S = 0.1


@dataclass(frozen=True)
class ProcessGroup:
    """How many processes train; with `pipeline` two, with the head in the first and the tail in the second."""

    processes: int
    pipeline: bool = False
    max_restarts: int = MAX_RESTARTS

    def __post_init__(self) -> None:
        if self.pipeline and self.processes != 2:
            raise LearningError(
                f"a pipeline has a process for the head and one for the tail, not {self.processes}",
                hint="--pipeline --processes 2",
            )
        if not 2 <= self.processes <= MAX_PROCESSES:
            raise LearningError(f"{self.processes} processes; 2 to {MAX_PROCESSES} train together")


def fit_on_processes(
    config: TrainConfig,
    data: PreparedData,
    data_folder: Path,
    fingerprint: str,
    group: ProcessGroup,
    *,
    resume: bool,
    progress: Progress = silent,
    on_start: Callable[[int], None] = lambda process: None,
) -> TrainedNetwork:
    """Train on several processes; the weights are those of one process, but for the order of sums.

    `data` is what `data_folder` holds. `on_start` gets the id of the process that supervises the workers.

    Raises:
        LearningError: as `fit`, too few GPUs, or a worker died more often than it is started again.
    """
    _check_gpus(config.training.device, group.processes)
    network = initial_network(config, data)
    if group.pipeline:
        two_parts(network.network)
    began = time.monotonic()
    folder = config.run_folder / "processes"
    # Results of an earlier run must not pass for this run's.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    _write_job(folder, config, data_folder, fingerprint, group, resume)
    _supervise(folder, group, progress, on_start)
    document = json.loads((folder / "result.json").read_bytes())
    history = tuple(EpochResult(**each) for each in document.pop("history"))
    _load(network, folder, group)
    network.eval()
    return TrainedNetwork(network, TrainingResult(**document, history=history), time.monotonic() - began)


def _write_job(
    folder: Path, config: TrainConfig, data_folder: Path, fingerprint: str, group: ProcessGroup, resume: bool
) -> None:
    # Workers read prepared data; the sources, with names of secrets, are not theirs.
    bare = msgspec.structs.replace(
        config,
        data=msgspec.structs.replace(config.data, sources=(FileSource(path="prepared"),)),
        network=msgspec.structs.replace(config.network, name=config.network_name),
    )
    job = WorkerJob(
        folder=str(folder),
        data=str(data_folder),
        checkpoints=str(config.run_folder / "checkpoints"),
        fingerprint=fingerprint,
        config=bare,
        pipeline=group.pipeline,
        resume=resume,
    )
    write_whole(folder / "job.json", msgspec.json.encode(job, enc_hook=_with_unit))


def _with_unit(value: float) -> str:
    """A duration or a size as the configuration writes it."""
    return f"{value}s" if isinstance(value, float) else str(int(value))


def _supervise(folder: Path, group: ProcessGroup, progress: Progress, on_start: Callable[[int], None]) -> None:
    """Run the agent to its end, and pass the workers' progress on."""
    agent = [sys.executable, "-m", "isthmus_tools.learning.training.agent", str(folder / "job.json")]
    agent += [str(group.processes), str(group.max_restarts)]
    # A run that is killed takes its workers along: the agent ends with this process, the workers with the agent.
    command = [sys.executable, parent_death.__file__, str(os.getpid()), *agent]
    progress(f"starting {group.processes} processes")
    with (folder / "agent.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            on_start(process.pid)
            shown: Any = None
            # After an error of ours another start would fail as well, as where the loss is not finite.
            while process.poll() is None and not (folder / ERROR).exists():
                shown = _show(folder / "progress.json", shown, progress)
                time.sleep(_LOOK_S)
        finally:
            # SIGTERM: the agent ends its workers before itself.
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise _failure(folder, process.returncode, group)


def _show(path: Path, shown: Any, progress: Progress) -> Any:
    try:
        latest = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return shown
    if latest != shown:
        progress(*latest)
    return latest


def _failure(folder: Path, code: int, group: ProcessGroup) -> LearningError:
    """The error of a run whose workers failed after the last restart."""
    if (path := folder / ERROR).exists():
        document = json.loads(path.read_bytes())
        return LearningError(document["error"], hint=document.get("hint", ""), **document.get("facts", {}))
    log = folder / "agent.log"
    facts: dict[str, Any] = {"worker": None, "exit_code": code}
    what = f"the agent of the workers ended with {code}"
    if (path := folder / "failure.json").exists():
        facts = json.loads(path.read_bytes())
        ended = f"by {facts['signal']}" if facts["exit_code"] < 0 else f"with exit code {facts['exit_code']}"
        what = f"worker {facts['worker']} (process {facts['process']}) died {ended}"
        logs = sorted(folder.glob(f"logs/*/attempt_*/{facts['worker']}/stderr.log"))
        log = logs[-1] if logs else log
    end = log.read_bytes()[-_SHOWN_BYTES:].decode("utf-8", "replace").strip() if log.exists() else ""
    return LearningError(
        f"{what}, after {group.max_restarts} restarts" + (f": …{end}" if end else ""),
        hint=f"--resume goes on from the last checkpoint; logs are in {folder}",
        **facts,
    )


def _load(network: Any, folder: Path, group: ProcessGroup) -> None:
    states = [
        torch.load(folder / f"weights-{rank}.pt", map_location="cpu", weights_only=True)
        for rank in range(2 if group.pipeline else 1)
    ]
    if not group.pipeline:
        network.load_state_dict(states[0])
        return
    head, tail = two_parts(network.network)
    head.load_state_dict({n.removeprefix("network."): v for n, v in states[0].items() if n.startswith("network.")})
    tail.load_state_dict(states[1])


def _check_gpus(device: str, processes: int) -> None:
    if device.startswith("cuda") and torch.cuda.device_count() < processes:
        raise LearningError(
            f"{processes} processes need a GPU each, and torch finds {torch.cuda.device_count()} here",
            key="training.device",
            hint='device = "cpu" trains on the CPUs by gloo',
        )
