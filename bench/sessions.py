"""onnxruntime sessions of the systems in bench/load.py, with the options of Isthmus's own; in any environment.

Run by bench/load.py as `sessions.py THREADS INPUT HEAD TAIL`, this is onnxruntime alone: each line `CALLERS SECONDS` on
stdin runs head and tail one after the other in as many threads, in a closed loop, and prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort


def open_session(path: str, threads: int) -> Any:
    """A session that computes as a function's does."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: Any, values: dict[str, Any]) -> None:
    """Run a segment on the values at hand, and add its outputs to them."""
    names = [output.name for output in session.get_outputs()]
    inputs = {value.name: values[value.name] for value in session.get_inputs()}
    values.update(zip(names, session.run(names, inputs), strict=True))


def closed_loop(sessions: list[Any], x: Any, callers: int, seconds: float) -> list[float]:
    """Seconds of each run of all sessions in turn."""
    name = sessions[0].get_inputs()[0].name
    until, times = time.monotonic() + seconds, list[float]()

    def call() -> None:
        while (began := time.monotonic()) < until:
            values = {name: x}
            for session in sessions:
                run(session, values)
            times.append(time.monotonic() - began)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def main() -> None:
    threads, input_path, *paths = sys.argv[1:]
    sessions = [open_session(path, int(threads)) for path in paths]
    x = np.load(Path(input_path))
    for line in sys.stdin:
        callers, seconds = line.split()
        began = time.monotonic()
        times = closed_loop(sessions, x, int(callers), float(seconds))
        print(json.dumps({"times": times, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
