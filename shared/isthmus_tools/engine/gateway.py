"""OpenFaaS's REST API for faas-cli, over the functions of a stack."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE

import isthmus
from isthmus.errors import IsthmusError, Missing, RequestMalformed
from isthmus.http.addresses import is_loopback
from isthmus_tools.engine.async_queue import AsyncQueue
from isthmus_tools.engine.credentials import MAX_SECRET_BYTES, SecretFolder, authorizes
from isthmus_tools.engine.fleet import NAMESPACE, Fleet, describe
from isthmus_tools.engine.proxy import MAX_HEADER_BYTES, ReverseProxy
from isthmus_tools.engine.telemetry import InvocationMetrics, LogLine

_MAX_DOCUMENT_BYTES = 2 * MAX_SECRET_BYTES  # base64 takes a third more than the secret
_IDLE_S = 75.0  # default of nginx
# How long a caller may go on sending a refused body: closing at once would reset the connection, and the response with
# the reason might be lost.
_LINGER_S = 5.0
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_gateway(
    fleet: Fleet,
    proxy: ReverseProxy,
    queue: AsyncQueue,
    metrics: InvocationMetrics,
    secrets: SecretFolder,
    *,
    password: str,
    loopback: bool,
) -> web.Application:
    """The gateway's routes; `loopback`: only this machine reaches /system.

    /system requires the credentials; calls, health and metrics do not, as in OpenFaaS.
    """
    api = _Api(fleet, metrics, secrets)
    # A sub-application, so that every route below /system passes the middlewares.
    system = web.Application(
        client_max_size=_MAX_DOCUMENT_BYTES, middlewares=[_same_machine(loopback), _authenticated(password)]
    )
    system.add_routes(
        [
            web.get("/functions", api.functions),
            web.put("/functions", api.update),
            web.post("/functions", api.create),
            web.delete("/functions", api.remove),
            web.get("/function/{name}", api.function),
            web.post("/scale-function/{name}", api.scale),
            web.get("/secrets", api.secret_names),
            web.post("/secrets", api.create_secret),
            web.put("/secrets", api.update_secret),
            web.delete("/secrets", api.delete_secret),
            web.get("/logs", api.logs),
            web.get("/info", api.info),
            web.get("/namespaces", api.namespaces),
        ]
    )
    app = web.Application(client_max_size=_MAX_DOCUMENT_BYTES, middlewares=[_errors])
    app.add_subapp("/system", system)
    app.router.add_route("*", "/function/{rest:.+}", proxy.handle)
    app.router.add_post("/async-function/{rest:.+}", queue.handle)
    app.router.add_get("/calls/{id}", queue.state)
    app.router.add_get("/", api.index)
    app.router.add_get("/healthz", api.health)
    app.router.add_get("/metrics", api.metrics)
    app.on_response_prepare.append(_without_own_name)
    app.on_shutdown.append(api.end_logs)
    return app


def create_runner(app: web.Application, drain_s: float) -> web.AppRunner:
    """Server of the gateway; a disconnected caller cancels the call, as in OpenFaaS.

    Units: calls in flight have `drain_s` seconds during cleanup.
    """
    return web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=drain_s,
        auto_decompress=False,
        keepalive_timeout=_IDLE_S,
        lingering_time=_LINGER_S,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
    )


class _Api:
    def __init__(self, fleet: Fleet, metrics: InvocationMetrics, secrets: SecretFolder) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._secrets = secrets

    async def functions(self, request: web.Request) -> web.Response:
        if request.query.get("namespace") not in (None, "", NAMESPACE):
            return web.json_response([])
        return web.json_response([describe(s) for s in self._fleet])

    async def function(self, request: web.Request) -> web.Response:
        return web.json_response(describe(self._fleet.find(request.match_info["name"])))

    async def create(self, request: web.Request) -> web.Response:
        self._fleet.deploy(await _document(request), update=False)
        return web.Response(status=202)

    async def update(self, request: web.Request) -> web.Response:
        self._fleet.deploy(await _document(request), update=True)
        return web.Response(status=202)

    async def remove(self, request: web.Request) -> web.Response:
        self._fleet.remove(str((await _document(request)).get("functionName", "")))
        return web.Response(status=202)

    async def scale(self, request: web.Request) -> web.Response:
        replicas = (await _document(request)).get("replicas")
        if not isinstance(replicas, int) or isinstance(replicas, bool):
            raise RequestMalformed("replicas must be a whole number")
        self._fleet.find(request.match_info["name"]).scale(replicas)
        return web.Response(status=202)

    async def secret_names(self, request: web.Request) -> web.Response:
        return web.json_response([{"name": name, "namespace": NAMESPACE} for name in self._secrets.names()])

    async def create_secret(self, request: web.Request) -> web.Response:
        name, value = _secret(await _document(request))
        if name in self._secrets.names():
            return web.Response(status=409, text=f"the secret {name} exists already")
        self._secrets.put(name, value)
        return web.Response(status=202)

    async def update_secret(self, request: web.Request) -> web.Response:
        name, value = _secret(await _document(request))
        if name not in self._secrets.names():
            raise Missing(f"there is no secret {name!r}", kind="secret", name=name, exists=self._secrets.names())
        self._secrets.put(name, value)
        return web.Response(status=202)

    async def delete_secret(self, request: web.Request) -> web.Response:
        self._secrets.delete(str((await _document(request)).get("name", "")))
        return web.Response(status=202)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """Buffered lines, then, with follow=true, new lines."""
        query = request.query
        supervisor = self._fleet.find(query.get("name", ""))
        tail, since, instance = _tail(query.get("tail", "")), _since(query.get("since", "")), query.get("instance", "")
        reply = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await reply.prepare(request)
        for line in supervisor.log_buffer.lines(tail=tail, since=since, instance=instance):
            await reply.write(_log_line(supervisor.name, line))
        if query.get("follow") in ("true", "1"):
            async for line in supervisor.log_buffer.follow(instance):
                await reply.write(_log_line(supervisor.name, line))
        return reply

    async def end_logs(self, app: web.Application) -> None:
        """End followers of logs, so that the engine need not wait for their connections."""
        for supervisor in self._fleet:
            supervisor.log_buffer.close()

    async def info(self, request: web.Request) -> web.Response:
        version = {"sha": "", "release": isthmus.__version__}
        provider = {"provider": "isthmus-local", "orchestration": "processes", "version": version}
        return web.json_response({"provider": provider, "version": version, "arch": ""})

    async def namespaces(self, request: web.Request) -> web.Response:
        return web.json_response([NAMESPACE])

    async def index(self, request: web.Request) -> web.Response:
        """Redirect to the page of the first router; OpenFaaS's gateway redirects to its own page."""
        if not (path := page_path(self._fleet)):
            return web.Response(status=404, text="no function here has the setting hops, as routers do")
        return web.Response(status=302, headers={"Location": path})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def metrics(self, request: web.Request) -> web.Response:
        replicas = {f"{s.name}.{NAMESPACE}": s.available for s in self._fleet}
        return web.Response(
            body=self._metrics.expose(replicas), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )


