"""Samples from files: a folder per class, arrays with labels, series of the UCR archive, and tables.

Files of object stores are copied beside the run first, by the registry's stores.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from isthmus.arrays import DTYPES, Array, restore_bfloat16
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import LearningError, RequestError
from isthmus.processing.media import looks_like_image
from isthmus.registry import open_blob_store
from isthmus.settings import RegistrySettings
from isthmus_tools import array_files
from isthmus_tools.calibration.inputs import LABELS, list_files
from isthmus_tools.learning.training.config import DataTable, FileSource
from isthmus_tools.learning.training.samples import RawSample
from isthmus_tools.progress import Progress, silent

# Beside inputs and labels in an .npz file.
_GROUPS = "groups"
# numpy's kinds of dtypes: bool, signed, unsigned, float.
_NUMBERS = frozenset("biuf")
_MISSING_TEXTS = frozenset(("", "?", "na", "nan", "null", "none"))


def read_samples(
    source: FileSource, data: DataTable, folder: Path, settings: RegistrySettings, progress: Progress = silent
) -> Iterator[RawSample]:
    """The samples of a source, in the order of file names; objects of a store are copied below `folder` first.

    Raises:
        LearningError: no samples, no labels, or a file that cannot be read; the message names the file.
        RegistryError: the store does not answer.
    """
    path = Path(source.path)
    if "://" in source.path:
        path = _copied(source.path, folder, settings, data.max_bytes, progress)
    files = [path] if path.is_file() else list_files(path)
    count = 0
    for i, file in enumerate(files):
        progress(f"reading {source.path}", i, len(files))
        for sample in _samples_of(file, path, source, data):
            count += 1
            yield replace(sample, part=source.part)
    if not count:
        raise LearningError(
            f"{source.path} holds no samples of the kind {data.kind} among {len(files)} files",
            source=source.path,
            hint="see [data] in docs/reference/training.md for the files that are read",
        )


def photo_steps(size: Sequence[int]) -> dict[str, object]:
    """The pre-processing of photos, the same in training and in the bundle: pixels of 0 to 255; without its input."""
    return {
        "kind": "image",
        "dtype": "float32",
        "steps": [
            {"op": "resize", "size": list(size), "interpolation": "bilinear"},
            {"op": "layout", "to": "NCHW"},
        ],
    }


def _samples_of(file: Path, root: Path, source: FileSource, data: DataTable) -> Iterator[RawSample]:
    suffix = file.suffix.lower()
    if suffix == ".npz":
        yield from _arrays(file)
    elif suffix == ".ts" and data.kind == "series":
        yield from _archive_series(file)
    elif suffix == ".csv" and data.kind == "table":
        yield from _table(file, source)
    elif (reader := _single_reader(file, data)) is not None:
        label = _folder_label(file, root)
        yield RawSample(reader(file), label, _path_group(file, root, source.group), str(file))


def _single_reader(file: Path, data: DataTable) -> Callable[[Path], Array] | None:
    """The reader of a file with a single sample; None for a file of another kind."""
    if data.kind == "series":
        return {".csv": _readings, ".npy": _one_array}.get(file.suffix.lower())
    if data.kind == "image":
        with file.open("rb") as f:
            is_photo = looks_like_image(f.read(64))
        return (lambda path: _photo(path, data.size)) if is_photo else None
    return None


def _folder_label(file: Path, root: Path) -> str:
    parts = file.relative_to(root).parts if root.is_dir() else ()
    if len(parts) < 2:
        raise LearningError(
            f"{file} has no label: it lies in no folder of a class",
            file=str(file),
            hint=f"move it to {root / 'CLASS' / file.name}, or give .npz files with an array {LABELS!r}",
        )
    return parts[0]


def _path_group(file: Path, root: Path, pattern: str) -> str:
    """The group in a file's path; the file itself without a pattern."""
    name = file.relative_to(root).as_posix() if root.is_dir() else file.name
    if not pattern:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as e:
        raise LearningError(f"the group {pattern!r} is no regular expression: {e}", key="group") from e
    group = None if match is None else match[1] if match.re.groups else match[0]
    if group is None:
        raise LearningError(f"the group {pattern!r} is not in the path {name}", key="group", file=str(file))
    return group


