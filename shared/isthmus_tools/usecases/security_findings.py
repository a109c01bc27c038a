"""A finding of a security check, and how severe it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["critical", "high", "medium", "low"]
State = Literal["open", "unknown", "ok"]
SEVERITIES: tuple[Severity, ...] = ("critical", "high", "medium", "low")
STATES: tuple[State, ...] = ("open", "unknown", "ok")


@dataclass(frozen=True)
class SecurityFinding:
    """A check of a deployment: `severity` is that of the check where it is open, whatever its state."""

    check: str
    state: State
    severity: Severity
    where: str
    observed: str
    advice: str = ""


def judged(
    check: str, severity: Severity, wrong: Sequence[str], observed: str, advice: str, *, right: str
) -> SecurityFinding:
    """An open finding of the places in `wrong`; without any the check is in order, as `right` says."""
    if wrong:
        return SecurityFinding(check, "open", severity, ", ".join(wrong), observed, advice)
    return SecurityFinding(check, "ok", severity, "", right)


def unknown(check: str, severity: Severity, where: str, observed: str, advice: str) -> SecurityFinding:
    """A check that could not be made."""
    return SecurityFinding(check, "unknown", severity, where, observed, advice)
