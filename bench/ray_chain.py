"""The chain of bench/chain.py as three Ray Serve deployments; prints READY and serves until SIGTERM.

Run by bench/chain.py as `ray_chain.py PORT TEMP_DIR`, in the environment of requirements-ray.txt. POST /SIZE sends the
input; the head returns SIZE bytes of float32, the tail their first 16 values. With POST /SIZE/direct Ray passes the
head's output to the tail without the router.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, cast

import numpy as np
import ray  # type: ignore[import-not-found]
from ray import serve
from starlette.requests import Request  # type: ignore[import-not-found]
from starlette.responses import Response  # type: ignore[import-not-found]

LIGHT = {"num_cpus": 0.1}


@serve.deployment(ray_actor_options=LIGHT, max_ongoing_requests=32)
class Head:
    """Takes the small input, gives the activations."""

    def __init__(self) -> None:
        self._ready: dict[int, Any] = {}

    async def __call__(self, x: Any, size: int) -> Any:
        return self._ready.setdefault(size, np.zeros((size // 1024, 256), np.float32))


@serve.deployment(ray_actor_options=LIGHT, max_ongoing_requests=32)
class Tail:
    """Takes the activations, gives a few values."""

    async def __call__(self, activations: Any) -> Any:
        return activations[0, :16].copy()


@serve.deployment(ray_actor_options=LIGHT, max_ongoing_requests=32)
class Router:
    """Takes HTTP, calls the head and then the tail."""

    def __init__(self, head: Any, tail: Any) -> None:
        self._head = head
        self._tail = tail

    async def __call__(self, request: Request) -> Response:
        x = np.frombuffer(await request.body(), np.float32)
        size, _, direct = request.url.path.strip("/").partition("/")
        if direct:
            output = await self._tail.remote(self._head.remote(x, int(size)))
        else:
            activations = await self._head.remote(x, int(size))
            output = await self._tail.remote(activations)
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[2], logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    router, head, tail = (cast(Any, each) for each in (Router, Head, Tail))  # the decorator's own class has no types
    serve.run(router.bind(head.bind(), tail.bind()), name="chain")
    print("READY", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
