"""Inputs of a model for learning: photos or rows of arrays, with the class of each where labels are there.

Labels come from a file, from an array `labels` beside the inputs in .npz files, or from a folder for each class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import CalibrationError, LearningError, RequestError, ShapeMismatch
from isthmus_tools.calibration.inputs import LABELS, file_kind, list_files, named_arrays
from isthmus_tools.learning.classes import ModelClasses, read_label_file

# Array files stay in memory up to this size; beyond, the file that was read first is read again.
_CACHED_BYTES = 2**30


@dataclass(frozen=True)
class LabelledData:
    """Inputs in files, read on demand, in the order of files and rows. Inputs count as independent of each other.

    `places` are (file, row); the row of a photo is 0. Shapes: labels (inputs,) int64, None without labels.
    """

    name: str
    places: Sequence[tuple[Path, int]]
    labels: Array | None
    read: Callable[[Path, int], dict[str, Array]]

    def __len__(self) -> int:
        return len(self.places)

    def inputs(self, indices: Iterable[int] | None = None) -> Iterator[dict[str, Array]]:
        """The model's inputs of all places, or of `indices` alone, each as a batch of 1.

        Raises:
            LearningError: a file cannot be used, or holds values that are not finite.
        """
        for index in range(len(self.places)) if indices is None else indices:
            path, row = self.places[index]
            arrays = self.read(path, row)
            for name, array in arrays.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise LearningError(
                        f"{path} holds NaN or infinity in {name}, input {row}",
                        file=str(path),
                        tensor=name,
                        row=row,
                        hint="leave such inputs out, or repair them",
                    )
            yield arrays

    def subset(self, indices: Iterable[int]) -> LabelledData:
        """The data of some inputs."""
        rows = np.fromiter(indices, np.int64)
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, places=[self.places[i] for i in rows], labels=labels)

    def sample(self, count: int, seed: int = 0) -> LabelledData:
        """At most `count` inputs, drawn at random, in their order here."""
        if count >= len(self):
            return self
        return self.subset(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def parts(self, shares: Sequence[float], seed: int = 0) -> list[LabelledData]:
        """Disjoint random parts of about these shares, each in its order here; the last takes the rest."""
        order = np.random.default_rng(seed).permutation(len(self))
        ends = np.round(np.cumsum(shares[:-1]) * len(self)).astype(int)
        return [self.subset(np.sort(part)) for part in np.split(order, ends)]


def open_labelled(
    bundle: Bundle,
    folder: Path,
    classes: ModelClasses | None = None,
    *,
    labels: Path | None = None,
    required: bool = False,
) -> LabelledData:
    """The data set of a folder or a file, all photos or all arrays; files of other kinds are skipped.

    Arrays have a row for each input: (rows, …) where the model takes (batch, …), or (rows, 1, …). `labels` is a file
    for `read_label_file`. Labels are read with `classes` alone; `required` refuses data without.

    Raises:
        LearningError: no usable files, arrays that do not fit the model, or labels that are missing or do not fit.
        CalibrationError: the folder cannot be read, or has no files.
    """
    files = [folder] if folder.is_file() else list_files(folder)
    usable = {path: kind for path in files if path != labels and (kind := file_kind(path))}
    kinds = set(usable.values())
    if len(kinds) != 1:
        raise LearningError(
            f"{folder} holds {'both photos and arrays' if kinds else 'neither photos nor arrays'}",
            source=str(folder),
            files=len(files),
            hint="photos (JPEG, PNG, …), or arrays as .npy or .npz files named after the model's inputs",
        )
    data = _photos(bundle, folder, list(usable)) if kinds == {"photos"} else _rows(bundle, folder, list(usable))
    if classes is None:
        return data
    texts, source = _labels(data, folder, labels)
    # Folders may sort photos by other things than classes: without a name in common nothing is labelled.
    by_folder = labels is None and data.labels is None
    if by_folder and not required and texts and all(classes.index(text) is None for text in texts):
        texts = None
    if texts is None and required:
        raise LearningError(
            f"{folder} has no labels, and this needs the class of each input",
            source=str(folder),
            hint=f"a folder for each class, an array {LABELS!r} in each .npz file, or --labels FILE",
        )
    return replace(data, labels=None if texts is None else classes.indices(texts, source))


def _photos(bundle: Bundle, folder: Path, files: Sequence[Path]) -> LabelledData:
    if bundle.preprocess is None:
        raise LearningError(
            f"{bundle.name} declares no pre-processing of photos, and {folder} holds photos",
            model=bundle.name,
            source=str(folder),
            hint="give arrays: .npy or .npz files named after the model's inputs",
        )
    # Imported late: data of arrays needs no Pillow.
    from isthmus.processing.image import sample_input

    def read(path: Path, row: int) -> dict[str, Array]:
        try:
            return sample_input(bundle, path.read_bytes())
        except (RequestError, ShapeMismatch, OSError) as e:
            raise LearningError(f"{path} cannot be used: {e}", file=str(path)) from e

    return LabelledData(str(folder), [(path, 0) for path in files], None, read)


def _rows(bundle: Bundle, folder: Path, files: Sequence[Path]) -> LabelledData:
    arrays = _ArrayFiles(bundle.inputs)
    places: list[tuple[Path, int]] = []
    labels: list[Array] = []
    for path in files:
        count = arrays.rows(path)
        places += [(path, row) for row in range(count)]
        if (own := arrays.labels(path, count)) is not None:
            labels.append(own)
    if labels and len(labels) < len(files):
        raise LearningError(
            f"{len(labels)} of {len(files)} files in {folder} hold an array {LABELS!r}; all or none is needed",
            source=str(folder),
        )
    return LabelledData(str(folder), places, np.concatenate(labels) if labels else None, arrays.row)


class _ArrayFiles:
    """Files of arrays, cached, and their rows as batches of 1."""

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self._specs = specs
        self._files: dict[Path, dict[str, Array]] = {}

    def rows(self, path: Path) -> int:
        """The inputs in a file; the first is checked against the model."""
        arrays = self._load(path)
        counts = {
            name: array.shape[0] for name, array in arrays.items() if name != LABELS and self._by_row(name, array)
        }
        if len(set(counts.values())) > 1:
            raise LearningError(f"{path} holds different numbers of rows: {counts}", file=str(path), rows=counts)
        count = next(iter(counts.values()), 1)
        try:
            if count:
                check_tensors(self._specs, self.row(path, 0))
        except ShapeMismatch as e:
            raise LearningError(f"{path} does not fit the model: {e}", file=str(path), **e.facts) from e
        return count

    def labels(self, path: Path, count: int) -> Array | None:
        """The labels beside the inputs of a file, if any."""
        labels = self._load(path).get(LABELS)
        if labels is None or LABELS in (spec.name for spec in self._specs):
            return None
        if labels.shape != (count,):
            raise LearningError(
                f"{path} holds {count} inputs, and {LABELS!r} is {labels.dtype} {list(labels.shape)}",
                file=str(path),
                inputs=count,
                hint=f"{LABELS!r} has one whole number for each input",
            )
        return labels

    def row(self, path: Path, row: int) -> dict[str, Array]:
        """The input of a row, as a batch of 1."""
        arrays = {name: array for name, array in self._load(path).items() if self._takes(name)}
        return {name: self._batch(name, array, row) for name, array in arrays.items()}

    def _batch(self, name: str, array: Array, row: int) -> Array:
        if not self._by_row(name, array):
            return array
        # A row of (rows, 1, …) has the batch's axis already.
        return array[row] if array.ndim > self._rank(name) else array[row : row + 1]

    def _takes(self, name: str) -> bool:
        # Arrays of no input stay, so that the check reports their names; labels are no input.
        return name != LABELS or name in (spec.name for spec in self._specs)

    def _rank(self, name: str) -> int:
        return next((len(spec.shape) for spec in self._specs if spec.name == name), 0)

    def _by_row(self, name: str, array: Array) -> bool:
        spec = next((spec for spec in self._specs if spec.name == name), None)
        if spec is None or not spec.shape:
            return False
        # A first axis of a fixed size above 1 is no batch: the input is the same for every row.
        is_batch = isinstance(spec.shape[0], str) or spec.shape[0] == 1
        return array.ndim == len(spec.shape) + 1 or (array.ndim == len(spec.shape) and is_batch)

    def _load(self, path: Path) -> dict[str, Array]:
        if (cached := self._files.get(path)) is not None:
            return cached
        try:
            content = named_arrays(path, self._specs)
        except CalibrationError as e:
            raise LearningError(e.message, hint=e.hint, **e.facts) from e
        # A single file beyond the bound still has to be in memory while its rows are read.
        while self._files and sum(a.nbytes for f in self._files.values() for a in f.values()) > _CACHED_BYTES:
            del self._files[next(iter(self._files))]
        self._files[path] = content
        return content


def _labels(data: LabelledData, folder: Path, file: Path | None) -> tuple[Sequence[object] | None, str]:
    """The labels of all inputs as texts or numbers, None without; and their source, for messages."""
    if file is not None:
        return _from_file(data, folder, file), str(file)
    if data.labels is not None:
        return data.labels.tolist(), f"the array {LABELS!r} in {folder}"
    parents = [path.relative_to(folder).parts[:-1] if path != folder else () for path, _ in data.places]
    return ([parts[0] for parts in parents] if parents and all(parents) else None), f"the folder {folder}"


def _from_file(data: LabelledData, folder: Path, file: Path) -> Sequence[object]:
    labels = read_label_file(file)
    if not isinstance(labels, dict):
        if len(labels) != len(data):
            raise LearningError(
                f"{file} has {len(labels)} labels, and {folder} has {len(data)} inputs",
                labels=len(labels),
                inputs=len(data),
                hint="one label for each input, in the order of files by name and of rows",
            )
        return list(labels)
    # Paths below the folder, or names alone where no two files are of a name.
    names = [path.relative_to(folder).as_posix() if path != folder else path.name for path, _ in data.places]
    texts = [labels.get(name, labels.get(path.name)) for name, (path, _) in zip(names, data.places, strict=True)]
    if missing := [name for name, text in zip(names, texts, strict=True) if text is None]:
        raise LearningError(
            f"{file} has no label of {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            missing=missing[:10],
            hint=f"lines FILE,LABEL with paths below {folder}",
        )
    unknown = labels.keys() - {*names, *(path.name for path, _ in data.places)}
    if unknown:
        raise LearningError(
            f"{file} has a label of {min(unknown)}, which is no input in {folder}", unknown=sorted(unknown)[:10]
        )
    return [text for text in texts if text is not None]
