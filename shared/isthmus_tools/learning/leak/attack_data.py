"""Public inputs in halves: one half trains attackers, the other half measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.artifacts.fidelity import TOP1, measure_for
from isthmus.errors import LearningError
from isthmus_tools.calibration.inputs import open_source, split
from isthmus_tools.learning.classes import classes_of
from isthmus_tools.learning.labelled import open_labelled


@dataclass(frozen=True)
class AttackData:
    """Public inputs, read on demand, each a batch of 1: `training` for attackers, `held_out` for measurement.

    `labels` are the classes of the held-out inputs; None compares with the classes of the inputs themselves.
    """

    name: str
    files: int
    training: Callable[[], Iterator[Mapping[str, Array]]]
    held_out: Callable[[], Iterator[Mapping[str, Array]]]
    count: int
    labels: Sequence[int] | None = None


def refuse_texts(bundle: Bundle) -> None:
    """Refuse a model of texts, before its data are read.

    Raises:
        LearningError: a language model or a sentence encoder.
    """
    if bundle.text is not None or bundle.embedding is not None:
        raise LearningError(
            f"{bundle.name} takes texts; photos, series and vectors are reconstructed, token ids are not",
            model=bundle.name,
            hint="count no cut of a model of texts as protection: hidden states are known to reveal their texts",
        )


def open_folder(
    bundle: Bundle,
    folder: Path,
    blob: Callable[[Blob], bytes] | None,
    labels: Path | None,
    count: int,
    seed: int = 0,
) -> AttackData:
    """At most `count` inputs of a folder: arrays and labelled photos whole, unlabelled photos in parts.

    `blob` reads the names of the model's classes; None takes no labels.

    Raises:
        LearningError: the data or labels do not fit, or labels for a model without classes.
    """
    classes = classes_of(bundle, blob) if blob is not None and measure_for(bundle).kind == TOP1 else None
    if labels is not None and classes is None:
        raise LearningError(f"labels are given, and {bundle.name} has no classes to compare", labels=str(labels))
    data = open_labelled(bundle, folder, classes, labels=labels)
    paths = list(dict.fromkeys(path for path, _ in data.places))
    if data.labels is None and paths and paths[0].suffix not in (".npy", ".npz"):
        return parts_of_photos(bundle, paths, str(folder), count, seed)
    training, held_out = data.sample(count, seed).parts((0.5, 0.5), seed)
    classes_held_out = None if held_out.labels is None else held_out.labels.tolist()
    total = len(training) + len(held_out)
    return AttackData(str(folder), len(paths), training.inputs, held_out.inputs, total, classes_held_out)


def parts_of_photos(bundle: Bundle, photos: Sequence[Path], name: str, count: int, seed: int = 0) -> AttackData:
    """Photos and random parts of these, `count` in all; parts of one photo are on one side.

    Raises:
        CalibrationError: too few photos.
    """
    source = open_source(bundle, photos, name, count, seed)
    # Attackers need many inputs: a handful of photos would teach no network.
    training, held_out = split(source, count, seed)

    def rows(files: Sequence[Path]) -> Iterator[Mapping[str, Array]]:
        return (example.arrays for example in source.examples(files, count // 2))

    return AttackData(name, len(photos), lambda: rows(training), lambda: rows(held_out), 2 * (count // 2))
