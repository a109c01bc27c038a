"""Serve `create_app()` of function/handler.py behind of-watchdog.

The port is bound first and the app is made in the background, so that the watchdog finds a listener and `/_/ready`
tells the truth: until the app is there, every request is answered 503 with Retry-After. A start that fails prints one
line of JSON and exits with 1, or with 78 where a setting is at fault and another start would end the same way. SIGTERM
is ignored: it reaches this process before the watchdog has drained the requests under way, and the watchdog ends this
process when it has. SIGINT ends it at once.

Environment: `upstream_url` (host and port to bind), `max_concurrency`, `max_request_bytes`, `max_working_bytes`,
`deadline_s`, `log_level`. The app reads its own settings.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from http_request import Memory
from http_server import Channel, error_document
from http_workers import Workers
from waitress.server import create_server  # type: ignore[import-untyped]

HERE = Path(__file__).resolve().parent
MAX_LINE = 32 * 1024  # characters; the watchdog stops reading a function's log at a line of 64 KiB
MAX_WAITING = 16  # requests that wait for the registry outside of max_concurrency: isthmus.admission
SPARE_THREADS = 2  # one for the readiness probe, one to refuse what exceeds max_concurrency
RETRY_AFTER_S = 1
MAX_CONNECTIONS = 4096  # beyond these, and half of the open files allowed, connections wait to be accepted
EX_CONFIG = 78  # sysexits.h: who restarts this process need not do so before its settings change
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class BadStart(Exception):
    """This process cannot start as configured; `facts` name the variable."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class JsonLines(logging.Formatter):
    """One JSON object a line, bounded; a record's `facts` become fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _short(record.getMessage()),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = _short("".join(traceback.format_exception(*record.exc_info)))
        text = json.dumps(line, default=str)
        if len(text) <= MAX_LINE:
            return text
        return json.dumps({k: line[k] for k in ("time", "level", "logger", "message")} | {"truncated": len(text)})


class Door:
    """The WSGI app from the first moment on: 503 until `open` is called with the function's own."""

    def __init__(self) -> None:
        self._app: WsgiApp | None = None

    def open(self, app: WsgiApp) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self._app is not None:
            return self._app(environ, start_response)
        body = error_document("this function is still loading; try again", "NotReady", retry_after_s=RETRY_AFTER_S)
        start_response(
            "503 Service Unavailable",
            [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Retry-After", str(RETRY_AFTER_S)),
                ("Cache-Control", "no-store"),
            ],
        )
        return [body]


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Not KeyboardInterrupt: raised inside a finaliser it is dropped, and the process would live on.
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    _log_as_json()
    _keep_memory()
    try:
        server, door = _bind()
    except BadStart as e:
        _fail(e)
    threading.Thread(target=_load, args=(door,), name="load", daemon=True).start()
    server.run()


