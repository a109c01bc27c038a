"""The classes of a classifier: the output with their scores, their number and names, and labels as indices."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.artifacts.fidelity import TOP1, measure_for
from isthmus.artifacts.tensors import TensorSpec, describe
from isthmus.errors import LearningError
from isthmus.processing.classify_spec import parse_labels
from isthmus_tools import array_files

# Of unknown names in a message.
_MAX_LISTED = 5
# A line for each input, of some 100 bytes.
_MAX_LABEL_FILE = 256 * 2**20


@dataclass(frozen=True)
class ModelClasses:
    """The classes of a model: `count` scores in each row of `output`; `names` is empty where the bundle has none."""

    output: TensorSpec
    count: int
    names: tuple[str, ...] = ()

    @cached_property
    def _indices(self) -> dict[str, int]:
        indices: dict[str, int] = {}
        for index, name in enumerate(self.names):
            # ImageNet's labels list synonyms; the first class of a shared synonym counts.
            for text in (name, *name.split(",")):
                indices.setdefault(text.strip().casefold(), index)
        return indices

    def index(self, label: object) -> int | None:
        """The class of a label: a name, case aside, or an index; None for labels of no class."""
        # A text of digits may be a name; a number never is.
        if isinstance(label, str) and (by_name := self._indices.get(label.strip().casefold())) is not None:
            return by_name
        try:
            index = int(str(label))
        except ValueError:
            return None
        return index if 0 <= index < self.count else None

    def indices(self, labels: Sequence[object], source: str) -> Array:
        """The classes of labels; `source` names their origin in messages. Shapes: (labels,) int64.

        Raises:
            LearningError: a label is no class of the model, or all are of a single class.
        """
        indices = [self.index(label) for label in labels]
        unknown = dict.fromkeys(str(a) for a, index in zip(labels, indices, strict=True) if index is None)
        if unknown:
            first = ", ".join(repr(name[:60]) for name in list(unknown)[:_MAX_LISTED])
            valid = f"such as {', '.join(self.names[:_MAX_LISTED])}" if self.names else f"0 to {self.count - 1}"
            raise LearningError(
                f"{source} has labels that are no class of the model: {first}",
                unknown=list(unknown)[:_MAX_LISTED],
                classes=self.count,
                hint=f"a label is a class's name or its index; this model's {self.count} classes are {valid}",
            )
        if len(set(indices)) == 1:
            raise LearningError(
                f"{source} has inputs of one class only, {labels[0]!s:.60}; two are the least",
                classes=1,
                hint="add inputs of the other classes",
            )
        return np.array(indices, np.int64)


def classes_of(bundle: Bundle, blob: Callable[[Blob], bytes], output: str = "") -> ModelClasses:
    """The classes of a bundle's model; `blob` reads its names. `output` is that of scores where the bundle is silent.

    Raises:
        LearningError: no classifier with a single output of scores: a regression, a detector, a model of text.
        ModelError: the labels are malformed.
    """
    measure = measure_for(bundle, output)
    scores = ", ".join(describe(spec.dtype, spec.shape, spec.name) for spec in bundle.outputs)
    if bundle.state is not None or bundle.embedding is not None:
        raise LearningError(
            f"{bundle.name} is a model of text, which has no fixed classes; its outputs are {scores}",
            hint=f"for a language model: isthmus draft {bundle.name}" if bundle.state is not None else "",
        )
    if measure.kind != TOP1:
        raise LearningError(
            f"{bundle.name} does not say which output holds classes; a regression or a detector has none. Its outputs"
            f" are {scores}",
            outputs=[spec.name for spec in bundle.outputs],
            hint="name the output whose last axis holds scores of classes: --classes OUTPUT",
        )
    if (spec := next((s for s in bundle.outputs if s.name == measure.output), None)) is None:
        raise LearningError(f"{bundle.name} has no output {measure.output!r}; its outputs are {scores}")
    if len(bundle.outputs) > 1:
        raise LearningError(
            f"{bundle.name} has {len(bundle.outputs)} outputs, and classes are predicted for models of a single one;"
            f" its outputs are {scores}",
            outputs=[each.name for each in bundle.outputs],
        )
    # (batch, classes), or with axes of 1 behind; a grid of scores would be a detector's or a segmentation's.
    if (
        not spec.dtype.startswith("float")
        or len(spec.shape) < 2
        or any(size != 1 for size in spec.shape[2:])
        or not isinstance(spec.shape[1], int)
        or spec.shape[1] < 2
    ):
        raise LearningError(
            f"the output {scores} of {bundle.name} is no table of scores (batch, classes)",
            output=spec.name,
            hint="a regression, a detector or a segmentation has no classes to exit with",
        )
    names = parse_labels(blob(bundle.labels)) if bundle.labels is not None else ()
    return ModelClasses(spec, spec.shape[1], names)


def read_label_file(path: Path) -> Array | list[Any] | dict[str, str]:
    """Labels of a file: a list or an array in the order of inputs (.json, .npy), or by file name (CSV `file,label`).

    Raises:
        LearningError: none of these formats.
    """
    try:
        if path.stat().st_size > _MAX_LABEL_FILE:
            raise ValueError(f"it has more than {_MAX_LABEL_FILE} bytes")
        if path.suffix == ".npy":
            array = array_files.read_one(path)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"labels are one axis of whole numbers, and it has {array.dtype} {list(array.shape)}")
            return array
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            if not isinstance(content, list) or not all(isinstance(each, str | int) for each in content):
                raise ValueError("it is no list of class names or indices")
            return content
        # Spreadsheets begin a file with a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _by_file(list(csv.reader(file)))
    except (OSError, ValueError, RecursionError, csv.Error) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise LearningError(
            f"{path} cannot be read as labels: {why}",
            file=str(path),
            hint="CSV with lines FILE,LABEL; or .npy or .json with a label for each input, in the order of files",
        ) from e


def _by_file(lines: list[list[str]]) -> dict[str, str]:
    rows = [line for line in lines if line]
    # The header is optional: spreadsheets write a header, scripts often do not.
    if rows and [cell.strip().casefold() for cell in rows[0]] == ["file", "label"]:
        del rows[0]
    if not rows:
        raise ValueError("it is empty")
    labels: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(f"line {number} has {len(row)} cells, not FILE,LABEL")
        if row[0] in labels:
            raise ValueError(f"it has two labels of {row[0]}")
        labels[row[0]] = row[1]
    return labels
