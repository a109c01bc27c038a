"""onnxruntime without telemetry: its import, its providers, its limits and its error texts.

The only module that imports the package. Its wheels (seen in 1.31.1 for Linux) write a device id and a database to
~/.cache at import, and after ten seconds call a host of their vendor. Only the variable ORT_DISABLE_TELEMETRY, set
before the import, prevents both; `disable_telemetry_events()` is too late. The environment's own value takes
precedence.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from isthmus.errors import SettingsError

__all__ = [
    "available_providers",
    "block_quantization",
    "check_providers",
    "cpu_limit",
    "ort",
    "ort_state",
    "quantization",
    "reason_of",
    "time_limit",
    "version",
]

_MAX_REASON = 500
_PREAMBLE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : |Load model from .*? failed: ?|^Exception during \w+: |Fatal error: "
)
_ARGUMENTS = r"[^()]*\((?:[^()]|\([^()]*\))*\)"
_SOURCE_LINE = re.compile(
    rf"\S+\.(?:cc|cpp|h|hpp|cu|cuh):\d+ {_ARGUMENTS}(?:::{_ARGUMENTS})*(?: const)?(?: \[with [^\]]*\])? ?"
)

# Messages start with the node and the types of its inputs and outputs, possibly pages of text.
_LOADING = re.compile(
    r"This is an invalid model\. In Node, \(\"(?P<name>.*?)\", (?P<op>[\w.]+),.*?, Error (?P<reason>.+)"
)
_RUNNING = re.compile(
    r"Non-zero status code returned while running (?P<op>\S+) node\. Name:'(?P<name>.*?)'"
    r" Status Message: (?P<reason>.+)"
)


@contextmanager
def time_limit(seconds: float) -> Iterator[Any]:
    """RunOptions that terminate a run after `seconds`, between two operators: a model's loop may be endless.

    Raises:
        TimeoutError: the run was terminated.
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
    """The package onnxruntime.quantization; depends on onnx.

    Raises:
        ImportError: onnx is missing.
    """
    importlib.import_module("onnxruntime.quantization.shape_inference")
    return importlib.import_module("onnxruntime.quantization")


def block_quantization() -> Any:
    """The module of onnxruntime.quantization for weights in blocks; depends on onnx and onnx-ir.

    Raises:
        ImportError: one of these is missing.
    """
    return importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")


def version() -> str:
    """The runtime and its version."""
    return f"onnxruntime {ort.__version__}"


def available_providers() -> list[str]:
    """The execution providers of this build of onnxruntime."""
    providers: list[str] = ort.get_available_providers()
    return providers


def check_providers(providers: tuple[str, ...]) -> None:
    """Check that this build of onnxruntime has these execution providers.

    Raises:
        SettingsError: names the missing provider and the available ones.
    """
    available = available_providers()
    for provider in providers:
        if provider not in available:
            raise SettingsError(
                f"the setting providers names {provider}; this onnxruntime has {', '.join(available)}",
                variable="providers",
                value=provider,
            )


def cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole CPUs available to this process, by its affinity and its container's quota, at least 1.

    onnxruntime counts the cores of the node, and a container with a smaller quota would be throttled.
    """
    # macOS has no affinity.
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, int(quota) / int(period))
    except (OSError, ValueError):
        try:
            quota_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
            period_us = int((cgroup / "cpu/cpu.cfs_period_us").read_text())
            if quota_us > 0:
                cpus = min(cpus, quota_us / period_us)
        except (OSError, ValueError):
            pass  # without a cgroup, the affinity is the limit
    return max(1, int(cpus))


def reason_of(error: Exception) -> str:
    """onnxruntime's reason for an error, then the node's name: one bounded line, without paths and sources."""
    text = " ".join(str(error).split())
    text = _SOURCE_LINE.sub("", _PREAMBLE.sub("", text)).strip() or text
    if (match := _LOADING.fullmatch(text) or _RUNNING.fullmatch(text)) is not None:
        text = f"{match['reason'][:_MAX_REASON]} (node {match['name'] or match['op']})"
    return text[: 2 * _MAX_REASON]
