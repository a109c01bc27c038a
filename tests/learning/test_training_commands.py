"""The commands of trainings on several machines: the cloud's side in a process of its own, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from isthmus.settings import RegistrySettings
from isthmus_tools.learning.training.config import TrainingPlace, read_config
from support.cli import isthmus, refusal
from support.ports import free_port
from support.training import digits

torch = pytest.importorskip("torch")

from isthmus_tools.learning.training.checkpoints import Checkpoints  # noqa: E402
from isthmus_tools.learning.training.run import fit  # noqa: E402

CONFIG = """
name = "digits"
folder = "{folder}"
[data]
kind = "table"
[[data.sources]]
kind = "files"
path = "unused.csv"
[network]
width = 32
[training]
epochs = 3
clip = 0
patience = 0
checkpoint_every = 5
[split_learning]
labels = "stay"
"""


def serve_tail(config: Path, port: int) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("isthmus")), "train-tail", str(config), "--port", str(port), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["url"] == f"http://127.0.0.1:{port}"
    return process


def test_the_clouds_process_is_killed_and_started_again_and_the_weights_are_those_of_one_process(
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    data, port = digits(train=333), free_port()
    for folder in ("edge", "cloud", "one"):
        (tmp_path / f"{folder}.toml").write_text(CONFIG.format(folder=tmp_path / folder))
    edge, one = (read_config(tmp_path / f"{name}.toml", {}) for name in ("edge", "one"))
    processes = [serve_tail(tmp_path / "cloud.toml", port)]
    killed = threading.Event()

    def kill(stage: str, done: int = 0, total: int = 0) -> None:
        if done >= 13 and not killed.is_set():
            killed.set()
            processes[0].send_signal(signal.SIGKILL)
            processes[0].communicate()
            processes.append(serve_tail(tmp_path / "cloud.toml", port))

    try:
        trained = fit(
            edge,
            data,
            Checkpoints(tmp_path / "unused", 1, "x"),
            resume=False,
            progress=kill,
            place=TrainingPlace(split_with=f"http://127.0.0.1:{port}"),
            settings=RegistrySettings(secrets_dir=str(tmp_path)),
        )
    finally:
        processes[-1].send_signal(signal.SIGINT)
        out, _ = processes[-1].communicate()
    assert len(processes) == 2
    assert json.loads(out.splitlines()[-1]) == {"steps": 33}
    alone = fit(one, data, Checkpoints(tmp_path / "one", 1, "x"), resume=False)
    for name, value in alone.network.state_dict().items():
        torch.testing.assert_close(trained.network.state_dict()[name], value, atol=1e-6, rtol=0)


def test_commands_refuse_what_cannot_work(tmp_path: Path) -> None:
    config = tmp_path / "train.toml"
    config.write_text(CONFIG.format(folder=tmp_path / "run"))
    assert "--with URL" in refusal(isthmus("federate", "join", config, "--json"))["error"]
    assert "data.classes is missing" in refusal(isthmus("federate", "serve", config, "--json"))["error"]
    beyond = refusal(isthmus("train-tail", config, "--host", "0.0.0.0", "--json"))  # noqa: S104
    assert "without the secret hop-keys" in beyond["error"]
    for command in ("train-tail", "federate"):
        assert "Example:" in isthmus(command, "--help").stdout
