"""The client of a function's profiling route. Source: docs/reference/profile.md, "The route"."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
import numpy as np
import stamina

from isthmus.artifacts.device import Device
from isthmus.artifacts.profile import CodecSpeed
from isthmus.client import Client
from isthmus.errors import (
    HopRejected,
    HopUnavailable,
    HopUntrusted,
    NotReady,
    Overloaded,
    ProfileMalformed,
    SettingsError,
)
from isthmus.http.pool import Response, stage_seconds
from isthmus.http.tls import TlsTrust
from isthmus.retries import backoff
from isthmus.security.protected_call import CallProtection
from isthmus.settings import is_secret
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame

# Optimised graphs hold no weights: a language model's has a few MiB, and thousands of kernels.
# A function is trusted with neither the length of its graph nor the number of its kernels.
MAX_GRAPH_BYTES = 256 * 2**20
MAX_KERNELS = 1_000_000
# With pauses of 1 to 10 s, some 30 s: a large segment loads in the background for that long.
_ATTEMPTS = 6
_MAX_REASON = 200

T = TypeVar("T")
Document = TypeVar("Document", bound=msgspec.Struct)
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class _Memory(msgspec.Struct):
    activation_bytes: Count = 0
    arena_bytes: Count = 0


class _Kernels(msgspec.Struct):
    kernels: Annotated[list[tuple[str, str, Seconds]], msgspec.Meta(max_length=MAX_KERNELS)] = []
    graph: bytes = b""


class _DeviceDocument(msgspec.Struct):
    device: Device


class _CodecSpeed(msgspec.Struct):
    pack_s: Seconds
    unpack_s: Seconds


class _CodecsDocument(msgspec.Struct):
    codecs: dict[str, _CodecSpeed]


class _MeasurementDocument(msgspec.Struct):
    device: Device
    runs_s: Annotated[tuple[Seconds, ...], msgspec.Meta(min_length=1)]
    decode_s: Seconds
    encode_s: Seconds
    input_bytes: Count
    output_bytes: Count
    memory: _Memory | None
    nodes: _Kernels | None


@dataclass(frozen=True)
class SegmentMeasurement:
    """A function's measurement of a segment. Units: seconds, bytes.

    `kernels` and `graph` are empty, and the memory sizes 0, where the function's deadline left no time for them.
    """

    device: Device
    runs_s: tuple[float, ...]
    decode_s: float
    encode_s: float
    input_bytes: int
    output_bytes: int
    activation_bytes: int
    arena_bytes: int
    kernels: Mapping[str, float]
    graph: bytes


@dataclass(frozen=True)
class Echo:
    """A call that runs no segment: seconds at the caller, and seconds inside the function."""

    total_s: float
    served_s: float


class ProfiledFunction:
    """A function at `url` that measures for holders of `token`.

    `protection` is that of its other routes, `trust` that of an https URL.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout_s: float = 60.0,
        protection: CallProtection | None = None,
        trust: TlsTrust | None = None,
    ) -> None:
        if token and not is_secret(token):
            raise SettingsError("the profile token is none: it is one word of printable characters", variable="token")
        self.url = url.rstrip("/")
        self.protection, self.trust = protection, trust
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": frames.CONTENT_TYPE}
        # The header above is of these calls alone: a key for routers is none for functions.
        self._client = Client(self.url, timeout_s=timeout_s, trust=trust, api_key="")

    def device(self) -> Device:
        """The function's device.

        Raises:
            ProfilingOff, ProfilingRefused: the function has no token, or another token.
            HopUnavailable, HopTimeout: the function cannot be reached.
            ProfileMalformed: the response is no measurement.
        """
        return self._read(_DeviceDocument, [], {}, lambda doc: doc.device)

    def codecs(self) -> dict[str, CodecSpeed]:
        """The device's encode and decode times for each codec.

        Raises:
            As `device`.
        """
        document = self._read(_CodecsDocument, [], {"codecs": "1"}, lambda doc: doc)
        return {name: CodecSpeed(speed.pack_s, speed.unpack_s) for name, speed in document.codecs.items()}

    def measure(
        self, frame: Frame, *, runs: int, warmup: int = 2, nodes: bool = False, memory: bool = True
    ) -> SegmentMeasurement:
        """Run the segment that `frame` names on the frame's tensors, `runs` times after `warmup` unmeasured runs.

        Raises:
            As `device`; errors of the segment.
        """
        fields = {"runs": str(runs), "warmup": str(warmup), "nodes": str(int(nodes)), "memory": str(int(memory))}
        return self._read(_MeasurementDocument, frames.encode_parts(frame), fields, _measurement)

    def echo(self, sent_bytes: int, received_bytes: int) -> Echo:
        """Exchange frames with payloads of these sizes, encoded and decoded as by a hop.

        Raises:
            As `device`.
        """
        start = time.perf_counter()
        body = frames.encode_parts(Frame({"echo": np.zeros(sent_bytes, np.uint8)}))
        response = self._post("/profile/echo", body, {"bytes": str(received_bytes)})
        # The header and its padding stay below a MiB.
        frames.decode(response.body, max_bytes=2 * received_bytes + 2**20)
        total_s = time.perf_counter() - start
        return Echo(total_s, stage_seconds(response.headers.get("server-timing", ""), "total"))

    # Errors of conversion count as malformed too: `convert` checks facts that no schema can.
    def _read(
        self,
        kind: type[Document],
        body: Sequence[bytes | memoryview],
        fields: Mapping[str, str],
        convert: Callable[[Document], T],
    ) -> T:
        response = self._post("/profile", body, fields)
        try:
            return convert(msgspec.json.decode(response.body, type=kind))
        except (msgspec.DecodeError, ValueError, KeyError, TypeError, zlib.error, RecursionError) as e:
            raise ProfileMalformed(
                f"{self.url}/profile answered with no measurement: {str(e)[:_MAX_REASON]}",
                path=self.url,
                hint="give the URL of a segment function, such as edge-head or cloud-tail, not the router's",
            ) from e

    def _post(self, path: str, body: Sequence[bytes | memoryview], fields: Mapping[str, str]) -> Response:
        # A segment that loads for longer than the function's deadline is ready at a later attempt.
        pauses = backoff(1.0, 10.0)
        for attempt in stamina.retry_context(
            on=lambda e: isinstance(e, NotReady | Overloaded) and next(pauses), attempts=_ATTEMPTS, timeout=None
        ):
            with attempt:
                return self._post_once(path, body, fields)
        raise AssertionError("unreachable: the last attempt raises")

    def _post_once(self, path: str, body: Sequence[bytes | memoryview], fields: Mapping[str, str]) -> Response:
        try:
            return self._client.post(path, body, self._headers, dict(fields))
        except HopUntrusted:
            raise
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


def _measurement(doc: _MeasurementDocument) -> SegmentMeasurement:
    memory, nodes = doc.memory or _Memory(), doc.nodes or _Kernels()
    return SegmentMeasurement(
        device=doc.device,
        runs_s=doc.runs_s,
        decode_s=doc.decode_s,
        encode_s=doc.encode_s,
        input_bytes=doc.input_bytes,
        output_bytes=doc.output_bytes,
        activation_bytes=memory.activation_bytes,
        arena_bytes=memory.arena_bytes,
        kernels={name: seconds for name, _, seconds in nodes.kernels},
        graph=_decompressed(nodes.graph),
    )


def _decompressed(data: bytes) -> bytes:
    if not data:
        return b""
    reader = zlib.decompressobj()
    graph = reader.decompress(data, MAX_GRAPH_BYTES)
    if not reader.eof:
        raise ValueError(f"the optimised graph has more than {MAX_GRAPH_BYTES} bytes, or its end is missing")
    return graph
