"""A calibrated model behind sockets, hops that do other things than answer, and routes that take closer looks."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Response
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.choice import Look
from isthmus.artifacts.fidelity import TOP1, Measure
from isthmus.codecs import Encoding
from isthmus.codecs.transform.table import PlaneTable
from isthmus.context import Context, Deadline
from isthmus.pipeline import HttpHop, LocalHop, LookPolicy, Result, Route, agreement, execute, plan_route
from isthmus.runtime.store import SegmentStore
from isthmus.serving import create_segment_app
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus_tools.calibration.transforms import learn_planes
from support.bundles import Published, cache_of, publish_photos, segment_settings, served
from support.patience import LONG_S

ALWAYS, NEVER = math.inf, 1e-9
CALIBRATED, PLAIN = "transform/4", "sparse/2"
COARSE, FINE = 0.2, 0.4
FINER = (0.4, 0.6, 0.8)
Wsgi = Callable[..., Any]


@dataclass
class Gate:
    """A function behind a socket, and what it does with its calls instead of answering, first to last."""

    app: Wsgi
    instead: list[Callable[[Gate, dict[str, Any]], Response | None]] = field(default_factory=list)
    calls: int = 0
    url: str = ""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if (environ["REQUEST_METHOD"], environ["PATH_INFO"]) == ("POST", "/"):
            self.calls += 1
            act = self.instead.pop(0) if self.instead else None
            if act is not None and (answer := act(self, environ)) is not None:
                return answer(environ, start_response)
        return self.app(environ, start_response)

    def then(self, *acts: Callable[[Gate, dict[str, Any]], Response | None]) -> None:
        """Do that with the next calls."""
        self.instead, self.calls = list(acts), 0


def answers(gate: Gate, environ: dict[str, Any]) -> None:
    """Let the function answer."""


def refuses(gate: Gate, environ: dict[str, Any]) -> Response:
    return Response("busy", 503, {"Retry-After": "30"})


def slowly(gate: Gate, environ: dict[str, Any]) -> None:
    time.sleep(0.8)


def breaks_off(gate: Gate, environ: dict[str, Any]) -> Response:
    """Answer to nobody: the call has arrived, and its answer has not."""
    list(gate.app(environ, lambda status, headers: None))
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return Response()


def with_tables(published: Published, folder: Path, tables: Mapping[str, PlaneTable]) -> Published:
    """The next version, calibrated: with these tables for its tensors."""
    blobs, files = {}, {}
    for name, table in tables.items():
        data = frames.encode(Frame(table.to_arrays()))
        blobs[name] = Blob(digest_of(data), len(data))
        files[blobs[name].digest] = folder / f"{name}.table"
        files[blobs[name].digest].write_bytes(data)
    bundle = structs.replace(published.bundle, tables=blobs)
    version = published.registry.publish(bundle, files, alias="prod")
    return replace(published, bundle=bundle, version=version.version, digest=version.digest)


def input_of(seed: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((1, 3, 8, 8)).astype(np.float32)}


@dataclass(frozen=True)
class Known:
    """A calibrated model, and the tables of what crosses its cuts."""

    published: Published
    tables: Mapping[str, PlaneTable]

    @property
    def inputs(self) -> dict[str, Array]:
        return self.published.inputs


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("photos")
    photos = publish_photos(folder)
    hop = LocalHop(SegmentStore(cache_of(photos, folder), segment_settings(photos, folder)))
    route = plan_route(photos.digest, photos.bundle, (hop,), ("1", "6"))
    seen: dict[str, list[Array]] = {"r1": [], "p6": []}
    for seed in range(100, 180):
        values = execute(route, input_of(seed), context()).tensors
        for name, samples in seen.items():
            samples.append(np.array(values[name]))
    tables = {name: learn_planes(samples) for name, samples in seen.items()}
    return Known(with_tables(photos, folder, tables), tables)


@pytest.fixture(scope="module")
def photos(known: Known) -> Published:
    return known.published


@pytest.fixture(scope="module")
def new_tail(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Wsgi]:
    """A function that has just started."""
    return lambda: create_segment_app(segment_settings(photos, tmp_path_factory.mktemp("tail")))


@pytest.fixture(scope="module")
def tail_of_all(new_tail: Callable[[], Wsgi]) -> Iterator[Gate]:
    gate = Gate(new_tail())
    with served(gate) as gate.url:
        yield gate


@pytest.fixture
def tail(tail_of_all: Gate) -> Gate:
    tail_of_all.then()
    return tail_of_all


@pytest.fixture(scope="module")
def head(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> LocalHop:
    folder = tmp_path_factory.mktemp("head")
    return LocalHop(SegmentStore(cache_of(photos, folder), segment_settings(photos, folder)))


@pytest.fixture
def remote() -> Iterator[Callable[[str], HttpHop]]:
    made: list[HttpHop] = []

    def to(url: str) -> HttpHop:
        made.append(HttpHop(url, attempts=3, connect_timeout_s=1, max_reply_bytes=2**20))
        return made[-1]

    yield to
    for hop in made:
        hop.close()


def looks(margin: float, *qualities: float) -> LookPolicy:
    return LookPolicy(
        tuple(Look(q, margin) for q in qualities or (FINE,)), partial(agreement.margin, Measure(TOP1, "logits"))
    )


def split(
    known: Known,
    hops: tuple[Any, ...],
    wanted: LookPolicy,
    cuts: tuple[str, ...] = ("6",),
    qualities: Mapping[str, float] = {"p6": COARSE},
    codec: str = CALIBRATED,
) -> Route:
    """A route through `cuts`, those of its tensors packed at these qualities, with closer looks."""
    route = plan_route(known.published.digest, known.published.bundle, hops, cuts)
    encodings = tuple(
        {s.name: Encoding(codec, qualities[s.name], known.tables.get(s.name)) for s in g.inputs if s.name in qualities}
        for g in route.segments
    )
    return replace(route, encodings=encodings, looks=wanted)


def context(seconds: float = LONG_S) -> Context:
    return Context(Deadline.after(seconds), "call-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")


def same_bits(one: Result, other: Result) -> bool:
    return all(array.tobytes() == other.outputs[name].tobytes() for name, array in one.outputs.items())


def once(route: Route, inputs: Mapping[str, Array], quality: float = 0.0) -> Result:
    """The answer where all is sent at that quality at least, and no look taken."""
    return execute(replace(route.finer(quality), looks=None), inputs, context())
