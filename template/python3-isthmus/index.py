"""Serve `create_app()` of function/handler.py behind of-watchdog.

The port is bound first and the app is loaded in the background: until then every request is answered 503 with
Retry-After, so `/_/ready` is truthful. A failed start logs a line of JSON and exits with 1, or with 78 for a wrong
setting, where another start would fail as well. SIGTERM does not end the process: it arrives before the watchdog has
drained the requests in flight, and the watchdog ends this process afterwards. A handler that has work besides requests
has a function `drain` as well, which is called then. SIGINT ends the process at once.

Environment: `upstream_url` (host and port to bind), `max_concurrency`, `max_queued`, `max_request_bytes`,
`max_working_bytes`, `deadline_s`, `log_level`. The app reads its own settings.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import start_settings as settings
from bounded_server import RETRY_AFTER_S, Limits, error_body, listen, serve
from json_lines import configure_logging

HERE = Path(__file__).resolve().parent
MAX_CONCURRENCY = 4096  # each takes a thread, and a process that cannot start one ends
MAX_QUEUED = 4096  # so does each of these
MAX_WAITING = 16  # requests that wait for the registry outside of max_concurrency: isthmus.admission
SPARE_THREADS = 2  # for the readiness probe, and for refusals of requests beyond the queue
EX_CONFIG = 78  # sysexits.h: a supervisor need not restart this process before its settings change
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class LoadingApp:
    """A WSGI app that answers 503 until the function's own app is `loaded`."""

    loaded: WsgiApp | None = None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.loaded is not None:
            return self.loaded(environ, start_response)
        reason = "this function is still loading; try again"
        body = error_body(environ.get("PATH_INFO", ""), 503, reason, "NotReady", retry_after_s=RETRY_AFTER_S)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Retry-After": str(RETRY_AFTER_S),
            "Cache-Control": "no-store",
        }
        start_response("503 Service Unavailable", list(headers.items()))
        return [body]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=drain, name="drain", daemon=True).start())
    # Not KeyboardInterrupt: raised inside a finaliser, that exception is dropped and the process lives on.
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    configure_logging(settings.text("log_level"))
    app = LoadingApp()
    try:
        concurrency = settings.count("max_concurrency", 32, MAX_CONCURRENCY)
        queued = settings.count("max_queued", 64, MAX_QUEUED, minimum=0)
        body_bytes = settings.size("max_request_bytes", 64 * 2**20)
        working_bytes = settings.size("max_working_bytes", 256 * 2**20)
        limits = Limits.of(body_bytes, working_bytes, settings.seconds("deadline_s", 25.0))
        listener = listen(*settings.address("upstream_url", "http://127.0.0.1:5000"), limits)
    except (settings.SettingRefused, OSError) as e:
        exit_failed(e, foreseen=True)
    threading.Thread(target=load, args=(app,), name="load", daemon=True).start()
    # A thread for each request that is worked on or waits, so that a refusal never waits for one of these.
    threads = concurrency + queued + min(concurrency, MAX_WAITING) + SPARE_THREADS
    try:
        serve(app, listener, limits, threads)
    except Exception as e:  # the loading thread logs meanwhile, so a bare traceback would be torn apart
        exit_failed(e)


def load(app: LoadingApp) -> None:
    """Import the handler and create its app; end the process where that fails."""
    started = time.monotonic()
    for folder in (HERE, HERE / "function", HERE / "function" / "shared"):
        if folder.is_dir():
            sys.path.insert(0, str(folder))
    try:
        from function.handler import create_app

        app.loaded = create_app()
    except BaseException as e:
        exit_failed(e)
    logging.getLogger("index").info("serving", extra={"facts": {"after_s": round(time.monotonic() - started, 3)}})


def drain() -> None:
    """Tell the handler that the process is about to end, if it asked for that."""
    if hook := getattr(sys.modules.get("function.handler"), "drain", None):
        hook()


def exit_failed(error: BaseException, *, foreseen: bool = False) -> Any:
    """Log why the process cannot serve, and end it from any thread; a traceback only where that was not `foreseen`."""
    facts = getattr(error, "facts", None)
    foreseen = foreseen or isinstance(facts, Mapping)
    message = f"cannot start: {type(error).__name__}: {getattr(error, 'message', error)}"
    if hint := getattr(error, "hint", ""):
        message += f"; {hint}"
    trace = None if foreseen else (type(error), error, error.__traceback__)
    logging.getLogger("index").critical(message, extra={"facts": dict(facts or {})}, exc_info=trace)
    sys.stderr.flush()
    # The main thread may be inside waitress's loop, which no exception of another thread ends.
    os._exit(EX_CONFIG if "variable" in (facts or {}) else 1)


if __name__ == "__main__":
    main()
