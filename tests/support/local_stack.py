"""A small stack of real functions, for the tests of the local engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import urllib3

from isthmus_tools.engine import Engine
from support.paths import ROOT
from support.patience import LONG_S

HANDLER = """
import os
import signal
import time

from flask import Flask, Response, jsonify, request


def create_app():
    if os.environ.get("broken"):
        raise RuntimeError("broken was set")
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = None

    @app.get("/ready")
    def ready():
        return Response(status=503 if os.path.exists(os.environ.get("not_ready_file", "")) else 200)

    @app.post("/")
    def echo():
        time.sleep(float(request.args.get("sleep", 0)))
        reply = Response(request.get_data(), mimetype=request.mimetype or "application/octet-stream")
        reply.headers["X-Pid"] = str(os.getpid())
        reply.headers["X-Seen-Call-Id"] = request.headers.get("X-Call-Id", "")
        reply.set_cookie("a", "1")
        reply.set_cookie("b", "2")
        return reply

    @app.get("/facts/<path:rest>")
    def facts(rest):
        return jsonify(rest=rest, query=request.query_string.decode(), env=dict(os.environ), cwd=os.getcwd(),
                       headers=dict(request.headers))

    @app.post("/say")
    def say():
        print(request.get_data(as_text=True), flush=True)
        return Response(status=204)

    @app.post("/odd")
    def odd():
        return Response("odd", headers={"Host": "example.com", "Expect": "100-continue", "X-Own": "own"})

    @app.post("/busy")
    def busy():
        path = os.environ["busy_file"]
        if os.path.exists(path):
            return Response("done", status=200)
        open(path, "w").close()
        return Response(status=429, headers={"Retry-After": "0"})

    return app
"""

STACK = """
version: 1.0
provider:
  name: openfaas
  gateway: http://127.0.0.1:8080
configuration:
  copy:
    - common
functions:
  echo:
    lang: python3-isthmus
    handler: ./functions/echo
    image: example/echo:${TAG:-latest}
    environment:
      gateway_url: http://gateway.openfaas.svc.cluster.local:8080/function/other
      flag: true
  other:
    lang: python3-isthmus
    handler: ./functions/echo
    image: example/other:latest
"""


def write_stack(root: Path, text: str = STACK) -> Path:
    """A repository with that stack.yml, the real template, and one handler; the path of its stack.yml."""
    shutil.copytree(ROOT / "template" / "python3-isthmus", root / "template" / "python3-isthmus")
    (root / "functions" / "echo").mkdir(parents=True)
    (root / "functions" / "echo" / "handler.py").write_text(HANDLER)
    (root / "common").mkdir()
    (root / "common" / "words.py").write_text("WORD = 'isthmus'\n")
    (root / "stack.yml").write_text(text)
    return root / "stack.yml"


def http(method: str, url: str, **options: object) -> urllib3.BaseHTTPResponse:
    """One request, without retries or redirects."""
    with urllib3.PoolManager(retries=False) as pool:
        return pool.request(method, url, timeout=LONG_S, **options)  # type: ignore[arg-type]


def system(
    engine: Engine, method: str, path: str, *, headers: Mapping[str, str] | None = None, **options: object
) -> urllib3.BaseHTTPResponse:
    """One request to the engine's system API, with its credentials."""
    return http(method, engine.url + path, headers={**login_header(engine), **(headers or {})}, **options)


def login_header(engine: Engine) -> dict[str, str]:
    """The header that holds an engine's credentials."""
    return dict(urllib3.make_headers(basic_auth=":".join(engine.login)))
