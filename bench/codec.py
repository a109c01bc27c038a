"""What crosses a cut, and what answers survive it: Isthmus's codecs beside JPEG, WebP and plain quantisation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from codec_curves import Point, bytes_at, curve, fewer, fewest_bits, point
from codec_digits import digits
from codec_models import Subject, detector, encoder, voice
from codec_peers import Affine, Half, Ideal, scales, zlib_6, zstd_3
from codec_photos import efficientnet
from codec_speed import add_speed
from report import Goal, Report, Row, arguments, at_least, at_most

from isthmus.bundle import WHOLE, Bundle
from isthmus.calibration.calibrate import CHOICES, learn_tables
from isthmus.calibration.choice import Choice
from isthmus.calibration.crossing import Crossing, Run, crossing
from isthmus.calibration.reference import References
from isthmus.calibration.running import runs_here
from isthmus.calibration.scoring import Trial, Way, score, trials
from isthmus.calibration.spool import Spool
from isthmus.graph import build
from isthmus.registry import FolderStore, Registry, SegmentCache
from isthmus.settings import SegmentSettings

PACKAGES = ["numpy", "onnxruntime", "pillow", "scikit-image", "scikit-learn", "torch", "zstandard"]
STEPS = tuple(round(2.0 ** (-4 + i / 2), 4) for i in range(13))
"""Of uniform quantisation, in shares of the activation's root mean square: 0.06 to 4."""
QUALITIES = tuple(round(i / 16, 4) for i in range(14))
"""Finer steps are not needed to tell what 99% takes."""
PEERS = ("raw", "half/1", "lossless/1", "int8/1", "int4/1", "sparse/1")
NETWORKS = ("efficientnet-lite0", "digits", "ocr-detector", "minilm", "silero")
OURS, IDEAL, INT8 = "transform/1", "uniform, ideal entropy", "int8 + zstd"
LEVELS = (0.95, 0.99)
SAME, ERRORS = (0.8, 0.9, 0.95, 0.98, 0.99), (0.2, 0.1, 0.05, 0.02, 0.01)


@dataclass(frozen=True)
class Scored:
    """What was measured at one cut."""

    subject: Subject
    cut: str
    points: list[Point]


def main() -> None:
    report = arguments("codec", __doc__, PACKAGES, NETWORKS)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as scratch:
        folder = Path(scratch)
        scored: list[Scored] = []
        for name in report.models or NETWORKS:
            subject = _subject(name, folder, report)
            scored += measure(subject, folder / name, report)
        if not report.models:
            report.say("timing")
            add_speed(report, folder)
    add_ratios(report, scored)
    add_goals(report, scored)
    report.emit()


def _subject(name: str, folder: Path, report: Report) -> Subject:
    if name == "digits":
        report.say("training a residual network on digits")
        return digits(folder, report.quick)
    made = {"efficientnet-lite0": efficientnet, "ocr-detector": detector, "minilm": encoder, "silero": voice}
    return made[name](report.quick)


def measure(subject: Subject, folder: Path, report: Report) -> list[Scored]:
    """Calibrate every cut of one network, score every way to send what crosses, and add a table for each cut."""
    folder.mkdir()
    names = [cut.partition("=")[0] for cut in subject.cuts]
    bundle, run = _published(subject, folder)
    crossings = [crossing(bundle, name) for name in names]
    calibrating, held_out = subject.counts
    report.say(f"{subject.name}: calibrating with {calibrating} inputs")
    spool = Spool(crossings, run, folder)
    for example in subject.calibrating():
        spool.add(example.arrays)
    rule = replace(subject.measure, scales=spool.scales())
    tables, skipped = learn_tables(crossings, spool, run, rule, longest_s=8 if report.quick else 120)
    for tensor, why in skipped.items():
        report.say(f"{subject.name}: {tensor} has no table: {why}")
    every = 3 if report.quick else 1
    ideal = {c.cut: [Ideal(step, scales(spool.crossed(c.cut))) for step in STEPS[::every]] for c in crossings}
    ways = {c.cut: _ways(c, tables, ideal[c.cut], QUALITIES[::every]) for c in crossings}
    beside = None
    if bundle.preprocess is not None:
        whole = bundle.segment(WHOLE)
        beside = References(bundle, lambda arrays: run(whole, arrays), rule)
    report.say(f"{subject.name}: scoring {sum(map(len, ways.values()))} ways with {held_out} inputs")
    tallies = score(subject.held_out(), held_out, crossings, ways, run, subject.judge, beside=beside)
    found = []
    for each in crossings:
        values = tallies[each.cut, "raw"].values // len(tallies[each.cut, "raw"].bytes)
        exact = {way.name: way.mean_bytes() for way in ideal[each.cut]}
        points = [point(way.name, tallies[each.cut, way.name], values, exact.get(way.name)) for way in ways[each.cut]]
        if beside is not None:
            points += [point(f"{kind} @{q}", tally, values) for (kind, q), tally in beside.tallies.items()]
        found.append(Scored(subject, each.cut, points))
        share = f"{bundle.cuts[each.cut].macs_before:.0%} of the work before it, {values:,} values"
        title = f"{subject.name}, cut {each.cut} ({share}), {held_out} inputs held out, {calibrating} calibrated"
        report.add(title, [_row(p, subject.error) for p in sorted(points, key=lambda p: -p.bytes)])
    return found