def _bind() -> tuple[Any, Door]:
    url = _env("upstream_url") or "http://127.0.0.1:5000"
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host, port = parts.hostname or "127.0.0.1", parts.port or 5000
    except ValueError as e:
        raise BadStart(
            f"upstream_url is {url!r}; it must be like http://127.0.0.1:5000", variable="upstream_url"
        ) from e
    limit = _whole("max_concurrency", 32)
    threads = limit + min(limit, MAX_WAITING) + SPARE_THREADS
    largest = _size("max_request_bytes", 64 * 2**20)
    door = Door()
    try:
        server = create_server(
            door,
            _dispatcher=Workers(threads),
            host=host,
            port=port,
            threads=threads,
            backlog=1024,
            connection_limit=max(256, 4 * threads, min(MAX_CONNECTIONS, _open_files() // 2)),
            channel_timeout=120,  # seconds; the watchdog gives an idle connection up after 0.5, so it never meets this
            # A little over the app's own bound, so that the app refuses most oversize bodies and can say why.
            max_request_body_size=largest + 2**20,
            # Bodies stay in memory up to these; above, waitress writes them to a temporary file.
            inbuf_overflow=largest + 2 * 2**20,
            outbuf_overflow=largest + 2 * 2**20,
            recv_bytes=32 * 1024,  # of a head, and of a body whose length is not known; others are read by Channel
            asyncore_use_poll=True,  # select() ends at file descriptor 1023
            ident=None,
            clear_untrusted_proxy_headers=True,
        )
    except OSError as e:
        raise BadStart(f"cannot listen on {host}:{port} (upstream_url): {e}", upstream_url=url) from e
    server.channel_class = Channel
    # Parsers and tasks know nothing of their server but its adjustments.
    server.adj.receive_s = _seconds("deadline_s", 25.0)
    server.adj.memory = Memory(max(_size("max_working_bytes", 256 * 2**20), 2 * largest))
    return server, door


def _load(door: Door) -> None:
    started = time.monotonic()
    for folder in (HERE, HERE / "function", HERE / "function" / "shared"):
        if folder.is_dir():
            sys.path.insert(0, str(folder))
    try:
        from function.handler import create_app

        door.open(create_app())
    except BaseException as e:
        _fail(e)
    logging.getLogger("index").info("serving", extra={"facts": {"after_s": round(time.monotonic() - started, 3)}})


def _keep_memory() -> None:
    """Let malloc keep what a body leaves behind, in one arena for all threads, where this is glibc's malloc.

    Bodies of a megabyte come and go with every request. Paging them in anew each time costs a fifth of the time that
    1.2 MB take through three functions, and an arena for each thread costs 20 MB.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 32 * 2**20), (M_TRIM_THRESHOLD, 128 * 2**20)):
            mallopt(parameter, value)


def _fail(error: BaseException) -> None:
    """Say in one line why the start failed, and end the process whichever thread this is."""
    known = getattr(error, "facts", None)
    understood = isinstance(known, Mapping)
    facts = dict(known) if isinstance(known, Mapping) else {}
    message = f"cannot start: {type(error).__name__}: {error.args[0] if error.args else ''}"
    if hint := getattr(error, "hint", ""):
        message += f"; {hint}"
    trace = None if understood else (type(error), error, error.__traceback__)
    logging.getLogger("index").critical(message, extra={"facts": facts}, exc_info=trace)
    sys.stderr.flush()
    # The main thread may be inside waitress's loop, which no exception of another thread ends.
    os._exit(EX_CONFIG if "variable" in facts else 1)


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = _env("log_level").upper()
    root.setLevel(level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "INFO")
    logging.getLogger("waitress.queue").setLevel("ERROR")  # it warns for each request that waits for a thread
    for name in ("urllib3", "botocore", "boto3", "s3transfer"):
        logging.getLogger(name).setLevel("WARNING")


def _env(name: str) -> str:
    return os.environ.get(name, "").strip()


def _whole(name: str, default: int) -> int:
    text = _env(name)
    try:
        value = int(text) if text else default
    except ValueError:
        value = 0
    if value < 1:
        raise BadStart(f"the setting {name} is {text!r}; it must be a whole number from 1", variable=name, value=text)
    return value


def _seconds(name: str, default: float) -> float:
    text = _env(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise BadStart(f"the setting {name} is {text!r}; it must be a number of seconds", variable=name, value=text)
    return value


def _open_files() -> int:
    """How many files this process may have open, connections among them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 2 * MAX_CONNECTIONS


def _size(name: str, default: int) -> int:
    """Bytes of `64MiB`, `512`, `1.5Gi`, as the function's own settings read them."""
    text = _env(name)
    if not text:
        return default
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text, re.IGNORECASE)
    if not match:
        raise BadStart(f"the setting {name} is {text!r}; it must be a size such as 64MiB", variable=name, value=text)
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _short(text: str) -> str:
    return text if len(text) <= 8000 else f"{text[:6000]} … {text[-1500:]}"


if __name__ == "__main__":
    main()
