"""The demo's requests: each photo each way, once directly for its prediction, then over the link for its times."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate
from isthmus.context import Context
from isthmus.pipeline import HttpHop, Result, execute, photo_input, planned_route
from isthmus.processing.image import model_input
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus.registry import Registry, Resolved
from isthmus.runtime.tables import Tables
from isthmus_tools.netem.process import link_to
from isthmus_tools.planner.inputs import TrialInput
from isthmus_tools.planner.measurement import requester
from isthmus_tools.progress import Progress
from isthmus_tools.usecases.demo_verdict import TimedRequest
from isthmus_tools.usecases.functions import FunctionUrls

_LONGEST_S = 120.0
_ATTEMPTS, _CONNECT_S, _MAX_REPLY_BYTES = 3, 5.0, 2**26


def send_photos(
    registry: Registry,
    model: Resolved,
    candidates: Mapping[str, Candidate],
    photos: Mapping[str, bytes],
    functions: FunctionUrls,
    link: Conditions,
    *,
    repeat: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, Result]], dict[str, list[TimedRequest]]]:
    """The result of each photo each way, and the requests that were timed over the link, `repeat` for each photo.

    Raises:
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    tables = Tables(registry.bundle, registry.blob, MAX_PIXELS)
    with ExitStack() as resources:
        tail = functions.tail
        if not link.adds_nothing:
            shape = {"uplink_bps": link.up_bps, "downlink_bps": link.down_bps, "rtt_s": link.rtt_s}
            tail = resources.enter_context(link_to(tail, **shape))

        def hop(url: str) -> HttpHop:
            one = HttpHop(url, attempts=_ATTEMPTS, connect_timeout_s=_CONNECT_S, max_reply_bytes=_MAX_REPLY_BYTES)
            return resources.enter_context(closing(one))

        head_hop, direct, linked = (hop(url) for url in (functions.head, functions.tail, tail))
        predicted: dict[str, dict[str, Result]] = {}
        for what, candidate in candidates.items():
            progress(f"loading what serves {what}")
            route = planned_route(candidate, model.digest, model.bundle, (head_hop, direct), tables, registry.bundle)
            encoded = photo_input(candidate, model.bundle, (head_hop, direct))
            predicted[what] = {
                name: execute(
                    route,
                    {} if encoded else model_input(model.bundle, photo),
                    Context.from_headers({}, longest_s=_LONGEST_S),
                    encoded.encode(photo) if encoded else None,
                )
                for name, photo in photos.items()
            }
        runs = {
            (what, name): requester(
                candidate,
                model.digest,
                model.bundle,
                (head_hop, linked),
                [TrialInput(model_input(model.bundle, photo), photo)],
                tables,
                registry.bundle,
                functions.edge,
            )
            for what, candidate in candidates.items()
            for name, photo in photos.items()
        }
        # A new connection's first bytes wait for a further round trip, and the router keeps connections.
        runs[list(candidates)[-1], next(iter(photos))](0)
        timed = _timed(runs, repeat, progress)
    return predicted, timed


def _timed(runs: Mapping[tuple[str, str], Any], repeat: int, progress: Progress) -> dict[str, list[TimedRequest]]:
    """Every photo each way, `repeat` times, in random order: slow drifts of the machine hit all ways alike."""
    rng, rows = random.Random(0), dict[str, list[TimedRequest]]()  # noqa: S311 - an order of requests, no secret
    order = list(runs)
    for n in range(repeat):
        rng.shuffle(order)
        for i, (what, name) in enumerate(order):
            progress("sending the photos each way", n * len(order) + i, repeat * len(order))
            s = runs[what, name](n)
            edge_s = s["preprocess"] + s["pack"] + s.get("edge", 0.0)
            cloud_s = s.get("cloud_run", 0.0)
            parts = (s["total"], edge_s, s["total"] - edge_s - cloud_s, cloud_s)
            rows.setdefault(what, []).append(TimedRequest(name, *(1000 * part for part in parts)))
    return rows
