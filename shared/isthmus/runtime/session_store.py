"""A store of segments that also runs the steps of sessions."""

from __future__ import annotations

import time
from collections.abc import Mapping

from isthmus.arrays import Array
from isthmus.context import Deadline
from isthmus.errors import RequestMalformed
from isthmus.registry import SegmentSource
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.sessions import Sessions
from isthmus.runtime.store import SegmentStore, TimedOutputs
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Step


def open_store(source: SegmentSource, settings: SegmentSettings) -> SessionStore:
    """A store of the segments of `source`, without sessions yet."""
    return SessionStore(SegmentStore(source, settings), settings)


class SessionStore:
    """`store`, and the state of the sessions that ran on its segments."""

    def __init__(self, store: SegmentStore, settings: SegmentSettings) -> None:
        self.store = store
        self.sessions = Sessions(
            max_sessions=settings.max_sessions,
            max_bytes=settings.session_bytes,
            max_tokens=settings.max_session_tokens,
            idle_s=settings.session_idle_s,
        )

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> TimedOutputs:
        """See `SegmentStore.run`."""
        return self.store.run(bundle, segment, arrays, deadline)

    def step(
        self, bundle: str, segment: str, arrays: Mapping[str, Array], step: Step, deadline: Deadline
    ) -> TimedOutputs:
        """Run a segment for the step of a session, whose state stays here.

        Raises:
            StateMissing: the session's state here ends before the step.
            RequestMalformed: the bundle declares no state.
            Overloaded: no place for another session. Further errors as `run`.
        """
        with self.store.running(bundle, segment, deadline) as (runner, load_s, wait_s):
            if not isinstance(runner, OrtRunner) or runner.state is None:
                raise RequestMalformed(f"the frame is a step of a session, and bundle {bundle} declares no state")
            started = time.perf_counter()
            outputs = self.sessions.step((bundle, segment), runner, runner.state, step, arrays)
            return TimedOutputs(outputs, load_s, wait_s, time.perf_counter() - started)

    def end_session(self, session: str) -> None:
        """Forget a session in every segment, once its step under way is over; no-op without it."""
        self.sessions.end(session)

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """See `SegmentStore.load`."""
        return self.store.load(bundle, segment, deadline)
