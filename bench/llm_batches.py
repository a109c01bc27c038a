"""Steps of sessions that share runs: tokens a second of 1 to 16 sessions in the tail of SmolLM2, shared and in turn.

One process with all CPUs and a closed loop for each session: no link and no head, so that the run is all there is. In
turn is the same store with `batching=off`. Memory is what the state of a session takes, in pages.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from harness import STATE, Report, Row, arguments, at_least
from llm import CUT, MIN_BATCHED, REGISTRY, open_model

from isthmus.artifacts.sampling import Sampling
from isthmus.context import Deadline
from isthmus.registry import open_cache, open_registry
from isthmus.runtime.session_store import SessionStore, open_store
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Step

TAIL, WIDTH = f"{CUT}..", 576
GOAL_SESSIONS = 8
# Tokens of context and sessions.
CASES = ((64, 1), (64, 2), (64, 4), (64, GOAL_SESSIONS), (64, 16), (512, GOAL_SESSIONS))
QUICK_CASES = ((64, 1), (64, GOAL_SESSIONS))
RESERVE = 1024
CHUNK = 256
LONG_S = 3600.0


def main() -> None:
    report = arguments("llm_batches", __doc__, ["numpy", "onnxruntime"])
    with open_model(report) as model:
        digest = model.resolved.digest
    rows = [compared(report, digest, count, context) for context, count in (QUICK_CASES if report.quick else CASES)]
    report.add("tokens a second in the tail", rows)
    for row in rows:
        if row["sessions"] == GOAL_SESSIONS:
            name = f"{GOAL_SESSIONS} sessions of {row['context']} tokens, times the throughput in turn"
            report.goals.append(at_least(name, float(row["gain"] or 0), MIN_BATCHED))
    report.emit()


def compared(report: Report, digest: str, count: int, context: int) -> Row:
    """Tokens a second with runs shared, and in turn; the seconds of both interleaved, as the machine has moods."""
    report.say(f"{count} sessions of {context} tokens")
    seconds, turns = (3.0, 2) if report.quick else (5.0, 3)
    rates: dict[str, list[float]] = {"off": [], "auto": []}
    with opened("off") as alone, opened("auto") as shared:
        stores = {"off": alone, "auto": shared}
        for store in stores.values():
            prefill(store, digest, count, context)
        closed_loop(shared, digest, count, context, seconds)  # sizes are tried
        ran = sum(shared.sessions.counts().runs.values())
        tokens = 0
        for _ in range(turns):
            for name, store in stores.items():
                steps = closed_loop(store, digest, count, context, seconds)
                rates[name].append(steps / seconds)
                tokens += steps if name == "auto" else 0
        counts = shared.sessions.counts()
    in_turn, together = statistics.median(rates["off"]), statistics.median(rates["auto"])
    return {
        "context": context,
        "sessions": count,
        "in_turn_per_s": in_turn,
        "shared_per_s": together,
        "gain": together / in_turn,
        "steps_a_run": tokens / (sum(counts.runs.values()) - ran),
        "state_mib_a_session": counts.resident / count / 2**20,
    }


@contextlib.contextmanager
def opened(batching: str) -> Iterator[SessionStore]:
    """The segments of the model on all CPUs."""
    settings = SegmentSettings(
        registry=str(REGISTRY), cache_dir=str(STATE / "llm-cache"), cache_bytes=2 * 2**30, batching=batching
    )
    store = open_store(open_cache(settings, open_registry(settings)), settings)
    yield store
    store.store.close()


def prefill(store: SessionStore, digest: str, count: int, context: int) -> None:
    """Begin so many sessions."""
    for i in range(count):
        for start in range(0, context, CHUNK):
            run(store, digest, f"s{i}", start, min(CHUNK, context - start))


def closed_loop(store: SessionStore, digest: str, count: int, context: int, seconds: float) -> int:
    """Steps of all sessions, each of which takes its next one as soon as it has the last."""
    until = time.perf_counter() + seconds

    def steps(session: str) -> int:
        done = 0
        while time.perf_counter() < until:
            run(store, digest, session, context + done % CHUNK, 1)
            done += 1
        return done

    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(steps, [f"s{i}" for i in range(count)]))


def run(store: SessionStore, digest: str, session: str, position: int, count: int) -> None:
    """A step of random hidden states, greedily sampled."""
    hidden = np.random.default_rng(position).standard_normal((1, count, WIDTH)).astype(np.float32)
    step = Step(session, position, Sampling(), reserve=RESERVE)
    store.step(digest, TAIL, {CUT: hidden}, step, Deadline.after(LONG_S))


if __name__ == "__main__":
    main()
