"""Inputs for the evaluation of candidates: photos with the arrays made of them, arrays, or random numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Bundle
from isthmus.processing.image import sample_input

_PREPROCESS_RUNS = 3


@dataclass(frozen=True)
class TrialInput:
    """The model's inputs of one request, and the photo before pre-processing, if any."""

    arrays: Mapping[str, Array]
    photo: bytes | None = None


def from_photos(bundle: Bundle, photos: Iterable[bytes]) -> list[TrialInput]:
    """Requests with photos.

    Raises:
        MediaUnsupported: as `sample_input`.
    """
    return [TrialInput(sample_input(bundle, photo), photo) for photo in photos]


def preprocess_seconds(bundle: Bundle, inputs: Sequence[TrialInput]) -> float:
    """Seconds here from a photo to the model's input, the median over the photos; 0 where requests hold tensors."""
    photos = [i.photo for i in inputs if i.photo is not None]
    return statistics.median(least_seconds(partial(sample_input, bundle, p)) for p in photos) if photos else 0.0


def least_seconds(work: Callable[[], object]) -> float:
    """The least seconds of a few runs, since the machine may be busy."""
    tries = []
    for _ in range(_PREPROCESS_RUNS):
        start = time.perf_counter()
        work()
        tries.append(time.perf_counter() - start)
    return min(tries)


def from_arrays(bundle: Bundle, requests: Sequence[Mapping[str, Array]]) -> list[TrialInput]:
    """Requests with tensors.

    Raises:
        ShapeMismatch: names, dtypes or shapes differ from the model's inputs.
    """
    for arrays in requests:
        check_tensors(bundle.inputs, arrays)
    return [TrialInput(dict(arrays)) for arrays in requests]


def random_inputs(bundle: Bundle, count: int, seed: int = 0) -> list[TrialInput]:
    """Requests with noise, in the shapes for which the bundle counted bytes.

    Floats are normally distributed. Integers are 1: most are indices or counts, and larger values may be out of range.
    The bundle's stored example of an input goes first. Random inputs show speeds, and little of sizes and errors.
    """
    rng = np.random.default_rng(seed)
    shapes: Mapping[str, Sequence[int]] = bundle.source.get("bind", {})
    stored: Mapping[str, Mapping[str, Any]] = bundle.source.get("examples", {})
    requests = []
    for _ in range(count):
        arrays: dict[str, Array] = {}
        for spec in bundle.inputs:
            if spec.name in stored:
                arrays[spec.name] = np.asarray(stored[spec.name]["value"], np.dtype(stored[spec.name]["dtype"]))
                continue
            shape = tuple(shapes.get(spec.name) or (n if isinstance(n, int) else 1 for n in spec.shape))
            arrays[spec.name] = _noise(rng, spec.dtype, shape)
        requests.append(TrialInput(arrays))
    return requests


def _noise(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    # numpy knows no bfloat16 by name.
    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    if numpy_dtype.kind in "iub":
        return np.ones(shape, numpy_dtype)
    return rng.standard_normal(shape).astype(numpy_dtype)
