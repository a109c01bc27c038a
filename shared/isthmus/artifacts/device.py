"""The device of a measurement: the facts that decide whether its times hold elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct, structs

import isthmus
from isthmus.artifacts.constraints import Count

_ROUNDED_TO = 256 * 2**20
_ID_DIGITS = 12
MAX_TEXT = 200
_Fact = Annotated[str, Meta(max_length=MAX_TEXT)]


class Device(Struct, frozen=True, forbid_unknown_fields=True):
    """The compute resources of a function: usable `cpus`, `threads` per run, the runtime and the memory.

    `memory_bytes` is the container's limit, else the machine's memory in multiples of 256 MiB. `id` is 12 hex digits of
    the digest of the other fields, and so differs if any fact differs.

    Raises:
        ValueError: `id` does not match the facts.
    """

    cpu: _Fact
    arch: _Fact
    cpus: Count
    threads: Count
    providers: tuple[_Fact, ...]
    runtime: _Fact
    isthmus: _Fact
    memory_bytes: Count
    id: str = ""

    def __post_init__(self) -> None:
        facts = structs.asdict(self)
        del facts["id"]
        # The id is part of the key of a profile: changing this computation orphans stored profiles.
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_ID_DIGITS]
        if self.id not in ("", digest):
            raise ValueError(f"has the id {self.id[:40]!r}, which is not that of the device's facts")
        structs.force_setattr(self, "id", digest)


def this_device(*, cpus: int, threads: int, providers: tuple[str, ...], runtime: str) -> Device:
    """The device of this process; the caller supplies the facts about the runtime."""
    return Device(cpu_name(), platform.machine(), cpus, threads, providers, runtime, isthmus.__version__, memory())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU model; on ARM Linux, without a model name, the implementer and part numbers."""
    try:
        with cpuinfo.open(errors="replace") as f:
            # Bounded, since the file has a block per processor, all alike.
            fields = dict(_field(line) for line in f.read(2**16).splitlines() if ":" in line)
    except OSError:
        fields = {}
    if name := fields.get("model name") or fields.get("Model"):
        return name[:MAX_TEXT]
    parts = [f"{what} {fields[f'CPU {what}']}" for what in ("implementer", "part") if f"CPU {what}" in fields]
    return " ".join(parts) or platform.processor() or platform.machine()


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory available to this process."""
    # A kernel update changes the total by some kilobytes on the same device.
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
