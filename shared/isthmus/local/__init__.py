"""The embedded engine: OpenFaaS's provider API over local processes, for development and the first five minutes."""

from isthmus.local.engine import Engine, run_engine
from isthmus.local.events import Event
from isthmus.local.link import Link, LinkCounters, LinkShape

__all__ = ["Engine", "Event", "Link", "LinkCounters", "LinkShape", "run_engine"]
