"""onnxruntime with its telemetry off. The only module that imports the package.

onnxruntime's wheels (seen in 1.31.1 for Linux) write a device id and a database to ~/.cache at import, and from ten
seconds on look up and call a host of their vendor. Only this variable, set before the import, prevents both;
`disable_telemetry_events()` comes too late. A value that the environment has already stands.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

__all__ = ["ort", "ort_state", "quantization", "time_limit"]


@contextmanager
def time_limit(seconds: float) -> Iterator[Any]:
    """The RunOptions of a run that ends by then, between two operators: a model's loop may have no end.

    Raises:
        TimeoutError: it was ended.
    """
    options = ort.RunOptions()
    options.log_severity_level = 4
    timer = threading.Timer(seconds, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    except Exception as e:
        if options.terminate:
            raise TimeoutError(f"a run took longer than {seconds:.3g} s") from e
        raise
    finally:
        timer.cancel()
        timer.join()


def quantization() -> Any:
    """The package onnxruntime.quantization, which needs onnx beside it.

    Raises:
        ImportError: onnx is missing.
    """
    importlib.import_module("onnxruntime.quantization.shape_inference")
    return importlib.import_module("onnxruntime.quantization")
