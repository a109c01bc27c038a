"""A network emulator in user space: bandwidth, delay and loss on a TCP port in front of another."""

from __future__ import annotations

from isthmus_tools.netem.emulator import Link, LinkCounters, LinkShape

__all__ = ["Link", "LinkCounters", "LinkShape"]
