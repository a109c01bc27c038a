"""The training app: frames of other processes to a part of a training, and its frames back; and the app's server.

Segments are pure, trainings are not: the handler keeps state between calls, and numbers its steps so that a call that
is sent twice counts once. Calls are protected as those between functions (docs/reference/sealing.md).
Source: docs/reference/training.md.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from flask import Flask, Response
from waitress import wasyncore  # type: ignore[import-untyped]
from waitress.server import create_server  # type: ignore[import-untyped]

from isthmus.context import Context
from isthmus.errors import LocalError, SettingsError
from isthmus.http.addresses import is_loopback
from isthmus.serving.app import FunctionApp
from isthmus.serving.protected_routes import open_protection, protected
from isthmus.serving.receiving import BoundedListener
from isthmus.serving.request import FunctionRequest
from isthmus.serving.route_roles import TRAINING, Need, without_hop_keys
from isthmus.settings import SegmentSettings
from isthmus.wire import frame as frames

Exchange = Callable[[frames.Frame, Context], frames.Frame]
"""A part of a training: the frame in response to a frame; called by several threads."""
# Of an idle connection: nodes that train for minutes between two calls connect anew.
_IDLE_S = 60
# A node keeps one between its calls; half of the files that a process may usually open.
_CONNECTIONS = 512
# Between looks at the end of the server.
_LOOK_S = 0.2


def create_training_app(settings: SegmentSettings, exchange: Exchange) -> Flask:
    """The app that gives each frame of `POST /` to `exchange`.

    Raises:
        SettingsError: the secret `hop-keys` cannot be used.
    """
    app = _TrainingApp(settings, exchange)
    app.readiness.start()
    return app.flask


class _TrainingApp(FunctionApp):
    def __init__(self, settings: SegmentSettings, exchange: Exchange) -> None:
        protection = open_protection(settings)
        needs: Mapping[str, Need] = TRAINING if protection is not None else without_hop_keys(TRAINING)
        super().__init__("training", settings, lambda: None, needs)
        self._exchange = exchange
        self.post("/", protected(protection, "/", self.train), "train")

    def train(self, request: FunctionRequest) -> Response:
        """The training's frame in response to a frame."""
        start = time.perf_counter()
        # Without tables: calibrated codecs are of inference, and their frames are refused.
        frame = frames.decode(
            request.body,
            max_bytes=self._settings.max_request_bytes,
            accept=lambda outline: request.memory.hold(outline.decoded_bytes + outline.working_bytes),
        )
        request.facts.update(bundle=frame.bundle, segment=frame.segment)
        request.timings.add("decode", time.perf_counter() - start)
        start = time.perf_counter()
        reply = self._exchange(frame, request.context)
        request.timings.add("run", time.perf_counter() - start)
        return Response(frames.encode(reply), content_type=frames.CONTENT_TYPE)


class TrainingServer:
    """A training app that listens on `host` and `port` (0 takes a free one) while the block lasts, in a thread.

    Raises:
        SettingsError: an address beyond this machine without the secret `hop-keys`: whoever reaches the port would
            change the training, and could read weights and activations.
        LocalError: the address is in use, or not this machine's.
    """

    def __init__(
        self, settings: SegmentSettings, exchange: Exchange, *, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        if not is_loopback(host) and open_protection(settings) is None:
            raise SettingsError(
                f"the training would listen on {host}, beyond this machine, without the secret hop-keys",
                variable="hop-keys",
                hint="give both sides the same secret: docs/how-to/train-distributed.md, Security",
            )
        self._app = create_training_app(settings, exchange)
        self._connections: dict[int, Any] = {}
        self._server = create_server(
            self._app,
            map=self._connections,
            sockets=[
                BoundedListener(
                    _listener(host, port),
                    total_bytes=settings.max_working_bytes // 2,
                    receive_s=settings.deadline_s,
                )
            ],
            threads=settings.max_concurrency,
            connection_limit=_CONNECTIONS,
            channel_timeout=_IDLE_S,
            # The app refuses larger bodies with a JSON document; this bound is for bodies without an end.
            max_request_body_size=2 * settings.max_request_bytes,
            asyncore_use_poll=True,
            log_socket_errors=False,
            ident=None,
            clear_untrusted_proxy_headers=False,
        )
        self.host, self.port = host, int(self._server.effective_port)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="training", daemon=True)

    @property
    def url(self) -> str:
        """Where this machine's processes call it."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Answer the calls in work, then close every connection."""
        self._ended.set()
        self._thread.join()
        self._app.extensions["isthmus"].close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            wasyncore.loop(timeout=_LOOK_S, use_poll=True, map=self._connections, count=1)
        self._server.task_dispatcher.shutdown()
        # The workers' last responses are still to be sent.
        wasyncore.loop(timeout=0, use_poll=True, map=self._connections, count=2)
        wasyncore.close_all(self._connections, ignore_all=True)


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as e:
        raise LocalError(
            f"the training cannot listen on {host}:{port}: {e.strerror or e}",
            hint="choose another with --host or --port",
        ) from e
