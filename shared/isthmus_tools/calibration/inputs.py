"""Inputs for calibration: photos or arrays in files, read on demand."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import CalibrationError, RequestError, ShapeMismatch
from isthmus.processing.media import looks_like_image
from isthmus_tools import array_files

# Ends the listing of a wrong folder, such as a home directory.
MAX_FILES = 100_000
MIN_INPUTS = 16
"""Half of the inputs calibrate; agreement measured on fewer than the other eight would say next to nothing."""

LABELS = "labels"
"""The array with classes beside the inputs in .npz files."""

# Smaller crops would often leave the subject of a photo out.
_MIN_CROP = 0.4


@dataclass(frozen=True)
class CalibrationInput:
    """An input of the model; inputs of the same `group`, a file, are alike and stay on the same side of the split."""

    group: str
    arrays: dict[str, Array]


class InputSource(Protocol):
    """A data set for calibration."""

    name: str
    """The data set's name in fidelity documents."""
    method: str
    """How inputs are derived from a file, and how many."""
    files: Sequence[Path]
    """Each file is a group."""

    def examples(self, files: Sequence[Path], count: int) -> Iterator[CalibrationInput]:
        """About `count` inputs from `files`, the same in every call, read on demand."""
        ...


def open_source(bundle: Bundle, files: Sequence[Path], name: str, count: int, seed: int = 0) -> InputSource:
    """The data set of `files`, all photos or all arrays; other files are skipped.

    Raises:
        CalibrationError: neither kind, both, too few files, or photos for a model without pre-processing.
    """
    usable = [(path, kind) for path in files if (kind := file_kind(path))]
    kinds = {kind for _, kind in usable}
    paths = [path for path, _ in usable]
    if len(kinds) != 1 or len(paths) < 2:
        content = "both photos and arrays" if len(kinds) > 1 else f"{len(paths)} photos or arrays"
        raise CalibrationError(
            f"{name} holds {content} among {len(files)} files; two files of one kind are the least",
            source=name,
            files=len(files),
            usable=len(paths),
            hint="photos (JPEG, PNG, …), or arrays as .npy or .npz files named after the model's inputs",
        )
    if kinds == {"arrays"}:
        return ArraySource(bundle.inputs, name, paths)
    if bundle.preprocess is None:
        raise CalibrationError(
            f"{bundle.name} declares no pre-processing of photos, and {name} holds photos",
            model=bundle.name,
            source=name,
            hint="give arrays: .npy or .npz files named after the model's inputs",
        )
    from isthmus.processing.image import sample_input

    return PhotoSource(lambda photo: sample_input(bundle, photo), name, paths, count, seed)


def list_files(folder: Path) -> list[Path]:
    """The files below a folder by name, hidden ones left out.

    Raises:
        CalibrationError: no folder with files, or more than MAX_FILES files.
    """
    try:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    except OSError as e:
        raise CalibrationError(f"{folder} cannot be read: {e.strerror}", source=str(folder)) from e
    if not folder.is_dir() or not files:
        hint = "of a language model's text the option is --text FILE" if folder.is_file() else ""
        raise CalibrationError(f"{folder} is no folder with files in it", source=str(folder), hint=hint)
    if len(files) > MAX_FILES:
        raise CalibrationError(f"{folder} holds more than {MAX_FILES} files", source=str(folder), limit=MAX_FILES)
    return files


def split(source: InputSource, count: int, seed: int = 0) -> tuple[list[Path], list[Path]]:
    """Random halves of the files: calibrating and held out, so that no file is on both sides."""
    files = [source.files[i] for i in np.random.default_rng(seed).permutation(len(source.files))]
    files = files[: max(2, count)]
    half = len(files) // 2
    return files[:half], files[half:]