def page_path(fleet: Fleet) -> str:
    """Path of the page of the first router; empty without a router. Only routers have the setting `hops`."""
    return next((f"/function/{s.name}/" for s in fleet if "hops" in s.deployment.spec.environment), "")


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Render errors as sentences and not JSON: faas-cli prints the body unchanged."""
    try:
        return await handler(request)
    except IsthmusError as e:
        status = 404 if isinstance(e, Missing) else 400
        return web.Response(status=status, text=f"{e.message}; {e.hint}" if e.hint else e.message)


def _same_machine(loopback: bool) -> Any:
    """Keep web pages away from /system: a browser on this machine would otherwise carry their requests here."""

    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if "Origin" in request.headers or (loopback and not is_loopback(request.url.host or "")):
            return web.Response(status=403, text="/system is not for web pages")
        return await handler(request)

    return middleware


def _authenticated(password: str) -> Any:
    """Require the credentials, since any user of this machine reaches its loopback addresses."""

    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        if authorizes(request.headers.get("Authorization", ""), password):
            return await handler(request)
        return web.Response(
            status=401,
            text="/system asks for the credentials that `isthmus up` prints how to use: faas-cli login",
            headers={"WWW-Authenticate": 'Basic realm="Restricted"'},
        )

    return middleware


async def _without_own_name(request: web.Request, response: web.StreamResponse) -> None:
    """A function's Server header passes; aiohttp's own is no part of OpenFaaS's responses."""
    if response.headers.get("Server") == SERVER_SOFTWARE:
        del response.headers["Server"]


async def _document(request: web.Request) -> dict[str, Any]:
    try:
        doc = json.loads(await request.read())
    except (ValueError, RecursionError) as e:
        raise RequestMalformed(f"the body is not JSON: {e}") from e
    if not isinstance(doc, dict):
        raise RequestMalformed("the body must be a JSON object")
    return doc


def _secret(doc: dict[str, Any]) -> tuple[str, bytes]:
    name, value, raw = doc.get("name"), doc.get("value"), doc.get("rawValue")
    if not isinstance(name, str):
        raise RequestMalformed("a secret needs a name")
    try:
        return name, base64.b64decode(raw, validate=True) if raw else str(value or "").encode()
    except (binascii.Error, TypeError, ValueError) as e:
        raise RequestMalformed("rawValue must be base64") from e


def _tail(text: str) -> int | None:
    return int(text) or None if re.fullmatch("[0-9]{1,9}", text) else None


def _since(text: str) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as e:
        raise RequestMalformed(f"since is {text!r}; it must be a time such as 2030-01-31T12:00:00Z") from e
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _log_line(name: str, line: LogLine) -> bytes:
    doc = {
        "name": name,
        "namespace": NAMESPACE,
        "instance": line.instance,
        "timestamp": line.time.isoformat().replace("+00:00", "Z"),
        "text": line.text,
    }
    return json.dumps(doc).encode() + b"\n"
