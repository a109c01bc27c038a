"""Cleaning, splitting by group, and statistics: raw samples become parts of equal shape, with a report of the rest.

Every statistic, of outliers too, comes from the training part alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import LearningError
from isthmus_tools.learning.training.config import DataTable, SplitTable, TrainConfig
from isthmus_tools.learning.training.samples import PARTS, PreparedData, RawSample, Samples, Statistics

# A recording down to half of the length is padded; less would be mostly padding.
_MIN_SHARE = 0.5
# Rounding of a sum over a constant channel.
_CONSTANT = 1e-6
_EXAMPLES = 5


class _CleaningReport:
    """Counts of dropped and changed samples by reason, with a few of their origins."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)

    def note(self, reason: str, origin: str) -> None:
        self.counts[reason] += 1
        if len(self.examples[reason]) < _EXAMPLES:
            self.examples[reason].append(origin)

    def document(self) -> dict[str, object]:
        return {reason: {"samples": n, "examples": self.examples[reason]} for reason, n in self.counts.items()}


def prepare(config: TrainConfig, raw: Iterable[RawSample], earlier: Mapping[str, str] | None = None) -> PreparedData:
    """Clean, split and measure the samples; `earlier` maps groups to their parts in an earlier run.

    Raises:
        LearningError: nothing is left, a single class, labels that are not the configuration's classes, more bytes
            than `max_bytes`, a group in two parts, or a class without samples in a part.
    """
    report = _CleaningReport()
    samples = read_bounded(raw, config.data)
    collected = len(samples)
    classes = _classes(samples, config.data.classes)
    for stage in (_without_missing, _without_flat, _of_one_shape, _without_duplicates):
        samples = stage(samples, config, report)
    if not samples:
        raise LearningError(
            f"no sample of {collected} is left after cleaning: {dict(report.counts)}", dropped=dict(report.counts)
        )
    parts = split(samples, classes, config.split, config.seed, earlier or {})
    if config.clean.outliers == "drop":
        parts = _without_outliers(parts, config, report)
    arrays = {name: _stacked(parts[name], classes, samples[0].values.shape) for name in PARTS}
    _check_parts(arrays, classes, config.split)
    arrays, statistics = _normalisation(arrays, config.data, report)
    document = {
        "collected": collected,
        "left": {name: len(part) for name, part in arrays.items()},
        "groups": {name: len(set(part.groups)) for name, part in arrays.items()},
        "classes": {
            name: {label: int((part.labels == i).sum()) for i, label in enumerate(classes)}
            for name, part in arrays.items()
        },
        "changes": report.document(),
    }
    return PreparedData(arrays, classes, statistics, config.data.input_name, document)


def read_bounded(raw: Iterable[RawSample], data: DataTable) -> list[RawSample]:
    """The samples, read up to the configuration's bound on their bytes, before memory is full.

    Raises:
        LearningError: more bytes than `max_bytes`.
    """
    samples, size = [], 0
    for sample in raw:
        size += sample.values.nbytes
        if size > data.max_bytes:
            raise LearningError(
                f"the samples have more than data.max_bytes, {data.max_bytes}",
                key="data.max_bytes",
                hint="raise it where the memory allows, or give smaller photos or fewer files",
            )
        samples.append(sample)
    return samples


def _classes(samples: Sequence[RawSample], declared: Sequence[str]) -> tuple[str, ...]:
    labels = Counter(sample.label for sample in samples)
    # An empty cell of a table, or an empty level of a topic.
    if missing := [sample.origin for sample in samples if not sample.label]:
        raise LearningError(f"{len(missing)} samples have no label; the first is {missing[0]}", unlabelled=len(missing))
    if len(labels) < 2:
        raise LearningError(
            f"all {len(samples)} samples are of one class, {next(iter(labels), 'none')!r}",
            classes=list(labels),
            hint="a classifier needs samples of two classes or more",
        )
    if declared and (unknown := sorted(set(labels) - set(declared))):
        raise LearningError(
            f"the data has the labels {', '.join(unknown)}, and data.classes names {', '.join(declared)}",
            unknown=unknown,
            key="data.classes",
        )
    if absent := [name for name in declared if name not in labels]:
        raise LearningError(f"no sample is of the class {', '.join(absent)}", absent=absent, key="data.classes")
    return tuple(declared) or tuple(sorted(labels, key=_natural))


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers by value, before texts."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _without_missing(samples: Sequence[RawSample], config: TrainConfig, report: _CleaningReport) -> list[RawSample]:
    """Samples with their missing values filled, or dropped; tables are filled with the median later."""
    left = []
    for sample in samples:
        missing = ~np.isfinite(sample.values)
        if not missing.any():
            left.append(sample)
        elif config.clean.missing == "drop" or missing.mean() > config.clean.max_missing:
            report.note("dropped: missing values", sample.origin)
        elif config.data.kind == "table":
            left.append(replace(sample, values=np.where(missing, np.float32(np.nan), sample.values)))
            report.note("filled: the training part's median", sample.origin)
        # Nothing to interpolate between.
        elif missing.all(axis=-1).any():
            report.note("dropped: a channel without values", sample.origin)
        else:
            left.append(replace(sample, values=_interpolated(sample.values, missing)))
            report.note("filled: interpolated", sample.origin)
    return left