def _arrays(file: Path) -> Iterator[RawSample]:
    """Rows of an .npz file with labels."""
    content = _loaded(file)
    arrays = dict(content) if isinstance(content, Mapping) else {}
    labels, groups = arrays.pop(LABELS, None), arrays.pop(_GROUPS, None)
    if labels is None:
        raise LearningError(
            f"{file} has no labels", file=str(file), hint=f"add an array {LABELS!r} with one for each row"
        )
    if len(arrays) != 1:
        raise LearningError(
            f"{file} holds {', '.join(arrays) or 'nothing'} beside {LABELS!r}; one array of inputs is read",
            file=str(file),
        )
    # Any name: the configuration names the model's input.
    (inputs,) = arrays.values()
    is_numeric = inputs.dtype.kind in _NUMBERS or inputs.dtype == DTYPES["bfloat16"]
    if not is_numeric or inputs.ndim < 2:
        raise LearningError(
            f"{file} holds inputs of {inputs.dtype} {list(inputs.shape)}; they are numbers, a row for each input",
            file=str(file),
        )
    for name, each in ((LABELS, labels), (_GROUPS, groups)):
        if each is not None and each.shape != inputs.shape[:1]:
            found = f"{len(each)} {name}" if each.ndim == 1 else f"{name} of shape {list(each.shape)}"
            raise LearningError(f"{file} holds {len(inputs)} inputs and {found}", file=str(file))
    # Values beyond float32 become infinite, which cleaning takes for missing.
    with np.errstate(over="ignore"):
        rows = inputs.astype(np.float32)
    for i, row in enumerate(rows):
        group = f"{file.name}#{i}" if groups is None else str(groups[i])
        yield RawSample(row, str(labels[i]), group, f"{file}, row {i}")


