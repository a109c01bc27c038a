"""Fixtures that several test modules share, and how Hypothesis looks for examples."""

import gc
import os
import signal

from hypothesis import HealthCheck, settings

# Tests that import onnxruntime themselves may do so before Isthmus, which turns its telemetry off, is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Worker processes of xdist are given a width, which the command's console would keep.
os.environ.pop("COLUMNS", None)

# A run on a machine that pauses tells no more than one on a quick one, and the same tree gets the same answer.
settings.register_profile("isthmus", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isthmus")

# A shell starts jobs in the background with SIGINT ignored, and so would the processes be that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same of SIGHUP under nohup; a handler, unlike SIG_IGN, is not passed on to the processes of tests.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

pytest_plugins = (
    "support.leftovers",
    "support.s3_server",
    "support.moto_server",
    "support.nats_server",
    "support.gcs_server",
    "support.azurite_server",
    "support.hdfs_server",
)


def pytest_collection_finish() -> None:
    """Keep the million objects of test modules and libraries out of every later collection of garbage."""
    gc.collect()
    gc.freeze()
