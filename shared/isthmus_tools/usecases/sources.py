"""Model sources and inputs: ONNX files, torch exports, ready models; example inputs for measurements."""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Bundle
from isthmus.errors import ModelError, RequestMalformed
from isthmus_tools.graph.encoder.graph import write as write_encoder
from isthmus_tools.graph.exporting import ModelInputs
from isthmus_tools.graph.formats import export_of
from isthmus_tools.planner.inputs import TrialInput, from_arrays, from_photos, random_inputs
from isthmus_tools.progress import Progress
from isthmus_tools.usecases.language_sources import sentence_encoder
from isthmus_tools.zoo import models as zoo
from isthmus_tools.zoo.photos import read_photo, sample_photos, varied_photos

# Each candidate runs on every example; more examples would take the time of further candidates.
MAX_EXAMPLES = 8
# Each takes two runs of the model for each JPEG quality.
MAX_JPEG_PHOTOS = 64


@contextlib.contextmanager
def onnx_file(model: str, inputs: ModelInputs, progress: Progress) -> Iterator[Path]:
    """The model's ONNX file; models of other formats and ready models get a temporary file for the block.

    Raises:
        ModelError: the export fails.
    """
    encoder = sentence_encoder(model)
    chosen = None if encoder is not None or model in zoo.MODELS else export_of(model)
    if encoder is None and chosen is None and model not in zoo.MODELS:
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        path = Path(folder) / "model.onnx"
        if encoder is not None:
            progress(f"writing the graph of {model}")
            write_encoder(encoder, path)
        elif chosen is None:
            progress(f"reading {model} from its package")
            zoo.zoo_model(model).write(path)
        else:
            framework, export = chosen
            progress(f"exporting {model} from {framework}")
            export(model, path, inputs)
        # Module and exported program refer to each other and hold the weights: without a collection the weights
        # outlive the export.
        gc.collect()
        yield path


def example_requests(
    bundle: Bundle, photos: Sequence[Path], tensors: Mapping[str, Array], *, random: int, samples: bool = False
) -> tuple[str, list[TrialInput]]:
    """The kind of the inputs (photo, tensors or random) and the example requests to measure with.

    Without photos and tensors: the sample photos if `samples` and the model takes photos, else `random` requests of
    noise.

    Raises:
        RequestMalformed: both photos and tensors, or an unreadable file.
        MediaUnsupported: photos for a model that declares no pre-processing.
        ShapeMismatch: tensors of other shapes than the model's inputs.
    """
    if photos and tensors:
        raise RequestMalformed("give photos or tensors to run the model on, not both")
    if samples and not photos and not tensors and bundle.preprocess is not None:
        with contextlib.suppress(ModelError):  # the sample photos are not installed
            photos = sample_photos()
    if tensors:
        kind, requests = "tensors", from_arrays(bundle, [tensors])
    elif photos:
        kind, requests = "photo", from_photos(bundle, [read_photo(path) for path in _sample(photos)])
    else:
        kind, requests = "random", random_inputs(bundle, random)
    # The first stands for all, which were made alike.
    check_tensors(bundle.inputs, requests[0].arrays)
    return kind, requests


def further_photos(bundle: Bundle, photos: Sequence[Path], tensors: Mapping[str, Array]) -> list[bytes]:
    """Photos for shares of agreement, more than the example requests: of `photos`, else those of installed packages.

    Raises:
        RequestMalformed: an unreadable file.
    """
    if tensors or bundle.preprocess is None:
        return []
    if not photos:
        with contextlib.suppress(ModelError):  # the photos are not installed
            return [read_photo(path) for path in varied_photos()]
        return []
    return [read_photo(path) for path in _sample(photos, MAX_JPEG_PHOTOS)]


def _sample(photos: Sequence[Path], most: int = MAX_EXAMPLES) -> list[Path]:
    """At most `most` files, evenly spaced over the files and the folders' files, those of folders in these too."""
    files: list[Path] = []
    for path in photos:
        # Hidden files are the system's: .DS_Store.
        inside = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        files += sorted(inside) if path.is_dir() else [path]
    if not files:
        raise RequestMalformed(f"{photos[0]} holds no files", hint="--input names photos, or folders with photos")
    # Over the whole list: folders are often sorted by class, and the first files would be of a single one.
    return files[:: math.ceil(len(files) / most)]