def _archive_series(file: Path) -> Iterator[RawSample]:
    """Series of a .ts file: a line each, channels between colons, the label last.

    Source: aeon-toolkit.org, "The .ts file format".
    """
    header: dict[str, str] = {}
    number = 0
    for line_number, line in enumerate(_text(file).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("@"):
            key, _, value = line[1:].partition(" ")
            header[key.lower()] = value.strip()
            continue
        if header.get("classlabel", "false").lower().startswith("false"):
            raise LearningError(f"{file} has no class labels", file=str(file), hint="a line: @classLabel true A B")
        if header.get("timestamps", "false").lower() == "true":
            # Time stamps would need resampling.
            raise LearningError(f"{file} has time stamps, which are not read", file=str(file))
        *channels, label = line.split(":")
        place = f"{file}, line {line_number}"
        rows = [_numbers(channel.split(","), place) for channel in channels]
        if len({len(row) for row in rows}) != 1:
            raise LearningError(f"{place} has channels of different length", file=str(file))
        yield RawSample(np.array(rows, np.float32), label.strip(), f"{file.name}#{number}", place)
        number += 1


def _table(file: Path, source: FileSource) -> Iterator[RawSample]:
    """Rows of a CSV file with a header."""
    # In memory: data.max_bytes bounds what is left of it, and texts are a few times larger.
    rows = _csv_rows(file)
    header = [name.strip() for name in rows[0]] if rows else []
    label = source.label or "label"
    for key, column in (("label", label), ("group", source.group)):
        if column and column not in header:
            raise LearningError(
                f"{file} has no column {column}; it has {', '.join(header[:20])}",
                file=str(file),
                key=key,
                hint=f"the key {key} of [[data.sources]] names the column",
            )
    named = [header.index(column) for column in (label, source.group) if column]
    for i, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(header):
            raise LearningError(f"{file}, line {i} has {len(row)} fields of {len(header)}", file=str(file))
        features = _numbers([field for n, field in enumerate(row) if n not in named], f"{file}, line {i}")
        group = row[named[1]] if source.group else f"{file.name}#{i}"
        yield RawSample(np.array(features, np.float32), row[named[0]].strip(), group, f"{file}, line {i}")


def _readings(file: Path) -> Array:
    """A CSV file of readings, a row per time: (channels, samples)."""
    rows = [row for row in _csv_rows(file) if row]
    # Names of the channels may come first.
    if rows and all(_is_name(field) for field in rows[0]):
        rows = rows[1:]
    numbers = [_numbers(row, f"{file}, reading {i}") for i, row in enumerate(rows, 1)]
    if not numbers or len({len(row) for row in numbers}) != 1:
        raise LearningError(f"{file} has no readings, or lines of different length", file=str(file))
    return np.ascontiguousarray(np.array(numbers, np.float32).T)


def _one_array(file: Path) -> Array:
    content = _loaded(file)
    array = np.asarray(content, np.float32) if isinstance(content, np.ndarray) else np.zeros(0, np.float32)
    # A series of a single channel may come without its axis.
    array = array[np.newaxis] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise LearningError(f"{file} is {list(array.shape)}; a series is (channels, samples)", file=str(file))
    return array


def _photo(file: Path, size: Sequence[int]) -> Array:
    # Imported late: series need no Pillow.
    from isthmus.processing.image import MAX_PIXELS, preprocess

    spec = TensorSpec("image", "float32", (1, 3, *size))
    steps = photo_steps(size) | {"input": "image"}
    try:
        batch: Array = preprocess(file.read_bytes(), steps, input=spec, max_pixels=MAX_PIXELS)
    except (RequestError, OSError) as e:
        raise LearningError(f"{file} cannot be used: {e}", file=str(file)) from e
    photo: Array = batch[0]
    return photo


def _loaded(file: Path) -> Array | Mapping[str, Array]:
    try:
        return array_files.read(file)
    except ValueError as e:
        # Labels as texts are no tensors; numpy reads such arrays without executing code.
        if file.suffix.lower() == ".npz":
            return _with_texts(file, e)
        raise LearningError(str(e), file=str(file)) from e


def _with_texts(file: Path, reason: ValueError) -> Mapping[str, Array]:
    try:
        with np.load(file, allow_pickle=False) as loaded:
            return {name: restore_bfloat16(loaded[name]) for name in loaded.files}
    # On broken files numpy raises nearly anything.
    except Exception as e:
        raise LearningError(str(reason), file=str(file)) from e


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise LearningError(f"{file} cannot be read as text: {e}", file=str(file)) from e


def _csv_rows(file: Path) -> list[list[str]]:
    try:
        return list(csv.reader(_text(file).splitlines()))
    except csv.Error as e:  # a field of more than 128 KiB, most likely a quotation mark that nothing ends
        raise LearningError(f"{file} cannot be read as CSV: {e}", file=str(file)) from e


def _numbers(fields: Sequence[str], place: str) -> list[float]:
    numbers = []
    for field in fields:
        text = field.strip()
        try:
            numbers.append(float("nan") if text.lower() in _MISSING_TEXTS else float(text))
        except ValueError as e:
            raise LearningError(f"{place}: {text[:40]!r} is no number", place=place) from e
    return numbers


def _is_name(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip().lower() not in _MISSING_TEXTS
    return False


def _copied(address: str, folder: Path, settings: RegistrySettings, max_bytes: int, progress: Progress) -> Path:
    """The objects below an address as files; copies of an earlier run with the same size stay.

    Raises:
        LearningError: more bytes than `max_bytes`, or a name that leaves the folder.
        RegistryError: the store does not answer, or nothing is there.
    """
    store = open_blob_store(address, replace(settings, registry=address), any_key=True)
    target = folder / "objects" / re.sub(r"[^A-Za-z0-9.-]+", "-", address)
    entries = [entry for entry in store.entries("") if not entry.key.endswith("/")]
    if (total := sum(entry.size for entry in entries)) > max_bytes:
        raise LearningError(
            f"{address} holds {total} bytes, more than data.max_bytes, {max_bytes}", key="data.max_bytes", bytes=total
        )
    for i, entry in enumerate(entries):
        progress(f"copying {address}", i, len(entries))
        path = target / entry.key
        # A stranger may have chosen the keys.
        if not path.resolve().is_relative_to(target.resolve()):
            raise LearningError(f"{address} has the key {entry.key!r}, which is no file's name", source=address)
        if path.is_file() and path.stat().st_size == entry.size:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        # A kill leaves no half copy under the name.
        partial = path.with_name(f".{path.name}.part")
        partial.write_bytes(store.get(entry.key, max_bytes=max(1, entry.size)))
        partial.replace(path)
    return target
