"""The generation of one sequence along a route: prefill in chunks, then a crossing for each step.

The token ids are all that the router keeps: a segment that lost its state is rebuilt by running the sequence through
the route again, and the generation goes on with the same tokens, sampled ones included, since a random number depends
on seed and position alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from msgspec import structs

from isthmus.artifacts.sampling import ALTERNATIVE_LOGPROBS, ALTERNATIVES, LOGPROBS, TOKENS, Sampling
from isthmus.context import Context
from isthmus.errors import DeadlineExceeded, HopBusy, HopUnavailable, ModelError, StateMissing
from isthmus.pipeline import Result, Route, execute
from isthmus.processing.sampling import SampledToken
from isthmus.wire.frame import Step

# A chunk's hidden states and scores stay small, and a step of another session waits no longer than for this many.
CHUNK = 256
_MAX_RECOVERIES = 8
# Proposed tokens of a step; a longer one would hold up the steps of other sessions.
MAX_PROPOSED = 64
GREEDY = Sampling()
Reroute = Callable[[Route, Exception], Route | None]


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


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt's token ids, and how to go on."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: frozenset[int] = frozenset()


@dataclass
class Generated:
    """What a generation did so far. Units: seconds and bytes."""

    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    recoveries: int = 0
    link_bytes: int = 0
    first_token_s: float = 0.0
    finish: str = ""


class Generator:
    """Generates along `route`; `reroute` gives another route where a hop of the present one gives no response.

    Without a `proposer` each step yields a single token.
    """

    def __init__(
        self, route: Route, reroute: Reroute = lambda route, error: None, proposer: Proposer | None = None
    ) -> None:
        if route.bundle.state is None or route.bundle.text is None:
            raise ModelError(f"{route.bundle.name} is no language model: it declares no state")
        self._route, self._reroute, self._proposer = route, reroute, proposer
        self._state = route.bundle.state

    def run(self, request: GenerationRequest, context: Context, done: Generated) -> Iterator[SampledToken]:
        """The tokens as they come; `done` is kept up to date.

        Raises:
            HopError, DeadlineExceeded: as `execute`, where recovery does not help.
        """
        began = time.perf_counter()
        sequence = list(request.prompt)
        session = _SessionState(secrets.token_hex(16), len(request.prompt) + request.max_tokens)
        while not done.finish:
            proposals = self._proposals(sequence, request.max_tokens - len(done.tokens) - 1, done)
            started = time.perf_counter()
            sampled = self._verified(session, sequence, proposals, request.sampling, context, done)
            accepted = _accepted(proposals, sampled)
            if self._proposer is not None and done.tokens:
                self._proposer.observe(len(proposals), accepted, time.perf_counter() - started)
            done.steps, done.proposed = done.steps + 1, done.proposed + len(proposals)
            for token in sampled[: accepted + 1]:
                done.first_token_s = done.first_token_s or time.perf_counter() - began
                done.accepted += len(done.tokens) > 0 and token is not sampled[accepted]
                done.tokens.append(token.token)
                sequence.append(token.token)
                if token.token in request.stop:
                    done.finish = "stop"
                elif len(done.tokens) == request.max_tokens:
                    done.finish = "length"
                yield token
                if done.finish:
                    return

    def _proposals(self, sequence: Sequence[int], most: int, done: Generated) -> list[int]:
        # The first step is the prompt's: its seconds say nothing of later ones.
        if self._proposer is None or not done.tokens or most < 1:
            return []
        return self._proposer.propose(sequence, min(most, MAX_PROPOSED))[:most]

    def _verified(
        self,
        session: _SessionState,
        sequence: Sequence[int],
        proposals: Sequence[int],
        sampling: Sampling,
        context: Context,
        done: Generated,
    ) -> list[SampledToken]:
        """The tokens sampled at the sequence's end and behind each proposal; rebuilds lost state."""
        tokens = [*sequence, *proposals]
        for _ in range(_MAX_RECOVERIES):
            try:
                return self._steps(session, tokens, len(proposals) + 1, sampling, context, done)
            except StateMissing:
                done.recoveries += 1
                session.position = 0
            except (HopUnavailable, HopBusy) as e:
                done.recoveries += 1
                if (route := self._reroute(self._route, e)) is None:
                    raise
                self._route, session.position = route, 0
        raise DeadlineExceeded("the session's state was lost again and again")

    def _steps(
        self,
        session: _SessionState,
        tokens: Sequence[int],
        last: int,
        sampling: Sampling,
        context: Context,
        done: Generated,
    ) -> list[SampledToken]:
        """Run the tokens behind the session's position in chunks, and sample behind the last ones."""
        # Of rejected proposals the functions keep state; a step at an earlier position takes it back.
        session.position = min(session.position, len(tokens) - last)
        result: Result | None = None
        while session.position < len(tokens):
            chunk = tokens[session.position : session.position + CHUNK]
            end = session.position + len(chunk)
            # Also behind a chunk that is not the last, for the history of the penalties; its tokens are ignored.
            drawn = min(last, len(chunk)) if end == len(tokens) else 1
            history = tuple(chunk) if sampling.has_penalty else ()
            step = Step(
                session.name, session.position, structs.replace(sampling, last=drawn, tokens=history), session.reserve
            )
            ids = np.array([chunk], np.int64)
            result = execute(self._route, {self._state.tokens: ids}, context, step=step)
            done.link_bytes += result.link_bytes
            session.position = end
        assert result is not None  # noqa: S101 - there is always a token to run
        return _tokens(result)


@dataclass
class _SessionState:
    name: str
    reserve: int
    position: int = 0
    """Tokens that every segment has run and that stand."""


def _accepted(proposals: Sequence[int], sampled: Sequence[SampledToken]) -> int:
    count = 0
    for proposal, token in zip(proposals, sampled, strict=False):
        if proposal != token.token:
            break
        count += 1
    return count


def _tokens(result: Result) -> list[SampledToken]:
    ids, logprobs = result.outputs[TOKENS][0].tolist(), result.outputs[LOGPROBS][0].tolist()
    if ALTERNATIVES not in result.outputs:
        return [SampledToken(i, p) for i, p in zip(ids, logprobs, strict=True)]
    others = zip(
        result.outputs[ALTERNATIVES][0].tolist(), result.outputs[ALTERNATIVE_LOGPROBS][0].tolist(), strict=True
    )
    return [
        SampledToken(i, p, tuple(zip(tokens, scores, strict=True)))
        for i, p, (tokens, scores) in zip(ids, logprobs, others, strict=True)
    ]
