"""kill -9 at random during publishes, promotions and collections, and twenty writers at once: what is lost, if any."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness import Report, Row, arguments, at_least, at_most

from support.moto_server import moto
from support.registry_kills import Job, Killer, Nursery, Place, audit_problems, problems, wait_for
from support.s3_server import unique_prefix

# Of a job over a folder and over S3 on loopback: some changes, and never only complete ones.
LONGEST_S = {"folder": 0.4, "s3": 2.0}
KILLS, QUICK_KILLS = 300, 40
WRITERS = 20


def main() -> None:
    report = arguments("registry_kills", __doc__, ["boto3", "moto"])
    kills = QUICK_KILLS if report.quick else KILLS
    with ExitStack() as stack:
        places = {name: stack.enter_context(place(name)) for name in LONGEST_S}
        nursery = stack.enter_context(Nursery())
        rows = [killed(report, nursery, name, each, kills // 2) for name, each in places.items()]
        report.add("processes killed at a random moment, two at a time", rows)
        report.goals.append(at_least("processes killed", sum(int(row["killed"] or 0) for row in rows), kills))
        for name, what in (("problems", "inconsistencies after kills"), ("audit", "changes not once in the audit log")):
            report.goals.append(at_most(what, sum(int(row[name] or 0) for row in rows), 0))
    with ExitStack() as stack:
        places = {name: stack.enter_context(place(name)) for name in LONGEST_S}
        nursery = stack.enter_context(Nursery())
        rows = [at_once(nursery, name, each, 2 if report.quick else 5) for name, each in places.items()]
        report.add(f"{WRITERS} publishers and promoters at once", rows)
        report.goals.append(at_most("changes lost, gaps, breaks", sum(int(row["problems"] or 0) for row in rows), 0))
    report.emit()


@contextmanager
def place(name: str) -> Iterator[Place]:
    """An empty registry of this kind."""
    if name == "folder":
        with tempfile.TemporaryDirectory(prefix="isthmus-kills-") as folder:
            yield Place(folder=f"{folder}/registry")
    else:
        with moto() as server:
            yield Place(endpoint=server.endpoint, prefix=unique_prefix())


def killed(report: Report, nursery: Nursery, name: str, where: Place, kills: int) -> Row:
    """Rounds until so many processes were killed; a registry takes 25 rounds, as checks grow with its versions."""
    with tempfile.TemporaryDirectory(prefix="isthmus-kills-") as folder:
        total, faults, audit, began, versions, moves = 0, list[str](), list[str](), time.monotonic(), 0, 0
        while total < kills:
            n = len(list(Path(folder).glob("log*")))
            part = Place(where.folder and f"{where.folder}-{n}", where.endpoint, where.prefix and f"{where.prefix}-{n}")
            killer = Killer(nursery, part, f"{folder}/files", f"{folder}/log{n}", seed=n)
            Path(killer.log).touch()
            while total + killer.killed < kills and killer.rounds < 25:
                killer.round(LONGEST_S[name])
            total += killer.killed
            faults += killer.problems
            audit += audit_problems(part.open())
            lines = Path(killer.log).read_text().splitlines()
            versions += sum(line.startswith("version") for line in lines)
            moves += sum(line.startswith("move") for line in lines)
            report.say(f"{name}: {total} killed, {len(faults)} problems")
        for fault in (*faults, *audit):
            report.say(fault)
        return {
            "store": name,
            "killed": total,
            "versions acknowledged": versions,
            "moves acknowledged": moves,
            "problems": len(faults),
            "audit": len(audit),
            "s": round(time.monotonic() - began, 1),
        }


def at_once(nursery: Nursery, name: str, where: Place, turns: int) -> Row:
    """All writers on one registry and one alias."""
    with tempfile.TemporaryDirectory(prefix="isthmus-kills-") as folder:
        log = f"{folder}/log"
        Job(where, f"{folder}/files", log, WRITERS, ["publish"], 2).run()
        began = time.monotonic()
        kinds = ["publish", "promote"]
        wait_for([nursery.start(Job(where, f"{folder}/files", log, n, kinds, turns)) for n in range(WRITERS)])
        seconds, registry = time.monotonic() - began, where.open()
        faults = [*problems(registry, log), *audit_problems(registry)]
        lines = len(Path(log).read_text().splitlines())
        for fault in faults:
            print(fault)
        return {
            "store": name,
            "versions": len(registry.versions("fake")),
            "moves of live": registry.alias("fake", "live").counter if "live" in registry.aliases("fake") else 0,
            "acknowledged": lines,
            "problems": len(faults),
            "s": round(seconds, 1),
        }


if __name__ == "__main__":
    main()
