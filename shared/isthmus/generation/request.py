"""What a generation is asked for, what it did so far, and who proposes its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from isthmus.artifacts.sampling import Sampling

GREEDY = Sampling()


class Proposer(Protocol):
    """Proposes tokens that a step verifies in one crossing; a proposer belongs to one generation.

    The tokens of a generation are the same for every proposer: a proposal is accepted where it is the token that would
    be sampled.
    """

    def propose(self, sequence: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens to follow `sequence`; empty where a proposal would not pay."""
        ...

    def observe(self, proposed: int, accepted: int, seconds: float) -> None:
        """Learn from a step of `seconds` that verified `proposed` tokens, the first `accepted` of them right."""
        ...


class EarlyToken(NamedTuple):
    """What an exit branch predicts to follow a sequence, and the probability by the branch."""

    token: int
    probability: float


EarlyTokens = Callable[[Sequence[int]], EarlyToken | None]
"""The early prediction behind a sequence; None where the route has no exit, or its functions lack state now."""


@runtime_checkable
class EarlyProposer(Protocol):
    """A proposer that drafts by early predictions of the generation's own session."""

    def attach(self, early: EarlyTokens) -> None:
        """Called before the first proposal."""
        ...


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt's token ids, and how to go on."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: frozenset[int] = frozenset()


@dataclass
class Generated:
    """What a generation did so far. Units: seconds and bytes.

    `recoveries` counts calls after which state was rebuilt or another route taken; `replayed` the positions that were
    run again for that, and `replayed_bytes` the frames. `route` is the name of the route in force, and `finish` why the
    generation ended: `stop` or `length`.
    """

    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    recoveries: int = 0
    replayed: int = 0
    replayed_bytes: int = 0
    link_bytes: int = 0
    first_token_s: float = 0.0
    finish: str = ""
