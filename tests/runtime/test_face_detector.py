"""Face detectors in onnxruntime: the ready one on a real photo, and graphs that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from isthmus.artifacts.bundle import Blob
from isthmus.artifacts.redaction import FaceBlur, Redaction
from isthmus.errors import ModelError, RunFailed
from isthmus.processing.photo_redaction import PhotoRedactor
from isthmus.runtime.face_detector import OrtFaceDetector
from isthmus_tools.graph.face_detector import centerface
from isthmus_tools.zoo.models import FACE_DETECTOR
from support.face_detectors import fixed_detector

PHOTOS = Path(skimage.__file__).parent / "data"
# Of the astronaut's face: from hair to chin, from ear to ear.
EYES = (205, 95, 245, 125)


@pytest.fixture(scope="module")
def redactor() -> PhotoRedactor:
    blur = FaceBlur(Blob("sha256:" + "0" * 64, 1))
    return PhotoRedactor(Redaction(faces=blur), OrtFaceDetector(centerface(FACE_DETECTOR.path, 320), 1))


def test_the_ready_detector_blurs_a_real_face_and_no_cat(redactor: PhotoRedactor) -> None:
    for name, faces in (("astronaut.png", 1), ("chelsea.png", 0)):
        before = Image.open(PHOTOS / name).convert("RGB")
        after, counts = before.copy(), dict[str, int]()
        redactor.counting(counts).redact(after)
        assert counts == {"redacted_faces": faces}
        assert (before.tobytes() == after.tobytes()) == (not faces)
        if faces:
            sharp, blurred = (np.asarray(p.crop(EYES).convert("L"), np.float64) for p in (before, after))
            assert np.abs(np.diff(blurred, axis=1)).max() < 0.2 * np.abs(np.diff(sharp, axis=1)).max()
            outside = (0, 250, 512, 512)
            assert before.crop(outside).tobytes() == after.crop(outside).tobytes()


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (b"nonsense", "cannot be loaded"),
        (fixed_detector([[0, 0, 1, 1]], [1], side=2000), "2000 pixels"),
        (fixed_detector([[0, 0, 1, 1]], [1]).replace(b"scores", b"xcores"), "other inputs or outputs"),
    ],
    ids=["no graph", "a large side", "other outputs"],
)
def test_a_graph_that_is_no_detector_is_refused(graph: bytes, reason: str) -> None:
    with pytest.raises(RunFailed, match=reason):
        OrtFaceDetector(graph, 1)


@pytest.mark.parametrize(
    ("boxes", "scores"),
    [([[0, 0, 1, 1]], [float("nan")]), ([[0, 0, 1, 1], [0, 0, 1, 1]], [0.5])],
    ids=["no number", "fewer scores"],
)
def test_results_that_cannot_be_read_are_no_absence_of_faces(boxes: list[list[float]], scores: list[float]) -> None:
    with pytest.raises(RunFailed):
        OrtFaceDetector(fixed_detector(boxes, scores), 1).boxes(np.zeros((1, 3, 64, 64), np.float32))


def test_another_graph_is_not_taken_for_centerface(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(fixed_detector([[0, 0, 1, 1]], [1]))
    with pytest.raises(ModelError, match="not the graph of CenterFace"):
        centerface(path, 320)
    with pytest.raises(ModelError, match="multiple of 32"):
        centerface(path, 300)
