"""The router's present state as a document: what it knows of hops and links, and how it divides requests.

`GET /routes`, the metrics and `isthmus top` all read this. Units: seconds, bytes; rates in bytes a second.
"""

from __future__ import annotations

from msgspec import Struct


class HopState(Struct, frozen=True):
    """A hop: its circuit breaker, its calls, and the estimates of its link; None where nothing was seen yet."""

    name: str
    breaker: str = "closed"
    in_flight: int = 0
    calls: int = 0
    failures: int = 0
    rtt_s: float | None = None
    up_bytes_s: float | None = None
    down_bytes_s: float | None = None
    age_s: float | None = None
    up_is_bound: bool = False
    """Whether `up_bytes_s` is only a lower bound, as all uploads were small."""
    wait_s: float = 0.0
    """Mean wait for a CPU behind the hop, of late."""
    opened: int = 0
    """How often the breaker opened."""
    hedged: int = 0
    """Calls of which a second was made elsewhere, as the first was slow."""
    hedges_won: int = 0
    """Of these, the ones whose second was answered first."""


class ExitState(Struct, frozen=True):
    """The exit of a route: `share` of its latest requests ended there.

    `checks` of the latest were compared with the full model; `disagreement` is the share of these with another
    prediction, `limit` the share above which the guard closes the exit.
    """

    cut: str
    threshold: float
    share: float = 0.0
    checks: int = 0
    disagreement: float = 0.0
    limit: float = 0.0
    closed: bool = False


class CandidateState(Struct, frozen=True):
    """A candidate route: its share of the present requests, and its seconds as expected now and as planned."""

    name: str
    segments: tuple[str, ...]
    share: float = 0.0
    expected_s: float | None = None
    planned_s: float | None = None
    requests: int = 0
    failures: int = 0
    degraded: str = ""
    loaded: bool = True
    """Whether every hop has its segments in memory."""
    measured_s: float | None = None
    """Median seconds of its latest requests."""
    drift: float | None = None
    """Live over planned seconds of its segments, wherever they run; None without a plan, or before all have run."""
    fallbacks: dict[str, int] = {}
    """Requests that left this route for another, by the class of the error."""
    exit: ExitState | None = None
    """None for a route without an exit."""


class ModelState(Struct, frozen=True):
    """A served version: its candidates, the preferred one, and how often the preference changed."""

    name: str
    version: str
    preferred: str
    switches: int
    candidates: tuple[CandidateState, ...]
    rate: float = 0.0
    """Requests a second, of late."""


class ReleaseCounts(Struct, frozen=True):
    """The requests of one version of a trial; `median_s` is of the latest, None before the first."""

    version: str
    requests: int = 0
    errors: int = 0
    median_s: float | None = None


class TrialState(Struct, frozen=True):
    """A trial as `GET /routes` and the metrics show it; `reason` is empty while it runs."""

    model: str
    alias: str
    share: float
    stable: ReleaseCounts
    canary: ReleaseCounts
    agreed: int
    differed: int
    not_compared: int
    reason: str
    is_alias_moved: bool
    """Whether this router moved the alias off the canary after its rollback."""


class RouterState(Struct, frozen=True):
    """The state of a router; `limit`, `working`, `queued` and `refused` are its admission's."""

    hops: tuple[HopState, ...]
    models: tuple[ModelState, ...]
    limit: int = 0
    working: int = 0
    queued: int = 0
    refused: int = 0
    canaries: tuple[TrialState, ...] = ()
    """The trials of canaries, ended ones too."""
    refusals: dict[str, int] = {}
    """Refused requests by reason, a word of the code."""
