"""Overhead of a cut: three functions on a single machine beside the uncut model in a process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from functions import stage_functions
from harness import STATE, Report, Samples, add_stages, arguments, at_most, interleave, stage_medians
from models import MODEL, REGISTRY, import_model, inputs, photos, resolved, whole

from isthmus.arrays import Array
from isthmus.client import Client
from isthmus.errors import IsthmusError

# Largest allowed difference from the uncut model's logits, relative to the largest logit.
TOLERANCE = 1e-5

SHARE, MIN_MS = 0.10, 6.0
REQUESTS, AT_ONCE = 200, 16
DIFFERENT = 25


@dataclass(frozen=True)
class Load:
    """Result of many requests at once. Units: seconds."""

    seconds: float
    times: Samples
    lost: int
    wrong: int
    difference: float


def main() -> None:
    report = arguments("overhead", __doc__, ["flask", "numpy", "onnxruntime", "urllib3", "waitress"])
    report.say(f"importing {MODEL} if absent")
    import_model()
    uncut, photo = whole(), photos()[0]
    arrays = inputs(DIFFERENT)
    logits = uncut.model.bundle.outputs[0].name
    expected = [uncut.run(each).outputs[logits] for each in arrays]
    first = arrays[0]
    report.say("starting the functions")
    with three_functions() as (router, beside):
        report.say("asking both by turns")
        stages: dict[str, list[float]] = {}

        def tensor() -> None:
            add_stages(stages, router.infer(first, model=MODEL).server_timing)

        times = interleave(
            {
                "tensor uncut": lambda: uncut.run(first),
                "tensor cut": tensor,
                "tensor cut, head in the router": lambda: beside.infer(first, model=MODEL),
                "photo uncut": lambda: uncut.photo(photo, None, 60.0),
                "photo cut": lambda: router.photo(photo, model=MODEL),
                "photo cut, head in the router": lambda: beside.photo(photo, model=MODEL),
            },
            turns=8 if report.quick else 40,
            block=5,
            warm=2,
        )
        add_times(report, times)
        report.add("stages of a tensor by the router's Server-Timing, medians in ms", [stage_medians(stages)])
        report.say(f"{REQUESTS} requests, {AT_ONCE} at once")
        load = under_load(router, arrays, expected)
    report.add(
        f"{REQUESTS} requests, {AT_ONCE} at once",
        [
            {
                "lost": load.lost,
                "wrong": load.wrong,
                "largest_difference": f"{load.difference:.1e}",
                "answers_a_second": REQUESTS / load.seconds,
                "uncut_one_at_a_time_a_second": 1 / times["tensor uncut"].p50,
                "p50_ms": load.times.p50 * 1e3,
                "p95_ms": load.times.p95 * 1e3,
            }
        ],
    )
    report.goals += [at_most("lost under load", load.lost, 0), at_most("wrong under load", load.wrong, 0)]
    report.emit()


def add_times(report: Report, times: dict[str, Samples]) -> None:
    """A row for each kind of request and topology, and a goal for the three functions."""
    rows = []
    for kind in ("tensor", "photo"):
        uncut = times[f"{kind} uncut"]
        for way in ("uncut", "cut", "cut, head in the router"):
            samples = times[f"{kind} {way}"]
            rows.append(
                {
                    "request": kind,
                    "model": way,
                    "p50_ms": samples.p50 * 1e3,
                    "p95_ms": samples.p95 * 1e3,
                    "more_ms": (samples.p50 - uncut.p50) * 1e3,
                    "over_uncut": samples.over(uncut),
                }
            )
        more = (times[f"{kind} cut"].p50 - uncut.p50) * 1e3
        limit = max(MIN_MS, SHARE * uncut.p50 * 1e3)
        report.goals.append(at_most(f"{kind}: time added by the cut, functions and hops", more, limit, "ms"))
    bundle = resolved().bundle
    across = sum(bundle.cuts[name].bytes for name in bundle.default_cuts)
    report.add(
        f"a prediction of the uncut model and of the cut one, one thread each; boundary tensors of {across:,} bytes",
        rows,
    )


@contextlib.contextmanager
def three_functions() -> Iterator[tuple[Client, Client]]:
    """Clients of two routers on a thread each: the first calls edge-head and cloud-tail, the second runs the head."""
    staged = stage_functions("router", "edge-head", "cloud-tail", registry=REGISTRY, model=MODEL)
    shared = {"cache_dir": str(STATE / "overhead-cache"), "threads": "1"}
    with contextlib.ExitStack() as stack:
        head, tail = (stack.enter_context(staged[name].start(**shared)) for name in ("edge-head", "cloud-tail"))
        routers = [
            stack.enter_context(staged["router"].start(**shared, hops=f"{first},{tail.url}"))
            for first in (head.url, "local")
        ]
        for process in (head, tail, *routers):
            process.wait_ready()
        yield Client(routers[0].url), Client(routers[1].url)


def under_load(router: Client, arrays: list[dict[str, Array]], expected: list[Array]) -> Load:
    """Send REQUESTS, AT_ONCE at a time, and compare each prediction with the uncut model's."""

    def ask(i: int) -> tuple[float, float | None]:
        began = time.perf_counter()
        try:
            logits = next(iter(router.infer(arrays[i % len(arrays)], model=MODEL).outputs.values()))
        except IsthmusError:
            return time.perf_counter() - began, None
        uncut = expected[i % len(arrays)]
        return time.perf_counter() - began, float(np.abs(logits - uncut).max() / np.abs(uncut).max())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        began = time.perf_counter()
        responses = list(pool.map(ask, range(REQUESTS)))
        seconds = time.perf_counter() - began
    differences = [difference for _, difference in responses if difference is not None]
    return Load(
        seconds,
        Samples([elapsed for elapsed, _ in responses]),
        lost=REQUESTS - len(differences),
        wrong=sum(difference > TOLERANCE for difference in differences),
        difference=max(differences, default=float("nan")),
    )


if __name__ == "__main__":
    main()
