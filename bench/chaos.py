"""Requests at a steady rate while the tail is killed, stopped, slowed, answers garbage or refuses, and its link fails.

Nine faults one after the other, each with calm before and after. Answers are compared with the routes' own, taken
before the first fault. The edge, at a seventh of a CPU, can answer alone; the best routes lead to the cloud.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptive import Site, plan_of, planned, site
from faults import Faults, faulty_front, wait_until
from harness import Report, Row, arguments, at_least, at_most
from traffic import ClosedLoop, Exchange, OpenLoop, Outcome, Query, Traffic

from isthmus.artifacts.conditions import Conditions
from isthmus_tools.netem import LinkShape
from isthmus_tools.zoo.photos import varied_photos

# The plan is the one of bench/capacity.py; over this link the cloud answers sooner than the edge.
PLANNED = Conditions(16e6, 16e6, 0.02)
LINK = LinkShape(50e6, 50e6, 0.005)
EDGE_SHARE, RATE, DEADLINE_S = 0.15, 4.5, 2.0
# Seconds of a fault and of the calm after it, full and quick: 2,000 requests and some 320.
FULL_S, QUICK_S = (15.0, 31.0), (2.5, 4.5)
PHOTOS = 6
# Routes to the cloud are back once they have this share of the requests that follow.
BACK_S, BACK_SHARE, BACK_OF = 3.0, 0.75, 8
# A killed tail starts anew on a busy machine.
RESTART_S = 8.0
MIN_REFUSED_OR_ANSWERED, MIN_ANSWERED = 0.999, 0.99


@dataclass(frozen=True)
class Fault:
    """A fault in mid-run. Units: seconds of `time.monotonic`; `ended` is when the tail was there again."""

    name: str
    began: float
    ended: float


@dataclass(frozen=True)
class Judged:
    """The exchanges around a fault."""

    fault: Fault
    before: Outcome
    during: Outcome
    after: Outcome

    @property
    def back_s(self) -> float:
        """Seconds from the fault's end to the request from which on routes to the cloud have their share."""
        leads = [not e.route.startswith("edge") for e in self.after.exchanges]
        for i, exchange in enumerate(self.after.exchanges):
            following = leads[i : i + BACK_OF]
            if leads[i] and sum(following) >= BACK_SHARE * len(following):
                return max(0.0, exchange.scheduled - self.fault.ended)
        return float("inf")


def main() -> None:
    report = arguments("chaos", __doc__, ["aiohttp", "flask", "onnxruntime", "waitress"])
    reference = planned([PLANNED], report)[PLANNED]
    with (
        faulty_front() as front,
        site(reference, LINK, share=EDGE_SHARE, hops=f"local,{front.url}") as running,
        Traffic(2) as traffic,
    ):
        front.target = running.link.url
        photos = [path.read_bytes() for path in varied_photos()[:PHOTOS]]
        report.say("the routes' own answers")
        right = _answers(running, traffic, photos, [c.name for c in plan_of(reference).candidates if not c.refused])
        with contextlib.closing(Faults(running, front, reference)) as faults:
            outcome, taken = _storm(report, running, traffic, photos, faults)
    wrong = [e for e in outcome.answered.exchanges if e.answer not in right[e.query]]
    judged = _judge(outcome, taken)
    _add_faults(report, judged, right)
    _add_goals(report, outcome, judged, wrong)

    report.emit()


def _answers(running: Site, traffic: Traffic, photos: Sequence[bytes], routes: Sequence[str]) -> list[set[str]]:
    """The top classes that the exact routes give for each photo; with the warm-up of every route."""
    right = []
    for photo in photos:
        queries = [running.query(photo, Isthmus_Route=route) for route in routes]
        outcome = traffic.run(ClosedLoop(1, 0.2), queries)
        right.append({e.answer for e in outcome.answered.exchanges})
    return right


def _storm(
    report: Report, running: Site, traffic: Traffic, photos: Sequence[bytes], faults: Faults
) -> tuple[Outcome, list[Fault]]:
    fault_s, calm_s = QUICK_S if report.quick else FULL_S
    timeout = f"{DEADLINE_S:g}s"
    queries = [running.query(photo, X_Timeout=timeout) for photo in photos]
    warm: Query = queries[0]
    traffic.run(OpenLoop(RATE, 3.0, poisson=False), [warm])
    seconds = len(faults.all) * (fault_s + calm_s) + calm_s + RESTART_S
    running_load = traffic.start(OpenLoop(RATE, seconds, poisson=False), queries)
    at, taken = time.monotonic() + calm_s, []
    for name, fault in faults.all.items():
        wait_until(at)
        report.say(f"the tail is {name}" if not name.startswith("link") else f"the {name.replace(' ', ' is ')}")
        with fault():
            began = time.monotonic()
            wait_until(began + fault_s)
        ended = time.monotonic()
        taken.append(Fault(name, began, ended))
        at = ended + calm_s
    wait_until(at)
    return running_load.result(), taken


def _judge(outcome: Outcome, taken: Sequence[Fault]) -> list[Judged]:
    starts = [outcome.exchanges[0].scheduled, *(fault.ended for fault in taken[:-1])]
    ends = [*(fault.began for fault in taken[1:]), outcome.exchanges[-1].scheduled]
    return [
        Judged(
            fault,
            # The latest part of the calm: the fault before left its traces in the first.
            outcome.between(max(start, fault.began - 10.0), fault.began),
            outcome.between(fault.began, fault.ended),
            outcome.between(fault.ended, end),
        )
        for fault, start, end in zip(taken, starts, ends, strict=True)
    ]


def _add_faults(report: Report, judged: Sequence[Judged], right: Sequence[set[str]]) -> None:
    rows: list[Row] = []
    for each in judged:
        during = each.during
        rows.append(
            {
                "the tail": each.fault.name,
                "seconds": each.fault.ended - each.fault.began,
                "requests": len(during),
                "answered": len(during.answered),
                "refused": sum(e.status in (429, 503, 504) for e in during.exchanges),
                "lost": len(during.lost),
                "degraded": sum(bool(e.degraded) for e in during.answered.exchanges),
                "p50 ms": during.quantile(0.5) * 1e3,
                "max ms": max((e.latency_s for e in during.exchanges), default=0.0) * 1e3,
                "p50 ms before": each.before.quantile(0.5) * 1e3,
                "routes before": _text(each.before.routes),
                "during": _text(during.routes),
                "back after s": each.back_s,
            }
        )
    report.add(f"{RATE:g} requests a second with a deadline of {DEADLINE_S:g} s, {len(right)} photos", rows)


def _add_goals(report: Report, outcome: Outcome, judged: Sequence[Judged], wrong: Sequence[Exchange]) -> None:
    in_time = [e for e in outcome.exchanges if e.status in (200, 429, 503, 504) and e.latency_s <= DEADLINE_S]
    answered = [e for e in in_time if e.status == 200]
    count = len(outcome)
    report.goals += [
        at_most(f"wrong answers of {count} requests", len(wrong), 0),
        at_least("answered or clearly refused within the deadline", len(in_time) / count, MIN_REFUSED_OR_ANSWERED),
        at_least("answered within the deadline", len(answered) / count, MIN_ANSWERED),
    ]
    report.goals += [
        at_most(f"back on the best route after: {each.fault.name}", each.back_s, BACK_S, "s") for each in judged
    ]
    report.goals.append(at_most("median of them", statistics.median(each.back_s for each in judged), BACK_S, "s"))


def _text(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:3])


if __name__ == "__main__":
    main()
