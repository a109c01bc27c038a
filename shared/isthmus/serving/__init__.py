"""The Flask apps: a segment's, the router's and the trigger's. Handlers call these factories and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.settings import RouterSettings, SegmentSettings, TriggerSettings

if TYPE_CHECKING:  # clients read isthmus.oip.messages without Flask
    from flask import Flask


def create_segment_app(settings: SegmentSettings) -> Flask:
    """The app of a function that runs segments; see isthmus.serving.segment."""
    from isthmus.serving.segment import create_segment_app as create

    return create(settings)


def create_router_app(settings: RouterSettings) -> Flask:
    """The app of the router; see isthmus.serving.router. A late import, since the router needs Pillow."""
    from isthmus.serving.router import create_router_app as create

    return create(settings)


def create_trigger_app(settings: TriggerSettings, folder: Path) -> Flask:
    """The app of the trigger, whose configuration is in `folder`. A late import, as no other function reads queues."""
    from isthmus.serving.trigger import create_trigger_app as create

    return create(settings, folder)
