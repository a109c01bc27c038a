"""EfficientNet-Lite0 on parts of real photos: the network and the inputs that most goals speak of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from codec_models import Fold, Subject, by_class, real

from isthmus.arrays import Array
from isthmus.artifacts.tensors import TensorSpec
from isthmus.processing.image import MAX_PIXELS, preprocess
from isthmus_tools.calibration.inputs import CalibrationInput, PhotoSource
from isthmus_tools.zoo import models as zoo
from isthmus_tools.zoo.photos import varied_photos

CUTS = ("31", "65")
"""After 33% and 69% of the multiply-accumulates: 15,680 and 9,408 values."""
FOLDS = 4


def same_photos(quick: bool) -> Subject:
    """Parts of all photos calibrate, other parts of the same photos are scored."""
    source, learned, scored = _photos(), 64 if quick else 200, 64 if quick else 1000
    each = (learned + scored) // len(source.files)
    of_each = learned // len(source.files)

    def parts(calibrating: bool) -> list[CalibrationInput]:
        every = source.examples(source.files, each * len(source.files))
        return [e for i, e in enumerate(every) if (i % each < of_each) == calibrating]

    counts = (of_each * len(source.files), (each - of_each) * len(source.files))
    fold = Fold(lambda: iter(parts(True)), lambda: iter(parts(False)), counts)
    return _subject("EfficientNet-Lite0, other parts of the same photos", [fold])


def other_photos(quick: bool) -> Subject:
    """Parts of every photo are scored with tables that were learned from twelve others."""
    source, learned, scored = _photos(), 60 if quick else 200, 64 if quick else 1000
    files = [source.files[i] for i in np.random.default_rng(0).permutation(len(source.files))]
    folds = []
    for n in range(2 if quick else FOLDS):
        held: Sequence[Path] = files[n :: 2 if quick else FOLDS]
        others = [f for f in files if f not in held]
        count = scored * len(held) // len(files)
        folds.append(
            Fold(partial(source.examples, others, learned), partial(source.examples, held, count), (learned, count))
        )
    return _subject("EfficientNet-Lite0, photos that did not calibrate", folds)


def _photos() -> PhotoSource:
    entry = zoo.zoo_model("efficientnet-lite0")
    taken = TensorSpec("image", "float32", (1, 3, 224, 224))
    spec = entry.preprocess or {}

    def to_input(photo: bytes) -> dict[str, Array]:
        return {taken.name: preprocess(photo, spec, input=taken, max_pixels=MAX_PIXELS)}

    return PhotoSource(to_input, "photos", varied_photos())


def _subject(name: str, folds: Sequence[Fold]) -> Subject:
    measure, judge = by_class("logits")
    path, preprocess = real.REAL["efficientnet-lite0"].path(), zoo.zoo_model("efficientnet-lite0").preprocess
    return Subject(name, path, CUTS, measure, judge, folds, "error of logits", preprocess=preprocess)
