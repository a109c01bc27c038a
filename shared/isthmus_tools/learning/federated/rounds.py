"""The rounds of federated averaging: the nodes that take part, the end of a round, and the nodes that are left out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from isthmus.errors import LearningError
from isthmus_tools.learning.federated.averaging import NodeUpdate, Weights, average, check_update, moved


@dataclass(frozen=True)
class RoundTerms:
    """`rounds` averages, each of at least `min_nodes` nodes that answer within `round_s` seconds.

    The first round begins with `nodes` nodes, or with `min_nodes` once `round_s` have passed since that many joined.
    """

    rounds: int
    min_nodes: int = 2
    nodes: int = 0
    round_s: float = 300.0
    momentum: float = 0.0


@dataclass(frozen=True)
class RoundRecord:
    """A round that ended: the nodes in its average with their examples, and the nodes that were left out."""

    number: int
    examples: Mapping[str, int]
    left_out: tuple[str, ...]
    seconds: float


class Task(NamedTuple):
    """A node's task: train from `weights` in round `number`; wait without weights, leave if it `is_over`."""

    number: int
    weights: Weights | None
    is_over: bool = False


@dataclass
class _OpenRound:
    began: float
    expected: set[str]
    updates: dict[str, NodeUpdate] = field(default_factory=dict)


class Rounds:
    """The state of the server: weights, the open round, and its nodes; thread-safe.

    `on_round` gets each record with the weights after it, before any node gets these. `number` is the open round,
    counted from 0, or how many there were.
    """

    def __init__(
        self,
        weights: Weights,
        terms: RoundTerms,
        *,
        number: int = 0,
        velocity: Weights | None = None,
        on_round: Callable[[RoundRecord, Rounds], None] = lambda record, rounds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if "examples" in weights:
            raise LearningError("a weight is named 'examples', which is the name of a node's number of examples")
        self.weights: Weights = weights
        self.velocity: Weights = velocity or {}
        self.number = number
        self.records: list[RoundRecord] = []
        self.failure: LearningError | None = None
        self._terms, self._on_round, self._clock = terms, on_round, clock
        self._lock = threading.Lock()
        self._open: _OpenRound | None = None
        # When each node called last, and when there were enough of them for the first round.
        self._joined: dict[str, float] = {}
        self._enough_at: float | None = None
        self._told: set[str] = set()

    @property
    def is_over(self) -> bool:
        """Whether all rounds have ended."""
        return self.number >= self._terms.rounds

    @property
    def all_told(self) -> bool:
        """Whether every node of the last round has the final weights."""
        return self.is_over and bool(self.records) and set(self.records[-1].examples) <= self._told

    def task(self, node: str) -> Task:
        """The node's next task.

        Raises:
            LearningError: the training failed for want of nodes.
        """
        with self._lock:
            self._advance(node)
            if self.is_over:
                self._told.add(node)
                return Task(self.number, self.weights, is_over=True)
            if self._open is None or node in self._open.updates:
                return Task(self.number, None)
            # A node that joins in mid-round takes part, and the round waits for that node too.
            self._open.expected.add(node)
            return Task(self.number, self.weights)

    def deliver(self, number: int, update: NodeUpdate) -> bool:
        """Take a node's update of round `number`; False where that round has ended. A second update changes nothing.

        Raises:
            LearningError, ShapeMismatch: an update that would spoil the average, or the training failed.
        """
        with self._lock:
            self._advance(update.node)
            if self._open is None or number != self.number:
                return False
            check_update(update, self.weights)
            # Not replaced: a call without a response comes again, and an average must not depend on that.
            self._open.updates.setdefault(update.node, update)
            self._end_if_complete()
            return True

    def tick(self) -> None:
        """Begin and end rounds as time passes; called several times a second."""
        with self._lock:
            self._advance("")

    def _advance(self, node: str) -> None:
        if self.failure is not None:
            raise self.failure
        if node:
            self._joined[node] = self._clock()
        if self.is_over:
            return
        if self._open is None:
            self._begin_if_enough()
        elif self._clock() - self._open.began >= self._terms.round_s:
            self._end()

    def _begin_if_enough(self) -> None:
        now, count = self._clock(), len(self._joined)
        if count < self._terms.min_nodes:
            return
        if self._enough_at is None:
            self._enough_at = now
        if count >= self._terms.nodes or now - self._enough_at >= self._terms.round_s:
            self._open = _OpenRound(now, set(self._joined))

    def _end_if_complete(self) -> None:
        if self._open is not None and self._open.expected <= set(self._open.updates):
            self._end()

    def _end(self) -> None:
        """Average the round's updates and begin the next round with the nodes that answered.

        A node that was left out takes part again from its next call on.
        """
        if (ended := self._open) is None:
            return
        now, updates = self._clock(), ended.updates
        left_out = tuple(sorted(ended.expected - set(updates)))
        if len(updates) < self._terms.min_nodes:
            # Kept, so that the nodes get the reason too and do not wait for further rounds.
            self.failure = LearningError(
                f"round {self.number + 1} has the updates of {len(updates)} of {len(ended.expected)} nodes after"
                f" {self._terms.round_s:g} s; at least {self._terms.min_nodes} are needed",
                round=self.number + 1,
                nodes=sorted(updates),
                left_out=list(left_out),
                hint="see why they do not answer, then start the server again: it goes on from its last round",
            )
            raise self.failure
        change = average(list(updates.values()))
        self.weights, self.velocity = moved(self.weights, change, self.velocity, self._terms.momentum)
        counts = {name: updates[name].examples for name in sorted(updates)}
        record = RoundRecord(self.number + 1, counts, left_out, now - ended.began)
        # Checkpoint first, under the lock: after a kill no node can have weights that the server does not know.
        self.number += 1
        self.records.append(record)
        try:
            self._on_round(record, self)
        except LearningError as e:
            # Kept: else the round, still open, would end again and its updates count twice.
            self.failure = e
            raise
        self._open = None if self.is_over else _OpenRound(now, set(updates))