def _interpolated(values: Array, missing: Array) -> Array:
    """Missing values between their neighbours along the last axis; at an end, the nearest value."""
    # A copy: the raw sample may be shared by windows.
    filled = np.array(values, np.float32)
    positions = np.arange(values.shape[-1])
    for index in np.ndindex(values.shape[:-1]):
        gaps = missing[index]
        if gaps.any():
            filled[index][gaps] = np.interp(positions[gaps], positions[~gaps], values[index][~gaps])
    return filled


def _without_flat(samples: Sequence[RawSample], config: TrainConfig, report: _CleaningReport) -> list[RawSample]:
    """Samples without constant ones: a sensor that is off, or a photo of a single colour."""
    if config.data.kind == "table":
        return list(samples)
    left = []
    for sample in samples:
        if all(np.ptp(channel) == 0 for channel in sample.values):
            report.note("dropped: constant in every channel", sample.origin)
        else:
            left.append(sample)
    return left


def _of_one_shape(samples: Sequence[RawSample], config: TrainConfig, report: _CleaningReport) -> list[RawSample]:
    """Samples with the most frequent number of channels; series in windows of equal length."""
    if not samples:
        return []
    series = config.data.kind == "series"
    # All axes but time, the last of a series.
    frame = [sample.values.shape[:-1] if series else sample.values.shape for sample in samples]
    usual = Counter(frame).most_common(1)[0][0]
    lengths = Counter(sample.values.shape[-1] for sample in samples)
    length = config.data.length or lengths.most_common(1)[0][0]
    hop = config.data.hop or length
    left = []
    for sample, shape in zip(samples, frame, strict=True):
        if shape != usual:
            report.note("dropped: another number of channels or features", sample.origin)
        elif not series:
            left.append(sample)
        else:
            left += _windows(sample, length, hop, report)
    return left


def _windows(sample: RawSample, length: int, hop: int, report: _CleaningReport) -> list[RawSample]:
    """Windows of a series, all of its group; a shorter series repeats its last value."""
    size = sample.values.shape[-1]
    if size < _MIN_SHARE * length:
        report.note("dropped: shorter than half of the length", sample.origin)
        return []
    if size < length:
        report.note("filled: the last value, up to the length", sample.origin)
        padding = np.repeat(sample.values[:, -1:], length - size, axis=1)
        return [replace(sample, values=np.concatenate([sample.values, padding], axis=1))]
    starts = range(0, size - length + 1, hop)
    if size > length:
        report.note("cut into windows", sample.origin)
    return [
        replace(sample, values=sample.values[:, s : s + length], origin=f"{sample.origin}, from {s}") for s in starts
    ]


def _without_duplicates(samples: Sequence[RawSample], config: TrainConfig, report: _CleaningReport) -> list[RawSample]:
    """The first of equal samples; none where equal samples have several labels, since a label must be wrong."""
    # Digests: comparing arrays pairwise would take the square of their number.
    contents = [hashlib.sha256(np.ascontiguousarray(sample.values).data).digest() for sample in samples]
    labels = defaultdict(set)
    for content, sample in zip(contents, samples, strict=True):
        labels[content].add(sample.label)
    present: set[bytes] = set()
    left = []
    for content, sample in zip(contents, samples, strict=True):
        if len(labels[content]) > 1:
            report.note("dropped: equal samples of several classes", sample.origin)
        elif content in present and config.clean.duplicates == "drop":
            report.note("dropped: duplicate", sample.origin)
        else:
            present.add(content)
            left.append(sample)
    return left


@dataclass(frozen=True)
class _SampleGroup:
    """The samples of a group, and the most frequent class."""

    name: str
    samples: list[RawSample]

    @property
    def label(self) -> str:
        return Counter(sample.label for sample in self.samples).most_common(1)[0][0]


