"""The functions of stack.yml as processes: laid out from the template as an image is, and served by its index.py."""

from __future__ import annotations

import compileall
import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import urllib3
from report import ROOT, STATE

from isthmus_tools.cli.options import stack_variables
from isthmus_tools.engine.stack import read_stack, stage

MAX_START_S = 60.0
KEPT_S = 86_400
"""How long the logs of processes are kept."""

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True)
class Process:
    """A server that was started here: where it listens, and its log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_ready(self, path: str = "/ready") -> None:
        """Return once GET `path` is answered with 200.

        Raises:
            TimeoutError: it was not, within MAX_START_S; ChildProcessError: the process ended before.
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
class Laid:
    """A function's folder, as its image holds it, and the environment that its image and stack.yml give it."""

    name: str
    folder: Path
    environment: Mapping[str, str]

    def start(self, **more: str) -> contextlib.AbstractContextManager[Process]:
        """Run it on a port of its own; `more` goes before stack.yml's variables."""
        url = f"http://127.0.0.1:{free_port()}"
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        env = {**passed_on, **self.environment, **more, "upstream_url": url}
        return running([sys.executable, "index.py"], self.name, url, env, self.folder)


def lay_out(*names: str, registry: Path, model: str) -> dict[str, Laid]:
    """Lay functions of stack.yml out for `model` in `registry`, their bytecode made as in the image."""
    stack = read_stack(ROOT / "stack.yml", {**stack_variables(str(registry)), "MODEL": model})
    found = {}
    for name in names:
        spec = stack.functions[name]
        folder = stage(stack, spec, STATE / "functions")
        compileall.compile_dir(folder, quiet=2)
        found[name] = Laid(name, folder, {**image_environment(folder / "Dockerfile"), **spec.environment})
    return found


def image_environment(dockerfile: Path) -> dict[str, str]:
    """The variables that a Dockerfile's last ENV sets."""
    _, _, after = dockerfile.read_text().replace("\\\n", " ").rpartition("\nENV ")
    return dict(pair.split("=", 1) for pair in shlex.split(after.partition("\n")[0]))


@contextlib.contextmanager
def running(
    command: list[str], name: str, url: str, environment: Mapping[str, str], folder: Path = ROOT
) -> Iterator[Process]:
    """A process with its log in a file, ended with the block."""
    log = STATE / "logs" / f"{name}-{url.rpartition(':')[2]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for old in log.parent.glob(f"{name}-[0-9]*.log"):
        if old.stat().st_mtime < time.time() - KEPT_S:
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
    """All functions of stack.yml behind the local gateway, in a process of its own as `isthmus up` runs it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("isthmus")), "up", "--port", str(port), "--no-logs"]
    command += ["--registry", str(registry)]
    for name, value in environment.items():
        command += ["--env", f"{name}={value}"]
    with running(
        command, "gateway", f"http://127.0.0.1:{port}", {**os.environ, "MODEL": model, "TERM": "dumb"}
    ) as found:
        try:
            for name in ("router", "edge-head", "cloud-tail"):
                found.wait_ready(f"/function/{name}/_/ready")
            yield found
        finally:
            found.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                found.process.wait(timeout=15)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
