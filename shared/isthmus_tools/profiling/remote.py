"""Client of a function's profiling route."""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import stamina

from isthmus.artifacts.device import Device, from_document
from isthmus.artifacts.profile import CodecSpeed
from isthmus.client import Client
from isthmus.errors import HopRejected, HopUnavailable, NotReady, Overloaded, ProfileMalformed, SettingsError
from isthmus.http.pool import Response, stage_seconds
from isthmus.retries import backoff
from isthmus.settings import is_secret
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame

MAX_GRAPH_BYTES = 256 * 2**20
MAX_KERNELS = 1_000_000
_ATTEMPTS = 6
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """A function's measurement of one segment. Units: seconds, bytes.

    `kernels` and `graph` are empty, and `arena_bytes` 0, where the deadline left no time for them.

    Source: docs/reference/profile.md, "The route".
    """

    device: Device
    runs_s: tuple[float, ...]
    decode_s: float
    encode_s: float
    input_bytes: int
    output_bytes: int
    weights_bytes: int
    activation_bytes: int
    arena_bytes: int
    kernels: Mapping[str, float]
    graph: bytes


@dataclass(frozen=True)
class Call:
    """A call without a segment run: seconds of the whole call, and inside the function."""

    total_s: float
    served_s: float


class ProfiledFunction:
    """A function at `url` with a profiling route that accepts `token`."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 60.0) -> None:
        if token and not is_secret(token):
            raise SettingsError("the profile token is none: it is one word of printable characters", variable="token")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": frames.CONTENT_TYPE}
        self._client = Client(self.url, timeout_s=timeout_s)

    def device(self) -> Device:
        """The function's device.

        Raises:
            ProfilingOff, ProfilingRefused: the function has no token, or another token.
            HopUnavailable, HopTimeout: the function cannot be reached.
            ProfileMalformed: the response is no measurement.
        """
        return self._document([], {}, lambda doc: from_document(doc["device"]))

    def codecs(self) -> dict[str, CodecSpeed]:
        """The speed of each codec.

        Raises:
            As `device`.
        """

        def read(doc: Mapping[str, Any]) -> dict[str, CodecSpeed]:
            return {
                str(name): CodecSpeed(_seconds(speed["pack_s"]), _seconds(speed["unpack_s"]))
                for name, speed in doc["codecs"].items()
            }

        return self._document([], {"codecs": "1"}, read)

    def measure(
        self, frame: Frame, *, runs: int, warmup: int = 2, nodes: bool = False, memory: bool = True
    ) -> Measured:
        """Run the frame's segment and measure it.

        Raises:
            As `device`, and the segment's errors on its inputs.
        """
        fields = {"runs": str(runs), "warmup": str(warmup), "nodes": str(int(nodes)), "memory": str(int(memory))}
        return self._document(frames.encode_parts(frame), fields, _measured)

    def echo(self, sent_bytes: int, response_bytes: int) -> Call:
        """Send a frame with a payload of that size and receive another, encoded and decoded as by a hop.

        Raises:
            As `device`.
        """
        start = time.perf_counter()
        body = frames.encode_parts(Frame({"echo": np.zeros(sent_bytes, np.uint8)}))
        response = self._post("/profile/echo", body, {"bytes": str(response_bytes)})
        frames.decode(response.body, max_bytes=2 * response_bytes + 2**20)
        total_s = time.perf_counter() - start
        return Call(total_s, stage_seconds(response.headers.get("server-timing", ""), "total"))

    def _document(
        self, body: Sequence[bytes | memoryview], fields: Mapping[str, str], read: Callable[[Mapping[str, Any]], T]
    ) -> T:
        response = self._post("/profile", body, fields)
        try:
            return read(json.loads(response.body))
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error, RecursionError) as e:
            raise ProfileMalformed(
                f"{self.url}/profile answered with no measurement: {type(e).__name__}: {str(e)[:200]}",
                path=self.url,
                hint="give the URL of a segment function, such as edge-head or cloud-tail, not the router's",
            ) from e

    def _post(self, path: str, body: Sequence[bytes | memoryview], fields: Mapping[str, str]) -> Response:
        # A segment that takes longer to load than the function's deadline is there at a later try.
        pauses = backoff(1.0, 10.0)
        for attempt in stamina.retry_context(
            on=lambda e: isinstance(e, NotReady | Overloaded) and next(pauses), attempts=_ATTEMPTS, timeout=None
        ):
            with attempt:
                return self._once(path, body, fields)
        raise AssertionError("unreachable: the last attempt raises")

    def _once(self, path: str, body: Sequence[bytes | memoryview], fields: Mapping[str, str]) -> Response:
        try:
            return self._client.post(path, body, self._headers, dict(fields))
        except HopUnavailable as e:
            raise HopUnavailable(
                e.message, hint=f"is a function deployed at {self.url}? try: curl {self.url}/ready", **e.facts
            ) from e
        except HopRejected as e:
            if e.facts.get("status") in (404, 405):
                raise HopRejected(
                    f"{self.url} has no profiling route: {e.message}",
                    hint="give the URL of a segment function of this version, such as edge-head or cloud-tail",
                    **e.facts,
                ) from e
            raise


def _measured(doc: Mapping[str, Any]) -> Measured:
    memory, nodes = doc["memory"] or {}, doc["nodes"] or {}
    kernels = nodes.get("kernels", [])
    if len(kernels) > MAX_KERNELS:
        raise ValueError(f"{len(kernels)} kernels; at most {MAX_KERNELS} are read")
    runs = tuple(_seconds(s) for s in doc["runs_s"])
    if not runs:
        raise ValueError("no run was made")
    return Measured(
        device=from_document(doc["device"]),
        runs_s=runs,
        decode_s=_seconds(doc["decode_s"]),
        encode_s=_seconds(doc["encode_s"]),
        input_bytes=int(doc["input_bytes"]),
        output_bytes=int(doc["output_bytes"]),
        weights_bytes=int(memory.get("weights_bytes", 0)),
        activation_bytes=int(memory.get("activation_bytes", 0)),
        arena_bytes=int(memory.get("arena_bytes", 0)),
        kernels={str(name): _seconds(s) for name, _, s in kernels},
        graph=_decompressed(nodes.get("graph", "")),
    )


def _decompressed(text: str) -> bytes:
    if not text:
        return b""
    reader = zlib.decompressobj()
    graph = reader.decompress(base64.b64decode(text, validate=True), MAX_GRAPH_BYTES)
    if not reader.eof:
        raise ValueError(f"the optimised graph has more than {MAX_GRAPH_BYTES} bytes, or its end is missing")
    return graph


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{value!r} is no number of seconds")
    return seconds
