"""Labelled samples in memory: raw samples of collection, and the parts that training takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import LearningError
from isthmus.files import write_whole
from isthmus_tools import array_files

PARTS = ("train", "validation", "test")
DOCUMENT = "prepared.json"
# From here on an accuracy may hide that the rare class is never predicted.
_IMBALANCE = 8
_STATISTICS = ("mean", "scale", "fill")


@dataclass(frozen=True)
class RawSample:
    """A sample as collected: float32 values, its class, and its group, which is never split over parts.

    Shapes: a series (channels, length) of any length, a photo (3, height, width), or a table's row (features,).
    `origin` names file and row in messages; `part` is set where the source says so.
    """

    values: Array
    label: str
    group: str
    origin: str
    part: str = ""


@dataclass(frozen=True)
class Samples:
    """Samples of equal shape: inputs (count, …) float32, labels (count,) int64 as indices of classes, and groups."""

    inputs: Array
    labels: Array
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: Sequence[int] | Array) -> Samples:
        """The samples at the indices, in the order of these."""
        index = np.asarray(indices, np.int64)
        return Samples(self.inputs[index], self.labels[index], tuple(self.groups[i] for i in index.tolist()))


@dataclass(frozen=True)
class Statistics:
    """Per-channel statistics of the training part alone: the first nodes of the graph.

    An input becomes (input - mean) * scale; `scale` is 0 for a channel that is constant in training. Missing values
    of a table are replaced by `fill` first. Shapes: (channels,).
    """

    mean: Array
    scale: Array
    fill: Array | None = None


@dataclass(frozen=True)
class PreparedData:
    """The parts by name, the classes in the order of the labels, the statistics, and a report of dropped samples."""

    parts: dict[str, Samples]
    classes: tuple[str, ...]
    statistics: Statistics
    input_name: str = "readings"
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def train(self) -> Samples:
        return self.parts["train"]

    @property
    def validation(self) -> Samples:
        return self.parts["validation"]

    @property
    def test(self) -> Samples:
        return self.parts["test"]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input, without the batch."""
        return tuple(self.train.inputs.shape[1:])

    def imbalance(self) -> str:
        """A warning where a class has many times the training samples of another class; else empty."""
        counts = np.bincount(self.train.labels, minlength=len(self.classes))
        few, many = int(counts.argmin()), int(counts.argmax())
        if counts[many] < _IMBALANCE * counts[few]:
            return ""
        return (
            f"{self.classes[many]} has {counts[many]} training samples, and {self.classes[few]} has {counts[few]}: look"
            ' at recall and macro F1, and try training.class_weights = "balanced", publish.metric = "macro_f1"'
        )

    def digest(self) -> str:
        """A digest of all parts: a checkpoint of other data is not resumed."""
        # The classes too: equal numbers may mean other classes.
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for name in PARTS:
            part = self.parts[name]
            for array in (part.inputs, part.labels):
                # Shapes mark where an array ends.
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def write(self, folder: Path) -> None:
        """Write each part as an .npz file that commands with --data read, and the rest as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in self.parts.items():
            # (count, 1, …): batches of 1, the form that every command reads.
            batches = {self.input_name: part.inputs[:, np.newaxis], "labels": part.labels}
            array_files.write_npz(folder / f"{name}.npz", batches)
        statistics = {
            name: None if (array := getattr(self.statistics, name)) is None else array.tolist() for name in _STATISTICS
        }
        document = {
            "input": self.input_name,
            "classes": list(self.classes),
            "groups": {name: list(part.groups) for name, part in self.parts.items()},
            "statistics": statistics,
            "report": self.report,
        }
        # Last: this file ends the stage.
        write_whole(folder / DOCUMENT, json.dumps(document, indent=1).encode() + b"\n", mode=0o644)


def read_prepared(folder: Path) -> PreparedData:
    """Read the files of `PreparedData.write`.

    Raises:
        LearningError: absent or damaged.
    """
    try:
        document = json.loads((folder / DOCUMENT).read_text())
        parts = {}
        for name in PARTS:
            arrays = array_files.read(folder / f"{name}.npz")
            inputs = arrays[document["input"]][:, 0]
            parts[name] = Samples(inputs, arrays["labels"], tuple(document["groups"][name]))
        # JSON keeps float32 exactly: its numbers are float64.
        values = document["statistics"]
        fill = None if values["fill"] is None else np.array(values["fill"], np.float32)
        statistics = Statistics(np.array(values["mean"], np.float32), np.array(values["scale"], np.float32), fill)
        return PreparedData(parts, tuple(document["classes"]), statistics, document["input"], document["report"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise LearningError(
            f"{folder} holds no prepared data: {e}", file=str(folder), hint="run the stages collect and clean first"
        ) from e
