"""Log records as bounded lines of JSON on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

MAX_LINE = 32 * 1024  # characters; the watchdog stops reading a function's log at a line of 64 KiB
IDENTITY = ("time", "level", "logger", "message", "call_id", "trace_id")  # what a line keeps that would be longer


class JsonLines(logging.Formatter):
    """A bounded JSON object a line; a record's `facts` become fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _shortened(record.getMessage()),
            **{name: _bounded(value) for name, value in getattr(record, "facts", {}).items()},
        }
        if record.exc_info:
            line["exception"] = _shortened("".join(traceback.format_exception(*record.exc_info)))
        text = json.dumps(line, default=str)
        if len(text) <= MAX_LINE:
            return text
        return json.dumps({k: line[k] for k in IDENTITY if k in line} | {"truncated": len(text)}, default=str)


def configure_logging(level: str) -> None:
    """Log as JSON lines from `level` on; an unknown level is INFO."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper() if level.upper() in ("DEBUG", "INFO", "WARNING", "ERROR") else "INFO")
    logging.getLogger("waitress.queue").setLevel("ERROR")  # a warning for every request that waits for a thread
    for name in ("urllib3", "botocore", "boto3", "s3transfer"):
        logging.getLogger(name).setLevel("WARNING")


def _bounded(value: Any) -> Any:
    """A fact as it is, or the beginning and the end of its text."""
    return _shortened(value) if isinstance(value, str) else value


def _shortened(text: str) -> str:
    return text if len(text) <= 8000 else f"{text[:6000]} … {text[-1500:]}"
