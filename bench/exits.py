"""Early exits over a link, beside edge-only, cloud-only with the compressed input, and the split without exits.

Three networks with labels, an edge of a quarter of this CPU, links of 1 and 10 Mbit/s with a round trip of 20 ms.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from exit_networks import REGISTRY, RISK, SETTINGS, TASKS, ExitNetwork, Labelled, prepared
from functions import Process, stage_functions
from harness import STATE, Report, Row, arguments, at_least, at_most
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.choice import PHOTO_ID
from isthmus.artifacts.plan import Candidate, Coding, Terms
from isthmus.context import Context
from isthmus.pipeline import HopReply, HttpHop, LocalHop, Result, Route, execute, photo_input, planned_route
from isthmus.processing.image import sample_input
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus.registry import open_cache, open_registry
from isthmus.runtime.store import SegmentStore
from isthmus.runtime.tables import Tables
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Frame
from isthmus_tools.learning.exits.threshold import choose_threshold
from isthmus_tools.netem.process import link_to
from isthmus_tools.profiling.slow_edge import EdgeWork, SlowEdge

SLOWDOWN = 4.0
RATES, ROUND_TRIP = (1e6, 10e6), 0.02
# Of the codecs without calibration the one that plans take most often.
CODEC = "int8/1"
# Half of the requests choose, as a plan does, the other half are reported.
REQUESTS, QUICK_REQUESTS, TRIES = 80, 30, 2
SPLITS, HOLDING = 100, 95
WORSE, BETTER, SAVING, LOST = 1.03, 1.5, 2.5, 0.005
MAX_SAVING = 1000.0
EDGE_ONLY, CLOUD_ONLY = "edge-only", "cloud-only"
LONGEST_S = 60.0


class WaitingHop:
    """A hop to the cloud, and the seconds that this thread only waited for it: link, cloud, and no CPU of the edge."""

    def __init__(self, inner: HttpHop) -> None:
        self._inner, self.name, self.encodes = inner, inner.name, inner.encodes
        self.waited_s = 0.0

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`."""
        start, cpu = time.perf_counter(), time.thread_time()
        try:
            return self._inner.call(frame, context)
        finally:
            self.waited_s += time.perf_counter() - start - (time.thread_time() - cpu)

    def close(self) -> None:
        """Close the connections."""
        self._inner.close()


@dataclass(frozen=True)
class Way:
    """A way to serve: its route, and whether the cloud gets the photo's file."""

    name: str
    route: Route
    candidate: Candidate


@dataclass(frozen=True)
class Cost:
    """A request: latency with the edge's CPU time multiplied, CPU seconds at full speed of edge and cloud, bytes."""

    seconds: float
    edge_s: float
    cloud_s: float
    bytes: int
    exits: bool


@dataclass(frozen=True)
class Cell:
    """A network on a link: the requests of each way, and the way chosen by the first half of these."""

    network: str
    rate: float
    costs: Mapping[str, Sequence[Cost]]

    @property
    def chosen(self) -> str:
        """The fastest way over the requests that choose."""
        return min(self.costs, key=lambda way: statistics.fmean(c.seconds for c in self.costs[way][::2]))

    def reported(self, way: str) -> Sequence[Cost]:
        """The requests that report."""
        return self.costs[way][1::2]

    def seconds(self, way: str) -> float:
        """Mean latency over the requests that report."""
        return statistics.fmean(c.seconds for c in self.reported(way))

    @property
    def gain(self) -> float:
        """The better baseline's time over that of the chosen way."""
        return min(self.seconds(EDGE_ONLY), self.seconds(CLOUD_ONLY)) / self.seconds(self.chosen)

    def cloud_saving(self, way: str) -> float:
        """Cloud-only's CPU time in the cloud over that of a way."""
        cloud = statistics.fmean(c.cloud_s for c in self.reported(CLOUD_ONLY))
        own = statistics.fmean(c.cloud_s for c in self.reported(way))
        # Where every reported request exits, nothing is left to divide by.
        return min(MAX_SAVING, cloud / own) if own else MAX_SAVING


