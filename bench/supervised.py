"""Processes that are started again whenever they end, and kills of them at random."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import urllib3
from functions import MAX_START_S
from harness import ROOT, STATE

# Between the death of a process and the next start, as platforms pause.
_PAUSE_S = 0.2
_LOOK_S = 0.05


class Supervised:
    """A command that runs until `stop`; `is_ready` says whether it serves. Its output is appended to `log`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        is_ready: Callable[[], bool],
        folder: Path = ROOT,
    ) -> None:
        self.name, self.log = name, STATE / "logs" / f"events-{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self._command, self._environment, self._folder = list(command), dict(environment), folder
        self._is_ready = is_ready
        self._stopping = threading.Event()
        self.process = self._spawn()
        self._thread = threading.Thread(target=self._keep, name=f"supervise-{name}", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether it runs and serves."""
        return self.process.poll() is None and self._is_ready()

    def wait_ready(self) -> None:
        """Return once it serves.

        Raises:
            TimeoutError: not within MAX_START_S.
        """
        until = time.monotonic() + MAX_START_S
        while not self.is_ready:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name} does not serve:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(_LOOK_S)

    def kill(self) -> None:
        """End the process as a power cut would; another follows."""
        self.process.kill()
        # A look at `is_ready` right afterwards is about the next process.
        self.process.wait()

    @contextlib.contextmanager
    def paused(self) -> None:
        """Stop the process for the block, and let it go on."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it for good."""
        self._stopping.set()
        self.process.kill()
        self._thread.join()

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self.process.wait()
            if not self._stopping.wait(_PAUSE_S):
                self.process = self._spawn()
        self.process.kill()
        self.process.wait()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            return subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )


@dataclass(frozen=True)
class Kill:
    """A kill, and the share of messages that was done before it."""

    victim: str
    progress: float


def kill_at_random(
    victims: Sequence[Supervised], kills: int, progress: Callable[[], float], rng: random.Random, mean_s: float
) -> list[Kill]:
    """Kill each of the victims as often as the others, in random order, until `kills` are done.

    The pause before each kill is random, `mean_s` on average; it ends early where a kill is due by the share of
    messages done, so that the last kill meets messages too. A victim is killed while it serves; others may be down.
    """
    order = [victims[i % len(victims)] for i in range(kills)]
    rng.shuffle(order)
    done = []
    for i, victim in enumerate(order):
        until = time.monotonic() + rng.uniform(0.0, 2.0 * mean_s)
        due = (i + 0.5) / (kills + 1)
        while time.monotonic() < until and progress() < due:
            time.sleep(_LOOK_S)
        victim.wait_ready()
        victim.kill()
        done.append(Kill(victim.name, progress()))
    return done


def answers(url: str) -> bool:
    """Whether GET `url` responds 200."""
    with urllib3.PoolManager() as http:
        try:
            return http.request("GET", url, retries=False, timeout=1.0).status == 200
        except urllib3.exceptions.HTTPError:
            return False


def listens(port: int) -> bool:
    """Whether a server accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
