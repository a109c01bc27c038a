"""The segments of bench/load.py as three Ray Serve deployments; serves until SIGTERM.

Run by bench/load.py as `ray_load.py PORT TEMP_DIR HEAD TAIL INPUT SHAPE`, in the environment of requirements-ray.txt.
POST / takes a float32 tensor's bytes and gives the output's. Head and tail run two requests at a time with a thread
each, as the functions do; Ray passes the boundary tensors as the router does.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any, cast

import numpy as np
import ray  # type: ignore[import-not-found]
from ray import serve
from sessions import open_session, run
from starlette.requests import Request  # type: ignore[import-not-found]
from starlette.responses import Response  # type: ignore[import-not-found]

LIGHT = {"num_cpus": 0.1}
AT_ONCE = 256


@serve.deployment(ray_actor_options=LIGHT, max_ongoing_requests=AT_ONCE)
class Part:
    """A segment: takes the values at hand, gives its outputs."""

    def __init__(self, path: str) -> None:
        self._session = open_session(path, 1)
        self._outputs = {output.name for output in self._session.get_outputs()}
        # As many runs at a time as CPUs: more would share them.
        self._turns = asyncio.Semaphore(2)

    async def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        async with self._turns:
            await asyncio.to_thread(run, self._session, values)
        return {name: values[name] for name in self._outputs}


@serve.deployment(ray_actor_options=LIGHT, max_ongoing_requests=AT_ONCE)
class Chain:
    """Takes HTTP, calls the head and then the tail."""

    def __init__(self, head: Any, tail: Any, name: str, shape: tuple[int, ...]) -> None:
        self._head, self._tail, self._name, self._shape = head, tail, name, shape

    async def __call__(self, request: Request) -> Response:
        x = np.frombuffer(await request.body(), np.float32).reshape(self._shape)
        activations = await self._head.remote({self._name: x})
        (output,) = (await self._tail.remote(activations)).values()
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    port, temp, head, tail, name, shape = sys.argv[1:]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=temp, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    part, chain = cast(Any, Part), cast(Any, Chain)  # the decorator's own class has no types
    app = chain.bind(
        part.options(name="head").bind(head), part.options(name="tail").bind(tail), name, tuple(json.loads(shape))
    )
    serve.run(app, name="load")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
