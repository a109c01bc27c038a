"""Prometheus metrics of a router's generations; docs/reference/metrics.md, "Generation"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from isthmus.admission import MemoryBudget
from isthmus.serving.metrics import FunctionMetrics

if TYPE_CHECKING:  # routers of other models never load tokenizers
    from isthmus.generation.request import Generated

# From a small model in one process to a long prompt at a slow edge; a token of a large model over a slow link.
FIRST_TOKEN_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
OUTCOMES = ("stop", "length", "left", "failed")
"""How generations end: a stop token, the bound on tokens, a reader that left or has enough, an error."""


class GenerationMetrics:
    """Counts of generations; thread-safe. Without labels of models: a router has few, and names are details.

    `memory` is the budget, of `max_bytes`, of boundary tensors that are stored for rebuilds.
    """

    def __init__(self, metrics: FunctionMetrics, max_bytes: int) -> None:
        self.memory = MemoryBudget(max_bytes)
        self._ended = Counter("isthmus_generations", "Generations that ended.", ["outcome"], registry=None)
        for outcome in OUTCOMES:
            self._ended.labels(outcome)
        self._open = Gauge("isthmus_generations_open", "Generations under way.", registry=None)
        self._prompt = _counter("prompt_tokens", "Tokens of prompts.")
        self._tokens = _counter("generated_tokens", "Tokens generated.")
        self._steps = _counter("generation_steps", "Steps: each gives a token, and the proposals that were right.")
        self._proposed = _counter("proposed_tokens", "Tokens proposed to be verified.")
        self._accepted = _counter("accepted_tokens", "Proposed tokens that were right.")
        self._recoveries = _counter("generation_recoveries", "Sessions rebuilt, and changes of route.")
        self._replayed = _counter("replayed_positions", "Positions that were run again to rebuild sessions.")
        self._replayed_bytes = _counter("replayed_bytes", "Bytes of the frames of these.")
        self._first_s = Histogram(
            "isthmus_first_token_seconds",
            "Time from a prompt to its first token.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=None,
        )
        self._token_s = Histogram(
            "isthmus_token_seconds",
            "Mean time of a further token of a generation.",
            buckets=TOKEN_SECONDS,
            registry=None,
        )
        for collector in (
            *(self._ended, self._open, self._prompt, self._tokens, self._steps, self._proposed, self._accepted),
            *(self._recoveries, self._replayed, self._replayed_bytes, self._first_s, self._token_s),
        ):
            metrics.add(collector)
        metrics.gauge(
            "isthmus_replay_memory_bytes",
            "Memory of the boundary tensors that are stored for rebuilds.",
            lambda: float(self.memory.used),
        )

    def began(self, prompt_tokens: int) -> None:
        """A generation begins."""
        self._open.inc()
        self._prompt.inc(prompt_tokens)

    def ended(self, done: Generated, seconds: float, *, outcome: str) -> None:
        """A generation ended after `seconds` of work, the waits for its reader excluded."""
        self._open.dec()
        self._ended.labels(outcome).inc()
        self._tokens.inc(len(done.tokens))
        self._steps.inc(done.steps)
        self._proposed.inc(done.proposed)
        self._accepted.inc(done.accepted)
        self._recoveries.inc(done.recoveries)
        self._replayed.inc(done.replayed)
        self._replayed_bytes.inc(done.replayed_bytes)
        if done.tokens:
            self._first_s.observe(done.first_token_s)
        if len(done.tokens) > 1:
            self._token_s.observe((seconds - done.first_token_s) / (len(done.tokens) - 1))


def _counter(name: str, help: str) -> Counter:
    return Counter(f"isthmus_{name}", help, registry=None)
