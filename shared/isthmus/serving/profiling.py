"""The profiling endpoints of a segment function: times and memory of a segment on this device, by bearer token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flask import Response

from isthmus.artifacts.json_documents import builtins
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, ProfilingOff, ProfilingRefused, RequestMalformed, RequestTooLarge
from isthmus.runtime.codec_speed import speeds
from isthmus.runtime.kernel_profile import KernelProfile
from isthmus.runtime.store import SegmentStore
from isthmus.security.callers import Role
from isthmus.serving.access import ADMITTED
from isthmus.serving.app import FunctionApp
from isthmus.serving.request import FunctionRequest
from isthmus.settings import SegmentSettings
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame

SECRET = "profile-token"  # noqa: S105
FORMAT = "isthmus.measurement/1"
# By default a profile of a slow segment ends within a deadline; the bounds stop a caller from holding the CPU for long.
RUNS, MAX_RUNS = 15, 500
WARMUP, MAX_WARMUP = 2, 50
_CODING_TRIES = 3
# A token is short; a file mounted by mistake need not be read whole.
_MAX_TOKEN_BYTES = 4096
# Share of the deadline for plain runs, without and with an observation after these.
_DEADLINE_SHARE_PLAIN, _DEADLINE_SHARE_OBSERVED = 0.9, 0.5


class Profiling:
    """`POST /profile` and `POST /profile/echo`. Each call needs the secret `profile-token` as its bearer token."""

    def __init__(
        self, store: SegmentStore, settings: SegmentSettings, decode: Callable[[FunctionRequest], Frame]
    ) -> None:
        self._store, self._settings, self._decode = store, settings, decode

    def serve_on(self, app: FunctionApp) -> None:
        """Add both routes."""
        app.post("/profile", self.measure, "profile")
        app.post("/profile/echo", self.echo, "profile_echo")

    def measure(self, request: FunctionRequest) -> Response:
        """Run the segment that the frame names on its tensors, warmed up, runs in sequence.

        An empty body asks for the device's description alone, and with `codecs` for its codecs' speed.

        Raises:
            ProfilingOff, ProfilingRefused: see `_admit`.
            RequestMalformed: a malformed query, or a frame that names no bundle.
            Further errors as decoding a frame and running a segment.
        """
        self._admit(request)
        runs = _whole(request.query, "runs", RUNS, 1, MAX_RUNS)
        warmup = _whole(request.query, "warmup", WARMUP, 0, MAX_WARMUP)
        nodes = bool(_whole(request.query, "nodes", 0, 0, 1))
        memory = bool(_whole(request.query, "memory", 1, 0, 1)) or nodes
        codecs = bool(_whole(request.query, "codecs", 0, 0, 1))
        doc: dict[str, Any] = {"format": FORMAT, "device": builtins(self._store.device)}
        if codecs:
            doc["codecs"] = {name: builtins(s) for name, s in speeds(request.context.deadline.remaining() / 4).items()}
        if not request.body:
            return _json(doc)
        decode_s, frame = _timed(lambda: self._decoded(request))
        deadline = request.context.deadline
        until = Deadline.after(deadline.remaining() * (_DEADLINE_SHARE_OBSERVED if memory else _DEADLINE_SHARE_PLAIN))
        times, outputs, load_s = self._run(frame, warmup, runs, until, deadline)
        encode_s, response = _timed(lambda: frames.encode(Frame(outputs, frame.bundle, frame.segment)))
        doc |= {
            "bundle": frame.bundle,
            "segment": frame.segment,
            "asked": runs,
            "warmup": warmup,
            "runs_s": times,
            **_quartiles(times),
            "load_s": load_s,
            "decode_s": decode_s,
            "encode_s": encode_s,
            "input_bytes": sum(a.nbytes for a in frame.tensors.values()),
            "output_bytes": sum(a.nbytes for a in outputs.values()),
            "answer_bytes": len(response),
            "memory": None,
            "nodes": None,
        }
        if memory:
            doc |= self._observe(frame, deadline, runs if nodes else 2, nodes)
        return _json(doc)

    def echo(self, request: FunctionRequest) -> Response:
        """Decode the frame and respond with a frame of `bytes` zero bytes, to time the call alone.

        Raises:
            As `measure`; RequestTooLarge: more bytes than a request may have.
        """
        self._admit(request)
        limit = self._settings.max_request_bytes
        count = _whole(request.query, "bytes", 0, 0, 2**40)
        if count > limit:
            raise RequestTooLarge(f"an answer of {count} bytes; at most {limit} are given", limit=limit)
        frame = frames.decode(request.body, max_bytes=limit)
        body = frames.encode(Frame({"echo": np.zeros(count, np.uint8)}, request=frame.request))
        return Response(body, content_type=frames.CONTENT_TYPE)

    def _admit(self, request: FunctionRequest) -> None:
        """Refuse a request without this function's token, unless its caller has the role `profile`.

        Raises:
            ProfilingOff: this function has no token.
            ProfilingRefused: the request has none, or a different token.
        """
        grant = ADMITTED.get()
        if grant is not None and grant.is_authenticated and grant.caller.has(Role.PROFILE):
            return
        try:
            with Path(self._settings.secrets_dir, SECRET).open("rb") as f:
                token = f.read(_MAX_TOKEN_BYTES).strip()
        except OSError:
            token = b""
        if not token:
            raise ProfilingOff(
                f"profiling is off: this function has no secret {SECRET}",
                secret=SECRET,
                hint=f"faas-cli secret create {SECRET} --from-file=token.txt, name it in the function's secrets and"
                " deploy; docs/reference/profile.md",
            )
        scheme, _, presented = request.headers.get("Authorization", "").partition(" ")
        # Digests have one length, so that the comparison does not reveal the token's.
        is_equal = hmac.compare_digest(*(hashlib.sha256(t).digest() for t in (token, presented.strip().encode())))
        if scheme.lower() != "bearer" or not is_equal:
            raise ProfilingRefused(
                "the bearer token is not this function's" if presented else "a bearer token is needed",
                hint=f"send Authorization: Bearer and what the secret {SECRET} holds",
            )

    def _decoded(self, request: FunctionRequest) -> Frame:
        with request.memory.scope():  # decoding is repeated to be timed, and each time reserves memory
            return self._decode(request)

    def _run(
        self, frame: Frame, warmup: int, runs: int, until: Deadline, deadline: Deadline
    ) -> tuple[list[float], Mapping[str, Any], float]:
        """Seconds of each run, as many as end before `until`; the outputs; seconds of loading."""
        times: list[float] = []
        load_s = 0.0
        while True:
            ran = self._store.run(frame.bundle, frame.segment, frame.tensors, deadline)
            load_s += ran.load_s
            # Runs vary: one that takes half as long again still ends in time.
            is_late = until.remaining() < 1.5 * ran.run_s
            if warmup > 0 and not is_late:
                warmup -= 1
                continue
            times.append(ran.run_s)
            if is_late or len(times) == runs:
                return times, ran.outputs, load_s

    def _observe(self, frame: Frame, deadline: Deadline, runs: int, nodes: bool) -> dict[str, Any]:
        """Memory and node times from the runtime's profiler; empty where the deadline is too near."""
        try:
            observed = self._store.profile(frame.bundle, frame.segment, frame.tensors, deadline, max_runs=runs)
        except DeadlineExceeded:
            return {}
        memory = observed.memory
        doc: dict[str, Any] = {
            "memory": {
                "weights_bytes": memory.weights_bytes,
                "packed_bytes": memory.packed_bytes,
                "activation_bytes": memory.activation_bytes,
                "arena_bytes": memory.arena_bytes,
            }
        }
        return doc | {"nodes": _nodes(observed)} if nodes else doc


def _nodes(observed: KernelProfile) -> dict[str, Any]:
    return {
        "runs": observed.runs,
        "kernels": [[k.name, k.op, k.seconds] for k in observed.kernels],
        "graph": base64.b64encode(zlib.compress(observed.graph)).decode(),
    }


def _quartiles(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"low_s": low, "median_s": median, "high_s": high}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Median seconds of `_CODING_TRIES` calls, and the result."""
    times, result = [], None
    for _ in range(_CODING_TRIES):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def _whole(query: Mapping[str, str], name: str, default: int, minimum: int, maximum: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 16 and minimum <= int(text) <= maximum):
        raise RequestMalformed(
            f"{name} is {text[:40]!r}; it is a whole number from {minimum} to {maximum}", parameter=name
        )
    return int(text)


def _json(doc: Mapping[str, Any]) -> Response:
    return Response(json.dumps(doc), mimetype="application/json")
