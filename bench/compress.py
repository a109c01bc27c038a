"""Compressed heads beside the head itself: int8, pruned channels with and without repair, onnxruntime's plain int8."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from codec_networks import Fold, Subject, detector, other_photos
from harness import Report, Row, arguments, at_least, at_most

from isthmus.artifacts.bounds import interval
from isthmus.registry import FolderStore, Registry, SegmentCache
from isthmus.runtime import ort
from isthmus.settings import SegmentSettings
from isthmus_tools.calibration.boundary import SegmentExecutor
from isthmus_tools.graph import build
from isthmus_tools.graph.variant_graphs import standalone
from isthmus_tools.learning.compression.int8 import int8
from isthmus_tools.learning.compression.measurement import interleaved_seconds
from isthmus_tools.learning.compression.pruning import ChannelPruner
from isthmus_tools.learning.compression.subject import HeadSubject, head_boundary, store_samples, with_scales

PACKAGES = ["numpy", "onnxruntime", "scipy", "pillow", "scikit-image", "scikit-learn"]
NETWORKS = ("efficientnet-lite0", "ocr-detector")
# Shares of the head's multiply-accumulates that pruning leaves.
KEEP = (0.9, 0.75)
# Inputs of a fold that calibrate, and held out: all that a run of some minutes allows.
COUNTS, QUICK_COUNTS = (128, 200), (32, 32)
PLAIN_INT8, INT8, MIXED = "int8, onnxruntime's defaults", "int8, all layers", "int8"
REPAIR_GOAL, INT8_TIME, PRUNED_TIME = 2.0, 0.75, 0.9


@dataclass(frozen=True)
class Head:
    """The head of a network at a cut, and graphs in its place by name."""

    subject: HeadSubject
    graphs: Mapping[str, Path]


def main() -> None:
    """Run and print."""
    report = arguments("compress", __doc__ or "", PACKAGES, NETWORKS)
    for name in report.models or NETWORKS:
        network = detector(report.quick) if name == "ocr-detector" else other_photos(report.quick)
        cut = network.cuts[-1]
        folds = network.folds[: 1 if report.quick else 2]
        rows = _rows(name, network, cut, folds, report)
        report.add(f"{network.name}, the head at {cut}", rows)
        _goals(name, {str(row["head"]): row for row in rows}, report)
    report.emit()


def _rows(name: str, network: Subject, cut: str, folds: Sequence[Fold], report: Report) -> list[Row]:
    """Each variant's figures; outcomes of all folds are pooled, each fold with variants of its own."""
    outcomes: dict[str, list[tuple[str, bool, float]]] = {}
    times: dict[str, list[float]] = {}
    sizes: dict[str, list[int]] = {}
    for number, fold in enumerate(folds):
        with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder:
            report.say(f"{name}: fold {number + 1} of {len(folds)}")
            head = _compressed(network, cut, fold, Path(folder), report)
            for variant, graph in head.graphs.items():
                sizes.setdefault(variant, []).append(graph.stat().st_size)
            for variant, outcome in _scored(network, head, fold, report).items():
                outcomes.setdefault(variant, []).extend(outcome)
            report.say(f"{name}: times")
            arrays = next(head.subject.head_samples())
            runners = [head.subject.runner(graph) for graph in head.graphs.values()]
            seconds = interleaved_seconds(runners, arrays)
            for variant, series in zip(head.graphs, seconds, strict=True):
                times.setdefault(variant, []).extend(series)
    rows: list[Row] = []
    for variant, outcome in outcomes.items():
        groups = sorted({group for group, _, _ in outcome})
        hits = [[same for each, same, _ in outcome if each == group] for group in groups]
        low, high = interval([(sum(same), len(same)) for same in hits])
        rows.append(
            {
                "head": variant,
                "kilobytes": statistics.mean(sizes[variant]) / 1000,
                "milliseconds": 1000 * statistics.median(times[variant]),
                "ratio": statistics.median(a / b for a, b in zip(times[variant], times["the head"], strict=True)),
                "agreement": statistics.mean(same for _, same, _ in outcome),
                "low": low,
                "high": high,
                "error_at_the_cut": float(np.sqrt(statistics.mean(error for _, _, error in outcome))),
                "inputs": len(outcome),
            }
        )
    return rows


