"""The audit log of a registry, read and verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from isthmus.errors import RequestMalformed
from isthmus.registry import open_registry
from isthmus.security.audit import AuditEntry, AuditLog, ChainCheck, ChainMark
from isthmus.settings import RegistrySettings


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """Which entries to read: the last `last` of the log, or none where it is verified with `last` 0.

    `checkpoint` is what an earlier verification printed, `NUMBER@sha256:HEX`; it makes this one a verification too.
    """

    settings: RegistrySettings
    last: int = 20
    verify: bool = False
    checkpoint: str = ""


@dataclass(frozen=True)
class AuditResult:
    """Entries of the log in order, and the verdict on the whole chain where it was verified."""

    entries: tuple[AuditEntry, ...]
    count: int
    check: ChainCheck | None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        doc: dict[str, Any] = {"entries": msgspec.to_builtins(self.entries), "count": self.count}
        if (check := self.check) is not None:
            broken = check.broken
            doc["verified"] = broken is None
            doc["checkpoint"] = str(check.verified)
            doc["broken"] = None if broken is None else {"number": broken.number, "reason": broken.reason}
        return doc


def read_audit(request: AuditRequest) -> AuditResult:
    """Read the last entries of the log, and verify all of it where the request says so.

    Raises:
        RequestMalformed: the checkpoint is none.
        RegistryError: the registry cannot be read, or an entry, and the log is not verified.
    """
    checkpoint = _checkpoint(request.checkpoint)
    registry = open_registry(request.settings)
    log = AuditLog(registry.store, registry.retry_policy)
    check = log.verify(checkpoint) if request.verify or checkpoint is not None else None
    if check is not None:
        # A chain that breaks is the result itself: its entries are not shown as if they were one.
        count = check.verified.number
        entries = () if check.broken else tuple(log.entries(after=max(0, count - request.last)))
        return AuditResult(entries if request.last else (), count, check)
    count = log.count()
    return AuditResult(tuple(log.entries(after=max(0, count - request.last))), count, None)


def _checkpoint(text: str) -> ChainMark | None:
    if not text:
        return None
    if (checkpoint := ChainMark.parse(text)) is None:
        raise RequestMalformed(
            f"{text[:100]!r} is no checkpoint", hint="isthmus audit --verify prints one: NUMBER@sha256:HEX"
        )
    return checkpoint
