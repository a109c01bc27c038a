"""A worker of a run on several processes: `python -m isthmus_tools.learning.training.worker JOB`.

torch's elastic agent starts the workers, and all of them again where one has died; each goes on from the checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch import nn

from isthmus.errors import IsthmusError
from isthmus.events.configuration import decode_unit
from isthmus.files import write_whole
from isthmus_tools.learning.training.checkpoints import Checkpoints
from isthmus_tools.learning.training.config import FitTable, TrainConfig
from isthmus_tools.learning.training.networks import Normalised, two_parts
from isthmus_tools.learning.training.processes import (
    GroupProcesses,
    PipelineComputation,
    StageProcesses,
    common_step,
)
from isthmus_tools.learning.training.run import initial_network
from isthmus_tools.learning.training.samples import PreparedData, read_prepared
from isthmus_tools.learning.training.trainer import Trainer, TrainingResult
from isthmus_tools.parent_death import die_with

# Long for a step of any network that a few processes train; a peer that died is noticed at once.
_STEP_S = 600
_TELL_S = 0.2
ERROR = "error.json"
"""The file of the run's folder with an error of Isthmus, as a document."""


class WorkerJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the workers share: files are in `folder`, the data is in `data`, checkpoints in `checkpoints`."""

    folder: str
    data: str
    checkpoints: str
    fingerprint: str
    config: TrainConfig
    pipeline: bool
    resume: bool


def read_job(path: Path) -> WorkerJob:
    """The job that `launch` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=WorkerJob, dec_hook=decode_unit)


class _Worker:
    """One process: its rank, its device, and its part of the network."""

    def __init__(self, job: WorkerJob) -> None:
        self._job, self._folder = job, Path(job.folder)
        self.rank = int(os.environ["RANK"])
        self._attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._device = _device(job.config.training.device, int(os.environ["LOCAL_RANK"]))
        self._told_at, self._resumed_at = 0.0, 0

    def run(self) -> None:
        """Train to the end, and write this process's result."""
        job = self._job
        # Every process has all of the data: a batch's rows are chosen by the seed, and not sent.
        data = read_prepared(Path(job.data))
        options = msgspec.structs.replace(job.config.training, device=self._device)
        # nccl has no CPUs, and gloo copies through these.
        with_gpu = self._device.startswith("cuda")
        processes = int(os.environ["WORLD_SIZE"])
        # Only this machine's processes take part: nothing listens beyond it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        dist.init_process_group(
            "nccl" if with_gpu else "gloo",
            # Not as a URL, which would have to be absolute, and ends at a `#` in the path.
            store=dist.FileStore(  # type: ignore[attr-defined]  # public, but not in __all__
                str(self._folder / f"group-{self._attempt}"), processes
            ),
            rank=self.rank,
            world_size=processes,
            timeout=timedelta(seconds=_STEP_S),
        )
        try:
            network = initial_network(job.config, data, check=False)
            trainer, checkpoints = self._trainer(network, data, options)
            if job.resume or self._attempt:
                self._restore(trainer, checkpoints)
            elif job.pipeline or self.rank == 0:
                checkpoints.remove()
            result = replace(trainer.run(), resumed_at=self._resumed_at)
            self._write_result(trainer.network, result)
        finally:
            dist.destroy_process_group()

    def _trainer(self, network: Normalised, data: PreparedData, options: FitTable) -> tuple[Trainer, Checkpoints]:
        job = self._job
        progress = self._tell if self.rank == 0 else _tell_nobody
        if not job.pipeline:
            checkpoints = Checkpoints(Path(job.checkpoints), options.keep, job.fingerprint)
            trainer = Trainer(
                network,
                data,
                options,
                job.config.seed,
                checkpoints=checkpoints,
                processes=GroupProcesses(),
                progress=progress,
            )
            return trainer, checkpoints
        head, tail = two_parts(network.network)
        stage: nn.Module = tail
        if self.rank == 0:
            stage = Normalised(head, data.statistics, len(data.input_shape))
        # A stage may be killed between the writes of both: the step before has to be there.
        folder = Path(job.checkpoints) / f"stage-{self.rank}"
        checkpoints = Checkpoints(folder, max(2, options.keep), job.fingerprint)
        stage.to(self._device)
        computation = PipelineComputation(
            stage, torch.device(self._device), label_smoothing=options.label_smoothing, clip=options.clip
        )
        trainer = Trainer(
            stage,
            data,
            options,
            job.config.seed,
            checkpoints=checkpoints,
            processes=StageProcesses(),
            computation=computation,
            progress=progress,
        )
        return trainer, checkpoints

    def _restore(self, trainer: Trainer, checkpoints: Checkpoints) -> None:
        step = common_step(checkpoints.steps())
        if step is not None:
            trainer.restore(checkpoints.read(step))
            self._resumed_at = step

    def _write_result(self, network: nn.Module, result: TrainingResult) -> None:
        # Data parallel processes have equal weights; stages have different ones.
        if self.rank == 0 or self._job.pipeline:
            torch.save(network.cpu().state_dict(), self._folder / f"weights-{self.rank}.pt")
        if self.rank == 0:
            write_whole(self._folder / "result.json", json.dumps(asdict(result)).encode())

    def _tell(self, stage: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if now - self._told_at >= _TELL_S or done == total:
            self._told_at = now
            again = f", restart {self._attempt}" if self._attempt else ""
            write_whole(self._folder / "progress.json", json.dumps([stage + again, done, total]).encode())


def _tell_nobody(stage: str, done: int = 0, total: int = 0) -> None:
    """Other processes are at the same step."""


def _device(device: str, local_rank: int) -> str:
    # A GPU for each process.
    return f"cuda:{local_rank}" if device.startswith("cuda") else device


def main() -> None:
    """Run the worker; an error of Isthmus goes to a file, for the process that started the run."""
    die_with(os.getppid())
    job = read_job(Path(sys.argv[1]))
    code = 0
    try:
        _Worker(job).run()
    except IsthmusError as e:
        write_whole(Path(job.folder) / ERROR, json.dumps(e.document(), default=str).encode())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's finalisation: a thread of gloo that drops the last tensor meanwhile would abort the
    # process (github.com/pytorch/pytorch/pull/179291), and its finished work would count as lost.
    os._exit(code)


if __name__ == "__main__":
    main()