@dataclass(frozen=True)
class Outcomes:
    """Classes of the model and of an exit, and the exit's confidence, by input."""

    labels: Array
    model: Array
    exit: Array
    confidence: Array

    def gated(self, threshold: float) -> tuple[float, float]:
        """The gated pair's accuracy, and the share that exits."""
        taken = self.confidence >= threshold
        return float((np.where(taken, self.exit, self.model) == self.labels).mean()), float(taken.mean())

    def failing(self) -> Array:
        """Inputs that would count as risk if these exited."""
        return RISK.failures(self.exit, self.model, self.labels)

    def holding(self) -> tuple[int, int]:
        """Of SPLITS random halves: those with a threshold, and those whose other half keeps the limit."""
        rng, fails = np.random.default_rng(0), self.failing()
        able = holding = 0
        for _ in range(SPLITS):
            order = rng.permutation(len(fails))
            choosing, judging = order[: len(order) // 2], order[len(order) // 2 :]
            found = choose_threshold(self.confidence[choosing], fails[choosing], RISK.limit, RISK.confidence)
            able += found is not None
            exits = np.zeros(len(judging), bool) if found is None else self.confidence[judging] >= found.threshold
            holding += float((exits & fails[judging]).mean()) <= RISK.limit
        return able, holding


def main() -> None:
    report = arguments("exits", __doc__, ["numpy", "onnxruntime", "scikit-learn", "torch"], models=tuple(TASKS))
    names = list(report.models or TASKS)
    cells: list[Cell] = []
    accuracies: list[Row] = []
    for name in names:
        network = prepared(TASKS[name], report)
        report.say(f"{name}: predicting {len(network.test.labels)} test inputs and as many held-out ones as there are")
        best, rows = accuracy(network, report)
        accuracies += rows
        cells += measured(network, best, report)
    report.add(f"accuracy on test inputs; risk: {RISK.kind}, at most {RISK.limit:.1%} of all requests", accuracies)
    report.add(f"a request, mean; edge {SLOWDOWN:g} times slower, {ROUND_TRIP * 1e3:g} ms round trip", table(cells))
    report.add("what a plan takes by half of the requests, on the other half", [verdict(cell) for cell in cells])
    add_goals(report, cells)
    report.emit()


def accuracy(network: ExitNetwork, report: Report) -> tuple[str, list[Row]]:
    """A row for each exit, goals for the one that most inputs take, and its cut."""
    rows: list[Row] = []
    outcomes = {each.cut: outcomes_of(network, each.cut) for each in network.bundle.exits}
    best, best_share = "", -1.0
    for each in network.bundle.exits:
        gate = each.gate
        assert gate is not None
        held_out, test = outcomes[each.cut]
        gated, share = test.gated(gate.threshold)
        full = float((test.model == test.labels).mean())
        rows.append(
            {
                "network": network.task.about,
                "cut": each.cut,
                "MACs_before": network.bundle.cuts[each.cut].macs_before,
                "full_model": full,
                "exit_alone": float((test.exit == test.labels).mean()),
                "gated_pair": gated,
                "exits": share,
                "held_out_exits": gate.share,
                "bound": gate.bound,
                "risk": float(((test.confidence >= gate.threshold) & test.failing()).mean()),
            }
        )
        if share > best_share:
            best, best_share = each.cut, share
    held_out, test = outcomes[best]
    gate = next(each.gate for each in network.bundle.exits if each.cut == best)
    assert gate is not None
    gated, share = test.gated(gate.threshold)
    lost = float((test.model == test.labels).mean()) - gated
    pool = Outcomes(*(np.concatenate([getattr(o, f) for o in (held_out, test)]) for f in Outcomes.__annotations__))
    able, holding = pool.holding()
    name = network.task.name
    report.goals += [
        at_most(f"{name}: accuracy lost by the gate", lost, LOST),
        at_least(f"{name}: share that exits", share, network.task.least_share),
        at_least(f"{name}: splits of {SPLITS} whose limit holds ({able} with an exit)", holding, HOLDING),
    ]
    return best, rows


def outcomes_of(network: ExitNetwork, cut: str) -> tuple[Outcomes, Outcomes]:
    """The outcomes on held-out and test inputs, kept for the bundle's digest."""
    parts = []
    with local_hop() as hop:
        route = split(network, cut, (hop, hop), exits=True).route
        for name, data in (("held-out", network.held_out), ("test", network.test)):
            model = kept(network, name, lambda data=data: full_classes(network, route, data))
            early = kept(network, f"{name}-{cut}", lambda data=data: exit_classes(route, data))
            parts.append(Outcomes(data.labels, model["classes"], early["classes"], early["confidence"]))
    return parts[0], parts[1]


def kept(network: ExitNetwork, name: str, predict: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """Predictions, kept between runs."""
    path = STATE / "exits-outcomes" / f"{network.model.digest[7:23]}-{name}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **predict())
    with np.load(path) as loaded:
        return dict(loaded)


def full_classes(network: ExitNetwork, route: Route, data: Labelled) -> dict[str, Array]:
    """The classes of the whole model."""
    output, full = network.bundle.outputs[0].name, route.full()
    rows = range(len(data.labels))
    return {"classes": np.array([run(full, data.row(index)).outputs[output].argmax() for index in rows])}


def exit_classes(route: Route, data: Labelled) -> dict[str, Array]:
    """The exit's classes and confidences, with a gate that every input passes."""
    assert route.exit is not None
    gate = structs.replace(route.exit.gate, threshold=-1e30)
    always = replace(route, exit=replace(route.exit, gate=gate))
    outcomes = [run(always, data.row(index)).exit for index in range(len(data.labels))]
    return {
        "classes": np.array([each.scores.argmax() for each in outcomes if each is not None]),
        "confidence": np.array([each.confidence for each in outcomes if each is not None]),
    }


def run(route: Route, arrays: Mapping[str, Array], photo: object = None) -> Result:
    """One request."""
    return execute(route, arrays, Context.from_headers({}, longest_s=LONGEST_S), photo)  # type: ignore[arg-type]


def split(network: ExitNetwork, cut: str, hops: tuple[LocalHop | WaitingHop, ...], *, exits: bool) -> Way:
    """The split at a cut, with its exit or without."""
    codecs = {t.name: Coding(CODEC) for t in network.bundle.cuts[cut].tensors if t.dtype == "float32"}
    candidate = Candidate(f"split-{cut}", "split", Terms(), cuts=(cut,), codecs=codecs)
    found = way(network, candidate.name, candidate, hops)
    return Way(f"exit-{cut}", found.route.with_exit(), candidate) if exits else found


def way(network: ExitNetwork, name: str, candidate: Candidate, hops: tuple[LocalHop | WaitingHop, ...]) -> Way:
    """A candidate's route."""
    registry = open_registry(SETTINGS)
    tables = Tables(registry.bundle, registry.blob, MAX_PIXELS)
    return Way(
        name,
        planned_route(candidate, network.model.digest, network.bundle, hops, tables, registry.bundle),
        candidate,
    )


@contextlib.contextmanager
def local_hop() -> Iterator[LocalHop]:
    """Segments in this process, on one thread: the edge, whose CPU time is this thread's."""
    settings = SegmentSettings(**vars(SETTINGS), threads=1)
    yield LocalHop(SegmentStore(open_cache(settings, open_registry(SETTINGS)), settings))


def measured(network: ExitNetwork, best: str, report: Report) -> list[Cell]:
    """Every way over each link, input by input and way by way."""
    cells = []
    count = min(len(network.test.labels), QUICK_REQUESTS if report.quick else REQUESTS)
    with contextlib.ExitStack() as resources:
        edge = resources.enter_context(local_hop())
        cloud = resources.enter_context(cloud_function(network.task.name))
        for rate in RATES:
            report.say(f"{network.task.name}: {count} requests each way at {rate / 1e6:g} Mbit/s")
            url = resources.enter_context(link_to(cloud.url, uplink_bps=rate, downlink_bps=rate, rtt_s=ROUND_TRIP))
            hop = WaitingHop(HttpHop(url, attempts=2, connect_timeout_s=5.0, max_reply_bytes=2**26))
            resources.callback(hop.close)
            hops = (edge, hop)
            ways = [
                way(network, EDGE_ONLY, Candidate(EDGE_ONLY, "edge", Terms()), hops),
                way(network, CLOUD_ONLY, compressed(network), hops),
                split(network, best, hops, exits=False),
                *(split(network, each.cut, hops, exits=True) for each in network.bundle.exits),
            ]
            cells.append(Cell(network.task.name, rate, costs_of(network, ways, cloud, (edge, hop), count)))
    return cells


@contextlib.contextmanager
def cloud_function(model: str) -> Iterator[Process]:
    """The tail's function, one thread, ready."""
    staged = stage_functions("cloud-tail", registry=REGISTRY, model=model)["cloud-tail"]
    with staged.start(threads="1", preload="", deadline_s="120", cache_dir=str(STATE / "exits-cloud")) as process:
        process.wait_ready()
        yield process


def compressed(network: ExitNetwork) -> Candidate:
    """Cloud-only with its input as small as it comes: the PNG itself, else the arrays without loss."""
    if network.test.files and network.task.preprocess is not None:
        name = network.bundle.inputs[0].name
        return Candidate(CLOUD_ONLY, "cloud", Terms(), codecs={name: Coding(PHOTO_ID)}, input="photo")
    codecs = {spec.name: Coding("lossless/3") for spec in network.bundle.inputs}
    return Candidate(CLOUD_ONLY, "cloud", Terms(), codecs=codecs)


def costs_of(
    network: ExitNetwork, ways: Sequence[Way], cloud: Process, hops: tuple[LocalHop, WaitingHop], count: int
) -> dict[str, list[Cost]]:
    """The requests of each way, each input by all ways in turn."""
    requests = {each.name: requester(network, each, hops) for each in ways}
    work, hop = SlowEdge(1.0, [cloud.process.pid]).work, hops[1]
    costs: dict[str, list[Cost]] = {each.name: [] for each in ways}
    for each in ways:
        # Loads segments on both sides, and opens the connection; an input that exits would leave the tail out.
        run(each.route.full(), network.test.row(0))
        requests[each.name](0)
    for index in range(count):
        turn = index % len(ways)
        for each in (*ways[turn:], *ways[:turn]):
            tries = [timed(requests[each.name], index, work, hop) for _ in range(TRIES)]
            # Other work on the machine only adds.
            costs[each.name].append(min(tries, key=lambda cost: cost.seconds))
    return costs


def timed(request: Callable[[int], Result], index: int, work: Callable[[], EdgeWork], hop: WaitingHop) -> Cost:
    """One request: the CPU time of this thread, the edge, multiplied, and what it waited for link and cloud.

    Other work on the machine takes CPUs from this thread, and so no wall time of the edge's own work counts.
    """
    before, waited, cpu = work().function_s, hop.waited_s, time.thread_time()
    result = request(index)
    edge_s, waited_s = time.thread_time() - cpu, hop.waited_s - waited
    cost = work().function_s - before
    return Cost(SLOWDOWN * edge_s + waited_s, edge_s, cost, result.link_bytes, result.is_early)


def requester(network: ExitNetwork, each: Way, hops: tuple[LocalHop | WaitingHop, ...]) -> Callable[[int], Result]:
    """A function that serves one test input, from the photo's file on where there is one."""
    files, bundle = network.test.files, network.bundle
    encoded = photo_input(each.candidate, bundle, hops)
    if encoded is not None:
        return lambda index: run(each.route, {}, encoded.encode(files[index]))
    if bundle.preprocess is not None:
        return lambda index: run(each.route, sample_input(bundle, files[index]))
    return lambda index: run(each.route, network.test.row(index))


def table(cells: Sequence[Cell]) -> list[Row]:
    """A row for each way in each cell."""
    rows: list[Row] = []
    for cell in cells:
        for name in cell.costs:
            costs = cell.reported(name)
            rows.append(
                {
                    "network": cell.network,
                    "Mbit/s": cell.rate / 1e6,
                    "way": name,
                    "mean_ms": cell.seconds(name) * 1e3,
                    "p95_ms": float(np.quantile([c.seconds for c in costs], 0.95)) * 1e3,
                    "edge_cpu_ms": statistics.fmean(c.edge_s for c in costs) * 1e3 * SLOWDOWN,
                    "cloud_cpu_ms": statistics.fmean(c.cloud_s for c in costs) * 1e3,
                    "link_bytes": round(statistics.fmean(c.bytes for c in costs)),
                    "exits": statistics.fmean(c.exits for c in costs),
                }
            )
    return rows


def verdict(cell: Cell) -> Row:
    """The choice in a cell, and its gain."""
    exits = [name for name in cell.costs if name.startswith("exit-")]
    fastest = min(exits, key=cell.seconds)
    return {
        "network": cell.network,
        "Mbit/s": cell.rate / 1e6,
        "chosen": cell.chosen,
        "over_the_better_of_edge_and_cloud": cell.gain,
        "fastest_exit": fastest,
        "cloud_compute_less_by": cell.cloud_saving(fastest),
    }


def add_goals(report: Report, cells: Sequence[Cell]) -> None:
    """Goals over all cells."""
    fast = sum(cell.gain >= BETTER for cell in cells)
    exits = [min((n for n in c.costs if n.startswith("exit-")), key=c.seconds) for c in cells]
    saving = min(cell.cloud_saving(name) for cell, name in zip(cells, exits, strict=True))
    report.goals += [
        at_least(
            f"cells of {len(cells)} at least {BETTER:g} times faster than the better baseline", fast, len(cells) / 2
        ),
        at_most("the choice's time over the better baseline's, worst cell", max(1 / c.gain for c in cells), WORSE),
        at_least("cloud compute of cloud-only over that of the exit, worst cell", saving, SAVING),
    ]


if __name__ == "__main__":
    main()
