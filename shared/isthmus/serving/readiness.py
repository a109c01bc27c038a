"""Whether a function can answer: it loads what it was told to in the background and says so truthfully."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from isthmus.errors import IsthmusError, NotReady

_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 15.0


class Readiness:
    """Runs `prepare` in a thread until it succeeds once; before that, `check` refuses.

    A registry that is down or a model that is not published yet is no reason to die: the platform would restart us
    into the same. So failures are logged, told to whoever asks, and tried again.
    """

    def __init__(self, prepare: Callable[[], None], log: logging.Logger) -> None:
        self._prepare = prepare
        self._log = log
        self._ready, self._closed = threading.Event(), threading.Event()
        self._reason, self._hint = "loading", ""

    def start(self) -> None:
        """Begin to prepare; called once, when everything that `prepare` uses is there."""
        threading.Thread(target=self._work, name="prepare", daemon=True).start()

    def close(self) -> None:
        """Try no more; an attempt under way goes on to its end."""
        self._closed.set()

    @property
    def ready(self) -> bool:
        """Whether everything that was asked for at start is loaded."""
        return self._ready.is_set()

    def check(self) -> None:
        """Go on only when ready.

        Raises:
            NotReady: says what is still missing, and when to ask again.
        """
        if not self._ready.is_set():
            raise NotReady(f"not ready: {self._reason}", retry_after_s=1, hint=self._hint)

    def _work(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._closed.is_set():
            try:
                self._prepare()
            except IsthmusError as e:
                self._reason, self._hint = e.message, e.hint
                facts = {"error": e.message, "again_in_s": wait_s} | ({"hint": e.hint} if e.hint else {})
                self._log.warning("not ready", extra={"facts": facts})
            except Exception as e:
                self._reason, self._hint = "an unexpected error; the log has it", ""
                self._log.error("not ready: %s", type(e).__name__, exc_info=True)
            else:
                self._ready.set()
                self._log.info("ready")
                return
            self._closed.wait(wait_s)
            wait_s = min(_MAX_WAIT_S, wait_s * 2)