def _published(subject: Subject, folder: Path) -> tuple[Bundle, Run]:
    bundle, files = build(
        subject.path,
        "bench",
        folder / "built",
        partitions=[[cut] for cut in subject.cuts],
        preprocess=subject.preprocess,
        **subject.open,
    )
    registry = Registry(FolderStore(folder / "registry"))
    version = registry.publish(bundle, files)
    settings = SegmentSettings(registry=str(folder / "registry"), cache_dir=str(folder / "cache"), threads=1)
    return bundle, runs_here(version.digest, SegmentCache(registry, folder / "cache", 2**32), settings)


def _ways(at: Crossing, tables: Mapping[str, object], ideal: Sequence[Ideal], qualities: Sequence[float]) -> list[Way]:
    choices = [c for c in CHOICES if c.codec in PEERS] + [Choice(OURS, q) for q in qualities]
    ours: list[Trial] = trials(at, choices, tables)
    return [*ours, *ideal, Half(), Affine(INT8, 8, zstd_3), Affine("int4 + zlib", 4, zlib_6)]


def _row(p: Point, error: str) -> Row:
    row: dict[str, str | float | int | bool | None] = {
        "way": p.name,
        "bytes": round(p.bytes),
        "bits_per_value": p.bits,
        "same_%": 100 * p.same,
        "95%_low": 100 * p.low,
        "high": 100 * p.high,
        error: p.error,
        "pack_ms": p.pack_ms,
        "unpack_ms": p.unpack_ms,
    }
    return row


def add_ratios(report: Report, scored: Sequence[Scored]) -> None:
    """Add how the transform codec compares with ideal entropy, for the same answers and for the same mean error."""
    rows: list[Row] = []
    for each in scored:
        ours, ideal = curve(each.points, OURS), curve(each.points, IDEAL)
        row: dict[str, str | float | int | bool | None] = {"network": each.subject.name, "cut": each.cut}
        for level in SAME:
            row[f"{level:.0%}_same"] = fewer(ours, ideal, level, lambda p: p.same)
        for level in ERRORS:
            row[f"error_{level}"] = fewer(ours, ideal, -level, lambda p: -p.error)
        rows.append(row)
    report.add(f"times fewer bytes with {OURS} than with uniform steps and ideal entropy, for the same", rows)


def add_goals(report: Report, scored: Sequence[Scored]) -> None:
    """Hold the curves against what was set before anything was measured."""
    for each in scored:
        report.goals += list(_against_peers(each))
    for each in scored:
        if each.subject.error == "1 - accuracy":
            uncut = next(1 - p.error for p in each.points if p.name == "raw")
            best = fewest_bits(curve(each.points, OURS), uncut - 0.01)
            name = f"bits a value at under 1 point of accuracy lost ({100 * uncut:.1f}% uncut), digits, {each.cut}"
            report.goals.append(at_most(name, best.bits if best else 32.0, 0.8))


def _against_peers(each: Scored) -> Iterator[Goal]:
    ideal = curve(each.points, IDEAL)
    for level in LEVELS:
        yield _times_fewer(f"uniform with ideal entropy, both at {level:.0%}", each, bytes_at(ideal, level), level, 1.6)
    int8 = next(p for p in each.points if p.name == INT8)
    yield _times_fewer(f"int8 + zstd ({int8.same:.1%} the same), ours at 99%", each, int8.bytes, 0.99, 2.5)
    for p in each.points:
        if p.name in ("jpeg @85", "jpeg @95"):
            yield _times_fewer(f"{p.name}, both at its {p.same:.1%}", each, p.bytes, p.same, 8)


def _times_fewer(name: str, each: Scored, theirs: float | None, level: float, goal: float) -> Goal:
    mine = bytes_at(curve(each.points, OURS), level)
    value = theirs / mine if theirs is not None and mine is not None else 0.0
    return at_least(f"times fewer bytes than {name}: {each.subject.name}, {each.cut}", value, goal)


if __name__ == "__main__":
    main()
