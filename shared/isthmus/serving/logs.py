"""Logs as one JSON object a line: what happened, shapes and sizes, never payloads or secrets."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

MAX_LINE = 8192
"""Characters; of-watchdog's log reader stops at lines over 64 KiB."""


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        doc: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage()[:2000],
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            doc["exception"] = self.formatException(record.exc_info)[-4000:]
        line = json.dumps(doc, default=str)
        if len(line) > MAX_LINE:
            # Half an object is no JSON: what can be long goes.
            kept = {"time": doc["time"], "level": doc["level"], "message": doc["message"][:1000], "cut_from": len(line)}
            line = json.dumps(kept)
        return line


def configure(level: str) -> logging.Logger:
    """Isthmus's logger, writing to stderr at `level`; asking again changes the level and adds nothing."""
    logger = logging.getLogger("isthmus")
    logger.setLevel(level.upper())
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonFormatter())
        logger.addHandler(handler)
    return logger
