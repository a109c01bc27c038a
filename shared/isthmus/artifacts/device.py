"""What a measurement was made on: enough to tell when a device is another one, and its times no longer count."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import isthmus

_ROUNDED_TO = 256 * 2**20
_ID_DIGITS = 12
_MAX_TEXT = 200


@dataclass(frozen=True)
class Device:
    """One function's computing: `cpus` it may use, `threads` of one run, its runtime and its memory.

    `memory_bytes` is the container's limit, or the machine's memory in whole 256 MiB where it has none.
    """

    cpu: str
    arch: str
    cpus: int
    threads: int
    providers: tuple[str, ...]
    runtime: str
    isthmus: str
    memory_bytes: int

    @cached_property
    def id(self) -> str:
        """12 hex digits that are others where any fact is another."""
        facts = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:_ID_DIGITS]

    def document(self) -> dict[str, Any]:
        """The facts and the id, JSON-ready."""
        return {"id": self.id, **asdict(self), "providers": list(self.providers)}


def from_document(doc: Mapping[str, Any]) -> Device:
    """The device of a document.

    Raises:
        ValueError, KeyError, TypeError: not such a document, or the id is not that of the facts.
    """
    device = Device(
        cpu=_text(doc["cpu"]),
        arch=_text(doc["arch"]),
        cpus=int(doc["cpus"]),
        threads=int(doc["threads"]),
        providers=tuple(_text(p) for p in doc["providers"]),
        runtime=_text(doc["runtime"]),
        isthmus=_text(doc["isthmus"]),
        memory_bytes=int(doc["memory_bytes"]),
    )
    if doc["id"] != device.id:
        raise ValueError(f"the id {str(doc['id'])[:40]!r} is not that of the device's facts")
    return device


def this_device(*, cpus: int, threads: int, providers: tuple[str, ...], runtime: str) -> Device:
    """The device that this process runs on; what the runtime knows is given."""
    return Device(cpu_name(), platform.machine(), cpus, threads, providers, runtime, isthmus.__version__, memory())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model; on ARM Linux, which has no name for it, its implementer and part."""
    try:
        with cpuinfo.open(errors="replace") as f:
            fields = dict(_field(line) for line in f.read(2**16).splitlines() if ":" in line)
    except OSError:
        fields = {}
    if name := fields.get("model name") or fields.get("Model"):
        return name[:_MAX_TEXT]
    parts = [f"{what} {fields[f'CPU {what}']}" for what in ("implementer", "part") if f"CPU {what}" in fields]
    return " ".join(parts) or platform.processor() or platform.machine()


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may use."""
    # A kernel's update moves the total by some kilobytes, and the device is still the same.
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = max(_ROUNDED_TO, total // _ROUNDED_TO * _ROUNDED_TO)
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(total, int((cgroup / limit).read_text()))
        except (OSError, ValueError):
            continue  # no such cgroup, or `max`
    return total


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f"a device's fact is {str(value)[:40]!r}; it is a text of at most {_MAX_TEXT} characters")
    return value
