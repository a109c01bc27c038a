"""EfficientNet-Lite0 on parts of real photos: the network and the inputs that most goals speak of."""

from __future__ import annotations

from codec_models import Subject, by_class, real

from isthmus.bundle import TensorSpec
from isthmus.calibration.inputs import Photos, split
from isthmus.cli.photos import varied_photos
from isthmus.graph import zoo

CUTS = ("31", "65")
"""After 33% and 69% of the multiply-accumulates: 15,680 and 9,408 values."""


def efficientnet(quick: bool) -> Subject:
    """Half of the photos calibrate, parts of the other half are scored."""
    calibrating, held_out = (60, 60) if quick else (200, 1000)
    entry = zoo.entry("efficientnet-lite0")
    source = Photos(entry.preprocess or {}, TensorSpec("image", "float32", (1, 3, 224, 224)), "photos", varied_photos())
    learning, scored = split(source, len(source.files))
    measure, judge = by_class("logits")
    return Subject(
        "EfficientNet-Lite0",
        real.REAL["efficientnet-lite0"].path(),
        CUTS,
        measure,
        judge,
        lambda: source.examples(learning, calibrating),
        lambda: source.examples(scored, held_out),
        (calibrating, held_out),
        "error of logits",
        preprocess=entry.preprocess,
    )
