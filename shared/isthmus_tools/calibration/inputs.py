"""Inputs to calibrate and score with: photos or arrays in a folder, read one at a time, never all at once."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
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

MAX_FILES = 100_000
LEAST = 16
"""Inputs below which nothing is measured: half of them calibrate, and eight say little about a share of 99%."""

_MIN_CROP = 0.4


@dataclass(frozen=True)
class Example:
    """One input of the model; those of one `group` (a file) are alike, and never on both sides of the split."""

    group: str
    arrays: dict[str, Array]


class Source(Protocol):
    """Where inputs come from."""

    @property
    def name(self) -> str:
        """What documents call it."""
        ...

    @property
    def made(self) -> str:
        """How many inputs come of one file, and how."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files, each a group."""
        ...

    def examples(self, files: Sequence[Path], count: int) -> Iterator[Example]:
        """About `count` inputs from `files`, the same ones each time, read as they are asked for."""
        ...


def open_source(bundle: Bundle, files: Sequence[Path], name: str, count: int, seed: int = 0) -> Source:
    """The source that `files` are: all photos, or all arrays.

    Raises:
        CalibrationError: neither, both, too few, or photos for a model that takes none.
    """
    usable = [(path, kind) for path in files if (kind := _kind(path))]
    kinds = {kind for _, kind in usable}
    paths = [path for path, _ in usable]
    if len(kinds) != 1 or len(paths) < 2:
        what = "both photos and arrays" if len(kinds) > 1 else f"{len(paths)} photos or arrays"
        raise CalibrationError(
            f"{name} holds {what} among {len(files)} files; two files of one kind are the least",
            source=name,
            files=len(files),
            usable=len(paths),
            hint="photos (JPEG, PNG, …), or arrays as .npy or .npz files named after the model's inputs",
        )
    if kinds == {"arrays"}:
        return Arrays(bundle, name, paths)
    if bundle.preprocess is None:
        raise CalibrationError(
            f"{bundle.name} declares no pre-processing of photos, and {name} holds photos",
            model=bundle.name,
            source=name,
            hint="give arrays: .npy or .npz files named after the model's inputs",
        )
    taken = next(s for s in bundle.inputs if s.name == bundle.preprocess["input"])
    return Photos(bundle.preprocess, taken, name, paths, count, seed)


def files_in(folder: Path) -> list[Path]:
    """The files of a folder, hidden ones left out, by name.

    Raises:
        CalibrationError: no such folder, or it holds too many files.
    """
    try:
        found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    except OSError as e:
        raise CalibrationError(f"{folder} cannot be read: {e.strerror}", source=str(folder)) from e
    if not folder.is_dir() or not found:
        raise CalibrationError(f"{folder} is no folder with files in it", source=str(folder))
    if len(found) > MAX_FILES:
        raise CalibrationError(f"{folder} holds more than {MAX_FILES} files", source=str(folder), limit=MAX_FILES)
    return found


def split(source: Source, count: int, seed: int = 0) -> tuple[list[Path], list[Path]]:
    """The files that calibrate and those held out: one half each, drawn by `seed`, so that no file is on both sides."""
    files = [source.files[i] for i in np.random.default_rng(seed).permutation(len(source.files))]
    files = files[: max(2, count)]
    half = len(files) // 2
    return files[:half], files[half:]


class Photos:
    """Photos through the bundle's pre-processing: each whole, then random parts of it, about half of them mirrored."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        taken: TensorSpec,
        name: str,
        files: Sequence[Path],
        count: int = 0,
        seed: int = 0,
    ) -> None:
        self.name, self.files = name, files
        self._spec, self._input, self._seed = spec, taken, seed
        each = max(1, -(-count // len(files)))
        self.made = (
            "one of each file"
            if each == 1
            else f"up to {each} of each file: all of it, then parts of {_MIN_CROP:.0%} of its sides or more"
        )

    def examples(self, files: Sequence[Path], count: int) -> Iterator[Example]:
        """See `Source.examples`."""
        from isthmus.processing.image import MAX_PIXELS, decode, preprocess  # Pillow, on use

        for i, path in enumerate(files):
            number = count // len(files) + (i < count % len(files))
            if not number:
                continue
            rng = np.random.default_rng([self._seed, *path.name.encode()])
            try:
                photo = decode(path.read_bytes(), max_pixels=MAX_PIXELS)
                for n in range(number):
                    # As a bitmap, since pre-processing starts from a file's bytes.
                    data = io.BytesIO()
                    (photo if n == 0 else _part(photo, rng)).save(data, "BMP")
                    array = preprocess(data.getvalue(), self._spec, input=self._input, max_pixels=MAX_PIXELS)
                    yield Example(str(path), {self._input.name: array})
            except (RequestError, ShapeMismatch, OSError) as e:
                raise CalibrationError(f"{path} cannot be used: {e}", file=str(path)) from e


class Arrays:
    """Arrays in files: .npz by the inputs' names, .npy for a model of one input; one axis more counts inputs."""

    made = "one of each row, or of each file"

    def __init__(self, bundle: Bundle, name: str, files: Sequence[Path]) -> None:
        self.name, self.files = name, files
        self._specs = bundle.inputs

    def examples(self, files: Sequence[Path], count: int) -> Iterator[Example]:
        """See `Source.examples`; fewer where the files hold fewer."""
        each = -(-count // len(files))
        left = count
        for path in files:
            for arrays in self._rows(path, min(each, left)):
                left -= 1
                yield Example(str(path), arrays)

    def _rows(self, path: Path, most: int) -> Iterator[dict[str, Array]]:
        found = _load(path, self._specs)
        stacked = {s.name: found[s.name].ndim == len(s.shape) + 1 for s in self._specs if s.name in found}
        rows = {found[name].shape[0] for name, is_stack in stacked.items() if is_stack}
        if len(rows) > 1:
            raise CalibrationError(f"{path} holds {sorted(rows)} rows of its arrays", file=str(path), rows=sorted(rows))
        for i in range(min(most, rows.pop()) if rows else 1):
            arrays = {name: array[i] if stacked.get(name) else array for name, array in found.items()}
            try:
                check_tensors(self._specs, arrays)
            except ShapeMismatch as e:
                raise CalibrationError(f"{path} does not fit the model: {e}", file=str(path), **e.facts) from e
            yield arrays


def _load(path: Path, specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
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


def _kind(path: Path) -> str:
    if path.suffix in (".npy", ".npz"):
        return "arrays"
    try:
        with path.open("rb") as file:
            return "photos" if looks_like_image(file.read(64)) else ""
    except OSError:
        return ""


def _part(photo: Any, rng: np.random.Generator) -> Any:
    """A random part of a photo, of its own aspect, mirrored half of the time."""
    share = rng.uniform(_MIN_CROP, 1.0)
    width, height = max(1, round(photo.width * share)), max(1, round(photo.height * share))
    left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
    part = photo.crop((left, top, left + width, top + height))
    return part.transpose(0) if rng.random() < 0.5 else part  # 0: left and right change places
