"""The functions of stack.yml as processes, laid out from the template as an image is."""

from __future__ import annotations

import compileall
import contextlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import urllib3
from harness import ROOT, STATE

from isthmus.serving.profiling import SECRET
from isthmus_tools.cli.options import stack_variables
from isthmus_tools.engine.stack import read_stack, stage

MAX_START_S = 60.0
# Of the logs of earlier processes.
MAX_AGE_S = 86_400

PROFILE_TOKEN = "bench"  # noqa: S105 - of functions that end with their benchmark
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True)
class Process:
    """A server process: its URL and its log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_ready(self, path: str = "/ready") -> None:
        """Return once GET `path` responds 200.

        Raises:
            TimeoutError: no such response within MAX_START_S.
            ChildProcessError: the process ended before.
        """
        until = time.monotonic() + MAX_START_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ChildProcessError(f"{self.log.stem} ended:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                if urllib3.request("GET", self.url + path, retries=False, timeout=2.0).status == 200:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{self.url}{path} did not answer:\n{self.log.read_text()[-3000:]}")


@dataclass(frozen=True)
class StagedFunction:
    """A function's folder as in its image, and its environment by image and stack.yml."""

    name: str
    folder: Path
    environment: Mapping[str, str]

    @property
    def command(self) -> list[str]:
        """The command that serves the function, run in its folder."""
        return [sys.executable, "index.py"]

    def environment_at(self, url: str, **more: str) -> dict[str, str]:
        """The environment of a process that serves `url`; `more` overrides stack.yml's variables."""
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        # On loopback alone, and without the watchdog of the image's environment, behind which nobody would be let in.
        opened = {"access": "anyone"}
        return {**passed_on, **self.environment, **opened, **more, "upstream_url": url}

    def start(self, **more: str) -> contextlib.AbstractContextManager[Process]:
        """Run the function on a port of its own; `more` as in `environment_at`."""
        url = f"http://127.0.0.1:{free_port()}"
        return running(self.command, self.name, url, self.environment_at(url, **more), self.folder)


def stage_functions(*names: str, registry: Path, model: str) -> dict[str, StagedFunction]:
    """Stage functions of stack.yml for `model` in `registry`, bytecode included as in the image."""
    stack = read_stack(ROOT / "stack.yml", {**stack_variables(str(registry)), "MODEL": model})
    staged = {}
    for name in names:
        spec = stack.functions[name]
        folder = stage(stack, spec, STATE / "functions")
        compileall.compile_dir(folder, quiet=2)
        staged[name] = StagedFunction(name, folder, {**image_environment(folder / "Dockerfile"), **spec.environment})
    return staged


@contextlib.contextmanager
def tiers_to_profile(registry: Path, model: str) -> Iterator[tuple[Process, Process]]:
    """The segment functions of edge and cloud, ready, which may be profiled with PROFILE_TOKEN."""
    staged = stage_functions("edge-head", "cloud-tail", registry=registry, model=model)
    with contextlib.ExitStack() as stack:
        secrets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-")))
        (secrets / SECRET).write_text(PROFILE_TOKEN)
        env = {"threads": "1", "preload": "", "secrets_dir": str(secrets), "deadline_s": "120", "exec_timeout": "130s"}
        edge = stack.enter_context(staged["edge-head"].start(**env, cache_dir=str(STATE / "plan-edge")))
        cloud = stack.enter_context(staged["cloud-tail"].start(**env, cache_dir=str(STATE / "plan-cloud")))
        edge.wait_ready()
        cloud.wait_ready()
        yield edge, cloud


def image_environment(dockerfile: Path) -> dict[str, str]:
    """The variables of a Dockerfile's last ENV."""
    _, _, after = dockerfile.read_text().replace("\\\n", " ").rpartition("\nENV ")
    return dict(pair.split("=", 1) for pair in shlex.split(after.partition("\n")[0]))


@contextlib.contextmanager
def running(
    command: list[str], name: str, url: str, environment: Mapping[str, str], folder: Path = ROOT
) -> Iterator[Process]:
    """A process for the block, its log in a file."""
    log = STATE / "logs" / f"{name}-{url.rpartition(':')[2]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for old in log.parent.glob(f"{name}-[0-9]*.log"):
        if old.stat().st_mtime < time.time() - MAX_AGE_S:
            old.unlink()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield Process(url, process, log)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def gateway(registry: Path, model: str, **environment: str) -> Iterator[Process]:
    """All functions of stack.yml behind the local gateway: `isthmus up` in a process of its own."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("isthmus")), "up", "--port", str(port), "--no-logs"]
    command += ["--registry", str(registry)]
    for name, value in environment.items():
        command += ["--env", f"{name}={value}"]
    with running(
        command, "gateway", f"http://127.0.0.1:{port}", {**os.environ, "MODEL": model, "TERM": "dumb"}
    ) as process:
        try:
            for name in ("router", "edge-head", "cloud-tail"):
                process.wait_ready(f"/function/{name}/_/ready")
            yield process
        finally:
            process.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(timeout=15)


def free_port() -> int:
    """A free port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
