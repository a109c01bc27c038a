"""The inputs that candidates are tried with: photos as they came, arrays, or random numbers where there is neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from isthmus.arrays import Array, check_tensors
from isthmus.artifacts.bundle import Bundle
from isthmus.errors import MediaUnsupported
from isthmus.processing.image import MAX_PIXELS, preprocess


@dataclass(frozen=True)
class Example:
    """One request: the model's inputs, and the photo that they were made of, if they were."""

    arrays: Mapping[str, Array]
    photo: bytes | None = None


def from_photos(bundle: Bundle, photos: Iterable[bytes]) -> list[Example]:
    """Requests with photos, as the bundle's `preprocess` makes them into its input.

    Raises:
        MediaUnsupported: the bundle declares no pre-processing, or one of the photos is none.
    """
    spec = bundle.preprocess
    if spec is None:
        raise MediaUnsupported(
            f"{bundle.name} declares no processing of photos", hint="give it tensors: --tensor NAME=FILE.npy"
        )
    taken = next(s for s in bundle.inputs if s.name == spec["input"])
    return [Example({taken.name: preprocess(data, spec, input=taken, max_pixels=MAX_PIXELS)}, data) for data in photos]


def from_arrays(bundle: Bundle, given: Sequence[Mapping[str, Array]]) -> list[Example]:
    """Requests with tensors.

    Raises:
        ShapeMismatch: they are not what the model takes.
    """
    for arrays in given:
        check_tensors(bundle.inputs, arrays)
    return [Example(dict(arrays)) for arrays in given]


def random_examples(bundle: Bundle, count: int, seed: int = 0) -> list[Example]:
    """Requests with noise of the shapes that the bundle's bytes were counted for.

    Floats are normal and whole numbers are 1, since they are indices or counts more often than not; an input that the
    bundle has an example of is that. Such inputs show speeds, and say little of sizes and errors.
    """
    rng = np.random.default_rng(seed)
    shapes: Mapping[str, Sequence[int]] = bundle.source.get("bind", {})
    known: Mapping[str, Mapping[str, Any]] = bundle.source.get("examples", {})
    made = []
    for _ in range(count):
        arrays: dict[str, Array] = {}
        for spec in bundle.inputs:
            if spec.name in known:
                arrays[spec.name] = np.asarray(known[spec.name]["value"], np.dtype(known[spec.name]["dtype"]))
                continue
            shape = tuple(shapes.get(spec.name) or (n if isinstance(n, int) else 1 for n in spec.shape))
            arrays[spec.name] = _noise(rng, spec.dtype, shape)
        made.append(Example(arrays))
    return made


def _noise(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    wanted = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    if wanted.kind in "iub":
        return np.ones(shape, wanted)
    return rng.standard_normal(shape).astype(wanted)
