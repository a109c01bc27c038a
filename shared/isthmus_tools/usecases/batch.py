"""Batch: photos of files and folders to a file of JSON lines; a later run continues the file.

The file is append-only. A line is written after its prediction, so a killed run leaves at most an incomplete last line,
and the next run removes that line.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import stamina

from isthmus.client import Client
from isthmus.errors import (
    HopBusy,
    HopUnavailable,
    ImageMalformed,
    IsthmusError,
    MediaUnsupported,
    NotReady,
    Overloaded,
    RequestMalformed,
    RequestTooLarge,
)
from isthmus.processing.image_spec import photos_refused
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.local_model import LocalModel
from isthmus_tools.zoo.photos import photo_files, read_photo

Predict: TypeAlias = Callable[[Sequence[bytes]], list[dict[str, Any]]]
"""Predictions for photos, in order: each the document of a prediction, or of the error that the photo caused."""

# Photos of one request: few enough for the router's deadline of 20 s on a slow edge, and for its bound on a body.
MAX_PHOTOS, MAX_BYTES = 8, 16 * 2**20
# Requests to a busy or restarting router are repeated for this long; a longer outage ends the run.
_RETRY_S = 120.0
_PHOTO_ERRORS = (ImageMalformed, MediaUnsupported, RequestTooLarge)
_BUSY = (HopBusy, NotReady, Overloaded)


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """Photos to classify: `photos` are files, and the files of folders in the order of their names.

    `output` is the file of JSON lines. Each line has `photo`, the path as given, and a prediction's document or an
    error's.
    """

    photos: Sequence[Path]
    output: Path
    predict: Predict


@dataclass(frozen=True)
class BatchResult:
    """Photos by outcome: classified and failed in this run, and skipped for a line of an earlier run.

    `errors` counts lines with an error by the error's type, of earlier runs too.
    """

    classified: int
    failed: int
    skipped: int
    errors: Mapping[str, int] = field(default_factory=dict)


def classify_photos(request: BatchRequest, progress: Progress = silent) -> BatchResult:
    """Append a line to the output for each photo without a line.

    Raises:
        RequestMalformed: a path does not exist, a folder has no files, or the output holds other lines, belongs to
            another running run, or holds results of another model or version.
        IsthmusError: of the model or the router; written lines stay, and the next run continues after these lines.
    """
    if missing := [path for path in request.photos if not path.exists()]:
        raise RequestMalformed(f"{missing[0]} cannot be read: there is no such file", path=str(missing[0]))
    paths = list(dict.fromkeys(photo_files(request.photos)))
    with _output(request.output) as file:
        previous = _read_lines(file, request.output)
        models = {_model_of(line) for line in previous.values()} - {None}
        given = set(map(str, paths))
        remaining = [path for path in paths if str(path) not in previous]
        classified = failed = 0
        errors = Counter(
            str(line.get("type", "unknown")) for photo, line in previous.items() if "error" in line and photo in given
        )
        for chunk in _chunks(remaining):
            lines = _classify(chunk, request.predict)
            models |= {_model_of(line) for line in lines} - {None}
            if len(models) > 1:
                raise _two_models(request.output, sorted(str(model) for model in models))
            file.write(b"".join(map(_encoded, lines)))
            # Before the progress is shown: a run that is killed has kept the photos that it counted.
            file.flush()
            new = Counter(str(line.get("type", "unknown")) for line in lines if "error" in line)
            errors += new
            failed, classified = failed + new.total(), classified + len(lines) - new.total()
            progress(f"classifying {len(remaining)} photos", classified + failed, len(remaining))
    return BatchResult(classified, failed, len(paths) - len(remaining), dict(errors))


def remote_predictor(client: Client, model: str, top_k: int | None) -> Predict:
    """Predictions by a router; requests are repeated while the router is busy, and fail at once if never reached."""
    reached = False

    def is_transient(error: Exception) -> bool:
        return isinstance(error, _BUSY) or (reached and isinstance(error, HopUnavailable))

    def predict(photos: Sequence[bytes]) -> list[dict[str, Any]]:
        nonlocal reached
        for attempt in stamina.retry_context(
            on=is_transient, attempts=None, timeout=_RETRY_S, wait_initial=0.5, wait_max=10.0
        ):
            with attempt:
                predictions = client.photos(photos, model=model, top_k=top_k)
        reached = True
        return predictions

    return predict


def local_predictor(model: LocalModel, top_k: int | None, timeout_s: float) -> Predict:
    """Predictions by this process.

    Raises:
        MediaUnsupported: the model declares no processing of photos.
    """
    check_takes_photos(model)

    def predict_one(photo: bytes) -> dict[str, Any]:
        try:
            return model.photo(photo, top_k, timeout_s)
        except _PHOTO_ERRORS as e:
            return e.document()

    return lambda photos: [predict_one(photo) for photo in photos]


def check_takes_photos(model: LocalModel) -> None:
    """Check that a model classifies photos.

    Raises:
        MediaUnsupported: the model declares no processing of photos.
    """
    bundle = model.model.bundle
    if bundle.preprocess is None or bundle.postprocess is None:
        raise photos_refused(bundle, "declares no pre- and post-processing for photos", "give it tensors")


def _classify(chunk: Sequence[tuple[Path, bytes | IsthmusError]], predict: Predict) -> list[dict[str, Any]]:
    """The lines of a chunk, by a single request; a request that is too large is divided into its photos."""
    photos = [data for _, data in chunk if isinstance(data, bytes)]
    try:
        predictions = iter(predict(photos) if photos else [])
    except RequestTooLarge as e:
        if len(photos) > 1:
            return [line for each in chunk for line in _classify([each], predict)]
        predictions = iter([e.document()])
    lines = []
    for path, data in chunk:
        document = next(predictions) if isinstance(data, bytes) else data.document()
        lines.append({"photo": str(path), **document})
    return lines


def _chunks(paths: Sequence[Path]) -> Iterator[list[tuple[Path, bytes | IsthmusError]]]:
    """Photos as bytes, or the error of reading a file; a chunk has MAX_PHOTOS and MAX_BYTES at most, or one photo."""
    chunk: list[tuple[Path, bytes | IsthmusError]] = []
    size = 0
    for path in paths:
        data = _bytes_or_error(path)
        length = len(data) if isinstance(data, bytes) else 0
        if chunk and (len(chunk) == MAX_PHOTOS or size + length > MAX_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append((path, data))
        size += length
    if chunk:
        yield chunk


def _bytes_or_error(path: Path) -> bytes | IsthmusError:
    try:
        return read_photo(path)
    except RequestMalformed as e:
        return e


@contextmanager
def _output(path: Path) -> Iterator[BinaryIO]:
    """The file opened for reading and appending; a second run is refused."""
    with path.open("a+b") as file:
        try:
            # Two runs at a time would classify the same photos and mix their lines.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise RequestMalformed(f"another run writes to {path}", path=str(path), hint="wait for its end") from e
        yield file


def _read_lines(file: BinaryIO, path: Path) -> dict[str, Mapping[str, Any]]:
    """The lines by photo; the incomplete last line of a killed run is removed."""
    lines: dict[str, Mapping[str, Any]] = {}
    complete = 0
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        try:
            document = json.loads(line)
            lines[document["photo"]] = document
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise RequestMalformed(
                f"{path} line {number} is no result of a photo",
                path=str(path),
                line=number,
                hint="name another file, or remove that line",
            ) from e
        complete += len(line)
    if complete < file.seek(0, os.SEEK_END):
        file.truncate(complete)
    return lines


def _encoded(line: Mapping[str, Any]) -> bytes:
    """A line of the file; file names that are no UTF-8 are escaped."""
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(line).encode() + b"\n"


def _model_of(line: Mapping[str, Any]) -> str | None:
    return f"{line['model_name']}:{line.get('model_version')}" if "model_name" in line else None


def _two_models(path: Path, models: Sequence[str]) -> RequestMalformed:
    return RequestMalformed(
        f"{path} would hold results of {' and '.join(models)}",
        path=str(path),
        models=list(models),
        hint="name another file, or the version that made this one: --model NAME:VERSION",
    )
