"""The profiling route of a segment function: what a segment takes on this device, for those who hold the token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.codecs import Tables
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, ProfilingOff, ProfilingRefused, RequestMalformed, RequestTooLarge
from isthmus.runtime.codec_speed import speeds
from isthmus.runtime.kernels import Observed
from isthmus.runtime.store import SegmentStore
from isthmus.serving.app import FunctionApp
from isthmus.serving.intake import accept, decoding
from isthmus.serving.memory import Turns
from isthmus.serving.work import Reply, Work
from isthmus.settings import SegmentSettings
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame

SECRET = "profile-token"  # noqa: S105
FORMAT = "isthmus.measurement/1"
RUNS, MAX_RUNS = 15, 500
WARMUP, MAX_WARMUP = 2, 50
_CODING_TRIES = 3
_MAX_TOKEN_BYTES = 4096
_OF_THE_TIME = {False: 0.9, True: 0.5}
"""The share of the deadline that plain runs may take, without and with an observation after them."""


class Profiling:
    """`POST /profile` and `POST /profile/echo`. Each call needs the secret `profile-token` as its bearer token."""

    def __init__(self, store: SegmentStore, settings: SegmentSettings, tables: Tables, turns: Turns) -> None:
        self._store, self._settings, self._tables, self._turns = store, settings, tables, turns

    def serve_on(self, app: FunctionApp) -> None:
        """Add both routes."""
        app.work("/profile", self.measure, "profile")
        app.work("/profile/echo", self.echo, "profile_echo")

    def measure(self, work: Work) -> Reply:
        """Run the segment that the frame names on its tensors, warmed up and one after the other; an empty body only
        asks what device this is, and with `codecs` how fast it packs.

        Raises:
            ProfilingOff, ProfilingRefused: see `_admit`.
            RequestMalformed: a query that is none, or a frame that names no bundle.
            And what running a segment raises.
        """
        self._admit(work)
        runs = _whole(work.query, "runs", RUNS, 1, MAX_RUNS)
        warmup = _whole(work.query, "warmup", WARMUP, 0, MAX_WARMUP)
        nodes = bool(_whole(work.query, "nodes", 0, 0, 1))
        memory = bool(_whole(work.query, "memory", 1, 0, 1)) or nodes
        codecs = bool(_whole(work.query, "codecs", 0, 0, 1))
        doc: dict[str, Any] = {"format": FORMAT, "device": self._store.device.document()}
        if codecs:
            doc["codecs"] = {name: asdict(s) for name, s in speeds(work.context.deadline.remaining() / 4).items()}
        if not work.body:
            return _json(doc)
        decode_s, frame = _timed(lambda: self._decode(work))
        deadline = work.context.deadline
        until = Deadline.after(deadline.remaining() * _OF_THE_TIME[memory])
        times, outputs, load_s = self._run(frame, warmup, runs, until, deadline)
        encode_s, answer = _timed(lambda: frames.encode(Frame(outputs, frame.bundle, frame.segment)))
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
            "answer_bytes": len(answer),
            "memory": None,
            "nodes": None,
        }
        if memory:
            doc |= self._observe(frame, deadline, runs if nodes else 2, nodes)
        return _json(doc)

    def echo(self, work: Work) -> Reply:
        """Unpack the frame, run nothing, and answer with one of `bytes` zero bytes: what a call costs by itself.

        Raises:
            As `measure`; RequestTooLarge: more bytes than a request may have.
        """
        self._admit(work)
        limit = self._settings.max_request_bytes
        count = _whole(work.query, "bytes", 0, 0, 2**40)
        if count > limit:
            raise RequestTooLarge(f"an answer of {count} bytes; at most {limit} are given", limit=limit)
        frame = frames.decode(work.body, max_bytes=limit)
        body = frames.encode(Frame({"echo": np.zeros(count, np.uint8)}, request=frame.request))
        return Reply(body, {"Content-Type": frames.CONTENT_TYPE})

    def _admit(self, work: Work) -> None:
        """Let only those pass who hold the token.

        Raises:
            ProfilingOff: this function has no token; ProfilingRefused: the caller has not this one.
        """
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
                " deploy; docs/profile.md",
            )
        kind, _, given = work.headers.get("Authorization", "").partition(" ")
        # Digests have one length, so that the comparison tells nothing about the token's.
        same = hmac.compare_digest(*(hashlib.sha256(t).digest() for t in (token, given.strip().encode())))
        if kind.lower() != "bearer" or not same:
            raise ProfilingRefused(
                "the bearer token is not this function's" if given else "a bearer token is needed",
                hint=f"send Authorization: Bearer and what the secret {SECRET} holds",
            )

    def _decode(self, work: Work) -> Frame:
        with work.memory.scope():  # it is decoded several times, to be timed
            return frames.decode(
                work.body,
                max_bytes=self._settings.max_request_bytes,
                tables=self._tables,
                accept=partial(accept, self._store, work),
                during=partial(decoding, self._turns, work),
            )

    def _run(
        self, frame: Frame, warmup: int, runs: int, until: Deadline, deadline: Deadline
    ) -> tuple[list[float], Mapping[str, Any], float]:
        """The seconds of each run, one at least and as many as end before `until`; the outputs; those of loading."""
        times: list[float] = []
        load_s = 0.0
        while True:
            ran = self._store.run(frame.bundle, frame.segment, frame.tensors, deadline)
            load_s += ran.load_s
            late = until.remaining() < 1.5 * ran.run_s
            if warmup > 0 and not late:
                warmup -= 1
                continue
            times.append(ran.run_s)
            if late or len(times) == runs:
                return times, ran.outputs, load_s

    def _observe(self, frame: Frame, deadline: Deadline, runs: int, nodes: bool) -> dict[str, Any]:
        """What the runtime's own profiler says; nothing of it where the deadline is too near."""
        try:
            seen = self._store.observe(frame.bundle, frame.segment, frame.tensors, deadline, most_runs=runs)
        except DeadlineExceeded:
            return {}
        memory = seen.memory
        found: dict[str, Any] = {
            "memory": {
                "weights_bytes": memory.weights_bytes,
                "packed_bytes": memory.packed_bytes,
                "activation_bytes": memory.activation_bytes,
                "arena_bytes": memory.arena_bytes,
            }
        }
        return found | {"nodes": _nodes(seen)} if nodes else found


def _nodes(seen: Observed) -> dict[str, Any]:
    return {
        "runs": seen.runs,
        "kernels": [[k.name, k.op, k.seconds] for k in seen.kernels],
        "graph": base64.b64encode(zlib.compress(seen.graph)).decode(),
    }


def _quartiles(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"low_s": low, "median_s": median, "high_s": high}


def _timed(do: Callable[[], Any]) -> tuple[float, Any]:
    """The median seconds of some tries, and the last one's result."""
    times, result = [], None
    for _ in range(_CODING_TRIES):
        start = time.perf_counter()
        result = do()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def _whole(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 16 and least <= int(text) <= most):
        raise RequestMalformed(f"{name} is {text[:40]!r}; it is a whole number from {least} to {most}", parameter=name)
    return int(text)


def _json(doc: Mapping[str, Any]) -> Reply:
    return Reply(json.dumps(doc).encode(), {"Content-Type": "application/json"})
