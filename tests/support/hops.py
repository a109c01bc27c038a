"""Hops that answer without running a segment."""

from __future__ import annotations

from typing import Any

from isthmus.errors import HopUnavailable
from isthmus.pipeline import HopReply


class Echo:
    """A hop that answers with what it is told, whatever it is sent."""

    name, encodes = "echo", True

    def __init__(self, outputs: dict[str, Any]) -> None:
        self.outputs = outputs
        self.fails = False

    def call(self, frame: Any, context: Any) -> Any:
        if self.fails:
            raise HopUnavailable("away", hop=self.name)
        return HopReply(frame._replace(tensors=self.outputs, encoded={}), 0.0)
