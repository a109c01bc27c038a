"""A smaller model of the same vocabulary that drafts at the edge.

Its state is a session like any other: what was drafted and refused is taken back by a step at an earlier position.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.sampling import TOKENS, Sampling
from isthmus.context import Context
from isthmus.errors import DeadlineExceeded, IsthmusError, ModelError, StateMissing
from isthmus.generation.policy import SessionEnder
from isthmus.generation.session import CHUNK, common_length
from isthmus.pipeline import Route, execute
from isthmus.wire.frame import Step


class DraftModel:
    """Drafts greedily along `route`, in a session of at most `tokens`; a source of proposals for one sequence.

    Drafts of a sampled sequence are greedy too: the likeliest token is the likeliest to be accepted.
    """

    kind = "draft"

    def __init__(self, route: Route, tokens: int, context: Context) -> None:
        if route.bundle.state is None:
            raise ModelError(f"{route.bundle.name} is no language model: it declares no state")
        self._route, self._context, self._state = route, context, route.bundle.state
        self.session, self._reserve = secrets.token_hex(16), min(tokens, route.bundle.state.context)
        self._ran: list[int] = []
        # Of these, the first that the sequence is known to have: it only grows.
        self._agreed = 0

    def confidence(self, sequence: Sequence[int]) -> int:
        """1 while the model's context has room for the sequence."""
        return int(len(sequence) < self._reserve)

    def draft(self, sequence: Sequence[int], count: int) -> list[int]:
        """The model's own next tokens; none where its function has no place for the session, or lost its state.

        A function that fails ends the drafts and not the generation.

        Raises:
            DeadlineExceeded: as `execute`.
        """
        agreed = self._agreed + common_length(self._ran[self._agreed :], sequence[self._agreed : -1])
        self._agreed, self._ran = agreed, self._ran[:agreed]
        waiting, drafted = list(sequence[agreed:]), list[int]()
        try:
            for _ in range(min(count, self._reserve - len(sequence))):
                drafted.append(self._run(waiting))
                waiting = drafted[-1:]
        except StateMissing:
            self._ran, self._agreed = [], 0
        except DeadlineExceeded:
            raise
        except IsthmusError:
            self._reserve = 0
        return drafted

    def end(self, ender: SessionEnder) -> None:
        """Have the session's memory given back, in the background."""
        ender.end(self.session, self._route.hops)

    def _run(self, tokens: Sequence[int]) -> int:
        """Run tokens behind those that ran; the likeliest to follow."""
        for start in range(0, len(tokens), CHUNK):
            drawn = self._step(tokens[start : start + CHUNK])
        return drawn

    def _step(self, tokens: Sequence[int]) -> int:
        step = Step(self.session, len(self._ran), Sampling(), self._reserve)
        result = execute(self._route, {self._state.tokens: np.array([tokens], np.int64)}, self._context, step=step)
        self._ran += tokens
        return int(result.outputs[TOKENS][0, -1])


def check_vocabulary(model: Bundle, tokenizer: bytes, draft: Bundle, draft_tokenizer: bytes) -> None:
    """Check that two models give every token the same id.

    Raises:
        ModelError: another vocabulary, so that the draft's ids would be other tokens.
    """
    if tokenizer != draft_tokenizer and _vocabulary(tokenizer) != _vocabulary(draft_tokenizer):
        raise ModelError(
            f"{draft.name} has another vocabulary than {model.name} and cannot draft for it",
            hint="set draft to a model with the same tokenizer",
        )


def _vocabulary(tokenizer: bytes) -> Mapping[str, int]:
    document: Mapping[str, Any] = json.loads(tokenizer)
    added = {token["content"]: token["id"] for token in document.get("added_tokens", [])}
    vocabulary = document.get("model", {}).get("vocab", {})
    # Unigram models list pairs of a token and its score, in the order of ids.
    pairs = vocabulary if isinstance(vocabulary, dict) else {each[0]: i for i, each in enumerate(vocabulary)}
    return {**pairs, **added}