def split(
    samples: Sequence[RawSample], classes: Sequence[str], table: SplitTable, seed: int, earlier: Mapping[str, str]
) -> dict[str, list[RawSample]]:
    """The samples by part: whole groups, about the stated shares of each class's groups.

    A group has the part that its source states, else that of an `earlier` run. The rest is drawn by a hash of seed and
    name, until each part has its share.

    Raises:
        LearningError: sources state several parts for a group.
    """
    # In the order of the sources, so that parts are the same in each run.
    by_name: dict[str, list[RawSample]] = defaultdict(list)
    for sample in samples:
        by_name[sample.group].append(sample)
    groups = [_SampleGroup(name, members) for name, members in by_name.items()]
    assigned = {group.name: part for group in groups if (part := _stated(group) or earlier.get(group.name, ""))}
    stated = {sample.part for sample in samples if sample.part}
    for label in classes:
        own = [group for group in groups if group.label == label]
        free = sorted((g.name for g in own if g.name not in assigned), key=lambda name: _draw(seed, name))
        for part, share in (("test", table.test), ("validation", table.validation)):
            # A part that sources state is theirs alone.
            if not share or part in stated:
                continue
            wanted = max(1, round(share * len(own)))
            short = wanted - sum(assigned.get(group.name) == part for group in own)
            # At least a single group stays to train on.
            for name in free[: max(0, min(short, len(free) - 1))]:
                assigned[name] = part
            free = [name for name in free if name not in assigned]
    parts: dict[str, list[RawSample]] = {name: [] for name in PARTS}
    for group in groups:
        parts[assigned.get(group.name, "train")] += group.samples
    return parts


def _stated(group: _SampleGroup) -> str:
    stated = {sample.part for sample in group.samples if sample.part}
    if len(stated) > 1:
        raise LearningError(
            f"the group {group.name} is in the parts {' and '.join(sorted(stated))}",
            group=group.name,
            hint="samples of one group, such as a person's, would tell the evaluation what was trained on",
        )
    return next(iter(stated), "")


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode(errors="backslashreplace")).digest()


def _without_outliers(
    parts: Mapping[str, list[RawSample]], config: TrainConfig, report: _CleaningReport
) -> dict[str, list[RawSample]]:
    """The parts without outliers among training and validation; held-out samples are as the world gives them."""
    if not parts["train"]:
        return dict(parts)
    # NaN of tables is no outlier: percentiles leave NaN out.
    training = _by_channel(np.stack([sample.values for sample in parts["train"]]))
    low, high = np.nanpercentile(training, [1, 99], axis=1)
    reach = config.clean.outlier_limit * (high - low)
    # A channel that hardly moves has no spread to measure by.
    reach[reach <= _CONSTANT * np.maximum(np.abs(low), np.abs(high))] = np.inf
    left = {"test": list(parts["test"])}
    for name in ("train", "validation"):
        left[name] = []
        for sample in parts[name]:
            values = _by_channel(sample.values[np.newaxis])
            if ((np.nanmin(values, 1) < low - reach) | (np.nanmax(values, 1) > high + reach)).any():
                report.note(f"dropped: outlier in {name}", sample.origin)
            else:
                left[name].append(sample)
    return left


def _by_channel(batch: Array) -> Array:
    """(count, channels, …) as (channels, values)."""
    return np.moveaxis(batch, 1, 0).reshape(batch.shape[1], -1)


def _stacked(samples: Sequence[RawSample], classes: Sequence[str], shape: tuple[int, ...]) -> Samples:
    inputs = np.stack([s.values for s in samples]) if samples else np.zeros((0, *shape))
    labels = np.array([classes.index(s.label) for s in samples], np.int64)
    return Samples(inputs.astype(np.float32), labels, tuple(s.group for s in samples))


def _check_parts(parts: Mapping[str, Samples], classes: Sequence[str], table: SplitTable) -> None:
    needed = {"train": 1.0, "validation": table.validation, "test": table.test}
    for name, share in needed.items():
        counts = np.bincount(parts[name].labels, minlength=len(classes))
        # Validation may lack a rare class; a class that nothing was trained on, or that is not tested, may not.
        lacking = [label for label, n in zip(classes, counts, strict=True) if not n]
        if (name != "validation" and share and lacking) or (share and not len(parts[name])):
            raise LearningError(
                f"the part {name} has no sample of {', '.join(lacking) or 'any class'}",
                part=name,
                classes=lacking,
                hint="collect more groups of it (three are the least), or set the shares in [split]",
            )


def _normalisation(
    parts: Mapping[str, Samples], data: DataTable, report: _CleaningReport
) -> tuple[dict[str, Samples], Statistics]:
    """The parts, and mean and scale of each channel of the training part; missing values of tables are filled there."""
    values = _by_channel(parts["train"].inputs).astype(np.float64)
    fill = None
    if data.kind == "table" and any(np.isnan(part.inputs).any() for part in parts.values()):
        fill = np.array([np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else 0.0 for c in values], np.float32)
        values = np.where(np.isfinite(values), values, fill[:, np.newaxis])
    # In float64: sums of millions of float32 values lose digits.
    mean, deviation = values.mean(1), values.std(1)
    constant = deviation <= _CONSTANT * np.maximum(np.abs(mean), _CONSTANT)
    for channel in np.flatnonzero(constant):
        report.note("ignored: a channel that is constant in training", f"channel {channel}")
    scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation))
    return dict(parts), Statistics(mean.astype(np.float32), scale.astype(np.float32), fill)
