"""The generation of one sequence along a route: prefill in chunks, then a crossing for each step.

The tokens are the same whatever happens on the way: a random number depends on seed and position alone, and state that
is lost is rebuilt by replay.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Sequence

from isthmus.context import Context
from isthmus.errors import ModelError
from isthmus.generation.policy import FixedRoute, GenerationPolicy, Rerouting
from isthmus.generation.request import EarlyProposer
from isthmus.generation.request import Generated as Generated
from isthmus.generation.request import GenerationRequest as GenerationRequest
from isthmus.generation.request import Proposer as Proposer
from isthmus.generation.session import RoutedSession, common_length
from isthmus.pipeline import Route
from isthmus.processing.sampling import SampledToken

# Proposed tokens of a step; a longer one would hold up the steps of other sessions.
MAX_PROPOSED = 64


class Generator:
    """Generates along `route`, or along the routes that `rerouting` gives where a hop fails.

    Without a `proposer` each step yields a single token.
    """

    def __init__(
        self,
        route: Route,
        rerouting: Rerouting | None = None,
        proposer: Proposer | None = None,
        policy: GenerationPolicy | None = None,
    ) -> None:
        if route.bundle.state is None or route.bundle.text is None:
            raise ModelError(f"{route.bundle.name} is no language model: it declares no state")
        self._route, self._state = route, route.bundle.state
        self._rerouting, self._proposer = rerouting or FixedRoute(), proposer
        self._policy = policy

    def run(
        self, request: GenerationRequest, context: Context, done: Generated
    ) -> abc.Generator[SampledToken, None, None]:
        """The tokens as they come; `done` is kept up to date. Closing the iterator ends the session.

        Raises:
            DeadlineExceeded: the context's deadline passed, or the policy's time without progress.
            HopError, StateMissing: as `execute`, where recovery does not help.
        """
        began = time.perf_counter()
        sequence = list(request.prompt)
        policy = self._policy or GenerationPolicy()
        session = RoutedSession(self._route, self._state, request, self._rerouting, policy, done)
        if isinstance(self._proposer, EarlyProposer):
            self._proposer.attach(lambda tokens: session.early(tokens, context))
        try:
            while not done.finish:
                for token in self._step(session, sequence, request, context, done):
                    done.first_token_s = done.first_token_s or time.perf_counter() - began
                    done.tokens.append(token.token)
                    sequence.append(token.token)
                    if token.token in request.stop:
                        done.finish = "stop"
                    elif len(done.tokens) == request.max_tokens:
                        done.finish = "length"
                    yield token
                    if done.finish:
                        break
        finally:
            session.end()
            if policy is not self._policy:
                # Nobody else closes it, and the traceback of a failure would keep its threads.
                policy.ender.finish()

    def _step(
        self,
        session: RoutedSession,
        sequence: Sequence[int],
        request: GenerationRequest,
        context: Context,
        done: Generated,
    ) -> list[SampledToken]:
        """The next token, and before it the proposals that were right."""
        proposals = self._proposals(sequence, request.max_tokens - len(done.tokens) - 1, done)
        began, recoveries = time.perf_counter(), done.recoveries
        sampled = session.sample([*sequence, *proposals], len(proposals) + 1, context)
        accepted = common_length(proposals, [each.token for each in sampled])
        # The seconds of the prompt and of replays say nothing of later steps.
        if self._proposer is not None and done.tokens and done.recoveries == recoveries:
            self._proposer.observe(len(proposals), accepted, time.perf_counter() - began)
        done.steps += 1
        done.proposed += len(proposals)
        done.accepted += accepted
        return sampled[: accepted + 1]

    def _proposals(self, sequence: Sequence[int], most: int, done: Generated) -> list[int]:
        if self._proposer is None or not done.tokens or most < 1:
            return []
        return self._proposer.propose(sequence, min(most, MAX_PROPOSED))[:most]
