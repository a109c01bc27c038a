"""Resident memory of the router and its functions over many requests and changes of the route.

Blocks of a hundred requests are pinned to one candidate after the other, every sixth block is the router's choice on a
link that steps. The head's function has room for two heads of three, so that pins make it load and evict all the time.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from functions import Process, stage_functions
from harness import STATE, Row, arguments, at_least, at_most
from traffic import ClosedLoop, OpenLoop, Query, Traffic

from isthmus.artifacts.plan import Candidate, Sources, Terms
from isthmus.artifacts.segment_id import WHOLE
from isthmus_tools.netem import LinkShape, NetworkEmulator
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import Published, photo, publish_photos
from support.plans import candidate, plan_for

BLOCK, RATE = 100, 80.0
# Every sixth block takes the route of the one before or after, where the router prefers that.
BLOCKS, QUICK_BLOCKS = 250, 30
# At the start: more callers than a function's threads.
BURST, BURST_S = 48, 3.0
MIN_SWITCHES, QUICK_SWITCHES = 200, 20
# After the first thousand requests every route was taken, and every buffer is as large as it gets.
SETTLED = 10
MAX_GROWTH = 1.05
CUTS = ("6", "1", "3")
ROUTES = ("edge", "cloud", *(f"split-{cut}" for cut in CUTS))
LINKS = (LinkShape(rtt_s=0.001), LinkShape(rtt_s=0.02, uplink_bps=4e6, downlink_bps=4e6))
# Values of a series before and after are medians of so many blocks: the allocator returns memory by turns.
_MEDIAN_OF = 5


@dataclass(frozen=True)
class MemorySeries:
    """Resident bytes of a process after each block."""

    name: str
    process: psutil.Process
    bytes: list[int]

    def measure(self) -> None:
        """Add the present value."""
        self.bytes.append(self.process.memory_info().rss)

    def settled(self) -> float:
        """Bytes after the first blocks."""
        return statistics.median(self.bytes[SETTLED - 1 : SETTLED - 1 + _MEDIAN_OF])

    def growth(self) -> float:
        """The last bytes over the settled ones."""
        return statistics.median(self.bytes[-_MEDIAN_OF:]) / self.settled()


def publish(folder: Path) -> Published:
    """A small model for photos with a plan of five routes."""
    photos = publish_photos(folder)

    def route(name: str, kind: str, edge_s: float, cloud_s: float, **facts: Any) -> Candidate:
        terms = Terms(edge_run=edge_s, cloud_run=cloud_s, sources=Sources("measured", "measured"))
        return candidate(name, kind, edge_s + cloud_s, predicted=terms, **facts)

    # None is better than another in every resource, so that a router keeps them all.
    splits = [
        route(f"split-{cut}", "split", 0.001 * n, 0.004 - 0.001 * n, cuts=(cut,)) for n, cut in enumerate(CUTS, 1)
    ]
    candidates = (*splits, route("edge", "edge", 0.005, 0.0), route("cloud", "cloud", 0.0, 0.005))
    plan = plan_for(photos.bundle, splits[0], candidates=candidates)
    publish_plan(photos.registry, photos.bundle, {}, plan, alias="prod")
    return photos


def room_for_two_heads(photos: Published) -> int:
    """Bytes of the whole model and the largest head: less than all that the routes need of the first hop."""
    bundle = photos.bundle
    whole, *heads = (
        sum(tensor.length for tensor in bundle.weight_ranges(bundle.segment(segment)))
        for segment in (WHOLE, *(f"..{cut}" for cut in CUTS))
    )
    return whole + max(heads)


@contextlib.contextmanager
def functions(photos: Published) -> Iterator[tuple[Mapping[str, Process], NetworkEmulator]]:
    """Router, head and tail, with an emulated link before the tail."""
    staged = stage_functions("router", "edge-head", "cloud-tail", registry=photos.folder, model=photos.name)
    shared = {"threads": "1", "preload": ""}
    with contextlib.ExitStack() as stack:
        caches = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-")))

        def start(name: str, **more: str) -> Process:
            return stack.enter_context(staged[name].start(**shared, cache_dir=str(caches / name), **more))

        head, tail = start("edge-head", max_loaded_bytes=str(room_for_two_heads(photos))), start("cloud-tail")
        link = stack.enter_context(NetworkEmulator(tail.url, LINKS[0]))
        router = start("router", hops=f"{head.url},{link.url}", model=photos.name)
        processes = {"router": router, "head": head, "tail": tail}
        for process in processes.values():
            process.wait_ready()
        yield processes, link


def rows(series: Sequence[MemorySeries]) -> list[Row]:
    """Resident MB after every twentieth of the blocks."""
    count = len(series[0].bytes)
    at = sorted({SETTLED - 1, *range(count - 1, 0, -max(1, count // 10))})
    return [{"requests": (i + 1) * BLOCK, **{f"{s.name}_MB": s.bytes[i] / 1e6 for s in series}} for i in at]


def main() -> None:
    report = arguments("memory", __doc__, ["flask", "onnxruntime", "waitress"])
    blocks = QUICK_BLOCKS if report.quick else BLOCKS
    STATE.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        photos = publish(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-"))))
        traffic = stack.enter_context(Traffic())
        processes, link = stack.enter_context(functions(photos))
        query = Query(f"{processes['router'].url}/", photo(), {"Content-Type": "image/png"})
        series = [MemorySeries(name, psutil.Process(p.process.pid), []) for name, p in processes.items()]
        taken: list[str] = []
        pins, links = itertools.cycle((*ROUTES, "")), itertools.cycle(LINKS)
        lost = 0
        # Each thread of a function has buffers of its own, which a steady load fills by and by.
        traffic.run(ClosedLoop(BURST, BURST_S), [query])
        for block, pin in zip(range(blocks), pins, strict=False):
            report.say(f"block {block + 1} of {blocks}: {pin or 'the choice of the router'}")
            if not pin:
                link.set(next(links))
            pinned = query.with_headers(Isthmus_Route=pin) if pin else query
            outcome = traffic.run(OpenLoop(RATE, BLOCK / RATE, poisson=False), [pinned])
            lost += len(outcome.lost)
            taken += [e.route for e in outcome.answered.exchanges]
            for each in series:
                each.measure()
    switches = sum(a != b for a, b in itertools.pairwise(taken))
    report.add("Resident memory", rows(series))
    report.goals = [
        *(at_most(f"{s.name}, of its memory after 1,000 requests", s.growth(), MAX_GROWTH) for s in series),
        at_most("requests with neither an answer nor a refusal", lost, 0),
        at_least("changes of the route", switches, QUICK_SWITCHES if report.quick else MIN_SWITCHES),
    ]
    report.emit()


if __name__ == "__main__":
    main()