def _compressed(network: Subject, cut: str, fold: Fold, folder: Path, report: Report) -> Head:
    registry = Registry(FolderStore(folder / "registry"))
    arguments = dict(network.open)
    bundle, files = build(
        network.path, "network", folder / "built", partitions=[[cut]], preprocess=network.preprocess, **arguments
    )
    version = registry.publish(bundle, files)
    settings = SegmentSettings(threads=1, cache_dir=str(folder / "cache"))
    cache = SegmentCache(registry, folder / "cache", 2**32)
    executor = SegmentExecutor(version.digest, bundle, cache, settings)
    calibrating, _ = QUICK_COUNTS if report.quick else COUNTS
    (folder / "samples").mkdir()
    samples = store_samples(islice(fold.calibrating(), calibrating), folder / "samples")
    segment, tail = head_boundary(bundle, cut)
    with cache.locate(version.digest, segment.id) as located:
        graph = standalone(located.path, folder / "head.onnx")
    measure = with_scales(network.measure, executor, samples)
    subject = HeadSubject(executor, segment, tail, graph, samples, measure, 1)
    graphs = {"the head": graph, PLAIN_INT8: _plain_int8(subject, folder)}
    for name, limit in ((INT8, 0.0), (MIXED, 0.99)):
        report.say(f"  {name}")
        graphs[name] = int8(subject, graph, _folder(folder, name), limit)[0]
    report.say("  costs of channels")
    pruner = ChannelPruner(subject)
    for share in KEEP:
        for repair in (False, True):
            name = _pruned(share, repair)
            report.say(f"  {name}")
            graphs[name] = pruner.prune(share, _folder(folder, name) / "pruned.onnx", repair=repair).path
    name = f"{_pruned(KEEP[0], True)}, int8"
    graphs[name] = int8(subject, graphs[_pruned(KEEP[0], True)], _folder(folder, name), 0.99)[0]
    return Head(subject, graphs)


def _pruned(share: float, repair: bool) -> str:
    return f"{share:.0%} of the work, {'repaired' if repair else 'not repaired'}"


def _folder(folder: Path, name: str) -> Path:
    path = folder / name.replace(" ", "-").replace("%", "")
    path.mkdir()
    return path


def _plain_int8(subject: HeadSubject, folder: Path) -> Path:
    """The head by quantize_static as it comes: one scale a tensor, every operator that it knows, int8 activations."""
    tools = ort.quantization()

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples = subject.head_samples()

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._samples, None)

    out = folder / "plain-int8.onnx"
    tools.quantize_static(str(subject.graph), str(out), Reader())
    return out


def _scored(network: Subject, head: Head, fold: Fold, report: Report) -> dict[str, list[tuple[str, bool, float]]]:
    """For each variant and held-out input: the photo, whether the prediction is the model's, the squared error."""
    subject = head.subject
    runners = {name: subject.runner(graph) for name, graph in head.graphs.items()}
    outcomes: dict[str, list[tuple[str, bool, float]]] = {name: [] for name in runners}
    _, held_out = QUICK_COUNTS if report.quick else COUNTS
    report.say("  held-out inputs")
    for example in islice(fold.held_out(), held_out):
        expected = subject.executor.predict(example.arrays)
        reference = runners["the head"].run(subject.head_inputs(example.arrays))
        for name, runner in runners.items():
            boundary = runner.run(subject.head_inputs(example.arrays))
            same, _ = network.judge(example, expected, subject.predict(example.arrays, boundary))
            error = max(
                float(np.square(reference[n] - a, dtype=np.float64).sum() / (np.square(reference[n]).sum() or 1.0))
                for n, a in boundary.items()
            )
            outcomes[name].append((example.group, same, error))
    return outcomes


def _goals(name: str, rows: Mapping[str, Row], report: Report) -> None:
    def of(row: str, column: str) -> float:
        return float(rows[row][column] or 0.0)

    for share in KEEP:
        lost = [1 - of(_pruned(share, repair), "agreement") for repair in (False, True)]
        times = lost[0] / max(lost[1], 1e-9)
        report.goals.append(
            at_least(f"{name}: agreement lost at {share:.0%} of the work, without over with repair", times, REPAIR_GOAL)
        )
    report.goals += [
        at_least(
            f"{name}: agreement of int8 above onnxruntime's defaults",
            of(MIXED, "agreement") - of(PLAIN_INT8, "agreement"),
            0.0,
        ),
        at_most(f"{name}: time of int8 over the head's", of(MIXED, "ratio"), INT8_TIME),
        at_most(
            f"{name}: time at {KEEP[-1]:.0%} of the work over the head's",
            of(_pruned(KEEP[-1], True), "ratio"),
            PRUNED_TIME,
        ),
    ]


if __name__ == "__main__":
    main()