class PhotoSource:
    """Photos after pre-processing: each whole, then random crops, about half of them mirrored.

    `to_input` makes the model's input of a photo's bytes, as `processing.image.sample_input`.
    """

    def __init__(
        self,
        to_input: Callable[[bytes], dict[str, Array]],
        name: str,
        files: Sequence[Path],
        count: int = 0,
        seed: int = 0,
    ) -> None:
        self.name, self.files = name, files
        self._to_input, self._seed = to_input, seed
        each = max(1, -(-count // len(files)))
        self.method = (
            "one of each file"
            if each == 1
            else f"up to {each} of each file: all of it, then parts of {_MIN_CROP:.0%} of its sides or more"
        )

    def examples(self, files: Sequence[Path], count: int) -> Iterator[CalibrationInput]:
        """See `InputSource.examples`."""
        from isthmus.processing.image_decoding import MAX_PIXELS, decode

        for i, path in enumerate(files):
            crops = count // len(files) + (i < count % len(files))
            if not crops:
                continue
            # By the file's name: crops must not depend on the files beside.
            rng = np.random.default_rng([self._seed, *path.name.encode()])
            try:
                photo = decode(path.read_bytes(), max_pixels=MAX_PIXELS)
                for n in range(crops):
                    # As a lossless file: pre-processing starts from a file's bytes.
                    data = io.BytesIO()
                    (photo if n == 0 else _random_crop(photo, rng)).save(data, "BMP")
                    yield CalibrationInput(str(path), self._to_input(data.getvalue()))
            except (RequestError, ShapeMismatch, OSError) as e:
                raise CalibrationError(f"{path} cannot be used: {e}", file=str(path)) from e


class ArraySource:
    """Arrays in files: .npz by the inputs' names, .npy for a model of a single input; a further axis counts inputs."""

    method = "one of each row, or of each file"

    def __init__(self, specs: tuple[TensorSpec, ...], name: str, files: Sequence[Path]) -> None:
        self.name, self.files = name, files
        self._specs = specs

    def examples(self, files: Sequence[Path], count: int) -> Iterator[CalibrationInput]:
        """See `InputSource.examples`; fewer where the files hold fewer."""
        each = -(-count // len(files))
        remaining = count
        for path in files:
            for arrays in self._rows(path, min(each, remaining)):
                remaining -= 1
                yield CalibrationInput(str(path), arrays)

    def _rows(self, path: Path, limit: int) -> Iterator[dict[str, Array]]:
        loaded = named_arrays(path, self._specs)
        # Labels beside the inputs are for learning.
        if LABELS not in (spec.name for spec in self._specs):
            loaded.pop(LABELS, None)
        stacked = {s.name: loaded[s.name].ndim == len(s.shape) + 1 for s in self._specs if s.name in loaded}
        rows = {loaded[name].shape[0] for name, is_stack in stacked.items() if is_stack}
        if len(rows) > 1:
            raise CalibrationError(f"{path} holds {sorted(rows)} rows of its arrays", file=str(path), rows=sorted(rows))
        for i in range(min(limit, rows.pop()) if rows else 1):
            arrays = {name: array[i] if stacked.get(name) else array for name, array in loaded.items()}
            try:
                check_tensors(self._specs, arrays)
            except ShapeMismatch as e:
                raise CalibrationError(f"{path} does not fit the model: {e}", file=str(path), **e.facts) from e
            yield arrays


def named_arrays(path: Path, specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """The arrays of a file by name; the single array of an .npy file has the name of the model's only input.

    Raises:
        CalibrationError: unreadable, or a single array for a model of several inputs.
    """
    try:
        loaded = array_files.read(path)
    except ValueError as e:
        raise CalibrationError(f"{e}", file=str(path)) from e
    if isinstance(loaded, Mapping):
        return dict(loaded)
    if len(specs) != 1:
        raise CalibrationError(
            f"{path} holds one array, and the model takes {', '.join(s.name for s in specs)}",
            file=str(path),
            hint="write them to one .npz file under those names",
        )
    return {specs[0].name: loaded}


def file_kind(path: Path) -> str:
    """`arrays` or `photos`; empty for any other file."""
    if path.suffix in (".npy", ".npz"):
        return "arrays"
    try:
        with path.open("rb") as file:
            return "photos" if looks_like_image(file.read(64)) else ""
    except OSError:
        return ""


def _random_crop(photo: Any, rng: np.random.Generator) -> Any:
    """A random part of a photo with its aspect ratio, mirrored half of the time."""
    share = rng.uniform(_MIN_CROP, 1.0)
    width, height = max(1, round(photo.width * share)), max(1, round(photo.height * share))
    x, y = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
    part = photo.crop((x, y, x + width, y + height))
    return part.transpose(0) if rng.random() < 0.5 else part  # 0 is Pillow's FLIP_LEFT_RIGHT
