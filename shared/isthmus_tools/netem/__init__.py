"""Network emulator in user space: bandwidth, propagation delay and faults in front of a TCP port."""

from __future__ import annotations

from isthmus_tools.netem.emulator import LinkCounters, NetworkEmulator
from isthmus_tools.netem.shaping import LinkShape

__all__ = ["LinkCounters", "LinkShape", "NetworkEmulator"]
